"""AdaSplash's reference against entmax-1.5 by bisection, row by row; on a GPU the library against it."""

from importlib import util

import pytest
import torch
from baseline_problems import make_problem

from dashbench.baselines.adasplash_entmax import entmax_rows, prepare
from dashbench.baselines.api import Unsupported
from dashbench.check import gate


def bisected_entmax(scores):
    """Entmax-1.5 of a list of fp64 scores: p = [z / 2 − τ]₊² with τ halved down to where they sum to one."""
    x = scores / 2
    low, high = x.max() - 1, x.max()
    for _ in range(60):
        middle = (low + high) / 2
        total = (x - middle).clamp_min(0).square().sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    return (x - low).clamp_min(0).square()


def test_rows_are_entmax_of_the_past():
    problem = make_problem("prefill", 40, group=2, head_dim=16)
    rows = torch.tensor([0, 1, 17, 39])
    out = entmax_rows(problem.query[:, :, rows], problem.key, problem.value, rows)
    for n, i in enumerate(rows.tolist()):
        for head in range(4):
            past = slice(0, i + 1)
            key, value = problem.key[0, head // 2, past], problem.value[0, head // 2, past]
            weights = bisected_entmax(key @ problem.query[0, head, i] * problem.scale)
            if i > 16:
                assert (weights == 0).any(), "the case must be sparse"
            torch.testing.assert_close(out[0, head, n], weights @ value, rtol=1e-9, atol=1e-9)


def test_a_cpu_is_refused():
    with pytest.raises(Unsupported, match="GPU"):
        prepare(make_problem("prefill", 64))


@pytest.mark.gpu
@pytest.mark.skipif(util.find_spec("adasplash") is None, reason="adasplash is not installed")
@pytest.mark.parametrize("phase,length", [("prefill", 1024), ("prefill", 1000), ("train", 512)])
def test_the_library_agrees_on_a_gpu(phase, length):
    shape = {"kv_heads": 2, "group": 4, "head_dim": 128, "block_size": 64, "device": "cuda"}
    problem = make_problem(phase, length, dtype=torch.bfloat16, **shape)
    check = gate(prepare(problem), problem)
    assert check.passed, check.detail
