"""Sparsity as measured: four definitions of one word, because the field uses all of them.

With n_i the distinct causal key tokens that query i attended (own block included, so at least one),
a_i = i + 1 the tokens it could have attended (i absolute), C the block size and L the length, for every batch
element, KV head and query (after the union over the heads of a group):

    s_flop   = 1 − Σ n_i / Σ a_i              share of the dense work skipped; predicts cost, the primary one
    s_mean   = 1 − mean(n_i / a_i)            every query counts alike
    s_up     = 1 − mean(C · ⌈n_i / C⌉) / L    as DashAttention's authors print it; it divides by the full
                                              length, so a dense causal run scores about one half
    s_routed = s_flop without the own block on both sides: routing beyond the block that all must keep

In decode (one query, i = L − 1) the first two coincide, and s_up differs only by rounding to whole blocks.
"""

from __future__ import annotations

from typing import Any

import torch

from dashbench.baselines.api import Operator, Problem

LATE = 4096  # DashAttention's authors leave the first 4096 queries out.
TILES = (1, 2, 4, 8, 16)
SAMPLED_TILES = 32
PERCENTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}


def definitions(kept: torch.Tensor, start: int, length: int, block: int) -> dict[str, float]:
    """All definitions over some queries.

    Args:
        kept: `[B, Hkv, N]` integers, n_i of the queries at positions start, start + 1, …
        start: absolute position of the first query.
        length: L, key tokens in all.
        block: C.

    Returns:
        `{"s_flop", "s_mean", "s_up", "s_routed"}`; sums are exact integers, divided once.
    """
    kept = kept.long()
    visible = torch.arange(start + 1, start + 1 + kept.shape[-1], device=kept.device)
    own = (visible - 1) % block + 1
    pairs = kept.shape[0] * kept.shape[1]
    total, routable = int(visible.sum()) * pairs, int((visible - own).sum()) * pairs
    kept_sum, own_sum = int(kept.sum()), int(own.sum()) * pairs
    blocks = int(((kept + block - 1) // block).sum())
    return {
        "s_flop": 1 - kept_sum / total,
        "s_mean": 1 - float((kept.double() / visible).mean()),
        "s_up": 1 - blocks * block / (kept.numel() * length),
        "s_routed": 1 - (kept_sum - own_sum) / routable if routable else 0.0,
    }


def percentiles(values: torch.Tensor) -> dict[str, float]:
    """`p10, p50, p90, p99, min, max, mean` of counts; a percentile is the nearest rank below, so a count."""
    ordered = values.flatten().sort().values
    last = ordered.numel() - 1
    out = {name: float(ordered[int(share * last)]) for name, share in PERCENTILES.items()}
    return out | {
        "min": float(ordered[0]),
        "max": float(ordered[-1]),
        "mean": float(ordered.double().mean()),
    }


def tile_inflation(operator: Operator, problem: Problem, seed: int = 0) -> dict[str, float]:
    """Mean size of the union of the routes of T neighbouring queries over the mean size of one route, by T.

    A tiled kernel computes the union for every query of its tile, so this factor multiplies its work. From
    `Operator.tile_union` if the method has it, else from the routes of 32 random aligned tiles of 16 queries.
    Empty for dense methods and where there are fewer than two such tiles.
    """
    rows = problem.query.shape[2]
    widest = TILES[-1]
    if operator.selected is None or rows < 2 * widest:
        return {}
    if operator.tile_union is not None:
        return {str(t): float(operator.tile_union(t)) for t in TILES}
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randperm(rows // widest, generator=generator)[:SAMPLED_TILES]
    sampled = (tiles[:, None] * widest + torch.arange(widest)).flatten()
    chosen = operator.selected(sampled.to(problem.query.device))
    routes = chosen.view(*chosen.shape[:2], len(tiles), widest, -1)
    one = routes.sum(-1).double().mean()
    out = {}
    for t in TILES:
        union = routes.view(*routes.shape[:3], widest // t, t, routes.shape[-1]).any(-2)
        out[str(t)] = float(union.sum(-1).double().mean() / one)
    return out


def measure(operator: Operator, problem: Problem) -> dict[str, Any]:
    """The sparsity fields of a row.

    A dense method keeps a_i everywhere, so s_flop, s_mean and s_routed are exactly 0 and s_up is what its
    definition gives.

    Raises:
        ValueError: the method reports an impossible count (none, or more than are visible).
    """
    length, block, start = problem.key.shape[2], problem.block_size, problem.start
    rows = problem.query.shape[2]
    visible = torch.arange(start + 1, start + 1 + rows, device=problem.key.device)
    expected = (problem.key.shape[0], problem.key.shape[1], rows)
    kept = visible.expand(expected) if operator.kept is None else operator.kept()
    if tuple(kept.shape) != expected:
        raise ValueError(
            f"the method counts kept tokens in shape {list(kept.shape)}, expected {list(expected)}"
        )
    if bool((kept < 1).any()) or bool((kept > visible).any()):
        raise ValueError(
            "the method reports keeping fewer than one or more than all visible tokens of a query"
        )
    whole = definitions(kept, start, length, block)
    every = dict(whole)
    if start < LATE < start + rows:
        late = definitions(kept[..., LATE - start :], LATE, length, block)
        every |= {f"{name}_from_{LATE}": value for name, value in late.items()}
    return {
        **whole,
        "s_definitions": every,
        "s_spread": percentiles(kept),
        "tile_inflation": tile_inflation(operator, problem),
    }
