"""Tiny attention problems and the brute-force loops that the tests of the baselines compare with."""

import math

import torch

from dashbench.baselines.api import Problem


def make_problem(
    phase,
    length,
    *,
    batch=1,
    kv_heads=2,
    group=2,
    head_dim=16,
    block_size=16,
    dtype=torch.float64,
    seed=0,
    device="cpu",
):
    """Gaussian values; keys in runs with a shared direction and an outlier, so that softmax rows are far from
    flat.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    rows = 1 if phase == "decode" else length
    heads = kv_heads * group
    topics = 2.5 * normal(4, head_dim)
    which = torch.randint(0, 4, (batch, kv_heads, math.ceil(length / 8)), generator=draw)
    key = normal(batch, kv_heads, length, head_dim)
    key += topics[which].repeat_interleave(8, 2)[:, :, :length]
    key[:, :, length // 3] *= 4
    query = normal(batch, heads, rows, head_dim)
    query += topics[torch.randint(0, 4, (batch, heads, rows), generator=draw)] * 0.7
    value = normal(batch, kv_heads, length, head_dim)
    grad = normal(batch, heads, rows, head_dim) if phase == "train" else None
    tensors = {"query": query, "key": key, "value": value, "summary_query": torch.zeros(kv_heads, head_dim)}
    tensors = {name: x.to(device=device, dtype=dtype) for name, x in tensors.items()}
    if grad is not None:
        grad = grad.to(device=device, dtype=dtype)
    return Problem(phase=phase, grad_output=grad, block_size=block_size, seed=seed, **tensors)


def attend_tokens(problem, b, h, i, tokens):
    """Softmax attention of query row i of head h over the listed key tokens, one number at a time; `[D]`
    fp64.
    """
    group = problem.query.shape[1] // problem.key.shape[1]
    q = problem.query[b, h, i].double()
    if not tokens:
        return torch.zeros_like(q)
    key, value = problem.key[b, h // group].double(), problem.value[b, h // group].double()
    weights = [math.exp(float(q @ key[t]) * problem.scale) for t in tokens]
    total = sum(weights)
    return sum(w / total * value[t] for w, t in zip(weights, tokens, strict=True))


def relative_error(actual, expected):
    """Largest deviation over the root mean square of what is expected."""
    expected = expected.double().cpu()
    return float((actual.double().cpu() - expected).abs().max() / expected.pow(2).mean().sqrt())
