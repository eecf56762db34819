"""NSA's specification against loops written from the paper's definition, per query and per head."""

import math

import pytest
import torch
from baseline_problems import attend_tokens, make_problem, relative_error

from dashbench.baselines import block_selection, block_sparse_reference, nsa_reference
from dashbench.baselines.api import Problem, Unsupported

BLOCK, KERNEL, STRIDE = 16, 8, 4


def loop_compress(problem, method, b, r):
    """Compressed keys and values of one head by loops, lists of `[D]` fp64."""
    key, value = problem.key[b, r].double(), problem.value[b, r].double()
    weights = {n: w.double() for n, w in method.compressor.weights.items()}
    keys, values, t = [], [], 0
    while t * STRIDE + KERNEL <= len(key):
        k, v = key[t * STRIDE : t * STRIDE + KERNEL], value[t * STRIDE : t * STRIDE + KERNEL]
        kind = method.compressor.kind
        if kind == "avgpool":
            new = sum(k) / KERNEL, sum(v) / KERNEL
        elif kind == "weightedpool":
            new = tuple(
                sum(weights[n][r, i] * x[i] for i in range(KERNEL)) for n, x in (("key", k), ("value", v))
            )
        elif kind == "linear":
            k = k + weights["position"][r]
            dim = key.shape[1]
            new = tuple(
                sum(x[i] @ weights[n][r, i * dim : (i + 1) * dim] for i in range(KERNEL))
                for n, x in (("key", k), ("value", v))
            )
        else:
            new = torch.empty(2, key.shape[1], dtype=torch.float64).fill_(torch.nan)
            for d in range(key.shape[1]):
                hidden = weights["first"] @ torch.cat((k[:, d], v[:, d])) + weights["bias"]
                new[:, d] = weights["second"] @ hidden.clamp_min(0)
        keys.append(new[0])
        values.append(new[1])
        t += 1
    return keys, values


def loop_nsa(problem, method, top_k, init, local, rule):
    """Outputs `[B, Hq, N, D]`, selections as sets and kept counts, all by loops."""
    batch, heads, rows, _ = problem.query.shape
    kv_heads, length = problem.key.shape[1:3]
    group = heads // kv_heads
    output = torch.full(problem.query.shape, torch.nan, dtype=torch.float64)
    chosen, kept = {}, torch.zeros(batch, kv_heads, rows, dtype=torch.int64)
    for b in range(batch):
        for r in range(kv_heads):
            compressed_keys, compressed_values = loop_compress(problem, method, b, r)
            for n in range(rows):
                i = length - rows + n
                seen = [t for t in range(len(compressed_keys)) if t * STRIDE + KERNEL - 1 <= i]
                importance = dict.fromkeys(seen, 0.0)
                branch = {}
                for h in range(r * group, (r + 1) * group):
                    q = problem.query[b, h, n].double()
                    weight = {t: math.exp(float(q @ compressed_keys[t]) * problem.scale) for t in seen}
                    total = sum(weight.values())
                    branch[h] = torch.zeros_like(q)
                    for t in seen:
                        importance[t] += weight[t] / total
                        branch[h] = branch[h] + weight[t] / total * compressed_values[t]
                own = i // BLOCK
                scores = []
                for j in range(own + 1):
                    overlaps = {
                        t: min(t * STRIDE + KERNEL, (j + 1) * BLOCK) - max(t * STRIDE, j * BLOCK)
                        for t in seen
                    }
                    parts = [(o // STRIDE) * importance[t] if rule == "sum" else importance[t]
                             for t, o in overlaps.items() if o > 0]  # fmt: skip
                    scores.append((sum(parts) if rule == "sum" else max(parts)) if parts else 0.0)
                forced = {j for j in range(own + 1) if j < init or own - local < j}
                free = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: -scores[j])
                blocks = forced | set(free[: max(0, top_k - len(forced))])
                chosen[b, r, n] = blocks
                tokens = [t for t in range(i + 1) if t // BLOCK in blocks]
                kept[b, r, n] = len(tokens)
                for h, compressed in branch.items():
                    gate = (
                        method.gate_weight.double() @ problem.query[b, h, n].double()
                        + method.gate_bias.double()
                    )
                    gate = 1 / (1 + torch.exp(-gate))
                    branches = [compressed, attend_tokens(problem, b, h, n, tokens)]
                    if method.window:
                        window = list(range(max(0, i - method.window + 1), i + 1))
                        branches.append(attend_tokens(problem, b, h, n, window))
                    output[b, h, n] = sum(g * o for g, o in zip(gate, branches, strict=True))
    return output, chosen, kept


def as_sets(selected):
    """`[B, Hkv, R, M]` bool to a dict of sets."""
    return {
        (b, r, n): set(selected[b, r, n].nonzero().flatten().tolist())
        for b in range(selected.shape[0])
        for r in range(selected.shape[1])
        for n in range(selected.shape[2])
    }


def build(problem, **settings):
    """The operator, and the mathematics behind it for its weights."""
    settings = {"top_k": 4, "local_blocks": 2, "window": 11} | settings
    chosen = nsa_reference.settings_for(problem, **settings)
    return nsa_reference.prepare(problem, **settings), nsa_reference.Nsa(problem, chosen), chosen


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("length,group", [(5, 1), (83, 4), (96, 1), (105, 2)])
@pytest.mark.parametrize("compression,rule", [("avgpool", "sum"), ("mlp", "max")])
def test_everything_equals_the_loops(phase, length, group, compression, rule):
    problem = make_problem(phase, length, group=group, kv_heads=2, head_dim=8, block_size=BLOCK)
    operator, method, chosen = build(problem, compression=compression, rule=rule)
    output, blocks, kept = loop_nsa(problem, method, chosen.top_k, 1, 2, rule)
    rows = torch.arange(problem.query.shape[2])
    expected = operator.reference(rows, None)
    if (
        rule == "sum"
    ):  # under `max` a window across a border ties two blocks exactly, and the earlier one wins
        assert not expected.undecided.any()
    assert as_sets(operator.selected(rows)) == blocks == as_sets(expected.selected)
    assert torch.equal(operator.kept(), kept)
    torch.testing.assert_close(operator.run(), output, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(expected.output, output, rtol=1e-9, atol=1e-10)
    for name, stage in operator.stages.items():
        result = stage()
        if name == "attend":
            torch.testing.assert_close(result, output, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("compression", ["weightedpool", "linear"])
def test_learned_compressors_equal_the_loops(compression):
    problem = make_problem("prefill", 61, head_dim=8, block_size=BLOCK, kv_heads=2, seed=3)
    _, method, _ = build(problem, compression=compression)
    keys, values = method.compress(problem.key, problem.value)
    for r in range(2):
        loop_keys, loop_values = loop_compress(problem, method, 0, r)
        torch.testing.assert_close(keys[0, r], torch.stack(loop_keys))
        torch.testing.assert_close(values[0, r], torch.stack(loop_values))


def test_weights_depend_on_the_seed_alone_and_start_near_mean_pooling():
    problem = make_problem("prefill", 64, block_size=BLOCK, seed=5)
    mean, _ = nsa_reference.Compressor("avgpool", block_selection.Windows(KERNEL, STRIDE), problem)(
        problem.key, problem.value
    )
    for kind in ("weightedpool", "linear", "mlp"):
        compressors = [
            nsa_reference.Compressor(kind, block_selection.Windows(KERNEL, STRIDE), p)
            for p in (problem, problem, make_problem("prefill", 64, block_size=BLOCK, seed=6))
        ]
        first, again, other = (c(problem.key, problem.value)[0] for c in compressors)
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert 0 < (first - mean).norm() / mean.norm() < 0.5, kind


@pytest.mark.parametrize("length", [7, 8, 9, 12, 80, 81])
@pytest.mark.parametrize("compression", ["avgpool", "linear"])
def test_decode_equals_the_last_row_of_prefill(length, compression):
    prefill = make_problem("prefill", length, block_size=BLOCK)
    decode = Problem(
        "decode",
        prefill.query[:, :, -1:],
        prefill.key,
        prefill.value,
        prefill.summary_query,
        block_size=BLOCK,
    )
    whole, step = build(prefill, compression=compression)[0], build(decode, compression=compression)[0]
    torch.testing.assert_close(step.run()[:, :, 0], whole.run()[:, :, -1], rtol=1e-10, atol=1e-12)
    last = torch.tensor([length - 1])
    assert torch.equal(step.selected(torch.tensor([0])), whole.selected(last))
    assert torch.equal(step.kept()[..., 0], whole.kept()[..., -1])
    assert step.notes["windows_appended"] == 2 * (length >= KERNEL and (length - KERNEL) % STRIDE == 0)


def test_block_scores_have_the_weights_of_the_paper():
    importance = torch.eye(17, dtype=torch.float64)  # one window at a time
    windows = block_selection.Windows(32, 16)
    sums = block_selection.scores_to_blocks(importance, windows, 64, 5, "sum")
    assert sums[:, 1].tolist() == [0, 0, 0, 1, 2, 2, 2, 1] + [0] * 9
    assert sums[:, 0].tolist() == [2, 2, 2, 1] + [0] * 13
    assert sums[:, 4].tolist() == [0] * 15 + [1, 2]
    largest = block_selection.scores_to_blocks(importance, windows, 64, 5, "max")
    assert torch.equal(largest, (sums > 0).double())


def test_ties_are_undecided_on_both_sides_and_nothing_else_is():
    top = block_selection.TopBlocks(4, top_k=4, init_blocks=1, local_blocks=1)
    scores = torch.tensor([[[[9.0, 3.0, 2.0, 2.001, 1.0, 7.0, 8.0]]]], dtype=torch.float64)
    position = torch.tensor([25])  # own block 6; block 0 and 6 forced
    small, large = torch.tensor([[[[1e-5]]]]), torch.tensor([[[[0.01]]]])
    assert as_sets(top.select(scores, position)) == {(0, 0, 0): {0, 1, 5, 6}}
    scores[..., 1] = 2.002
    assert not top.undecided(scores, position, small).any()
    assert as_sets(top.undecided(scores, position, large)) == {(0, 0, 0): {1, 2, 3}}
    scores[..., 1] = 2.001
    assert as_sets(top.undecided(scores, position, small)) == {(0, 0, 0): {1, 3}}
    few = torch.tensor([13])  # own block 3: four blocks for four places, no choice
    assert as_sets(top.select(scores, few)) == {(0, 0, 0): {0, 1, 2, 3}}
    assert not top.undecided(scores, few, large).any()


def test_a_tied_problem_is_undecided_and_judged_by_the_methods_own_selection():
    problem = make_problem("prefill", 96, kv_heads=1, block_size=BLOCK)
    problem.key[:, :, 12:68] = problem.key[:, :, 12:13]  # every window that touches block 1, 2 or 3
    problem.value[:, :, 16:32] *= 1e4
    operator, _, _ = build(problem, top_k=4)
    row = torch.tensor([95])
    expected = operator.reference(row, None)
    tied = as_sets(expected.undecided)[0, 0, 0]
    assert tied == {1, 2, 3}, "equal keys give equal scores, and forced blocks are never in doubt"
    other = expected.selected.clone()
    other[0, 0, 0, 1:4] = other[0, 0, 0, [2, 3, 1]]
    swapped = operator.reference(row, other)
    assert torch.equal(swapped.selected, expected.selected)
    assert relative_error(swapped.output, expected.output) > 1e-3, "values of the blocks differ"


def test_low_precision_selects_as_fp64_does_outside_ties():
    problem = make_problem("prefill", 300, group=4, head_dim=32, block_size=BLOCK, dtype=torch.bfloat16)
    operator, _, _ = build(problem, top_k=6)
    rows = torch.arange(300)
    selected = operator.selected(rows)
    expected = operator.reference(rows, selected)
    assert not ((selected != expected.selected) & ~expected.undecided).any()
    assert expected.undecided.double().mean() < 0.1
    assert relative_error(operator.run(), expected.output) < 0.08


@pytest.mark.parametrize("compression,rule", [("avgpool", "sum"), ("mlp", "max"), ("linear", "sum")])
def test_gradients_equal_finite_differences(compression, rule):
    problem = make_problem("train", 21, kv_heads=1, head_dim=4, block_size=8, seed=2)
    settings = {"top_k": 2, "local_blocks": 1, "window": 5, "compression": compression, "rule": rule}
    operator = nsa_reference.prepare(problem, **settings)
    output = operator.run()
    method = nsa_reference.Nsa(problem, nsa_reference.settings_for(problem, **settings))
    fixed = operator.selected(torch.arange(21))
    assert (fixed.sum(-1) < torch.arange(21) // 8 + 1).any(), "something is left out"

    def function(query, key, value):
        return method.forward(query, key, value, method.compress(key, value), method.gates(query), 0, fixed)

    leaves = tuple(getattr(problem, n).clone().requires_grad_() for n in ("query", "key", "value"))
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    exact = torch.autograd.grad(function(*leaves), leaves, problem.grad_output)
    reference = operator.reference_gradients()
    torch.testing.assert_close(output, function(*leaves).detach())
    for name, grad in zip(("query", "key", "value"), exact, strict=True):
        torch.testing.assert_close(operator.gradients()[name], grad)
        torch.testing.assert_close(reference[name], grad)


def test_slicing_rows_changes_nothing(monkeypatch):
    problem = make_problem("train", 50, block_size=8)
    settings = {"top_k": 3, "window": 9, "compression": "linear"}
    operator = nsa_reference.prepare(problem, **settings)
    output, grads, kept = operator.run(), operator.gradients(), operator.kept()
    monkeypatch.setattr(block_sparse_reference, "SLICE_ROWS", 7)
    sliced = nsa_reference.prepare(problem, **settings)
    torch.testing.assert_close(sliced.run(), output, rtol=1e-11, atol=1e-12)
    assert torch.equal(sliced.kept(), kept)
    for name, grad in sliced.gradients().items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-10, atol=1e-11)


def test_presets_and_limits():
    problem = make_problem("prefill", 64 * 70, kv_heads=1, group=1, head_dim=4, block_size=64)
    paper = nsa_reference.prepare(problem)
    names = ("top_k_used", "init_blocks", "local_blocks", "window", "compression", "rule")
    assert [paper.notes[name] for name in names] == [16, 1, 2, 512, "avgpool", "sum"]
    benchmark = nsa_reference.prepare(problem, preset="nsa_paper")
    assert [benchmark.notes[name] for name in names] == [64, 1, 17, 0, "mlp", "max"]
    assert nsa_reference.prepare(problem, top_k=1).notes["top_k_used"] == 3
    assert nsa_reference.prepare(problem, top_k=1000).notes["top_k_used"] == 70
    with pytest.raises(ValueError, match="preset must be one of nsa, nsa_paper"):
        nsa_reference.prepare(problem, preset="other")
    with pytest.raises(ValueError, match="compression must be one of"):
        nsa_reference.prepare(problem, compression="max")
    with pytest.raises(Unsupported, match="multiple of 4"):
        nsa_reference.prepare(make_problem("prefill", 20, block_size=10))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
@pytest.mark.parametrize("preset", ["nsa", "nsa_paper"])
def test_on_a_gpu(phase, preset):
    problem = make_problem(
        phase, 2100, group=16, head_dim=128, block_size=64, dtype=torch.bfloat16, device="cuda"
    )
    operator = nsa_reference.prepare(problem, preset=preset, top_k=20)
    rows = torch.arange(0, problem.query.shape[2], 37)
    selected = operator.selected(rows)
    expected = operator.reference(rows, selected)
    output = operator.run()
    assert not ((selected != expected.selected) & ~expected.undecided).any()
    assert relative_error(output[:, :, rows.cuda()], expected.output) < 0.08
    if phase == "train":
        exact = operator.reference_gradients()
        for name, grad in operator.gradients().items():
            assert (grad.double() - exact[name]).norm() / exact[name].norm() < 0.02, name
