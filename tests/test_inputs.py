"""The generators plant what they say: topics in the chunk means, graded wants, a support one can count."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dashbench.baselines.api import Unsupported
from dashbench.inputs import PEAK, clone_problem, entmax_support, make_problem
from dashbench.routings import ROUTINGS
from dashbench.rows import Point, Shape

BLOCK = 16
PLANTED = ["topics", "uniform", "clustered", "sink_local", "flat", "adversarial"]


def point(routing="topics", phase="prefill", context=1000, batch=1, heads=(8, 2), dim=64, seed=0, **options):
    return Point(
        method="m",
        phase=phase,
        context=context,
        batch=batch,
        shape=Shape(name="s", query_heads=heads[0], kv_heads=heads[1], head_dim=dim),
        dtype="float32",
        routing=routing,
        routing_options=options,
        cache="warm",
        launch="eager",
        block_size=BLOCK,
        seed=seed,
    )


def chunk_means(problem):
    key, length = problem.key.double(), problem.key.shape[2]
    return torch.stack([key[:, :, c : min(c + BLOCK, length)].mean(2) for c in range(0, length, BLOCK)], 2)


def routing_logits(problem):
    """`[B, Hkv, G, N, M]` fp64: λ⟨q, mean key of the chunk⟩."""
    kv_heads = problem.key.shape[1]
    query = problem.query.double().unflatten(1, (kv_heads, -1))
    return torch.einsum("brgnd,brcd->brgnc", query, chunk_means(problem)) * problem.scale


def exact_entmax(logits):
    """fp64 entmax-1.5 of one vector by bisection on its threshold."""
    x = logits.double() / 2
    low, high = x.max() - 1, x.max()
    for _ in range(100):
        middle = (low + high) / 2
        if ((x - middle).clamp(min=0) ** 2).sum() > 1:
            low = middle
        else:
            high = middle
    return (x - low).clamp(min=0) ** 2


def kept_share(problem, factor):
    """s_flop of DashAttention with mean-pooled summaries: entmax, union over the group, own chunk kept."""
    logits = routing_logits(problem) * factor
    start, rows, length = problem.start, problem.query.shape[2], problem.key.shape[2]
    position = torch.arange(start, start + rows)
    earlier = torch.arange(logits.shape[-1]) < (position // BLOCK)[:, None]
    x = (logits / 2).masked_fill(~earlier, -math.inf)
    ranked = x.sort(-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1)
    ranked = ranked.where(ranked.isfinite(), -1e9)
    mean, square = ranked.cumsum(-1) / count, ranked.square().cumsum(-1) / count
    tau = mean - ((1 - count * (square - mean**2)).clamp(min=0) / count).sqrt()
    size = ((tau <= ranked) & (ranked > -1e8)).sum(-1, keepdim=True)
    selected = (x > tau.gather(-1, (size - 1).clamp(min=0))).any(2)
    kept = selected.sum(-1) * BLOCK + position % BLOCK + 1
    assert length >= rows
    return 1 - float(kept.sum()) / (kept.shape[0] * kept.shape[1] * float((position + 1).sum()))


@pytest.mark.parametrize("routing", [r for r in ROUTINGS if r != "captured"])
@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_every_generator_gives_finite_seeded_inputs(routing, phase):
    asked = point(routing, phase, context=277, batch=2)
    problem, facts = make_problem(asked, "cpu")
    rows = 1 if phase == "decode" else 277
    assert problem.query.shape == (2, 8, rows, 64)
    assert problem.key.shape == problem.value.shape == (2, 2, 277, 64)
    assert problem.start == 277 - rows
    for tensor in (problem.query, problem.key, problem.value):
        assert tensor.isfinite().all()
    assert (problem.grad_output is not None) == (phase == "train")
    assert facts["seed"] == 0 and facts["variant"] == 0
    again, _ = make_problem(asked.model_copy(update={"method": "other", "cache": "cold"}), "cpu")
    fresh, _ = make_problem(asked, "cpu", variant=1)
    seeded, _ = make_problem(point(routing, phase, context=277, batch=2, seed=1), "cpu")
    for name in ("query", "key", "value") + (("grad_output",) if phase == "train" else ()):
        mine = getattr(problem, name)
        assert torch.equal(mine, getattr(again, name))
        assert not torch.equal(mine, getattr(fresh, name))
        assert not torch.equal(mine, getattr(seeded, name))
    assert not torch.equal(problem.key[0], problem.key[1])
    assert not torch.equal(problem.key[:, 0], problem.key[:, 1])


@pytest.mark.parametrize("routing", PLANTED)
@pytest.mark.parametrize("context", [1000, 16])
def test_content_has_no_mean_in_any_chunk(routing, context):
    """Queries' content cannot reach the chunk means: logits of a segment are equal for all its queries."""
    options = {"agreement": 1.0} if "agreement" in ROUTINGS[routing][1] else {}
    problem, _ = make_problem(point(routing, context=context, heads=(2, 1), **options), "cpu")
    logits = routing_logits(problem)[0, 0]
    # Heads that agree see the same logits up to rounding, although their content is their own.
    assert (logits[0] - logits[1]).abs().max() < 1e-5
    assert not torch.equal(problem.query[0, 0], problem.query[0, 1])


def test_logits_are_graded_between_zero_and_the_peak():
    problem, facts = make_problem(point(context=4000, heads=(2, 1), agreement=1.0), "cpu")
    logits = routing_logits(problem)[0, 0, 0]
    assert logits.min() > -1e-5 and 0.9 * PEAK < logits.max() <= 1.2 * PEAK + 1e-4
    # Strength times a uniform want: every tenth of the range is populated.
    histogram = torch.histc(logits, 10, 0, PEAK)
    assert (histogram / logits.numel() > 0.03).all()
    assert facts["segments"] == 1 + int(((logits[1:] - logits[:-1]).abs().amax(-1) > 1e-4).sum())


def test_values_are_standard_normal():
    value = make_problem(point(context=4000), "cpu")[0].value.double()
    assert abs(float(value.mean())) < 0.01 and abs(float(value.std()) - 1) < 0.01
    assert abs(float((value**4).mean()) - 3) < 0.1


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_sparsity_is_monotone_in_the_scaling_factor_and_spans_the_useful_range(phase):
    context = 1200 if phase == "prefill" else 4000
    problem, _ = make_problem(point(phase=phase, context=context, heads=(8, 1), batch=2), "cpu")
    factors = [0.02 * 1.5**i for i in range(19)]
    found = [kept_share(problem, f) for f in factors]
    assert all(b >= a for a, b in itertools.pairwise(found))
    assert found[0] < 0.1 and found[-1] > 0.88
    # Smooth: no step of the sweep jumps over what a target with its tolerance needs in between.
    assert max(b - a for a, b in itertools.pairwise(found)) < 0.25


def test_segments_are_as_long_as_asked_and_heads_agree_as_asked():
    problem, _ = make_problem(point(context=6000, heads=(4, 1), segment=40, agreement=0.8), "cpu")
    logits = routing_logits(problem)[0, 0]
    changed = (logits[:, 1:] - logits[:, :-1]).abs().amax(-1) > 1e-4
    starts = changed.any(0)
    assert 30 < 6000 / (int(starts.sum()) + 1) < 55
    # Two heads are equal where both follow: 0.8² of the segments, were they equally long.
    pairs = [(a, b) for a in range(4) for b in range(a)]
    equal = sum(float(((logits[a] - logits[b]).abs().amax(-1) < 1e-4).float().mean()) for a, b in pairs)
    assert equal / len(pairs) == pytest.approx(0.64, abs=0.1)


def test_routings_differ_as_their_names_say():
    def changes(routing):
        logits = routing_logits(make_problem(point(routing, context=1500, heads=(1, 1)), "cpu")[0])[0, 0, 0]
        best = logits.argmax(-1)
        return float((best[1:] != best[:-1]).float().mean()), logits

    scattered, _ = changes("uniform")
    runs, _ = changes("clustered")
    alternating, _ = changes("adversarial")
    assert scattered > 0.9 and alternating == 1.0 and runs < 0.05
    _, flat = changes("flat")
    assert flat.abs().max() < 1e-5
    _, near = changes("sink_local")
    own = torch.arange(1500) // BLOCK
    at_home = near.gather(1, own[:, None])[:, 0]
    far = near.gather(1, (own[:, None] - 40).clamp(min=1))[:, 0]
    assert (at_home[700:] > 0.9 * PEAK).all() and (far[700:] < 0.7 * PEAK).all()
    assert (near[700:, 0] > far[700:]).all()
    assert torch.allclose(near[:, 0], torch.tensor(PEAK, dtype=near.dtype), atol=1e-4)


def test_iid_has_nothing_to_route_on():
    logits = routing_logits(make_problem(point("iid", context=3200), "cpu")[0])
    assert float(logits.std()) == pytest.approx(1 / math.sqrt(BLOCK), rel=0.05)


def test_half_chunk_windows_see_the_topic():
    """NSA and InfLLMv2 pool over half a chunk: their best window lies in a chunk that is wanted."""
    problem, _ = make_problem(point(context=3200, heads=(1, 1)), "cpu")
    half = problem.key.double().unflatten(2, (-1, BLOCK // 2)).mean(3)[0, 0]
    scores = (problem.query.double()[0, 0] @ half.T * problem.scale).unflatten(1, (-1, 2)).amax(-1)
    planted = routing_logits(problem)[0, 0, 0]
    top = planted.topk(10, -1).indices
    assert float((scores.argmax(-1, keepdim=True) == top).any(-1).float().mean()) > 0.95


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40))
def test_support_size_is_that_of_exact_entmax(values):
    logits = torch.tensor(values)
    p = exact_entmax(logits)
    certain, possible = int((p > 1e-12).sum()), int((p >= 0).sum())
    assert p.sum() == pytest.approx(1.0, abs=1e-9)
    assert certain <= int(entmax_support(logits)) <= possible
    # Nothing that the count adds beyond the certain ones carries weight.
    ranked = p.sort(descending=True).values
    assert (ranked[certain:] <= 1e-12).all()
    padded = torch.cat([logits, torch.full((3,), -math.inf)])
    assert int(entmax_support(padded)) == int(entmax_support(logits))


def test_facts_count_the_planted_support():
    problem, facts = make_problem(point(context=2000, heads=(1, 1), agreement=1.0), "cpu")
    logits = routing_logits(problem)[0, 0, 0]
    sampled = torch.linspace(0, 1999, 256, dtype=torch.float64).round().long()
    counts = [int((exact_entmax(logits[i, : i // BLOCK]) > 1e-9).sum()) for i in sampled if i >= BLOCK]
    assert facts["planted_support"]["p50"] == pytest.approx(
        float(torch.tensor(counts).double().median()), abs=1
    )
    assert sum(facts["planted_support_histogram"].values()) == len(counts)


def test_clones_are_equal_and_elsewhere():
    problem, _ = make_problem(point(phase="train", context=64), "cpu")
    clone = clone_problem(problem)
    for name in ("query", "key", "value", "grad_output"):
        assert torch.equal(getattr(problem, name), getattr(clone, name))
        assert getattr(problem, name).data_ptr() != getattr(clone, name).data_ptr()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_captured_tensors_are_replayed(tmp_path, suffix):
    source, _ = make_problem(point(context=96), "cpu")
    tensors = {"query": source.query, "key": source.key, "value": source.value}
    path = tmp_path / f"layer{suffix}"
    if suffix == ".pt":
        torch.save(tensors, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(tensors, path)
    problem, facts = make_problem(point("captured", context=96, path=str(path)), "cpu")
    assert torch.equal(problem.query, source.query) and torch.equal(problem.value, source.value)
    assert facts["options"]["path"] == str(path)
    decode, _ = make_problem(point("captured", "decode", context=96, path=str(path)), "cpu")
    assert torch.equal(decode.query, source.query[:, :, -1:]) and decode.start == 95
    with pytest.raises(Unsupported, match="captured keys are"):
        make_problem(point("captured", context=97, path=str(path)), "cpu")


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(Unsupported, match="no option 'nonsense'"):
        make_problem(point("topics", nonsense=1), "cpu")
    with pytest.raises(Unsupported, match="needs the option path"):
        make_problem(point("captured"), "cpu")
    with pytest.raises(Unsupported, match="does not exist"):
        make_problem(point("captured", path=str(tmp_path / "no.pt")), "cpu")
    with pytest.raises(Unsupported, match="needs head_dim above"):
        make_problem(point("sink_local", dim=16), "cpu")
    torch.save({"query": torch.zeros(1)}, tmp_path / "half.pt")
    with pytest.raises(Unsupported, match="no tensor 'key'"):
        make_problem(point("captured", path=str(tmp_path / "half.pt")), "cpu")
