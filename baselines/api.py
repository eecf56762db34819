"""What a method is: the contract between dashbench and every attention it measures.

A method is a function `prepare(problem, **knobs) -> Operator` in one file. The harness calls it in a worker
process, outside any timed region; what `Operator.run` does is what gets timed. A method raises
`Unsupported` for a problem it cannot do; the harness records that as `skipped: reason` and never puts
another kernel in its place.

Letters in shapes: B batch, Hq query heads, Hkv key/value heads, G = Hq / Hkv, N query positions, L key
positions, D head dim, R checked query rows, M = ceil(L / block) blocks. Query head h reads key/value head h
// G. All positions are zero-based.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Phase = Literal["prefill", "decode", "train"]


class Unsupported(Exception):
    """This method cannot do this problem; the message is the reason that the user reads."""


@dataclass(frozen=True)
class Problem:
    """One attention problem, already on the device, in the layout `[B, H, N, D]` (any strides).

    Attributes:
        phase: `prefill` (N = L, causal), `decode` (N = 1 new token at position L - 1 against a cache of L
            tokens, the new one included) or `train` (prefill forward and backward).
        query: `[B, Hq, N, D]`, after position embedding, in the working dtype.
        key, value: `[B, Hkv, L, D]`.
        summary_query: `[Hkv, D]`, DashAttention's learned query of the chunk summaries (zero: mean pooling).
        grad_output: `[B, Hq, N, D]` for `train`, else None.
        block_size: tokens in a chunk or block of keys.
        seed: seeds whatever parameters a method makes for itself (gates, compressors).
    """

    phase: Phase
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    summary_query: torch.Tensor
    grad_output: torch.Tensor | None = None
    block_size: int = 64
    seed: int = 0

    @property
    def scale(self) -> float:
        """Softmax scale 1 / sqrt(D)."""
        return self.query.shape[-1] ** -0.5

    @property
    def start(self) -> int:
        """Absolute position of query row 0: 0 in prefill, L - 1 in decode."""
        return self.key.shape[2] - self.query.shape[2]


@dataclass(frozen=True)
class Expected:
    """What the fp64 reference says of some query rows.

    Attributes:
        output: `[B, Hq, R, D]` fp64, computed over the *method's own* selection when one is given, so that
            a borderline block that falls on the other side of a threshold is judged by
            `selected`/`undecided` and not counted twice.
        selected: `[B, Hkv, R, M]` bool, the exact selection, or None for dense attention.
        undecided: same shape, True where the exact selection is a tie within rounding (either answer is
            right).
    """

    output: torch.Tensor
    selected: torch.Tensor | None = None
    undecided: torch.Tensor | None = None


@dataclass
class Operator:
    """A prepared method.

    Attributes:
        run: the whole operator, no arguments, returns the output `[B, Hq, N, D]`. For `train` it runs
            forward and backward and leaves the gradients for `gradients`. This is what is timed; it must
            not synchronise with the host unless the method really does.
        reference: `reference(rows, selected) -> Expected`; `rows` is an int64 tensor `[R]` of query rows (0
            <= row < N), `selected` what `Operator.selected(rows)` gave (None for dense methods). Exact
            mathematics in fp64, memory bounded by R.
        stages: parts of the operator by their standard names (summarize, route, compress, select, attend,
            combine, append, backward), each callable alone with its inputs prepared, for the breakdown.
        selected: `selected(rows) -> [B, Hkv, R, M]` bool: blocks that the method attended; None if dense.
        kept: `kept() -> [B, Hkv, N]` int64: distinct causal key tokens each query attended; None if dense.
            Called once, untimed.
        tile_union: `tile_union(t) -> float`: mean size of the union of routes over t consecutive queries
            over the mean size of one route (tile inflation); None where it makes no sense. The harness
            derives it from `selected` if this is None.
        gradients: for `train`: `gradients() -> {"query": ..., "key": ..., "value": ...}` of the last `run`.
        score_gradient: for `train` where queries act otherwise than through scores as well (gates made from
            them): the part of the last `run`'s gradient of query that comes through scores.
        reference_gradients: for `train`: `reference_gradients() -> same keys`, fp64, of the same problem
            (small problems only) or None.
        notes: facts a row should carry: {"fallback": "dense below 2048"}, tile sizes, versions, preset names.
        weights_bytes: bytes of state the operator keeps beside its inputs (caches, summaries), for reports.
    """

    run: Callable[[], torch.Tensor]
    reference: Callable[[torch.Tensor, torch.Tensor | None], Expected]
    stages: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    selected: Callable[[torch.Tensor], torch.Tensor] | None = None
    kept: Callable[[], torch.Tensor] | None = None
    tile_union: Callable[[int], float] | None = None
    gradients: Callable[[], dict[str, torch.Tensor]] | None = None
    score_gradient: Callable[[], torch.Tensor] | None = None
    reference_gradients: Callable[[], dict[str, torch.Tensor]] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    weights_bytes: int = 0
