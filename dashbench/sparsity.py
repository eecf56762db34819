"""Sparsity as measured: four definitions of one word, because the field uses all of them.

With n_i the distinct causal key tokens that query i attended (own chunk included, so at least one), a_i = i
+ 1 the tokens it could have
attended (i absolute), C the block size and L the length, all per batch element, KV head and query:

    s_flop   = 1 − Σ n_i / Σ a_i                 share of the dense work that was skipped: predicts cost, the
    primary definition
    s_mean   = 1 − mean(n_i / a_i)               every query counts alike
    s_up     = 1 − mean(C · ceil(n_i / C)) / L   as DashAttention's authors print it; divides by the full
    length, so a dense
                                                 causal run scores up to one half
    s_routed = s_flop without the own chunk on both sides: what routing itself did
"""

from __future__ import annotations

from typing import Any

import torch

from dashbench.baselines.api import Operator, Problem

LATE = 4096  # DashAttention's authors leave the first 4096 queries out
TILES = (1, 2, 4, 8, 16)
SAMPLED_TILES = 32


def definitions(kept: torch.Tensor, start: int, length: int, block: int) -> dict[str, float]:
    """All definitions over some queries.

    Args:
        kept: `[B, Hkv, N]` integers, n_i of queries at positions start, start + 1, …
        start: absolute position of the first query.
        length: L, key tokens in all.
        block: C.

    Returns:
        `{"s_flop", "s_mean", "s_up", "s_routed"}`.
    """
    kept = kept.long()
    position = torch.arange(start, start + kept.shape[-1], device=kept.device)
    visible = position + 1
    own = position % block + 1
    pairs = kept.shape[0] * kept.shape[1]
    routable = int((visible - own).sum()) * pairs
    blocks = (kept + block - 1) // block
    return {
        "s_flop": 1 - int(kept.sum()) / (int(visible.sum()) * pairs),
        "s_mean": 1 - float((kept.double() / visible).mean()),
        "s_up": 1 - float(blocks.double().mean()) * block / length,
        "s_routed": 1 - int((kept - own).sum()) / routable if routable else 0.0,
    }


def tile_inflation(operator: Operator, problem: Problem, seed: int = 0) -> dict[str, float]:
    """Mean size of the union of the routes of T neighbouring queries over the mean size of one route, for
    some T.

    A tiled kernel computes the union for every query of its tile, so this factor multiplies its work.
    """
    rows = problem.query.shape[2]
    if operator.selected is None or rows < 2 * TILES[-1]:
        return {}
    if operator.tile_union is not None:
        return {str(t): operator.tile_union(t) for t in TILES}
    widest = TILES[-1]
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randint(0, rows // widest, (SAMPLED_TILES,), generator=generator)
    sampled = (tiles[:, None] * widest + torch.arange(widest)).flatten()
    chosen = operator.selected(sampled.to(problem.query.device))
    routes = chosen.view(*chosen.shape[:2], SAMPLED_TILES, widest, -1)
    single = routes.sum(-1).double().mean()
    out = {}
    for t in TILES:
        union = routes.reshape(*routes.shape[:3], widest // t, t, routes.shape[-1]).any(-2)
        out[str(t)] = float(union.sum(-1).double().mean() / single)
    return out


def measure(operator: Operator, problem: Problem) -> dict[str, Any]:
    """The sparsity fields of a row. A dense method has none to measure: all zero.

    Raises:
        ValueError: the method reports an impossible count (none, or more than are visible).
    """
    if operator.kept is None:
        return {"s_flop": 0.0, "s_mean": 0.0, "s_up": None, "s_routed": 0.0}
    kept = operator.kept()
    start, length, block = problem.start, problem.key.shape[2], problem.block_size
    position = torch.arange(start, start + kept.shape[-1], device=kept.device)
    if bool((kept < 1).any()) or bool((kept > position + 1).any()):
        raise ValueError(
            "the method reports keeping fewer than one or more than all visible tokens of a query"
        )
    whole = definitions(kept, start, length, block)
    every = dict(whole)
    if 0 < LATE - start < kept.shape[-1]:
        late = definitions(kept[..., LATE - start :], LATE, length, block)
        every |= {f"{k}_from_{LATE}": v for k, v in late.items()}
    values = kept.double().flatten()
    if (
        values.numel() > 1_000_000
    ):  # torch.quantile has a limit, and a stride is sample enough for percentiles
        values = values[:: values.numel() // 1_000_000 + 1]
    points = torch.quantile(
        values, torch.tensor([0.1, 0.5, 0.9, 0.99], dtype=torch.float64, device=values.device)
    ).tolist()
    spread = dict(zip(("p10", "p50", "p90", "p99"), points, strict=True))
    spread |= {"min": float(kept.min()), "max": float(kept.max()), "mean": float(kept.double().mean())}
    return {
        **whole,
        "s_definitions": every,
        "s_spread": spread,
        "tile_inflation": tile_inflation(operator, problem),
    }
