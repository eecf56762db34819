"""The cache holds what was appended, through growth, and summaries of exactly the complete chunks."""

import pytest
import torch

from dashbench.kernels.cache import DashCache
from dashbench.kernels.decode import decode_attention
from dashbench.kernels.reference import DashOptions, dash_attention, summarize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    topics = 3 * torch.randn(2, 2, -(-tokens // 16), 64, generator=generator)
    key = topics.repeat_interleave(16, 2)[:, :, :tokens] + torch.randn(2, 2, tokens, 64, generator=generator)
    value = torch.randn(2, 2, tokens, 64, generator=generator)
    query = torch.randn(2, 4, tokens, 64, generator=generator)
    bar = 0.3 * torch.randn(2, 64, generator=generator)
    return tuple(x.to(DEVICE) for x in (query, key, value, bar))


def cache_of(capacity):
    return DashCache(2, 2, 64, 16, capacity, torch.float32, DEVICE)


def test_growth_keeps_tokens_and_summaries():
    _, key, value, bar = draw(75)
    cache = cache_of(20)
    assert cache.capacity == 32
    for begin, end in ((0, 17), (17, 18), (18, 33), (33, 75)):
        cache.append(key[:, :, begin:end], value[:, :, begin:end], bar)
    assert cache.capacity == 128 and cache.view.lengths.tolist() == [75, 75]
    assert torch.equal(cache.view.key[:, :, :75], key) and torch.equal(cache.view.value[:, :, :75], value)
    want = summarize(key.double(), bar.double(), 16)
    torch.testing.assert_close(cache.view.summaries[:, :, :4].double(), want, atol=1e-5, rtol=0)


def test_token_by_token_decode_equals_the_rows_of_a_prefill():
    query, key, value, bar = draw(52, seed=1)
    options = DashOptions(16, bias_mode="raw")
    want, _ = dash_attention(query.double(), key.double(), value.double(), bar.double(), options)
    cache = cache_of(16)
    cache.append(key[:, :, :30], value[:, :, :30], bar)
    for t in range(30, 52):
        cache.append(key[:, :, t : t + 1], value[:, :, t : t + 1], bar)
        if DEVICE == "cpu" and 2 <= t % 16 < 14:
            continue  # the interpreter takes long: only what lies near a border of chunks
        output, _ = decode_attention(query[:, :, t : t + 1], cache.view, options)
        torch.testing.assert_close(output[:, :, 0].double(), want[:, :, t], atol=2e-5, rtol=0)


def test_parts_fill_the_same_memory():
    _, key, value, bar = draw(40, seed=2)
    whole, parted = cache_of(48), cache_of(48)
    whole.append(key, value, bar)
    for row in (0, 1):
        part = parted.part(row, row + 1)
        part.append(key[row : row + 1], value[row : row + 1], bar)
    assert parted.longest == 0 and part.longest == 40
    parted.advanced(40)
    for name in ("key", "value", "summaries", "lengths"):
        assert torch.equal(getattr(parted.view, name), getattr(whole.view, name)), name


@pytest.mark.parametrize(("new_tokens", "end"), [(3, 36), (22, 52)])
def test_pieces_of_a_prompt_equal_the_rows_of_one_prefill(new_tokens, end, monkeypatch):
    """Against a cache with a start offset, in slices of at most seven tokens, with left padding."""
    monkeypatch.setattr("dashbench.kernels.decode.STEP_SCORES", 2 * 4 * 4 * 7)  # B, Hq, M, tokens
    query, key, value, bar = draw(52, seed=3)
    padding = torch.tensor([0, 19], dtype=torch.int32, device=DEVICE)
    options = DashOptions(16, bias_mode="raw")
    want, routing = dash_attention(
        *(x.double() for x in (query, key, value, bar)), options, left_padding=padding
    )
    cache = DashCache(2, 2, 64, 16, 64, torch.float32, DEVICE, left_padding=padding)
    cache.append(key[:, :, :30], value[:, :, :30], bar)
    for begin in range(30, end, new_tokens):
        part = slice(begin, begin + new_tokens)
        cache.append(key[:, :, part], value[:, :, part], bar)
        output, active = cache.attend(query[:, :, part], options)
        torch.testing.assert_close(output.double(), want[:, :, part], atol=2e-5, rtol=0)
        assert torch.equal(active.long().cpu(), routing.active[:, :, part].sum(-1).cpu())


def test_wrong_tensors_are_named():
    _, key, value, bar = draw(16)
    cache = cache_of(16)
    with pytest.raises(ValueError, match=r"value is torch\.float64"):
        cache.append(key, value.double(), bar)
    with pytest.raises(ValueError, match="does not fit"):
        cache.append(key[:, :1], value, bar)
    with pytest.raises(ValueError, match="summary_query must be"):
        cache.append(key, value, bar[:1])


def test_clear_forgets_tokens():
    _, key, value, bar = draw(40)
    cache = cache_of(16)
    cache.append(key, value, bar)
    cache.clear()
    cache.append(value[:, :, :5], key[:, :, :5], bar)
    assert cache.view.lengths.tolist() == [5, 5] and torch.equal(cache.view.key[:, :, :5], value[:, :, :5])


@pytest.mark.gpu
def test_a_captured_step_follows_the_growing_cache():
    from dashbench.kernels.decode import DecodeStep, append

    query, key, value, bar = (x.bfloat16() for x in draw(300, seed=2))
    options = DashOptions(16, bias_mode="none")
    cache = DashCache(2, 2, 64, 16, 320, torch.bfloat16, DEVICE)
    cache.append(key[:, :, :100], value[:, :, :100], bar)
    new = [x[:, :, :1].clone() for x in (query, key, value)]
    step = DecodeStep(new[0], cache.view, options)

    def body():
        append(cache.view, new[1], new[2], bar, 16, step.workspace.append_tickets)
        step.run()

    start = cache.view.lengths.clone()
    body()
    cache.view.lengths.copy_(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    cache.view.lengths.copy_(start)
    for t in range(100, 300):
        for buffer, source in zip(new, (query, key, value), strict=True):
            buffer.copy_(source[:, :, t : t + 1])
        graph.replay()
        if t % 16 in (0, 1, 15):
            length = t + 1
            rows = (x[:, :, :length].double() for x in (key, value))
            active = torch.zeros(2, 2, 1, -(-length // 16), dtype=torch.bool, device=DEVICE)
            for b in range(2):
                for r in range(2):
                    count = int(step.workspace.counts[b, 0, r])
                    active[b, r, 0, step.workspace.lists[b, 0, r, :count].long()] = True
            want, routing = dash_attention(
                query[:, :, t : t + 1].double(), *rows, bar.double(), options, active=active
            )
            # bf16 summaries may move chunks that lie near the threshold, and no others.
            assert (routing.margin[active != routing.active] < 2e-2).all()
            torch.testing.assert_close(step.output.double(), want, atol=2e-2, rtol=0)
    assert cache.view.lengths.tolist() == [300, 300]
