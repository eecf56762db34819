"""Native Sparse Attention (NSA) in eager PyTorch: the specification, slow, for any device and dtype.

Three branches read the context: compressed windows of keys and values, the blocks that the compressed
attention finds important (one choice for all heads of a group), and a sliding window; sigmoid gates weigh
their outputs. Paper: https://arxiv.org/abs/2502.11089.

    windows     t = tokens [16 t, 16 t + 32), seen by query i once 16 t + 31 <= i
    compressed  kc_t = phi_k(keys of t), vc_t = phi_v(values of t)
                P_h = softmax_t(q_h kc_t / sqrt(D)),  o_cmp = P_h vc
    importance  I_t = sum of P_h,t over the heads of a group
                score_j = sum of I_t over the windows t = 4j-1 .. 4j+3 of block j, weights 1 2 2 2 1
    selection   the top_k blocks, the first `init_blocks` and the last `local_blocks` (own included) forced
                o_slc = causal attention in them
    window      o_win = attention over the last `window` tokens, the query's own included
    output      g_cmp o_cmp + g_slc o_slc + g_win o_win,  g = sigmoid(W q + c)

Parameters (`prepare`): `preset` gives the rest their defaults, each of which may be set by itself:
    top_k: blocks selected in total, forced ones included (raised to the number of forced blocks, lowered to
    the number of blocks).
    init_blocks, local_blocks: forced blocks at the start, and up to the own one, which counts.
    window: tokens of the sliding window; 0 for no such branch.
    compression: `avgpool`, `linear`, `weightedpool` or `mlp`.
    rule: how scores of windows become scores of blocks, `sum` (the paper) or `max`.

Presets: `nsa`, the paper's (top 16 with 1 initial and 2 local blocks, window 512); `nsa_paper`, what the
benchmark of the DashAttention paper (arXiv 2605.18753) calls NSA: no window branch, compression by a small
MLP over one channel's 32 keys and 32 values, `max` rule, top 64 with 1 initial and 17 local blocks (window of
1024 tokens and the own block). Windows and strides are block_size / 2 and / 4.

Debts to the paper:
    * Compression defaults to mean pooling, the paper's is an MLP with learned position embeddings. Its
      weights are not public; `linear` and `weightedpool` (and `mlp`) are given seeded weights near mean
      pooling, so that the choice of blocks stays meaningful untrained.
    * Gates come from the query, the paper's from the hidden state, which a kernel problem has not. Prefill
      and decode take them as an input, made before the timed region like any projection; training runs
      through them, so that query gradients are whole.
    * One set of keys and values serves the three branches (as in all public code); the paper projects them
      apart. Give the operator the branch's own keys to recover it.
    * Keys are compressed after position embedding; some public code compresses before and rotates the result.
    * `kept` and `selected` speak of the selected branch alone; compressed tokens and the window are named in
      `notes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dashbench.baselines.api import Operator, Problem, Unsupported
from dashbench.baselines.attention_reference import row_slices
from dashbench.baselines.block_selection import (
    TopBlocks,
    Windows,
    block_attention,
    masked_attention,
    scores_to_blocks,
    visible_softmax,
    wide,
    window_attention,
)
from dashbench.baselines.block_sparse_reference import (
    BlockSparseReference,
    State,
    block_count,
    make_operator,
)

COMPRESSIONS = ("avgpool", "linear", "weightedpool", "mlp")
MLP_WIDTH = 128
NOISE = 0.1
"""Size of the seeded departure of the compressors' weights from mean pooling, relative to it."""


@dataclass(frozen=True)
class NsaSettings:
    """The numbers of one NSA; `window` in blocks, so that a preset holds for any block size."""

    top_k: int = 16
    init_blocks: int = 1
    local_blocks: int = 2
    window_blocks: float = 8
    compression: str = "avgpool"
    rule: str = "sum"


PRESETS = {
    "nsa": NsaSettings(),
    "nsa_paper": NsaSettings(
        top_k=64, init_blocks=1, local_blocks=17, window_blocks=0, compression="mlp", rule="max"
    ),
}


class Compressor:
    """phi: complete windows of keys and values `[B, Hkv, L, D]` to compressed ones `[B, Hkv, T, D]`.

    Weights are drawn from a seed on the CPU, so that every device has the same, and rounded to the working
    dtype:

        avgpool       mean over the window
        weightedpool  w `[Hkv, kernel]` for keys and for values
        linear        W `[Hkv, kernel D, D]` for keys and for values, position embedding `[Hkv, kernel, D]`
                      added to the keys
        mlp           2 kernel -> 128 -> ReLU -> 2, shared by heads and channels: a channel's keys and values
                      of a window in, its compressed key and value out. Four hidden units carry +-mean(keys)
                      and +-mean(values); the others start small.
    """

    def __init__(self, kind: str, windows: Windows, problem: Problem):
        if kind not in COMPRESSIONS:
            raise ValueError(f"compression must be one of {', '.join(COMPRESSIONS)}, not {kind!r}")
        self.kind, self.windows = kind, windows
        kernel, (kv_heads, head_dim) = windows.kernel, (problem.key.shape[1], problem.key.shape[3])
        draw = torch.Generator().manual_seed(problem.seed)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        weights: dict[str, torch.Tensor] = {}
        if kind == "weightedpool":
            for name in ("key", "value"):
                weights[name] = (1 + NOISE * noise(kv_heads, kernel)) / kernel
        elif kind == "linear":
            mean = torch.eye(head_dim, dtype=torch.float64).repeat(kernel, 1) / kernel
            for name in ("key", "value"):
                spread = NOISE / kernel / head_dim**0.5
                weights[name] = mean + spread * noise(kv_heads, kernel * head_dim, head_dim)
            weights["position"] = NOISE * noise(kv_heads, kernel, head_dim)
        elif kind == "mlp":
            first = NOISE / kernel * noise(MLP_WIDTH, 2 * kernel)
            second = NOISE / MLP_WIDTH**0.5 * noise(2, MLP_WIDTH)
            for n, sign in enumerate((1, -1)):
                for which in range(2):
                    unit = 2 * n + which
                    first[unit] = 0
                    first[unit, which * kernel : (which + 1) * kernel] = sign / kernel
                    second[:, unit] = 0
                    second[which, unit] = sign
            weights |= {"first": first, "bias": NOISE * noise(MLP_WIDTH), "second": second}
        self.weights = {n: w.to(problem.key.dtype).to(problem.key.device) for n, w in weights.items()}

    def __call__(self, key: torch.Tensor, value: torch.Tensor) -> State:
        """Compressed keys and values in the dtype of `key`, computed in `wide(dtype)`."""
        if self.windows.count(key.shape[2]) == 0:
            empty = key[:, :, :0]
            return empty, empty
        dtype = wide(key.dtype)
        weights = {name: w.to(dtype) for name, w in self.weights.items()}
        keys, values = (self.windows.unfold(x.to(dtype)) for x in (key, value))  # [B, Hkv, T, D, kernel]
        widest = MLP_WIDTH if self.kind == "mlp" else self.windows.kernel
        each = keys[:, :, :1].numel() // self.windows.kernel * widest * dtype.itemsize
        parts = [
            self._compress(keys[:, :, s], values[:, :, s], weights)
            for s in row_slices(keys.shape[2], each if self.kind != "avgpool" else 0)
        ]
        return tuple(torch.cat(column, 2).to(key.dtype) for column in zip(*parts, strict=True))

    def _compress(self, keys: torch.Tensor, values: torch.Tensor, weights: dict[str, torch.Tensor]) -> State:
        if self.kind == "avgpool":
            return keys.mean(-1), values.mean(-1)
        if self.kind == "weightedpool":
            return tuple(
                torch.einsum("bhtdl,hl->bhtd", x, weights[n]) for n, x in (("key", keys), ("value", values))
            )
        if self.kind == "linear":
            keys = keys + weights["position"].mT[:, None]
            return tuple(
                torch.einsum("bhtx,hxd->bhtd", x.mT.flatten(3), weights[n])
                for n, x in (("key", keys), ("value", values))
            )
        hidden = torch.relu(torch.cat((keys, values), -1) @ weights["first"].mT + weights["bias"])
        return tuple((hidden @ weights["second"].mT).unbind(-1))


class Nsa(BlockSparseReference):
    """NSA for the shapes, seed and block size of one problem, other windows than its own if given."""

    def __init__(self, problem: Problem, settings: NsaSettings, windows: Windows | None = None):
        block = problem.block_size
        if block % 4 and windows is None:
            raise Unsupported(
                f"NSA needs a block size that is a multiple of 4 (stride = block / 4), not {block}"
            )
        self.windows = windows or Windows(block // 2, block // 4)
        self.top = TopBlocks(block, settings.top_k, settings.init_blocks, settings.local_blocks)
        self.scale = problem.scale
        self.rule = settings.rule
        self.window = round(settings.window_blocks * block)
        self.compressor = Compressor(settings.compression, self.windows, problem)
        branches, head_dim = 3 if self.window else 2, problem.query.shape[3]
        draw = torch.Generator().manual_seed(problem.seed + 1)
        weight = torch.randn(branches, head_dim, generator=draw, dtype=torch.float64) / head_dim**0.5
        bias = torch.randn(branches, generator=draw, dtype=torch.float64)
        self.gate_weight, self.gate_bias = (
            x.to(problem.query.dtype).to(problem.query.device) for x in (weight, bias)
        )

    def compress(self, key: torch.Tensor, value: torch.Tensor) -> State:
        return self.compressor(key, value)

    def append(self, state: State, key: torch.Tensor, value: torch.Tensor) -> State:
        if not self.windows.completes(key.shape[2]):
            return state
        new = self.compressor(key[:, :, -self.windows.kernel :], value[:, :, -self.windows.kernel :])
        return tuple(torch.cat(pair, 2) for pair in zip(state, new, strict=True))

    def gates(self, query: torch.Tensor) -> torch.Tensor:
        dtype = wide(query.dtype)
        return torch.sigmoid(query.to(dtype) @ self.gate_weight.to(dtype).T + self.gate_bias.to(dtype))

    def score(self, query, positions, state, blocks):
        logits = query @ state[0][:, :, None].mT * self.scale
        visible = self.windows.visible(positions, state[0].shape[2])
        importance = visible_softmax(logits, visible).sum(2)
        scores = scores_to_blocks(importance, self.windows, self.top.block_size, blocks, self.rule)
        return scores, largest_logit(logits, visible)

    def attend(self, query, positions, key, value, state, selected, gates, first, stop):
        compressed_keys, compressed_values = state
        visible = self.windows.visible(positions, compressed_keys.shape[2])[None, None]
        outputs = [
            masked_attention(query, compressed_keys, compressed_values, visible, self.scale),
            block_attention(query, key, value, positions, selected, self.top.block_size, self.scale, stop),
        ]
        if self.window:
            outputs.append(
                window_attention(query, key, value, positions, self.window, self.scale, first, stop)
            )
        return sum(gates[..., n, None] * output for n, output in enumerate(outputs))


def largest_logit(logits: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Largest visible |logit| of a group, `[B, Hkv, R, 1]` from `[B, Hkv, G, R, T]`; 0 where nothing is
    visible.
    """
    if logits.shape[-1] == 0:
        return logits.new_zeros((*logits.shape[:2], logits.shape[3], 1))
    return (logits.abs() * visible).amax((2, -1)).unsqueeze(-1)


def settings_for(
    problem: Problem,
    preset: str = "nsa",
    *,
    top_k: int | None = None,
    init_blocks: int | None = None,
    local_blocks: int | None = None,
    window: int | None = None,
    compression: str | None = None,
    rule: str | None = None,
) -> NsaSettings:
    """A preset with the given settings in place of its own, `top_k` brought into the possible range.

    Raises:
        ValueError: an unknown preset, or a setting below what makes sense.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    given = {
        "top_k": top_k, "init_blocks": init_blocks, "local_blocks": local_blocks,
        "compression": compression, "rule": rule,
        "window_blocks": None if window is None else window / problem.block_size,
    }  # fmt: skip
    settings = replace(PRESETS[preset], **{name: x for name, x in given.items() if x is not None})
    if (
        settings.top_k < 1
        or settings.init_blocks < 0
        or settings.local_blocks < 1
        or settings.window_blocks < 0
    ):
        raise ValueError(f"top_k and local_blocks start at 1, init_blocks and window at 0: {settings}")
    return replace(
        settings, top_k=clamp_top_k(settings.top_k, settings.init_blocks + settings.local_blocks, problem)
    )


def gradients_beside_gates(
    output: torch.Tensor,
    leaves: Sequence[torch.Tensor],
    source: torch.Tensor,
    grad_output: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Gradients of an output whose gates were made of `source`, a copy of the queries: `query` in all, `key`,
    `value`, and `query by scores` without what comes through the gates (autograd would add the two).

    Args:
        output, grad_output: of one shape.
        leaves: queries, keys and values.
        source: of the shape of the queries.
    """
    by_scores, key, value, by_gates = torch.autograd.grad(output, (*leaves, source), grad_output)
    return {"query": by_scores + by_gates, "key": key, "value": value, "query by scores": by_scores}


def clamp_top_k(top_k: int, forced: int, problem: Problem) -> int:
    """`top_k` raised to the number of forced blocks, then lowered to the number of blocks there are."""
    return min(max(top_k, forced), block_count(problem.key, problem.block_size))


def prepare(problem: Problem, *, preset: str = "nsa", **settings) -> Operator:
    """NSA for one problem; `settings` are those of `settings_for` (see the module's docstring)."""
    chosen = settings_for(problem, preset, **settings)
    method = Nsa(problem, chosen)
    asked = settings.get("top_k") or PRESETS[preset].top_k
    notes = {
        "preset": preset,
        "top_k": asked,
        "top_k_used": chosen.top_k,
        "init_blocks": chosen.init_blocks,
        "local_blocks": chosen.local_blocks,
        "window": method.window,
        "compression": chosen.compression,
        "rule": chosen.rule,
        "compressed_tokens": method.windows.count(problem.key.shape[2]),
        "gates": "from the query, before the timed region" if problem.phase != "train" else "from the query",
    }
    return make_operator(problem, method, notes)
