"""From the equations of a block-selecting attention to an `Operator`: prefill, decode and training in slices
of query rows.

A subclass of `BlockSparseReference` says how keys are compressed, how a query scores blocks and what it makes
of the tokens it chose (`nsa_reference`, `infllmv2_reference`); everything here is the same for all of them.
Nothing here is fast: queries and keys are raised to fp32 (fp64 stays fp64) and all causal keys of a slice are
multiplied, selected or not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from dashbench.baselines.api import Expected, Operator, Problem
from dashbench.baselines.attention_reference import kept_tokens, row_slices, small_enough_for_gradients
from dashbench.baselines.block_selection import TopBlocks, tie_margin, wide

State = tuple[torch.Tensor, ...]
"""What a method derives from the raw keys and values, each `[B, Hkv, T, D]`: compressed keys, compressed
values, ...
"""

SLICE_ROWS = 256
"""Most query rows of a slice: a slice reads keys up to its last row only, so shorter ones skip more of the
future.
"""


class BlockSparseReference(ABC):
    """One block-selecting attention, as mathematics on tensors.

    Attributes:
        top: which blocks are chosen from the scores.
        scale: softmax scale.
    """

    top: TopBlocks
    scale: float

    @abstractmethod
    def compress(self, key: torch.Tensor, value: torch.Tensor) -> State:
        """The state of all complete windows of `key`, `value` `[B, Hkv, L, D]`, in their dtype."""

    @abstractmethod
    def append(self, state: State, key: torch.Tensor, value: torch.Tensor) -> State:
        """The state after the last token of `key`, `value` (length L) came in, from the state of L - 1
        tokens.
        """

    @abstractmethod
    def score(
        self, query: torch.Tensor, positions: torch.Tensor, state: State, blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Block scores `[B, Hkv, R, M]` of grouped queries, and the largest visible |logit| behind them `[B,
        Hkv, R, 1]`.
        """

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        positions: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: State,
        selected: torch.Tensor,
        gates: torch.Tensor | None,
        first: int,
        stop: int,
    ) -> torch.Tensor:
        """Output `[B, Hkv, G, R, D]` for a given selection; positions lie in `[first, stop)`; `gates` `[B,
        Hkv, G, R, branches]`.
        """

    def gates(self, query: torch.Tensor) -> torch.Tensor | None:
        """Gates `[B, Hq, N, branches]` of the branches in `wide(dtype)`, None if nothing is gated."""
        return None

    # What follows is the same for every method.

    def group(self, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """`[B, Hq, R, X]` to `[B, Hkv, G, R, X]`."""
        return x.unflatten(1, (kv_heads, -1))

    def select(self, query: torch.Tensor, positions: torch.Tensor, state: State, blocks: int) -> torch.Tensor:
        """Bool `[B, Hkv, R, M]` for grouped queries; no gradient flows through the choice."""
        with torch.no_grad():
            return self.top.select(self.score(query, positions, state, blocks)[0], positions)

    def rows(
        self,
        query: torch.Tensor,
        positions: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: State,
        gates: torch.Tensor | None,
        selected: torch.Tensor | None,
        first: int,
        stop: int,
    ) -> torch.Tensor:
        """Output of query rows `[B, Hq, R, D]` at `positions`, over `selected` if given, else over their own
        selection.
        """
        grouped = self.group(query, key.shape[1])
        gates = None if gates is None else self.group(gates, key.shape[1])
        if selected is None:
            selected = self.select(grouped, positions, state, block_count(key, self.top.block_size))
        return self.attend(grouped, positions, key, value, state, selected, gates, first, stop).flatten(1, 2)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: State,
        gates: torch.Tensor | None,
        start: int,
        selected: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The whole output `[B, Hq, N, D]`, row 0 at position `start`, in the dtype of `query`; computes in
        `wide(dtype)`.

        With gradients each slice is recomputed in the backward pass, so that no N x L matrix is kept.
        """
        dtype = wide(query.dtype)
        key, value = key.to(dtype), value.to(dtype)
        state = tuple(x.to(dtype) for x in state)
        outputs = []
        for part in row_slices(query.shape[2], bytes_per_row(query, key), most=SLICE_ROWS):
            positions = torch.arange(start + part.start, start + part.stop, device=query.device)
            arguments = (
                query[:, :, part].to(dtype), positions, key, value, state,
                None if gates is None else gates[:, :, part].to(dtype),
                None if selected is None else selected[:, :, part],
                start + part.start, start + part.stop,
            )  # fmt: skip
            if torch.is_grad_enabled():
                rows = checkpoint(self.rows, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                rows = self.rows(*arguments)
            outputs.append(rows.to(query.dtype))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

    def selection(self, problem: Problem, state: State, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The selection of some rows (all if None) in working precision, `[B, Hkv, R, M]`."""
        dtype = wide(problem.query.dtype)
        rows = torch.arange(problem.query.shape[2]) if rows is None else rows
        rows = rows.to(problem.query.device)
        state = tuple(x.to(dtype) for x in state)
        kv_heads, blocks = problem.key.shape[1], block_count(problem.key, self.top.block_size)
        chosen = []
        for part in row_slices(len(rows), bytes_per_row(problem.query, problem.key, dtype)):
            query = self.group(problem.query[:, :, rows[part]].to(dtype), kv_heads)
            chosen.append(self.select(query, rows[part] + problem.start, state, blocks))
        return torch.cat(chosen, 2)

    def expected(self, problem: Problem, rows: torch.Tensor, selected: torch.Tensor | None) -> Expected:
        """fp64 output of some rows over `selected` (over the exact selection if None), and the exact
        selection with its ties.
        """
        rows = rows.to(problem.query.device)
        key, value = problem.key.double(), problem.value.double()
        kv_heads, blocks = key.shape[1], block_count(key, self.top.block_size)
        parts = []
        with torch.no_grad():
            state = self.compress(key, value)
            for part in row_slices(len(rows), bytes_per_row(problem.query, key)):
                query = problem.query[:, :, rows[part]].double()
                positions = rows[part] + problem.start
                gates = self.gates(query)
                scores, largest = self.score(self.group(query, kv_heads), positions, state, blocks)
                exact = self.top.select(scores, positions)
                ties = self.top.undecided(scores, positions, tie_margin(largest, problem.query.dtype))
                given = exact if selected is None else selected[:, :, part].to(exact.device)
                output = self.rows(query, positions, key, value, state, gates, given, 0, key.shape[2])
                parts.append((output, exact, ties))
        return Expected(*(torch.cat(column, 2) for column in zip(*parts, strict=True)))


def block_count(key: torch.Tensor, block_size: int) -> int:
    """Blocks in `key` `[B, Hkv, L, D]`, a partial last one included."""
    return -(-key.shape[2] // block_size)


def bytes_per_row(query: torch.Tensor, key: torch.Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes of one query row's scores over all keys and heads."""
    return query.shape[0] * query.shape[1] * key.shape[2] * (dtype or key.dtype).itemsize


def make_operator(problem: Problem, method: BlockSparseReference, notes: dict[str, Any]) -> Operator:
    """The `Operator` of a block-selecting attention for this problem."""
    build = {"prefill": _prefill, "decode": _decode, "train": _train}[problem.phase]
    return build(problem, method, notes)


def _shared(problem: Problem, method: BlockSparseReference, state: Callable[[], State]) -> dict[str, Any]:
    """What every phase offers beside `run`; `state()` is what `run` would compress."""

    def selected(rows: torch.Tensor) -> torch.Tensor:
        return method.selection(problem, state(), rows)

    def kept() -> torch.Tensor:
        rows = torch.arange(problem.query.shape[2], device=problem.query.device)
        counts = [
            kept_tokens(selected(rows[part]), rows[part] + problem.start, method.top.block_size)
            for part in row_slices(len(rows), bytes_per_row(problem.query, problem.key))
        ]
        return torch.cat(counts, -1)

    def reference(rows: torch.Tensor, chosen: torch.Tensor | None) -> Expected:
        return method.expected(problem, rows, chosen)

    return {"selected": selected, "kept": kept, "reference": reference}


def _prefill(problem: Problem, method: BlockSparseReference, notes: dict[str, Any]) -> Operator:
    query, key, value = problem.query, problem.key, problem.value

    @torch.no_grad()
    def compress() -> State:
        return method.compress(key, value)

    prepared_state = cache(compress)
    prepared_selection = cache(lambda: method.selection(problem, prepared_state()))
    with torch.no_grad():
        gates = method.gates(query)

    @torch.no_grad()
    def run() -> torch.Tensor:
        return method.forward(query, key, value, compress(), gates, problem.start)

    @torch.no_grad()
    def attend() -> torch.Tensor:
        return method.forward(query, key, value, prepared_state(), gates, problem.start, prepared_selection())

    stages = {
        "compress": compress,
        "select": lambda: method.selection(problem, prepared_state()),
        "attend": attend,
    }
    return Operator(run=run, stages=stages, notes=notes, **_shared(problem, method, prepared_state))


def _decode(problem: Problem, method: BlockSparseReference, notes: dict[str, Any]) -> Operator:
    query, key, value = problem.query, problem.key, problem.value
    with torch.no_grad():
        cached = method.compress(key[:, :, :-1], value[:, :, :-1])
        gates = method.gates(query)

    @torch.no_grad()
    def append() -> State:
        return method.append(cached, key, value)

    state = append()
    selection = method.selection(problem, state)
    notes["windows_appended"] = sum(
        new.shape[2] - old.shape[2] for new, old in zip(state, cached, strict=True)
    )

    @torch.no_grad()
    def run() -> torch.Tensor:
        return method.forward(query, key, value, append(), gates, problem.start)

    @torch.no_grad()
    def attend() -> torch.Tensor:
        return method.forward(query, key, value, state, gates, problem.start, selection)

    stages = {"append": append, "select": lambda: method.selection(problem, state), "attend": attend}
    held = sum(x.numel() * x.element_size() for x in cached)
    return Operator(
        run=run, stages=stages, notes=notes, weights_bytes=held, **_shared(problem, method, lambda: state)
    )


def _train(problem: Problem, method: BlockSparseReference, notes: dict[str, Any]) -> Operator:
    names = ("query", "key", "value")
    leaves = [getattr(problem, name).detach().clone().requires_grad_() for name in names]
    grads: dict[str, torch.Tensor] = {}

    def backward_through(inputs: list[torch.Tensor], grad_output: torch.Tensor, selected=None):
        query, key, value = inputs
        output = method.forward(
            query, key, value, method.compress(key, value), method.gates(query), problem.start, selected
        )
        return output, dict(zip(names, torch.autograd.grad(output, inputs, grad_output), strict=True))

    def run() -> torch.Tensor:
        output, new = backward_through(leaves, problem.grad_output)
        grads.update(new)
        return output.detach()

    @cache
    def state() -> State:
        with torch.no_grad():
            return method.compress(problem.key, problem.value)

    def reference_gradients() -> dict[str, torch.Tensor]:
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        return backward_through(exact, problem.grad_output.double(), method.selection(problem, state()))[1]

    return Operator(
        run=run,
        gradients=lambda: dict(grads),
        reference_gradients=reference_gradients if small_enough_for_gradients(problem) else None,
        notes=notes,
        **_shared(problem, method, state),
    )
