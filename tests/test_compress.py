"""Compression kernels against the specification's compressors in fp64, with gradients of everything."""

import pytest
import torch
from baseline_problems import make_problem

from dashbench.baselines.block_selection import Windows
from dashbench.baselines.nsa_compression import KINDS, compress
from dashbench.baselines.nsa_reference import Compressor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "eager"])
@pytest.mark.parametrize("length", [5, 16, 45, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, length, kernels):
    problem = make_problem("prefill", length, head_dim=16, block_size=32, device=DEVICE)
    specified = Compressor(kind, Windows(16, 8), problem)
    wanted = specified(problem.key, problem.value)
    key, value = (x.float().requires_grad_() for x in (problem.key, problem.value))
    weights = {name: w.float().requires_grad_() for name, w in specified.weights.items()}
    found = compress(kind, key, value, 8, weights, kernels=kernels)
    for got, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)
    if length < 16:
        assert found[0].shape[2] == 0
        return
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE) for x in found]
    exact = [x.detach().double().requires_grad_() for x in (key, value, *weights.values())]
    live = Compressor(kind, Windows(16, 8), problem)
    live.weights = dict(zip(weights, exact[2:], strict=True))
    right = torch.autograd.grad(live(*exact[:2]), exact, [g.double() for g in grads])
    got = torch.autograd.grad(found, [key, value, *weights.values()], grads)
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "eager"])
def test_the_networks_second_bias_shifts_keys_and_values(kernels):
    problem = make_problem("prefill", 40, head_dim=16, block_size=32, dtype=torch.float32, device=DEVICE)
    weights = dict(Compressor("mlp", Windows(16, 8), problem).weights)
    plain = compress("mlp", problem.key, problem.value, 8, weights, kernels=kernels)
    weights["second_bias"] = torch.tensor([0.5, -2.0], device=DEVICE)
    shifted = compress("mlp", problem.key, problem.value, 8, weights, kernels=kernels)
    for before, after, by in zip(plain, shifted, (0.5, -2.0), strict=True):
        torch.testing.assert_close(after - before, torch.full_like(before, by), rtol=1e-4, atol=1e-4)


def test_missing_weights_and_unknown_kinds_are_named():
    x = torch.zeros(1, 1, 32, 16)
    with pytest.raises(ValueError, match="first, bias, second"):
        compress("mlp", x, x, 8, {})
    with pytest.raises(ValueError, match="avgpool"):
        compress("maxpool", x, x, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_real_shapes_on_a_gpu(kind):
    given = {"kv_heads": 2, "group": 1, "head_dim": 128, "block_size": 64, "device": "cuda"}
    problem = make_problem("prefill", 4100, dtype=torch.bfloat16, **given)
    compressor = Compressor(kind, Windows(32, 16), problem)
    found = compress(kind, problem.key, problem.value, 16, compressor.weights)
    wanted = compressor(problem.key.double(), problem.value.double())
    for got, right in zip(found, wanted, strict=True):
        assert float((got.double() - right).norm() / right.norm()) < 5e-3
