"""The four kinds of checkpoint: how one is recognised, which parameters it adds, and its settings.

Sources: DashAttention (arXiv 2605.18753) and the checkpoints its authors released (fasa-org MiniCPM-4-8B), of
which the names and shapes of the added parameters are known from their published modeling code. Nothing here
needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

KINDS = ("dense", "infllmv2", "nsa", "dash")
KNOBS = {"infllmv2": "top_k", "nsa": "top_k", "dash": "scaling_factor"}
"""The setting that decides the sparsity."""

NETWORK_WIDTH = 128  # of NSA's compression network
# MiniCPM's multipliers: the released checkpoints are plain Llamas with these folded into the weights.
FOREIGN_KEYS = ("scale_emb", "scale_depth", "dim_model_base")

NSA = {"preset": "nsa_paper", "block_size": 64, "top_k": 64, "init_blocks": 1, "local_blocks": 17}

# What a config does not say. `package` and `paper` are the two published variants of each method: the
# released package's defaults, and what the paper's benchmark code ran.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "dense": {"package": {}, "paper": {}},
    "infllmv2": {
        "package": {"block_size": 64, "top_k": 96, "init_blocks": 1, "local_blocks": 32, "lse_mode": "exact"},
        "paper": {"block_size": 64, "top_k": 64, "init_blocks": 1, "local_blocks": 16, "lse_mode": "exact"},
    },
    "nsa": {"package": NSA, "paper": NSA},
    "dash": {
        "package": {
            "chunk_size": 64, "scaling_factor": 1.0, "alpha": 1.5, "sigma": 1e6, "bias_mode": "raw",
            "forced": "own", "visibility": "own", "summary_query_mode": "plain",
        },
        "paper": {
            "chunk_size": 16, "scaling_factor": 0.16 * 1.4426950408889634, "alpha": 1.5, "sigma": 1e8,
            "bias_mode": "centered", "forced": "own_and_previous", "visibility": "completed",
            "summary_query_mode": "rope_mean",
        },
    },
}  # fmt: skip


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one sentence."""


def added_parameters(
    kind: str, kv_heads: int, head_dim: int, block_size: int = 64
) -> dict[str, tuple[int, ...]]:
    """Names (below `self_attn.`) and shapes of what a kind adds to every layer."""
    if kind == "dash":
        return {"indexer_q": (kv_heads * head_dim,)}
    if kind == "nsa":
        return {
            "compress_kv.kv_compress.0.weight": (NETWORK_WIDTH, block_size),
            "compress_kv.kv_compress.0.bias": (NETWORK_WIDTH,),
            "compress_kv.kv_compress.2.weight": (2, NETWORK_WIDTH),
            "compress_kv.kv_compress.2.bias": (2,),
            "gate_proj.weight": (2, head_dim),
            "gate_proj.bias": (2,),
        }
    return {}


def kind_of(names: Iterable[str], config: dict[str, Any], asked: str = "auto") -> str:
    """The kind of a checkpoint.

    Args:
        names: of its parameters.
        config: its config.json.
        asked: a kind, or `auto`: what the config's `attention_kind` says, else what the added parameters say;
            a checkpoint without any is dense. InfLLMv2 adds none: name it.

    Raises:
        CheckpointError: an unknown kind, or one that contradicts the parameters.
    """
    names = [name.split(".self_attn.")[-1] for name in names if ".self_attn." in name]
    has_dash = "indexer_q" in names
    has_nsa = any(name.startswith(("compress_kv", "gate_proj")) for name in names)
    if has_dash and has_nsa:
        raise CheckpointError("the checkpoint has the parameters of both DashAttention and NSA")
    told = asked if asked != "auto" else config.get("attention_kind")
    found = "dash" if has_dash else "nsa" if has_nsa else None
    if told is None:
        return found or "dense"
    if told not in KINDS:
        raise CheckpointError(f"unknown attention {told!r}; known: {', '.join(KINDS)}")
    if found is not None and told != found:
        reason = "indexer_q" if has_dash else "compress_kv and gate_proj"
        raise CheckpointError(f"asked for {told} attention, but the checkpoint has {reason}: it is {found}")
    if found is None and told in ("dash", "nsa"):
        wanted = next(iter(added_parameters(told, 1, 1)))
        raise CheckpointError(f"asked for {told} attention, but the checkpoint has no self_attn.{wanted}")
    return told


def settings_of(kind: str, config: dict[str, Any], preset: str, given: dict[str, Any]) -> tuple[dict, dict]:
    """Settings of a kind: what the caller gives, else what the config says, else the preset.

    Returns:
        (settings, where each came from: `given`, `config` or the preset's name).

    Raises:
        CheckpointError: an unknown preset or setting, or keys of another model family.
    """
    foreign = [key for key in FOREIGN_KEYS if key in config]
    if foreign:
        raise CheckpointError(
            f"config.json has {foreign[0]}, a multiplier of MiniCPM that a plain Llama does not apply"
        )
    if preset not in PRESETS[kind]:
        raise CheckpointError(f"unknown preset {preset!r}; known: {', '.join(PRESETS[kind])}")
    settings = dict(PRESETS[kind][preset])
    source = dict.fromkeys(settings, preset)
    told = {**config, **config.get("sparse_config", {}), **config.get("attention_settings", {})}
    if kind == "dash" and "estimate_diagonal" in told:
        told.setdefault("bias_mode", "centered" if told["estimate_diagonal"] else "raw")
    for key in settings:
        if key in told and told[key] is not None:
            settings[key], source[key] = told[key], "config"
    for key, value in given.items():
        if key not in settings:
            raise CheckpointError(
                f"{kind} attention has no setting {key!r}; known: {', '.join(settings) or 'none'}"
            )
        settings[key], source[key] = value, "given"
    return settings, source
