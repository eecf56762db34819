"""Entmax-1.5 attention token by token by AdaSplash-2: DashAttention's relative without blocks or routing.

Every query head gives exactly zero weight to the tokens whose score lies under its own threshold; how many
that are is the inputs' affair. Code: https://github.com/deep-spin/adasplash (PyPI: `pip install
adasplash==0.2.2`, written from 0.2.2); paper: AdaSplash, arXiv 2502.12082.

Parameters: `niter`, the library's refinement steps of the threshold (its default: 1).

Debts and facts:
    * No knob: sparsity is not set, and the kernels do not say what it was, so rows carry no sparsity.
    * The gate fails it on planted inputs: relative L2 0.9 to 1.0 % (limit 0.5 %) at 1k, 4k and 16k tokens,
      whatever `niter` (1 to 10), because its kernels round the scaled query to bf16 before the product. On
      inputs of unit variance it passes. Training fails there too: gradients are off by 3 to 4.5 % (limit
      1 %) at 512 tokens on an H100.
    * Causal prefill and training only; the library has no step against a cache.
    * The library wants contiguous `[B, H, N, D]`, at least 64 tokens, and a power of two of them (other
      lengths are padded here before the timed region and named by its `varlen`).
"""

from __future__ import annotations

from importlib import metadata, util

import torch

from dashbench.baselines.api import Expected, Operator, Problem, Unsupported
from dashbench.baselines.attention_reference import row_slices, small_enough_for_gradients
from dashbench.kernels.reference import entmax

NAMES = ("query", "key", "value")
LEAST = 64


def entmax_rows(query, key, value, positions: torch.Tensor) -> torch.Tensor:
    """Causal entmax-1.5 attention of query rows `[B, Hq, R, D]` at `positions` `[R]`."""
    group = query.shape[1] // key.shape[1]
    causal = torch.arange(key.shape[2], device=key.device) <= positions[:, None]
    outputs = []
    for r in range(key.shape[1]):
        heads = query[:, r * group : (r + 1) * group]
        scores = heads @ key[:, r : r + 1].mT * query.shape[-1] ** -0.5
        outputs.append(entmax(scores.masked_fill(~causal, -torch.inf)) @ value[:, r : r + 1])
    return torch.cat(outputs, 1)


def prepare(problem: Problem, *, niter: int = 1) -> Operator:
    """AdaSplash-2 for one problem.

    Raises:
        Unsupported: no GPU, no library, or decode.
    """
    if not problem.query.is_cuda:
        raise Unsupported("AdaSplash's Triton kernels need a GPU")
    if util.find_spec("adasplash") is None:
        raise Unsupported("adasplash is not installed: pip install adasplash==0.2.2")
    if problem.phase == "decode":
        raise Unsupported("AdaSplash has no decode step")
    from adasplash import adasplash_v2

    length = problem.query.shape[2]
    padded = max(LEAST, 1 << (length - 1).bit_length())
    lengths = None
    if padded != length:
        batch = problem.query.shape[0]
        lengths = torch.full((batch,), length, dtype=torch.int32, device=problem.query.device)

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x.detach(), (0, 0, 0, padded - length)).contiguous()

    tensors = [laid_out(getattr(problem, name)) for name in NAMES]

    @torch.no_grad()
    def reference(rows: torch.Tensor, _) -> Expected:
        rows = rows.to(problem.query.device)
        key, value = problem.key.double(), problem.value.double()
        each = problem.query.shape[0] * problem.query.shape[1] * length * 8
        parts = [
            entmax_rows(problem.query[:, :, rows[part]].double(), key, value, rows[part])
            for part in row_slices(len(rows), each)
        ]
        return Expected(torch.cat(parts, 2))

    notes = {"adasplash": metadata.version("adasplash"), "niter": niter, "sparsity": "not measured"}
    if problem.phase == "prefill":

        @torch.no_grad()
        def run() -> torch.Tensor:
            return adasplash_v2(*tensors, niter=niter, varlen=lengths)[:, :, :length]

        return Operator(run=run, reference=reference, notes=notes)

    leaves = [x.requires_grad_() for x in tensors]
    grad_output = laid_out(problem.grad_output)
    grads: dict[str, torch.Tensor] = {}

    def run_train() -> torch.Tensor:
        out = adasplash_v2(*leaves, niter=niter, varlen=lengths)
        new = torch.autograd.grad(out, leaves, grad_output)
        grads.update({name: g[:, :, :length] for name, g in zip(NAMES, new, strict=True)})
        return out.detach()[:, :, :length]

    def exact_gradients() -> dict[str, torch.Tensor]:
        exact = [getattr(problem, name).double().requires_grad_() for name in NAMES]
        positions = torch.arange(length, device=problem.query.device)
        out = entmax_rows(*exact, positions)
        new = torch.autograd.grad(out, exact, problem.grad_output.double())
        return dict(zip(NAMES, new, strict=True))

    return Operator(
        run=run_train,
        reference=reference,
        gradients=lambda: dict(grads),
        reference_gradients=exact_gradients if small_enough_for_gradients(problem) else None,
        notes=notes,
    )
