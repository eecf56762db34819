"""The correctness gate: no time without it.

A seeded handful of query rows of the real problem, at its real length, is compared with the fp64 reference.
Two questions are kept apart, because a chunk that sits on the routing threshold may fall either way: is the
method's *selection* right wherever exact mathematics decides it, and is its *output* right for the
selection it made?

The inputs are the exact bits that the method saw, so what is tolerated is only the rounding of probabilities,
accumulations and the output itself:

| dtype | element | relative L2, all rows | relative L2, one row |
|---|---|---|---|
| bfloat16 | 2e-2 | 5e-3 | 4e-2 |
| float16 | 4e-3 | 1e-3 | 8e-3 |
| float32 | 1e-3 | 1e-3 | 8e-3 |

An element's limit is absolute, times the expected value where that is above 1. One row is one query of one
head. Late queries average many values and are small: without their own limit, a kernel that is wrong only
there would hide behind the early ones. float32 leaves room for TF32 products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dashbench.baselines.api import Expected, Operator, Problem
from dashbench.rows import Check

ROWS = 64


@dataclass(frozen=True)
class Tolerance:
    """Largest errors that rounding explains; see the module's table."""

    element: float
    relative_l2: float

    @property
    def row_relative_l2(self) -> float:
        """A single row scatters more than all of them together."""
        return 8 * self.relative_l2

    @property
    def gradient_relative_l2(self) -> float:
        """Gradients sum products of rounded probabilities: twice as loose."""
        return 2 * self.relative_l2


TOLERANCE = {
    torch.bfloat16: Tolerance(2e-2, 5e-3),
    torch.float16: Tolerance(4e-3, 1e-3),
    torch.float32: Tolerance(1e-3, 1e-3),
    # Methods that compute in another precision than their inputs' dtype name it in `notes["arithmetic"]`.
    # FP8 has 3 bits of mantissa and rounds the probabilities too; its reference is exact attention over the
    # rounded inputs.
    "float8_e4m3fn": Tolerance(2e-1, 8e-2),
    # A library that rounds the scaled query, the pooled keys and values, each branch's output and its gate to
    # bfloat16 before their sum: twice the rounding of one kernel (fla's NSA; 5.0e-3 to 6.9e-3 seen).
    "bfloat16 between branches": Tolerance(4e-2, 1e-2),
}
# Euler's identities are judged relative to the terms' own size; see `_identity_problems`.
IDENTITY_SIGMAS = 5.0


def checked_rows(count: int, block: int, wanted: int, seed: int) -> torch.Tensor:
    """Query rows to check: the first and the last, the borders of some blocks, and random ones.

    Args:
        count: query rows there are.
        block: block size.
        wanted: rows to choose; where fewer are wanted than there are ends and borders, those are chosen
            anyway.
        seed: of the random ones.

    Returns:
        Ascending int64 on the CPU; all rows if there are no more than wanted.
    """
    if count <= wanted:
        return torch.arange(count)
    last = (count - 1) // block * block
    chosen = {
        0,
        1,
        block - 1,
        block,
        block + 1,
        2 * block - 1,
        2 * block,
        last - 1,
        last,
        last + 1,
        count - 2,
        count - 1,
    }
    chosen = {row for row in chosen if 0 <= row < count}
    generator = torch.Generator().manual_seed(seed)
    while len(chosen) < wanted:
        chosen.add(int(torch.randint(0, count, (1,), generator=generator)))
    return torch.tensor(sorted(chosen))


def gate(operator: Operator, problem: Problem, rows: int = ROWS, seed: int = 0) -> Check:
    """Runs the operator once and judges it.

    Args:
        operator: prepared for `problem`.
        problem: the inputs.
        rows: query rows to compare (of all batch elements and heads).
        seed: of the choice of rows.

    Returns:
        A check; `passed` is False with the reasons in `detail`. NaN and infinity never pass.
    """
    query = problem.query
    chosen_rows = checked_rows(query.shape[2], problem.block_size, rows, seed).to(query.device)
    # The allocator hands this block to the output next: what the method does not write stays NaN.
    poison = torch.full_like(query, torch.nan)
    del poison
    output = operator.run()
    if tuple(output.shape) != tuple(query.shape):
        detail = f"output has shape {list(output.shape)}, expected {list(query.shape)}"
        return Check(passed=False, rows=0, detail=detail)
    if not _finite(output):
        return Check(passed=False, rows=len(chosen_rows), detail="output is not finite everywhere")
    expected, wrong, undecided = _expected(operator, chosen_rows)
    actual = output.detach()[:, :, chosen_rows].double()
    tolerance = TOLERANCE[operator.notes.get("arithmetic", query.dtype)]
    problems, worst, relative = _output_problems(actual, expected.output.to(actual), tolerance)
    if wrong:
        problems.insert(0, f"{wrong} blocks on the wrong side of the selection")
    remarks = [f"{undecided} blocks undecided within rounding"] if undecided else []
    if problem.phase == "train":
        bad, how = _gradient_problems(operator, problem, output, tolerance)
        problems += bad
        remarks.append(how)
    return Check(
        passed=not problems,
        rows=len(chosen_rows),
        max_abs=worst,
        relative_l2=relative,
        selection_errors=wrong,
        detail="; ".join(problems or remarks),
    )


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in fp64; infinite if not finite, absolute if ‖expected‖ is 0."""
    difference = float((actual.double() - expected.double()).norm())
    norm = float(expected.double().norm())
    if not difference < float("inf"):
        return float("inf")
    return difference / norm if norm else difference


def _finite(x: torch.Tensor) -> bool:
    """Whether all of `x` is finite: its sum is. `isfinite` would need several times the memory of `x`."""
    return bool(x.detach().sum(dtype=torch.float32).isfinite())


def _output_problems(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance
) -> tuple[list[str], float | None, float | None]:
    error = (actual - expected).abs()
    if not bool(torch.isfinite(error).all()):
        return ["the reference or the output is not finite"], None, None
    worst, relative = float(error.max()), relative_l2(actual, expected)
    problems = []
    excess = float((error / expected.abs().clamp_min(1.0)).max())
    if excess > tolerance.element:
        problems.append(f"an element is off by {excess:.2g} (limit {tolerance.element:g})")
    if relative > tolerance.relative_l2:
        problems.append(f"relative L2 is {relative:.2g} (limit {tolerance.relative_l2:g})")
    norms = expected.norm(dim=-1)
    by_row = float((error.norm(dim=-1) / norms.clamp_min(1e-6)).max())
    if by_row > tolerance.row_relative_l2:
        problems.append(f"relative L2 of one row is {by_row:.2g} (limit {tolerance.row_relative_l2:g})")
    return problems, worst, relative


def _expected(operator: Operator, rows: torch.Tensor) -> tuple[Expected, int | None, int]:
    """The reference for some rows, blocks selected wrongly (None for dense methods), and undecided blocks."""
    chosen = operator.selected(rows) if operator.selected else None
    expected = operator.reference(rows, chosen)
    if chosen is None or expected.selected is None:
        return expected, None, 0
    differs = chosen.cpu().bool() != expected.selected.cpu().bool()
    undecided = 0
    if expected.undecided is not None:
        differs &= ~expected.undecided.cpu()
        undecided = int(expected.undecided.sum())
    return expected, int(differs.sum()), undecided


def _gradient_problems(
    operator: Operator, problem: Problem, output: torch.Tensor, tolerance: Tolerance
) -> tuple[list[str], str]:
    """What is wrong with the gradients, and how they were judged."""
    if operator.gradients is None:
        return ["a method that trains must report its gradients"], ""
    found = operator.gradients()
    missing = {"query", "key", "value"} - found.keys()
    if missing:
        return [f"no gradient of {sorted(missing)[0]}"], ""
    for name, gradient in found.items():
        if not _finite(gradient):
            return [f"gradient of {name} is not finite everywhere"], ""
    if operator.reference_gradients is None:
        if operator.score_gradient is not None:
            found = {**found, "query": operator.score_gradient()}
        return _identity_problems(problem, output, found), "gradients judged by Euler's identities only"
    limit = tolerance.gradient_relative_l2
    problems = []
    for name, reference in operator.reference_gradients().items():
        relative = relative_l2(found[name], reference)
        if not relative <= limit:
            problems.append(f"gradient of {name}: relative L2 is {relative:.2g} (limit {limit:g})")
    return problems, "gradients compared with fp64"


def _identity_problems(problem: Problem, output: torch.Tensor, found: dict[str, torch.Tensor]) -> list[str]:
    """Checks that hold at any size for every batch element and KV head, with output O and its gradient dO.

    Attention is linear in V, so ⟨dV, V⟩ = ⟨dO, O⟩; scores are bilinear in Q and K, so scaling Q is scaling
    K and ⟨dQ, Q⟩ = ⟨dK, K⟩ (routing by mean-pooled keys included, what gates made of queries add to dQ left
    out; a learned summary query breaks it, then this part is left out). Both sides are sums of
    rounded terms: with relative rounding u the difference has a standard deviation of about u times the root
    of the sum of squared terms. A gradient that lacks a head of its group, a scale or a block misses by far
    more. Weaker than a comparison, and labelled so.
    """
    # float32 products may run as TF32, which has 10 bits of mantissa as float16 has.
    rounding = max(torch.finfo(problem.query.dtype).eps, torch.finfo(torch.float16).eps)

    def terms(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sums, squares = [], []
        # One head at a time: all of them in fp64 would not fit.
        for x, y in zip(a.detach().flatten(0, 1), b.detach().flatten(0, 1), strict=True):
            product = x.double() * y.double()
            sums.append(product.sum())
            squares.append(product.square().sum())
        return tuple(torch.stack(x).view(*problem.key.shape[:2], -1).sum(-1) for x in (sums, squares))

    pairs = {"value": (terms(found["value"], problem.value), terms(problem.grad_output, output))}
    if not bool(problem.summary_query.any()):
        pairs["query and key"] = (terms(found["query"], problem.query), terms(found["key"], problem.key))
    problems = []
    for name, ((left, left_squares), (right, right_squares)) in pairs.items():
        noise = rounding * (left_squares + right_squares).sqrt()
        sigmas = float(((left - right).abs() / noise.clamp_min(1e-30)).max())
        if sigmas > IDENTITY_SIGMAS:
            problems.append(f"gradient of {name} misses Euler's identity by {sigmas:.1f} σ of rounding")
    return problems
