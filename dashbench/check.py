"""The correctness gate: no time without it.

A seeded handful of query rows of the real problem, at its real length, is compared with the fp64 reference.
Two questions are kept apart,
because a chunk that sits on the routing threshold may fall either way: is the method's *selection* right
wherever exact mathematics
decides it, and is its *output* right for the selection it made?
"""

from __future__ import annotations

import torch

from dashbench.baselines.api import Expected, Operator, Problem
from dashbench.rows import Check

# (largest absolute error relative to the largest expected value, relative L2 error) an output may have.
# Inputs are taken as the exact bits
# that the method saw, so what remains is rounding of probabilities, accumulations and the output itself.
OUTPUT_TOLERANCE = {
    torch.bfloat16: (2e-2, 5e-3),
    torch.float16: (4e-3, 1e-3),
    torch.float32: (1e-3, 1e-3),  # TF32 products may be on
}
# Gradients sum products of rounded probabilities: twice as loose.
GRADIENT_FACTOR = 2.0
ROWS = 64


def checked_rows(count: int, block: int, wanted: int, seed: int) -> torch.Tensor:
    """Query rows to check: the first, the last, the borders of some blocks, and random ones; ascending,
    int64, on the CPU."""
    if count <= wanted:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    chosen = {0, 1, count - 1, count - 2, block - 1, block, block + 1, 2 * block - 1, 2 * block}
    last = (count - 1) // block * block
    chosen |= {last - 1, last, last + 1}
    chosen = {row for row in chosen if 0 <= row < count}
    while len(chosen) < wanted:
        chosen.add(int(torch.randint(0, count, (1,), generator=generator)))
    return torch.tensor(sorted(chosen))


def errors(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(largest absolute error, relative L2 error) of `actual` against fp64 `expected`; infinity where
    anything is not finite."""
    difference = actual.double() - expected
    if not bool(torch.isfinite(difference).all()):
        return float("inf"), float("inf")
    norm = float(expected.norm())
    return float(difference.abs().max()), float(difference.norm()) / norm if norm else float(
        difference.norm()
    )


def _expected(operator: Operator, rows: torch.Tensor) -> tuple[Expected, int | None]:
    """The reference for some rows, and how many blocks the method selected wrongly (None for dense
    methods)."""
    chosen = operator.selected(rows) if operator.selected else None
    expected = operator.reference(rows, chosen)
    wrong = None
    if chosen is not None and expected.selected is not None:
        differs = chosen.cpu() != expected.selected.cpu()
        if expected.undecided is not None:
            differs &= ~expected.undecided.cpu()
        wrong = int(differs.sum())
    return expected, wrong


def gate(operator: Operator, problem: Problem, rows: int = ROWS, seed: int = 0) -> Check:
    """Runs the operator once and judges it.

    Args:
        operator: prepared for `problem`.
        problem: the inputs.
        rows: query rows to compare (over all batch elements and heads).
        seed: of the choice of rows.

    Returns:
        A check; `passed` is False with the reason in `detail`.
    """
    chosen_rows = checked_rows(problem.query.shape[2], problem.block_size, rows, seed).to(
        problem.query.device
    )
    output = operator.run()
    if tuple(output.shape) != tuple(problem.query.shape):
        detail = f"output has shape {tuple(output.shape)}, expected {tuple(problem.query.shape)}"
        return Check(passed=False, rows=0, detail=detail)
    expected, wrong = _expected(operator, chosen_rows)
    worst, relative = errors(output[:, :, chosen_rows], expected.output)
    limit_abs, limit_l2 = OUTPUT_TOLERANCE[problem.query.dtype]
    limit_abs *= max(1.0, float(expected.output.abs().max()))
    problems = []
    if wrong:
        problems.append(f"{wrong} blocks selected that exact mathematics does not select, or the reverse")
    if worst > limit_abs or relative > limit_l2:
        problems.append(
            f"output off by {worst:.2g} (limit {limit_abs:.2g}), "
            f"relative L2 {relative:.2g} (limit {limit_l2:.2g})"
        )
    if problem.phase == "train":
        problems += _gradient_problems(operator, problem)
    finite = worst != float("inf")
    return Check(
        passed=not problems,
        rows=len(chosen_rows),
        max_abs=worst if finite else None,
        relative_l2=relative if finite else None,
        selection_errors=wrong,
        detail="; ".join(problems) if finite else "output is not finite everywhere",
    )


def _gradient_problems(operator: Operator, problem: Problem) -> list[str]:
    """What is wrong with the gradients; where fp64 gradients of the whole problem are out of reach, only
    that they are finite."""
    if operator.gradients is None:
        return ["a method that trains must report its gradients"]
    found = operator.gradients()
    out = [
        f"gradient of {name} is not finite" for name, g in found.items() if not bool(torch.isfinite(g).all())
    ]
    limit = GRADIENT_FACTOR * OUTPUT_TOLERANCE[problem.query.dtype][1]
    expected = operator.reference_gradients() if operator.reference_gradients and not out else {}
    for name, reference in expected.items():
        _, relative = errors(found[name], reference)
        if not relative <= limit:
            out.append(f"gradient of {name} off by relative L2 {relative:.2g} (limit {limit:.2g})")
    return out
