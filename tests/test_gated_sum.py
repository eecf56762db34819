"""The gated sum of branches and its gradients, against plain multiplication in fp64."""

import pytest
import torch

from dashbench.kernels.gated_sum import gated_sum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("branches", [2, 3])
def test_sum_and_gradients(branches):
    draw = torch.Generator().manual_seed(branches)
    outputs = [torch.randn(2, 3, 37, 64, generator=draw).to(DEVICE) for _ in range(branches)]
    outputs[0] = outputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    gates = torch.rand(2, 3, 37, branches, generator=draw).to(DEVICE)
    leaves = [x.requires_grad_() for x in (gates, *outputs)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wanted = sum(exact[0][..., n, None] * o for n, o in enumerate(exact[1:]))
    found = gated_sum(*leaves)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(gated_sum(*(x.detach() for x in leaves)), found)
    grad = torch.randn(found.shape, generator=draw).to(DEVICE)
    right = torch.autograd.grad(wanted, exact, grad.double())
    for got, expected in zip(torch.autograd.grad(found, leaves, grad), right, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_every_branch_needs_its_gate():
    x = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match="3 branches and 2 gates"):
        gated_sum(torch.zeros(1, 1, 4, 2), x, x, x)
