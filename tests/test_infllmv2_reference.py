"""InfLLMv2's specification against loops written from the paper's definition, per query and per head."""

import math

import pytest
import torch
from baseline_problems import attend_tokens, make_problem, relative_error

from dashbench.baselines import infllmv2_reference
from dashbench.baselines.api import Problem
from dashbench.baselines.attention_reference import attention_gradients, dense_expected

BLOCK, KERNEL, STRIDE = 16, 8, 4
SMALL = {"top_k": 4, "local_blocks": 1}


def window_means(key, kernel, stride):
    """Means of the complete windows of `[L, D]`, one sum at a time."""
    return [sum(key[t : t + kernel]) / kernel for t in range(0, len(key) - kernel + 1, stride)]


def loop_infllmv2(problem, top_k, init, local, lse_mode):
    """Outputs `[B, Hq, N, D]`, selections as sets and kept counts, all by loops."""
    batch, heads, rows, _ = problem.query.shape
    kv_heads, length = problem.key.shape[1:3]
    group = heads // kv_heads
    output = torch.full(problem.query.shape, torch.nan, dtype=torch.float64)
    chosen, kept = {}, torch.zeros(batch, kv_heads, rows, dtype=torch.int64)
    for b in range(batch):
        for r in range(kv_heads):
            key = problem.key[b, r].double()
            fine, coarse = window_means(key, KERNEL, STRIDE), window_means(key, 2 * BLOCK, BLOCK)
            for n in range(rows):
                i = length - rows + n
                seen = [t for t in range(len(fine)) if STRIDE * t + KERNEL - 1 <= i]
                seen_coarse = [t for t in range(len(coarse)) if BLOCK * t + 2 * BLOCK - 1 <= i]
                importance = dict.fromkeys(seen, 0.0)
                for h in range(r * group, (r + 1) * group):
                    q = problem.query[b, h, n].double()
                    weight = {t: math.exp(float(q @ fine[t]) * problem.scale) for t in seen}
                    total = sum(weight.values())
                    if lse_mode == "coarse" and seen_coarse:
                        total = sum(math.exp(float(q @ coarse[t]) * problem.scale) for t in seen_coarse)
                    for t in seen:
                        importance[t] += weight[t] / total
                own = i // BLOCK
                scores = []
                for j in range(own + 1):
                    touching = [importance[t] for t in seen if 4 * j - 1 <= t <= 4 * j + 3]
                    scores.append(max(touching) if touching else 0.0)
                forced = {j for j in range(own + 1) if j < init or own - local <= j}
                free = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: -scores[j])
                blocks = forced | set(free[: max(0, top_k - len(forced))])
                chosen[b, r, n] = blocks
                tokens = [t for t in range(i + 1) if t // BLOCK in blocks]
                kept[b, r, n] = len(tokens)
                for h in range(r * group, (r + 1) * group):
                    output[b, h, n] = attend_tokens(problem, b, h, n, tokens)
    return output, chosen, kept


def as_sets(selected):
    """`[B, Hkv, R, M]` bool to a dict of sets."""
    return {
        (b, r, n): set(selected[b, r, n].nonzero().flatten().tolist())
        for b in range(selected.shape[0])
        for r in range(selected.shape[1])
        for n in range(selected.shape[2])
    }


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("length,group", [(5, 1), (83, 4), (112, 1), (121, 2)])
@pytest.mark.parametrize("lse_mode", ["exact", "coarse"])
def test_everything_equals_the_loops(phase, length, group, lse_mode):
    problem = make_problem(phase, length, group=group, head_dim=8, block_size=BLOCK)
    operator = infllmv2_reference.prepare(problem, lse_mode=lse_mode, **SMALL)
    output, blocks, kept = loop_infllmv2(problem, 4, 1, 1, lse_mode)
    rows = torch.arange(problem.query.shape[2])
    expected = operator.reference(rows, None)
    assert as_sets(operator.selected(rows)) == blocks == as_sets(expected.selected)
    assert torch.equal(operator.kept(), kept)
    torch.testing.assert_close(operator.run(), output, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(expected.output, output, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(operator.stages["attend"](), output, rtol=1e-9, atol=1e-10)
    assert as_sets(operator.stages["select"]()) == blocks


def test_the_coarse_mode_can_choose_otherwise():
    """The loops of both modes agree with their operators above; here they must differ, or the mode would be
    untested.
    """
    problem = make_problem("prefill", 121, group=4, head_dim=8, block_size=BLOCK)
    exact, coarse = (
        infllmv2_reference.prepare(problem, lse_mode=m, **SMALL).selected(torch.arange(121))
        for m in ("exact", "coarse")
    )
    assert not torch.equal(exact, coarse)
    assert torch.equal(exact[:, :, : 2 * BLOCK - 1], coarse[:, :, : 2 * BLOCK - 1]), (
        "exact where no coarse window"
    )


@pytest.mark.parametrize("length", [7, 8, 12, 32, 48, 81])
@pytest.mark.parametrize("lse_mode", ["exact", "coarse"])
def test_decode_equals_the_last_row_of_prefill(length, lse_mode):
    prefill = make_problem("prefill", length, block_size=BLOCK)
    decode = Problem(
        "decode",
        prefill.query[:, :, -1:],
        prefill.key,
        prefill.value,
        prefill.summary_query,
        block_size=BLOCK,
    )
    whole, step = (infllmv2_reference.prepare(p, lse_mode=lse_mode, **SMALL) for p in (prefill, decode))
    torch.testing.assert_close(step.run()[:, :, 0], whole.run()[:, :, -1], rtol=1e-10, atol=1e-12)
    assert torch.equal(step.selected(torch.tensor([0])), whole.selected(torch.tensor([length - 1])))
    assert torch.equal(step.kept()[..., 0], whole.kept()[..., -1])
    fine = length >= 8 and (length - 8) % 4 == 0
    coarse = lse_mode == "coarse" and length >= 32 and length % 16 == 0
    assert step.notes["windows_appended"] == fine + coarse


def test_a_window_across_a_border_ties_two_blocks_and_the_earlier_wins():
    problem = make_problem("prefill", 112, kv_heads=1, group=1, block_size=BLOCK)
    problem.key.mul_(0.05)
    problem.query[:, :, -1] = 1.0
    problem.key[:, :, 44:52] = 3.0  # the window over the border of blocks 2 and 3
    operator = infllmv2_reference.prepare(problem, top_k=4, local_blocks=1)
    expected = operator.reference(torch.tensor([111]), None)
    assert as_sets(expected.selected)[0, 0, 0] == {0, 2, 5, 6}
    assert as_sets(expected.undecided)[0, 0, 0] == {2, 3}


@pytest.mark.parametrize("dense_len", [0, 200])
def test_short_contexts_are_dense_below_dense_len(dense_len):
    problem = make_problem("prefill", 150, block_size=BLOCK)
    operator = infllmv2_reference.prepare(problem, dense_len=dense_len, **SMALL)
    rows = torch.arange(150)
    dense = dense_expected(problem, rows).output
    same = torch.allclose(operator.run(), dense, rtol=1e-9, atol=1e-11)
    assert same == bool(dense_len)
    assert (operator.notes.get("fallback") == "dense below 200") == bool(dense_len)
    if dense_len:
        assert torch.equal(operator.kept(), (rows + 1).expand(1, 2, 150))
        expected = operator.reference(rows, operator.selected(rows))
        assert torch.equal(expected.selected, operator.selected(rows)) and not expected.undecided.any()


def test_low_precision_selects_as_fp64_does_outside_ties():
    problem = make_problem("prefill", 300, group=4, head_dim=32, block_size=BLOCK, dtype=torch.bfloat16)
    operator = infllmv2_reference.prepare(problem, top_k=6, local_blocks=1)
    rows = torch.arange(300)
    selected = operator.selected(rows)
    expected = operator.reference(rows, selected)
    assert not ((selected != expected.selected) & ~expected.undecided).any()
    assert expected.undecided.double().mean() < 0.1
    assert relative_error(operator.run(), expected.output) < 0.06


@pytest.mark.parametrize("lse_mode", ["exact", "coarse"])
def test_gradients_are_those_of_attention_over_the_selection(lse_mode):
    problem = make_problem("train", 83, block_size=BLOCK)
    operator = infllmv2_reference.prepare(problem, lse_mode=lse_mode, **SMALL)
    operator.run()
    selected = operator.selected(torch.arange(83))
    exact = attention_gradients(
        problem.query, problem.key, problem.value, problem.grad_output, selected=selected, block_size=BLOCK
    )
    for name, grad in exact.items():
        torch.testing.assert_close(operator.gradients()[name], grad, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(operator.reference_gradients()[name], grad, rtol=1e-9, atol=1e-11)


def test_presets_and_limits():
    problem = make_problem("prefill", 64 * 130, kv_heads=1, group=1, head_dim=4, block_size=64)
    names = ("top_k_used", "init_blocks", "local_blocks", "lse_mode", "dense_len")
    paper = infllmv2_reference.prepare(problem, preset="paper")
    assert [paper.notes[name] for name in names] == [96, 1, 32, "coarse", 8192]
    benchmark = infllmv2_reference.prepare(problem)
    assert [benchmark.notes[name] for name in names] == [64, 1, 16, "exact", 0]
    assert infllmv2_reference.prepare(problem, top_k=2).notes["top_k_used"] == 18
    assert infllmv2_reference.prepare(problem, top_k=999).notes["top_k_used"] == 130
    with pytest.raises(ValueError, match="lse_mode must be"):
        infllmv2_reference.prepare(problem, lse_mode="rough")
    with pytest.raises(ValueError, match="preset must be one of paper, infllmv2_paper"):
        infllmv2_reference.prepare(problem, preset="nsa")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
@pytest.mark.parametrize("lse_mode", ["exact", "coarse"])
def test_on_a_gpu(phase, lse_mode):
    problem = make_problem(
        phase, 2100, group=16, head_dim=128, block_size=64, dtype=torch.bfloat16, device="cuda"
    )
    operator = infllmv2_reference.prepare(problem, lse_mode=lse_mode, top_k=20)
    rows = torch.arange(0, problem.query.shape[2], 37)
    selected = operator.selected(rows)
    expected = operator.reference(rows, selected)
    output = operator.run()
    assert not ((selected != expected.selected) & ~expected.undecided).any()
    assert relative_error(output[:, :, rows.cuda()], expected.output) < 0.06
    if phase == "train":
        exact = operator.reference_gradients()
        for name, grad in operator.gradients().items():
            assert (grad.double() - exact[name]).norm() / exact[name].norm() < 0.02, name
