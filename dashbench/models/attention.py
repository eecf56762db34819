"""The attention that takes the place of the stock one: a function that transformers calls by name.

`register` makes the name `dashbench` known to transformers; a model whose config names it calls `attend`
with queries, keys and values after position embedding. A whole forward (training, scoring) has no state; in
generation a `sequence.Sequences` travels with the call as `sequences`. On a GPU the kernels run, elsewhere
the references.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dashbench.baselines.infllmv2 import infllmv2_attention
from dashbench.baselines.nsa import nsa_attention
from dashbench.kernels.dash import dash_attention
from dashbench.kernels.decode import DecodeStep, append
from dashbench.kernels.dense import dense_attention, dense_step
from dashbench.kernels.reference import DashOptions
from dashbench.kernels.reference import dash_attention as specified_dash
from dashbench.models.kinds import NETWORK_WIDTH
from dashbench.models.sequence import Sequences

NAME = "dashbench"


class AttentionState:
    """What all layers of a model share: the kind, its settings (a dict that may be changed at any time), and
    the rotation that the model applies to queries and keys."""

    def __init__(self, kind: str, settings: dict[str, Any], source: dict[str, str], rotary: nn.Module):
        self.kind, self.settings, self.source = kind, settings, source
        self.rotary = rotary
        # (queries, keys) that attention sees in place of the model's own; random weights route unlike trained
        # ones, and these are planted.
        self.planted: tuple[Tensor, Tensor] | None = None
        self.backend: str | None = None  # of dense attention, once it ran

    @property
    def block_size(self) -> int:
        """Tokens in a chunk or block."""
        return self.settings.get("chunk_size", self.settings.get("block_size", 64))


def register() -> None:
    """Makes the name known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface

    # No mask is registered, for every kind is causal by itself: transformers then does not look for packed
    # sequences among the positions, for which the host would wait for the GPU in every step.
    AttentionInterface.register(NAME, attend)


def add_parameters(
    attention: nn.Module, kind: str, kv_heads: int, head_dim: int, block: int, **options
) -> None:
    """Gives a layer what a kind needs beyond the projections; see `kinds.added_parameters`.

    Zero summary queries make DashAttention start from mean pooling; NSA's network and gates start as
    `nn.Linear` does.
    """
    if kind == "dash":
        attention.indexer_q = nn.Parameter(torch.zeros(kv_heads * head_dim, **options))
    elif kind == "nsa":
        attention.compress_kv = nn.Module()
        attention.compress_kv.kv_compress = nn.Sequential(
            nn.Linear(block, NETWORK_WIDTH, **options), nn.ReLU(), nn.Linear(NETWORK_WIDTH, 2, **options)
        )
        attention.gate_proj = nn.Linear(head_dim, 2, **options)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequences: Sequences | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of one layer, as transformers asks for it.

    Args:
        module: the layer's attention; `module.dashbench` is its `AttentionState`.
        query: `[B, Hq, T, D]`; key, value: `[B, Hkv, T, D]`, all after position embedding.
        attention_mask: must be None: sequences are not padded.
        scaling: must be 1/√D.
        dropout: must be 0.
        sequences: state of a generation, or None.

    Returns:
        (output `[B, T, Hq, D]`, None).

    Raises:
        ValueError: a mask, another scale, or dropout.
    """
    if attention_mask is not None:
        raise ValueError("padded batches are not attended here: give each row its own length")
    if dropout or (scaling is not None and abs(scaling * query.shape[-1] ** 0.5 - 1) > 1e-6):
        raise ValueError("attention is scaled by 1/√D and has no dropout here")
    state: AttentionState = module.dashbench
    start = 0 if sequences is None else sequences.length
    if state.planted is not None:
        here = slice(start, start + query.shape[2])
        rows = slice(None) if sequences is None else sequences.rows
        query, key = (x[rows, :, here] for x in state.planted)
    if sequences is not None:
        new = key, value
        by_kernels = state.kind == "dash" and query.is_cuda
        key, value = sequences.extend(module.layer_idx, key, value, write=not by_kernels)
        out, active = _continued(module, state, query, key, value, new, sequences)
        if sequences.counting:
            phase = "prefill" if start == 0 else "decode"
            sequences.ledger.add(phase, module.layer_idx, active, start, query.shape[2], state.block_size)
    else:
        out, active = _whole(module, state, query, key, value)
    return out.transpose(1, 2), None


def _whole(module, state: AttentionState, query, key, value, cache=None) -> tuple[Tensor, Tensor | None]:
    """All tokens attend, from the first one on; differentiable."""
    if state.kind == "dense":
        return _dense(state, query, key, value), None
    if state.kind == "dash":
        summary = summary_query(module, state, key)
        options = dash_options(state.settings)
        if query.is_cuda:
            return dash_attention(query, key, value, summary, return_active_blocks=True, **options)
        out, routing = specified_dash(query, key, value, summary.to(key.dtype), DashOptions(**options))
        return out, routing.active.sum(-1)
    if state.kind == "infllmv2":
        given = {**state.settings, "return_active_blocks": True}
        return infllmv2_attention(query, key, value, cache=cache, **given)
    gates, weights = nsa_parameters(module, query)
    given = {**state.settings, "return_active_blocks": True}
    return nsa_attention(query, key, value, gates, compression_weights=weights, cache=cache, **given)


def _continued(module, state, query, key, value, new, sequences) -> tuple[Tensor, Tensor | None]:
    """The last T of L tokens attend to all; what the kind caches is brought up to date."""
    layer, tokens, length = module.layer_idx, query.shape[2], key.shape[2]
    if state.kind == "dense":
        return _dense(state, query, key, value), None
    if tokens == length:  # slices of the buffers are not contiguous, and the fastest kernels want that
        key, value = (x.contiguous() for x in new)
    if state.kind != "dash":
        return _whole(module, state, query, key, value, sequences.compressed[layer])
    options = dash_options(state.settings)
    if not query.is_cuda:
        summary = summary_query(module, state, key)
        out, routing = specified_dash(query, key, value, summary.to(key.dtype), DashOptions(**options))
        return out, routing.active.sum(-1)
    cache = sequences.dash[layer]
    if tokens == length:
        out, active = _whole(module, state, query, key, value)
        plain = module.indexer_q.view(key.shape[1], key.shape[3])
        cache.clear()
        cache.append(key, value, plain)
        _rotated_summaries(module, state, cache, 0, length)
        return out, active
    return _dash_continued(module, state, query, new, cache, sequences, length)


def _dash_continued(module, state, query, new, cache, sequences, length) -> tuple[Tensor, Tensor | None]:
    """DashAttention of the last T of L tokens by kernels, which write the new keys and values, too."""
    options, tokens = DashOptions(**dash_options(state.settings)), query.shape[2]
    plain = module.indexer_q.view(cache.view.key.shape[1], -1)
    new = tuple(x.contiguous() for x in new)
    if not sequences.static:
        append(cache.view, *new, plain, cache.chunk_size, cache._tickets)
        cache.advanced(tokens)
        _rotated_summaries(module, state, cache, length - tokens, length)
        if tokens > 1:
            return cache.attend(query, options)
    launch, space = sequences.dash_step or (None, None)
    written = {"new": (*new, plain)} if sequences.static else {}
    step = DecodeStep(query, cache.view, options, launch, space, **written)
    sequences.dash_step = step.launch, step.workspace
    out = step.run()
    # The next layer writes its counts into the same buffer.
    return out, step.workspace.counts.transpose(1, 2).clone() if sequences.counting else None


def _dense(state: AttentionState, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal softmax attention of the last T of L tokens, by the best backend there is."""
    attend_dense = dense_attention if query.shape[2] == key.shape[2] else dense_step
    out, state.backend = attend_dense(query, key, value)
    return out


def dash_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that are fields of `DashOptions`."""
    return {key: value for key, value in settings.items() if key != "summary_query_mode"}


def summary_query(module: nn.Module, state: AttentionState, key: Tensor) -> Tensor:
    """`[Hkv, D]`, or with `rope_mean` one a chunk, `[B, Hkv, M, D]`: the query rotated at every position of
    the chunk, averaged over it, as the paper's benchmark code does."""
    batch, kv_heads, length, dim = key.shape
    plain = module.indexer_q.view(kv_heads, dim)
    if state.settings["summary_query_mode"] == "plain":
        return plain
    size = state.settings["chunk_size"]
    rotated = _rotated_means(plain, state, size, 0, -(-length // size), key.dtype)
    return rotated.expand(batch, *rotated.shape)


def _rotated_means(plain, state, size: int, first: int, last: int, dtype) -> Tensor:
    """The summary query of chunks [first, last): `[Hkv, M, D]`."""
    position = torch.arange(first * size, last * size, device=plain.device)[None]
    cos, sin = state.rotary(plain[None].float(), position)
    query = plain.float()[:, None]
    half = query.shape[-1] // 2
    turned = torch.cat([-query[..., half:], query[..., :half]], -1)
    rotated = query * cos[0].float() + turned * sin[0].float()
    return rotated.unflatten(1, (last - first, size)).mean(2).to(dtype)


def _rotated_summaries(module, state, cache, before: int, length: int) -> None:
    """Replaces the summaries of chunks completed by tokens [before, length) with those of `rope_mean`."""
    size = cache.chunk_size
    first, last = before // size, length // size
    if state.settings["summary_query_mode"] == "plain" or last <= first:
        return
    _, kv_heads, _, dim = cache.view.key.shape
    query = _rotated_means(module.indexer_q.view(kv_heads, dim), state, size, first, last, torch.float32)
    keys = cache.view.key[:, :, first * size : last * size].unflatten(2, (last - first, size)).float()
    weights = torch.softmax((keys * query[:, :, None]).sum(-1) * dim**-0.5, -1)
    cache.view.summaries[:, :, first:last] = (weights[..., None] * keys).sum(3).to(cache.view.key.dtype)


def nsa_parameters(module: nn.Module, query: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Gates `[B, Hq, T, 2]` of queries, and the weights of the compression network."""
    gate = module.gate_proj
    gates = torch.sigmoid(F.linear(query, gate.weight.to(query.dtype), gate.bias.to(query.dtype)))
    network = module.compress_kv.kv_compress
    weights = {
        "first": network[0].weight, "bias": network[0].bias,
        "second": network[2].weight, "second_bias": network[2].bias,
    }  # fmt: skip
    return gates, weights
