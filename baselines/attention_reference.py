"""Exact softmax attention in fp64 for chosen query rows, the yardstick of every method's output.

Each row is `softmax(q k^T / sqrt(D)) v` over the keys t <= position of the row, or over those of them that
lie in the blocks a method selected. Works on one (batch element, key/value head) at a time and on slices of
rows, so that 64 rows of a 256k context need a bounded amount of memory. FlashAttention-3 (arXiv 2407.08608)
and SDPA compute the same function in lower precision.

Letters: B batch, Hq query heads, Hkv key/value heads, G = Hq / Hkv, N query positions, L key positions, D
head dim, R rows, M = ceil(L / block_size) blocks. Query head h reads key/value head h // G.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dashbench.baselines.api import Expected, Problem

SLICE_BYTES = 256 * 2**20
"""Most bytes of one slice's scores; a few temporaries of that size live at once."""


def row_slices(
    rows: int, bytes_per_row: int, budget: int = SLICE_BYTES, most: int | None = None
) -> Iterator[slice]:
    """Slices that cover `range(rows)`, each of at most `budget` bytes and `most` rows (at least one row)."""
    step = max(1, min(most or rows, budget // max(1, bytes_per_row)))
    for first in range(0, rows, step):
        yield slice(first, min(rows, first + step))


def causal_block_tokens(positions: torch.Tensor, blocks: int, block_size: int) -> torch.Tensor:
    """Causal tokens in each block for queries at `positions` `[R]`: `clamp(position + 1 - block * block_size,
    0, block_size)`, `[R, M]`.
    """
    first = torch.arange(blocks, device=positions.device) * block_size
    return (positions[:, None] + 1 - first).clamp(0, block_size)


def kept_tokens(selected: torch.Tensor, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """Distinct causal key tokens in the selected blocks; `selected` `[..., R, M]` bool, `positions` `[R]`;
    gives `[..., R]` int64.
    """
    return (selected * causal_block_tokens(positions, selected.shape[-1], block_size)).sum(-1)


def attention_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    selected: torch.Tensor | None = None,
    block_size: int = 64,
    scale: float | None = None,
    window: int | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of some query rows in fp64.

    Args:
        query: `[B, Hq, R, D]`, the rows themselves.
        key, value: `[B, Hkv, L, D]`, any dtype (converted to fp64 one head at a time).
        positions: int64 `[R]`, absolute position of each row; it sees keys 0 .. position.
        selected: bool `[B, Hkv, R, M]`, only these blocks are seen; None for all.
        block_size: tokens in a block of `selected`.
        scale: softmax scale, 1 / sqrt(D) if None.
        window: only the last `window` tokens including the row's own are seen; None for all.
        bias: `[B, Hkv, R, M]`, added to the logits of all tokens of a block; None for none.

    Returns:
        `[B, Hq, R, D]` fp64; zero where a row sees no key.
    """
    batch, query_heads, rows, head_dim = query.shape
    kv_heads, length = key.shape[1:3]
    group = query_heads // kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    output = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    tokens = torch.arange(length, device=key.device)
    for b in range(batch):
        for r in range(kv_heads):
            k, v = key[b, r].double(), value[b, r].double()
            for part in row_slices(rows, group * length * 8):
                q = query[b, r * group : (r + 1) * group, part].double()
                at = positions[part, None]
                visible = tokens <= at
                if window is not None:
                    visible &= tokens > at - window
                if selected is not None:
                    visible &= selected[b, r, part].repeat_interleave(block_size, -1)[:, :length]
                scores = q @ k.T * scale
                if bias is not None:
                    scores = scores + bias[b, r, part].double().repeat_interleave(block_size, -1)[:, :length]
                scores = scores.masked_fill(~visible, -torch.inf)
                row = torch.softmax(scores, -1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
                output[b, r * group : (r + 1) * group, part] = row @ v
    return output


def attention_gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_output: torch.Tensor,
    start: int = 0,
    selected: torch.Tensor | None = None,
    block_size: int = 64,
) -> dict[str, torch.Tensor]:
    """Gradients of causal attention in fp64, by the textbook formulas and not by autograd.

    With P the softmax, dP = dO v^T and dS = P (dP - rowsum(P dP)): dv = P^T dO, dq = scale dS k, dk = scale
    dS^T q, keys and values summed over the G heads that share them. The selection is a constant.

    Args:
        query, grad_output: `[B, Hq, N, D]`.
        key, value: `[B, Hkv, L, D]`.
        start: position of query row 0.
        selected: bool `[B, Hkv, N, M]` or None.
        block_size: tokens in a block of `selected`.

    Returns:
        `{"query": [B, Hq, N, D], "key": [B, Hkv, L, D], "value": [B, Hkv, L, D]}` in fp64.
    """
    batch, query_heads, rows, head_dim = query.shape
    kv_heads, length = key.shape[1:3]
    group, scale = query_heads // kv_heads, head_dim**-0.5
    grads = {
        name: torch.zeros(of.shape, dtype=torch.float64, device=of.device)
        for name, of in (("query", query), ("key", key), ("value", value))
    }
    tokens = torch.arange(length, device=key.device)
    for b in range(batch):
        for r in range(kv_heads):
            heads = slice(r * group, (r + 1) * group)
            k, v = key[b, r].double(), value[b, r].double()
            for part in row_slices(rows, group * length * 8):
                q, dout = query[b, heads, part].double(), grad_output[b, heads, part].double()
                at = torch.arange(part.start, part.stop, device=key.device)[:, None] + start
                visible = tokens <= at
                if selected is not None:
                    visible &= selected[b, r, part].repeat_interleave(block_size, -1)[:, :length]
                scores = (q @ k.T * scale).masked_fill(~visible, -torch.inf)
                p = torch.softmax(scores, -1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
                dp = dout @ v.T
                ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
                grads["query"][b, heads, part] = ds @ k
                grads["key"][b, r] += (ds.mT @ q).sum(0)
                grads["value"][b, r] += (p.mT @ dout).sum(0)
    return grads


def dense_expected(problem: Problem, rows: torch.Tensor) -> Expected:
    """What fp64 says of dense causal attention for query rows `rows` (int64 `[R]`)."""
    rows = rows.to(problem.query.device)
    output = attention_rows(problem.query[:, :, rows], problem.key, problem.value, rows + problem.start)
    return Expected(output=output)


def dense_gradients(problem: Problem) -> dict[str, torch.Tensor]:
    """fp64 gradients of dense causal attention for a `train` problem."""
    return attention_gradients(problem.query, problem.key, problem.value, problem.grad_output, problem.start)


def small_enough_for_gradients(problem: Problem) -> bool:
    """Whether the fp64 gradients of the whole problem are worth their time: N^2 Hq B pairs at most 2^34 on a
    GPU, 2^26 on a CPU.
    """
    batch, heads, rows = problem.query.shape[:3]
    pairs = batch * heads * rows * problem.key.shape[2]
    return pairs <= (2**34 if problem.query.is_cuda else 2**26)
