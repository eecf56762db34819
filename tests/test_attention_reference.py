"""The fp64 reference against loops over single tokens, and its gradients against autograd."""

import pytest
import torch
from baseline_problems import attend_tokens, make_problem

from dashbench.baselines import attention_reference as reference


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("length", [1, 15, 37])
def test_rows_equal_the_loop_over_tokens(length, group):
    problem = make_problem("prefill", length, batch=2, group=group, dtype=torch.float32)
    rows = torch.tensor(sorted({0, length // 2, length - 1}))
    actual = reference.attention_rows(problem.query[:, :, rows], problem.key, problem.value, rows)
    for b in range(2):
        for h in range(2 * group):
            for n, i in enumerate(rows.tolist()):
                expected = attend_tokens(problem, b, h, i, list(range(i + 1)))
                torch.testing.assert_close(actual[b, h, n], expected, rtol=1e-12, atol=1e-12)


def test_a_selection_and_a_window_restrict_the_keys():
    problem = make_problem("prefill", 37, block_size=8)
    rows = torch.tensor([3, 20, 36])
    selected = torch.zeros(1, 2, 3, 5, dtype=torch.bool)
    selected[0, 0, 0, 0] = selected[0, 0, 1, 2] = selected[0, 1, 2, 4] = selected[0, 1, 2, 1] = True
    actual = reference.attention_rows(
        problem.query[:, :, rows], problem.key, problem.value, rows, selected, block_size=8
    )
    windowed = reference.attention_rows(problem.query[:, :, rows], problem.key, problem.value, rows, window=5)
    for h in range(4):
        for n, i in enumerate(rows.tolist()):
            tokens = [t for t in range(i + 1) if selected[0, h // 2, n, t // 8]]
            torch.testing.assert_close(actual[0, h, n], attend_tokens(problem, 0, h, i, tokens))
            tokens = list(range(max(0, i - 4), i + 1))
            torch.testing.assert_close(windowed[0, h, n], attend_tokens(problem, 0, h, i, tokens))
    assert (actual[0, 2:, :2] == 0).all(), "a row that selects nothing gives zero"


def test_slicing_rows_changes_nothing(monkeypatch):
    problem = make_problem("train", 29)
    rows = torch.arange(29)
    whole = reference.attention_rows(problem.query, problem.key, problem.value, rows)
    gradients = reference.dense_gradients(problem)
    monkeypatch.setattr(reference.row_slices, "__defaults__", (1000, None))
    torch.testing.assert_close(
        reference.attention_rows(problem.query, problem.key, problem.value, rows),
        whole,
        rtol=1e-13,
        atol=1e-13,
    )
    for name, grad in reference.dense_gradients(problem).items():
        torch.testing.assert_close(grad, gradients[name], rtol=1e-12, atol=1e-12)


def test_row_slices_cover_everything_within_the_budget():
    slices = list(reference.row_slices(10, 300, budget=1000))
    assert [(s.start, s.stop) for s in slices] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [(s.start, s.stop) for s in reference.row_slices(2, 5000, budget=1000)] == [(0, 1), (1, 2)]
    assert [(s.start, s.stop) for s in reference.row_slices(5, 1, most=3)] == [(0, 3), (3, 5)]


@pytest.mark.parametrize("select", [False, True])
def test_gradients_equal_autograd_of_naive_attention(select):
    problem = make_problem("train", 21, group=3, block_size=8)
    selected = None
    mask = torch.ones(21, 21, dtype=torch.bool).tril().expand(1, 6, 21, 21)
    if select:
        selected = torch.rand(1, 2, 21, 3, generator=torch.Generator().manual_seed(1)) < 0.5
        mask = mask & selected.repeat_interleave(8, -1)[..., :21].repeat_interleave(3, 1)
    q, k, v = (getattr(problem, n).clone().requires_grad_() for n in ("query", "key", "value"))
    scores = q @ k.repeat_interleave(3, 1).mT * problem.scale
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach()) * mask
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    (weights @ v.repeat_interleave(3, 1)).backward(problem.grad_output)
    actual = reference.attention_gradients(
        problem.query, problem.key, problem.value, problem.grad_output, selected=selected, block_size=8
    )
    for name, leaf in (("query", q), ("key", k), ("value", v)):
        torch.testing.assert_close(actual[name], leaf.grad, rtol=1e-9, atol=1e-11)


def test_kept_tokens_counts_causal_tokens_of_selected_blocks():
    selected = torch.tensor([[True, False, True], [True, True, False]])
    kept = reference.kept_tokens(selected, torch.tensor([10, 5]), 4)
    assert kept.tolist() == [4 + 3, 4 + 2]
