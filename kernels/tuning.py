"""Launch choices of the kernels: a table of what was measured, a user's file before it, and a search that
fills one.

Nothing is tuned behind the caller's back: a kernel asks `choose`, which reads the tables and returns the
first rule that fits, or nothing, and then the kernel's own defaults stand. Rules are keyed by what changes
the best choice: architecture, head dim, chunk size, group, dtype, and a range of lengths wide enough that a
growing sequence compiles a handful of variants, not one a length.

A user's file is JSON, a list of rules like those of `TABLE`, named by the environment variable
`DASHBENCH_TUNING`; `tune` writes one. Its rules come first, the last one written before those above it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

VARIABLE = "DASHBENCH_TUNING"
STAGES = ("route", "route_all", "attend", "backward", "decode")
"""`route` searches among candidates, `route_all` among all chunks; `attend` is the portable kernel."""


@dataclass(frozen=True)
class Setting:
    """What a launch choice depends on.

    Attributes:
        arch: `sm_90`, … or `cpu`.
        head_dim, chunk_size, group: D, C, G.
        dtype: `bfloat16`, ….
        tokens: N, or in decode the cache's capacity.
    """

    arch: str
    head_dim: int
    chunk_size: int
    group: int
    dtype: str
    tokens: int


# A rule: stage, the launch, where it was measured, and the setting it is for. A setting left out fits any;
# `tokens` is (from, up to), inclusive. The first rule that fits is taken.
TABLE: tuple[dict[str, Any], ...] = (
    # NVIDIA H200, 32 query heads over 2 KV heads, bf16, 16k to 128k tokens; LOG.md: Route 3 and 8, Backward
    # 4, Decode.
    {
        "stage": "route",
        "arch": "sm_90",
        "head_dim": 128,
        "chunk_size": 64,
        "group": 16,
        "launch": {"BLOCK": 32, "num_warps": 8, "num_stages": 2, "maxnreg": 80},
    },
    {
        "stage": "route_all",
        "arch": "sm_90",
        "head_dim": 128,
        "chunk_size": 64,
        "group": 16,
        "launch": {"BLOCK": 64, "num_warps": 8, "num_stages": 2},
    },
    {
        "stage": "backward",
        "arch": "sm_90",
        "head_dim": 128,
        "chunk_size": 64,
        "group": 16,
        "launch": {"tile": 4, "query_warps": 4, "query_stages": 2, "chunk_warps": 4, "chunk_stages": 2},
    },
    {
        "stage": "decode",
        "arch": "sm_90",
        "launch": {"score_tile": 32, "route_warps": 8, "overlap": True},
    },
)


def setting_of(query: torch.Tensor, kv_heads: int, chunk_size: int, tokens: int | None = None) -> Setting:
    """The setting of a call.

    Args:
        query: `[B, Hq, N, D]`.
        kv_heads: Hkv.
        chunk_size: C.
        tokens: a cache's capacity; default N.
    """
    arch = "cpu"
    if query.is_cuda:
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(query.device))
    dtype = str(query.dtype).removeprefix("torch.")
    tokens = query.shape[2] if tokens is None else tokens
    return Setting(arch, query.shape[3], chunk_size, query.shape[1] // kv_heads, dtype, tokens)


def choose(stage: str, setting: Setting) -> dict[str, Any]:
    """Launch options of a stage, one of `STAGES`; empty where no rule fits.

    Raises:
        ValueError: the user's file is no list of rules; the message names the file.
    """
    path = os.environ.get(VARIABLE)
    changed = Path(path).stat().st_mtime_ns if path and Path(path).exists() else None
    return dict(_choose(stage, setting, path if changed else None, changed))


@lru_cache(maxsize=1024)
def _choose(stage: str, setting: Setting, path: str | None, changed: int | None) -> dict[str, Any]:
    mine = tuple(reversed(read_rules(path))) if path else ()
    for rule in (*mine, *TABLE):
        if rule["stage"] == stage and _fits(rule, setting):
            return rule["launch"]
    return {}


def _fits(rule: dict[str, Any], setting: Setting) -> bool:
    for name, value in asdict(setting).items():
        asked = rule.get(name)
        if asked is None:
            continue
        if name == "tokens":
            if not asked[0] <= value <= asked[1]:
                return False
        elif asked != value:
            return False
    return True


def read_rules(path: str | Path) -> list[dict[str, Any]]:
    """Rules of a file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        rules = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    known = {"stage", "launch", "measured", *Setting.__dataclass_fields__}
    for rule in rules if isinstance(rules, list) else [rules]:
        if not isinstance(rule, dict) or rule.get("stage") not in STAGES or "launch" not in rule:
            raise ValueError(
                f"{path}: a rule needs a stage of {', '.join(STAGES)} and a launch, got {rule!r}"
            )
        if unknown := set(rule) - known:
            raise ValueError(f"{path}: unknown key {sorted(unknown)[0]!r} in a rule")
    return rules


def length_range(tokens: int) -> tuple[int, int]:
    """The range of lengths that one measurement speaks for: from half of its power of two to that power."""
    upper = 1 << max(0, tokens - 1).bit_length()
    return (upper // 2 + 1, upper)


_ROUTE = (
    {"BLOCK": 64, "num_warps": 8, "num_stages": 2},
    {"BLOCK": 32, "num_warps": 8, "num_stages": 2},
    {"BLOCK": 32, "num_warps": 8, "num_stages": 2, "maxnreg": 80},
    {"BLOCK": 64, "num_warps": 4, "num_stages": 2},
)
CANDIDATES: dict[str, tuple[dict[str, Any], ...]] = {
    "route": _ROUTE,
    "route_all": _ROUTE,
    "attend": (
        {"num_warps": 8, "num_stages": 2},
        {"num_warps": 8, "num_stages": 3},
        {"num_warps": 4, "num_stages": 2},
    ),
}


def tune(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    summary_query: torch.Tensor,
    chunk_size: int,
    path: str | Path,
    **options,
) -> list[dict[str, Any]]:
    """Times `CANDIDATES` of routing and of the portable attention kernel on these inputs and appends the
    best ones to a user's file, for lengths of the same power of two. A candidate that does not compile is
    left out.

    Args:
        query, key, value, summary_query: as for `dash_attention`, on a GPU: what the caller's model really
            sees.
        chunk_size: C.
        path: JSON file of rules, made if missing; name it in `DASHBENCH_TUNING`.
        **options: `scaling_factor`, … of `route_chunks`.

    Returns:
        The rules written, with `measured` in milliseconds of every candidate, in their order (None: failed).
    """
    from dashbench.kernels.attend import block_sparse_attention
    from dashbench.kernels.route import route_chunks
    from dashbench.kernels.summarize import summarize_chunks

    setting = setting_of(query, key.shape[1], chunk_size)
    with torch.no_grad():
        summaries = summarize_chunks(key, summary_query, chunk_size)
        routes = route_chunks(query, summaries, chunk_size, **options)
        runs: dict[str, Callable[[dict], Any]] = {
            "route": lambda launch: route_chunks(query, summaries, chunk_size, launch=launch, **options),
            "route_all": lambda launch: route_chunks(
                query, summaries, chunk_size, launch=launch, compact=False, **options
            ),
            "attend": lambda launch: block_sparse_attention(
                query, key, value, routes, kernel="portable", launch=launch
            ),
        }
        written = []
        for stage, run in runs.items():
            times = [_milliseconds(run, launch) for launch in CANDIDATES[stage]]
            if not any(times):
                continue
            best = min((t, i) for i, t in enumerate(times) if t is not None)[1]
            keyed = asdict(setting) | {"tokens": length_range(setting.tokens)}
            written.append({"stage": stage, **keyed, "launch": CANDIDATES[stage][best], "measured": times})
    path = Path(path)
    before = read_rules(path) if path.exists() else []
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps([*before, *written], indent=1) + "\n")
    part.replace(path)  # readers see the old file or the new one
    return written


def _milliseconds(run: Callable[[dict], Any], launch: dict[str, Any], repeats: int = 10) -> float | None:
    """Median time of a launch on the GPU, or None where it cannot be compiled or does not fit."""
    try:
        run(launch)
        torch.cuda.synchronize()
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run(launch)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
    except Exception as error:  # compilers raise anything; the caller sees None in `measured`
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
    return sorted(times)[repeats // 2]
