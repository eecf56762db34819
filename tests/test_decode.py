"""Decode against the float64 specification: each new token equals its row of the prefill."""

import pytest
import torch

from dashbench.kernels.decode import (
    DecodeCache,
    DecodeLaunch,
    DecodeStep,
    DecodeWorkspace,
    append,
    decode_attention,
)
from dashbench.kernels.reference import DashOptions, dash_attention, summarize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(batch, heads, kv_heads, capacity, dim, new_tokens=1, seed=0, contrast=3.0):
    """Query of the last tokens, keys with one planted direction a chunk of 16, values, summary query."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    topics = contrast * normal(batch, kv_heads, -(-capacity // 16), dim)
    key = topics.repeat_interleave(16, 2)[:, :, :capacity] + normal(batch, kv_heads, capacity, dim)
    query = normal(batch, heads, new_tokens, dim)
    tensors = query, key, normal(batch, kv_heads, capacity, dim), 0.3 * normal(kv_heads, dim)
    return tuple(x.to(DEVICE) for x in tensors)


def filled(key, value, bar, chunk, lengths, page_size=None, seed=0):
    """A cache with the first `lengths[b]` tokens, written token ranges poisoned beyond; pages shuffled."""
    batch, heads, capacity, dim = key.shape
    size = page_size or capacity
    pages = capacity // size
    table = None
    if page_size:
        order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(seed))
        table = order.reshape(batch, pages).int().to(key.device)
    shape = (batch * pages, heads, size, dim)
    cache = DecodeCache(
        key.new_full(shape, float("nan")),
        key.new_full(shape, float("nan")),
        key.new_full((batch * pages, heads, size // chunk, dim), float("nan")),
        torch.tensor(lengths, dtype=torch.int32, device=key.device),
        table,
    )
    for b, length in enumerate(lengths):
        done = summarize(key[b : b + 1, :, :length].double(), bar.double(), chunk)[0].to(key.dtype)
        for page in range(pages):
            target = page if batch == 1 and table is None else (b if table is None else int(table[b, page]))
            tokens = slice(page * size, min(length, (page + 1) * size))
            count = max(0, tokens.stop - tokens.start)
            if count:
                cache.key[target, :, :count] = key[b, :, tokens]
                cache.value[target, :, :count] = value[b, :, tokens]
            part = done[:, page * size // chunk : (page + 1) * size // chunk]
            cache.summaries[target, :, : part.shape[1]] = part
    return cache


def expected(query, key, value, bar, lengths, options):
    out, counts = [], []
    for b, length in enumerate(lengths):
        result, routing = dash_attention(
            query[b : b + 1].double(), key[b : b + 1, :, :length].double(),
            value[b : b + 1, :, :length].double(), bar.double(), options,
        )  # fmt: skip
        out.append(result[0])
        counts.append(routing.active[0].sum(-1).T)
    return torch.stack(out), torch.stack(counts)


def balanced_output(step):
    """Output of a balanced step from the lists of another one."""
    launch = DecodeLaunch(splits=step.launch.splits, balanced=True)
    other = DecodeStep(step.query, step.cache, step.options, launch)
    assert other.workspace.balanced
    for name in ("lists", "places", "biases", "counts"):
        setattr(other.workspace, name, getattr(step.workspace, name))
    other.attend()
    return other.combine()


def compare(query, key, value, bar, lengths, options, page_size=None, splits=3):
    cache = filled(key, value, bar, options.chunk_size, lengths, page_size)
    step = DecodeStep(query, cache, options, DecodeLaunch(splits=splits))
    output, space = step.run(), step.workspace
    want, counts = expected(query, key, value, bar, lengths, options)
    assert torch.equal(space.counts.cpu().long(), counts.cpu())
    torch.testing.assert_close(output.double(), want, atol=2e-5, rtol=0)
    torch.testing.assert_close(balanced_output(step).double(), want, atol=2e-5, rtol=0)
    assert int(space.route_tickets.abs().sum()) == 0
    return counts


@pytest.mark.parametrize("page_size", [None, 32])
def test_each_sequence_has_its_own_length(page_size):
    lengths = [1, 15, 16, 17, 32, 93]
    counts = compare(
        *draw(6, 4, 2, 96, 64), lengths, DashOptions(16, scaling_factor=2.0, bias_mode="none"), page_size
    )
    assert counts.min() == 1 and 1 < counts[-1].max() < 6  # routing really dropped chunks


@pytest.mark.parametrize(
    "options",
    [
        DashOptions(16, bias_mode="raw"),
        DashOptions(16, bias_mode="centered", sigma=1.0),
        DashOptions(16, bias_mode="centered", sigma=1.0, forced="own_and_previous", visibility="completed"),
        DashOptions(16, bias_mode="raw", alpha=1.25),
        DashOptions(16, bias_mode="raw", alpha=2.0),
        DashOptions(32, bias_mode="raw"),
    ],
    ids=str,
)
def test_options_match_the_specification(options):
    compare(*draw(2, 4, 2, 128, 64, seed=1), [112, 97], options)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (16, 1, 128), (8, 1, 64)])
def test_groups_and_head_dims(heads, kv_heads, dim):
    compare(*draw(1, heads, kv_heads, 64, dim, seed=2), [61], DashOptions(16, bias_mode="none"))


@pytest.mark.parametrize(("page_size", "balanced"), [(None, False), (32, False), (None, True), (32, True)])
def test_a_step_that_appends_its_token_equals_appending_before_it(page_size, balanced):
    """Lengths around chunk borders: token 1, mid-chunk, completing a chunk, and the first of a chunk."""
    lengths, options = [1, 30, 48, 65], DashOptions(16, bias_mode="raw")
    query, key, value, bar = draw(4, 4, 2, 96, 64, seed=7)
    before = filled(key, value, bar, 16, [length - 1 for length in lengths], page_size)
    before.lengths.add_(1)
    rows, at = torch.arange(4), torch.tensor(lengths) - 1
    new = tuple(x[rows, :, at][:, :, None].contiguous() for x in (key, value))
    launch = DecodeLaunch(splits=3, balanced=balanced)
    step = DecodeStep(query, before, options, launch, new=(*new, bar.contiguous()))
    want, _ = expected(query, key, value, bar, lengths, options)
    torch.testing.assert_close(step.run().double(), want, atol=2e-5, rtol=0)
    whole = filled(key, value, bar, 16, lengths, page_size)
    torch.testing.assert_close(before.key, whole.key, equal_nan=True)
    torch.testing.assert_close(before.value, whole.value, equal_nan=True)
    torch.testing.assert_close(before.summaries, whole.summaries, atol=1e-6, rtol=0, equal_nan=True)


def test_appending_on_the_side_is_for_one_token():
    query, key, value, bar = draw(1, 2, 1, 32, 64, new_tokens=2)
    cache = filled(key, value, bar, 16, [20])
    with pytest.raises(ValueError, match="one new token"):
        DecodeStep(query, cache, DashOptions(16), new=(key[:, :, :2], value[:, :, :2], bar))


def test_several_new_tokens_across_a_chunk_border():
    compare(*draw(2, 4, 2, 96, 64, new_tokens=3, seed=3), [65, 90], DashOptions(16, bias_mode="raw"))


@pytest.mark.parametrize("programs", [1, 5, 12, 64])
def test_balanced_programs_attend_every_listed_chunk_once(programs):
    """Lists of very unlike lengths, planted: flat logits and values that name their chunk make the output a
    count of tokens. 22 blocks, so that one case has more programs than blocks."""
    sizes, lengths, chunks = [[[1, 40], [3, 6]], [[1, 1], [17, 2]]], [638, 601], 40
    generator = torch.Generator().manual_seed(0)
    query = torch.zeros(2, 4, 2, 64, device=DEVICE)
    value = torch.eye(64, device=DEVICE)[torch.arange(640, device=DEVICE) // 16].expand(2, 2, 640, 64)
    key = torch.randn(2, 2, 640, 64, generator=generator).to(DEVICE)
    cache = DecodeCache(
        key, value.contiguous(), key[:, :, :chunks], torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    )
    space = DecodeWorkspace(2, 2, 4, 2, 64, chunks, programs, DEVICE, balanced=True)
    options = DashOptions(16, bias_mode="none")
    step = DecodeStep(query, cache, options, DecodeLaunch(balanced=True), space)
    want, owners = torch.zeros(2, 2, 2, 64), []
    for group in range(8):
        b, t, r = group // 4, group // 2 % 2, group % 2
        count, position = sizes[b][t][r], lengths[b] - 2 + t
        own = position // 16
        listed = [*sorted(torch.randperm(own, generator=generator)[: count - 1].tolist()), own]
        space.counts[b, t, r] = count
        space.lists[b, t, r, :count] = torch.tensor(listed, dtype=torch.int32)
        want[b, t, r, listed] = 16
        want[b, t, r, own] = position % 16 + 1
        owners += [group] * -(-count // 4)
    step.attend()
    share, rest = divmod(len(owners), programs)
    programs_of = [p for p in range(programs) for _ in range(share + (p < rest))]
    slots = {program + group for program, group in zip(programs_of, owners, strict=True)}
    for left in (space.partial_output, space.partial_statistics):  # NaN where nothing was written
        assert set((~left.isnan()).any((1, 2)).nonzero().flatten().tolist()) == slots
    found = step.combine().reshape(2, 2, 2, 2, 64).permute(0, 3, 1, 2, 4)  # [B, T, Hkv, G, D]
    want = want[:, :, :, None].expand(-1, -1, -1, 2, -1)
    torch.testing.assert_close(found.cpu() * want.sum(-1, keepdim=True), want, atol=1e-3, rtol=0)


def test_more_splits_than_are_joined_at_a_time(monkeypatch):
    monkeypatch.setattr("dashbench.kernels.decode.JOINED", 2)
    counts = compare(*draw(1, 4, 2, 480, 64, contrast=1.0), [470], DashOptions(16, bias_mode="raw"), splits=7)
    assert counts.min() > 8, "three blocks and more, each a split"


def test_more_groups_than_a_balanced_program_reads_are_split_as_ever(monkeypatch):
    monkeypatch.setattr("dashbench.kernels.decode.BALANCED_GROUPS", 3)
    query, key, value, bar = draw(2, 4, 2, 32, 64)
    step = DecodeStep(
        query, filled(key, value, bar, 16, [20, 9]), DashOptions(16), DecodeLaunch(2, balanced=True)
    )
    assert not step.workspace.balanced and not step.launch.balanced and step.workspace.splits == 2


def test_flat_logits_activate_every_chunk():
    query, key, value, bar = draw(1, 4, 2, 96, 64)
    counts = compare(query * 0, key, value, bar, [90], DashOptions(16, bias_mode="none"))
    assert (counts == 6).all()


def test_more_chunks_than_a_route_tile(monkeypatch):
    monkeypatch.setattr("dashbench.kernels.decode.ROUTE_TILE", 4)
    compare(*draw(1, 4, 2, 240, 64, seed=4), [230], DashOptions(16, bias_mode="centered", sigma=1.0))


@pytest.mark.parametrize("page_size", [None, 32])
@pytest.mark.parametrize("new_tokens", [1, 3, 20])
def test_append_writes_tokens_and_the_summaries_they_complete(page_size, new_tokens):
    _, key, value, bar = draw(3, 4, 2, 64, 64, seed=5)
    lengths = [0, 15, 30]
    cache = filled(key, value, bar, 16, lengths, page_size)
    fresh_key = torch.stack([key[b, :, n : n + new_tokens] for b, n in enumerate(lengths)])
    fresh_value = torch.stack([value[b, :, n : n + new_tokens] for b, n in enumerate(lengths)])
    tickets = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    append(cache, fresh_key, fresh_value, bar, 16, tickets)
    longer = [n + new_tokens for n in lengths]
    want = filled(key, value, bar, 16, longer, page_size)
    assert cache.lengths.tolist() == longer and tickets.tolist() == [0, 0, 0]
    for name in ("key", "value", "summaries"):
        torch.testing.assert_close(
            getattr(cache, name), getattr(want, name), equal_nan=True, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 32}, "head dim must be"),
        ({"heads": 3}, "no multiple of 2"),
        ({"capacity": 40}, "no multiple of the chunk"),
    ],
)
def test_unsupported_shapes_are_named(change, message):
    shape = {"batch": 1, "heads": 4, "kv_heads": 2, "capacity": 48, "dim": 64} | change
    query, key, value, _ = draw(**shape)
    one = torch.ones(1, dtype=torch.int32, device=DEVICE)
    # Only pages must hold whole chunks; a contiguous cache may end inside one.
    cache = DecodeCache(key, value, key[:, :, :3], one, one[None] if "capacity" in change else None)
    with pytest.raises(ValueError, match=message):
        DecodeStep(query, cache, DashOptions(16))


def assert_low_precision_matches(dtype, batch, heads, kv_heads, capacity, dim, lengths, chunk):
    """Routing is judged outside a margin, attention over the chunks that the kernel chose."""
    tensors = draw(batch, heads, kv_heads, capacity, dim, seed=6)
    query, key, value, bar = (x.to(dtype) for x in tensors)
    options = DashOptions(chunk, bias_mode="none")
    cache = filled(key, value, bar, chunk, lengths)
    output, space = decode_attention(query, cache, options)
    for b, length in enumerate(lengths):
        active = torch.zeros(1, kv_heads, 1, -(-length // chunk), dtype=torch.bool, device=DEVICE)
        for r in range(kv_heads):
            active[0, r, 0, space.lists[b, 0, r, : space.counts[b, 0, r]].long()] = True
        one = slice(b, b + 1)
        want, routing = dash_attention(
            query[one].double(), key[one, :, :length].double(), value[one, :, :length].double(),
            bar.double(), options, active=active,
        )  # fmt: skip
        assert (routing.margin[active != routing.active] < 2e-2).all()
        torch.testing.assert_close(output[one].double(), want, atol=2e-2, rtol=0)
        assert (output[one].double() - want).norm() < 5e-3 * want.norm()


def test_half_precision_matches_within_its_rounding():
    assert_low_precision_matches(torch.float16, 2, 4, 2, 96, 64, [90, 33], 16)


# The interpreter takes long: there every value once, on a GPU every pair.
PADDED = [(None, "own"), (32, "own_and_previous")]
PADDED += [(32, "own"), (None, "own_and_previous")] if DEVICE == "cuda" else []


@pytest.mark.parametrize(("page_size", "forced"), PADDED)
def test_left_padding_keeps_chunks_in_their_padded_places(page_size, forced):
    """Paddings: none, inside the first chunk, a whole chunk, two chunks and a bit, up to the own chunk, and
    more than the query's own position (which is then padding itself and gives zeros)."""
    lengths, pads = [93, 90, 60, 81, 50, 20], [0, 3, 16, 35, 48, 20]
    options = DashOptions(16, bias_mode="centered", sigma=1.0, forced=forced, scaling_factor=2.0)
    query, key, value, bar = draw(6, 4, 2, 96, 64, new_tokens=2, seed=8)
    padding = torch.tensor(pads, dtype=torch.int32, device=DEVICE)
    empty = filled(key, value, bar, 16, [0] * 6, page_size)
    cache = DecodeCache(
        empty.key, empty.value, empty.summaries, torch.zeros(6, dtype=torch.int32, device=DEVICE),
        empty.page_table, padding,
    )  # fmt: skip
    tickets = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    append(cache, key[:, :, :96], value[:, :, :96], bar, 16, tickets)
    cache.lengths.copy_(torch.tensor(lengths))
    step = DecodeStep(query, cache, options, DecodeLaunch(splits=3))
    output = step.run()
    torch.testing.assert_close(balanced_output(step), output, atol=1e-5, rtol=0)
    for b, (length, pad) in enumerate(zip(lengths, pads, strict=True)):
        want, routing = dash_attention(
            query[b : b + 1].double(), key[b : b + 1, :, :length].double(),
            value[b : b + 1, :, :length].double(), bar.double(), options,
            left_padding=padding[b : b + 1],
        )  # fmt: skip
        torch.testing.assert_close(output[b : b + 1].double(), want, atol=2e-5, rtol=0)
        if length - pad > 80:  # routing drops chunks here
            assert 1 < int(routing.active[:, :, -1].sum(-1).min()) < 6
    assert bool((output[5] == 0).all()) and bool((output[:5] != 0).any(-1).all())


@pytest.mark.parametrize(("new_tokens", "balanced"), [(1, False), (1, True), (2, False)])
def test_a_chunk_that_begins_with_padding_is_summarised_over_its_real_tokens(new_tokens, balanced):
    """By `append`, and by the step that writes its one token on the side."""
    _, key, value, bar = draw(2, 4, 2, 32, 64, seed=9)
    padding = torch.tensor([3, 21], dtype=torch.int32, device=DEVICE)
    lengths = torch.full((2,), 32 - new_tokens, dtype=torch.int32, device=DEVICE)
    cache = DecodeCache(key.clone(), value.clone(), torch.zeros_like(key[:, :, :2]), lengths, None, padding)
    cache.key[:, :, 32 - new_tokens :] = float("nan")
    fresh = key[:, :, 32 - new_tokens :].contiguous(), value[:, :, 32 - new_tokens :].contiguous()
    if new_tokens == 1:
        lengths += 1
        query, launch = key.repeat(1, 2, 1, 1)[:, :, -1:], DecodeLaunch(balanced=balanced)
        DecodeStep(query, cache, DashOptions(16), launch, new=(*fresh, bar)).run()
    else:
        append(cache, *fresh, bar, 16, torch.zeros(2, dtype=torch.int32, device=DEVICE))
    assert torch.equal(cache.key, key)
    for b, pad in enumerate(padding.tolist()):
        real = key[b, :, max(16, pad) :].double()  # the second chunk's
        weights = torch.softmax((real * bar[:, None].double()).sum(-1) / 8, -1)
        want = (weights[..., None] * real).sum(1)
        torch.testing.assert_close(cache.summaries[b, :, 1].double(), want, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_real_sizes_match_within_rounding(dtype, chunk):
    assert_low_precision_matches(dtype, 2, 32, 2, 16384, 128, [16384, 8001], chunk)
