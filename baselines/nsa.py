"""Native Sparse Attention on our own kernels: one function for prompts, steps and training, and its method.

Paper: https://arxiv.org/abs/2502.11089; the specification, its settings and presets are `nsa_reference`'s.
Compressed attention writes its output and its softmax denominators, from which importance goes straight to
block scores and to the choice, all on the device; the chosen blocks are attended by the same kernel as
DashAttention's; a sliding window has one of its own. Without gradients each branch's kernel adds its gated
output to the sum. Any number of blocks up to all, any length up to 2^19 tokens at blocks of 64.

Timed in prefill and training: compression, compressed attention, selection, selected attention, the window
where there is one, the gated sum; from q, k, v as a model has them after RoPE, and in prefill and decode from
gates made before. Timed in decode: writing the new token and the window that it completes, and the step.

Debts to the paper: as the specification's, but for its slowness. The prefill's importance is a second product
with the compressed keys after the attention over them, because it needs the finished denominators.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dashbench.baselines.api import Operator, Problem, Unsupported
from dashbench.baselines.attention_reference import small_enough_for_gradients
from dashbench.baselines.nsa_compression import compress
from dashbench.baselines.nsa_reference import (
    PRESETS,
    Nsa,
    NsaSettings,
    gradients_beside_gates,
    settings_for,
)
from dashbench.baselines.selected_blocks import (
    CompressedCache,
    blocks_of_lists,
    blocks_of_mask,
    kept_of_active,
    kernels_for,
    with_layout,
)
from dashbench.kernels.attend import block_sparse_attention, kernel_for, routes_of_mask
from dashbench.kernels.band import Band, band_attention
from dashbench.kernels.compress import window_count
from dashbench.kernels.decode_blocks import BlockDecodeStep, append_token
from dashbench.kernels.gated_sum import gated_sum
from dashbench.kernels.selection import BlockChoice, select_blocks

NAMES = ("query", "key", "value")
Weights = Mapping[str, torch.Tensor]


def nsa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    *,
    preset: str = "nsa",
    block_size: int = 64,
    compression_weights: Weights | None = None,
    cache: CompressedCache | None = None,
    layout: str = "bhnd",
    backend: str = "auto",
    return_active_blocks: bool = False,
    **settings: Any,
):
    """Causal NSA of the last N of L tokens; differentiable in all tensors where N = L.

    Args:
        query: `[B, Hq, N, D]` (or `[B, N, Hq, D]` with `layout="bnhd"`), after position embedding; the last N
            positions. N = L is a prompt or training, N < L a step.
        key, value: `[B, Hkv, L, D]` (or `[B, L, Hkv, D]`), all tokens so far, the queries' own included.
        gates: `[B, Hq, N, branches]` (or `[B, N, Hq, branches]`), after the sigmoid, of compressed, selected
            and, where there is one, window attention.
        preset: `nsa` (the paper's) or `nsa_paper` (what the DashAttention paper compares with: no window
            branch, compression by a learned network), see `nsa_reference`.
        block_size: tokens in a block; windows are half as long and a quarter apart.
        compression_weights: see `nsa_compression`; for `mlp`: first `[128, block_size]`, bias `[128]`, second
            `[2, 128]`, second_bias `[2]`.
        cache: compressed keys and values of earlier calls, one object a layer; without it a step compresses
            everything again.
        layout: `bhnd` or `bnhd`; neither is copied.
        backend: `kernels`, `reference` (eager PyTorch), or `auto`: kernels on a GPU, else the reference.
        return_active_blocks: also return `[B, Hkv, N]` int: blocks that the selected branch attended, the own
            one included.
        **settings: top_k, init_blocks, local_blocks, window, compression, rule in place of the preset's.

    Returns:
        The output in the layout and dtype of `query`; with `return_active_blocks` (output, blocks).

    Raises:
        ValueError: an unknown setting, gates or weights that do not fit it, a shape that the kernels do not
            take, or a cache of other sequences.
    """
    query, key, value, gates = with_layout(layout, query, key, value, gates)
    phase = "prefill" if query.shape[2] == key.shape[2] else "decode"
    problem = Problem(phase, query, key, value, key.new_zeros(0), block_size=block_size)
    chosen = settings_for(problem, preset, **settings)
    branches = 3 if chosen.window_blocks else 2
    if tuple(gates.shape) != (*query.shape[:3], branches):
        raise ValueError(f"gates must be {(*query.shape[:3], branches)}, not {tuple(gates.shape)}")
    if kernels_for(backend, query, block_size):
        out, active = _attend(problem, chosen, gates, compression_weights, cache)
    else:
        out, active = _attend_reference(problem, chosen, gates, compression_weights, return_active_blocks)
    (out,) = with_layout(layout, out)
    return (out, active) if return_active_blocks else out


def choice_of(settings: NsaSettings, block_size: int) -> BlockChoice:
    """The kernels' description of the selection."""
    top_k = max(settings.top_k, settings.init_blocks + settings.local_blocks)
    return BlockChoice(block_size, top_k, settings.init_blocks, settings.local_blocks, settings.rule)


def window_of(settings: NsaSettings, block_size: int) -> int:
    """Tokens of the sliding window, 0 for none."""
    return round(settings.window_blocks * block_size)


def select(
    query: torch.Tensor, compressed: torch.Tensor, lse: torch.Tensor, choice: BlockChoice
) -> tuple[torch.Tensor, torch.Tensor]:
    """(bit mask, chosen blocks) of a prompt, see `select_blocks`."""
    with torch.no_grad():
        return select_blocks(query.detach(), compressed.detach(), lse, choice)


def _compressed(problem: Problem, settings: NsaSettings, weights: Weights | None, cache=None):
    key, value, stride = problem.key, problem.value, problem.block_size // 4
    if cache is None:
        return compress(settings.compression, key, value, stride, weights)
    return cache.windows(
        stride,
        lambda first: compress(settings.compression, key[:, :, first:], value[:, :, first:], stride, weights),
    )


def _attend(
    problem: Problem, settings: NsaSettings, gates, weights: Weights | None, cache: CompressedCache | None
):
    query, key, value = (getattr(problem, n) for n in NAMES)
    block, stride, new, length = problem.block_size, problem.block_size // 4, query.shape[2], key.shape[2]
    choice, window = choice_of(settings, block), window_of(settings, block)
    if cache is not None:
        cache.seen(length, new)
    compressed_key, compressed_value = _compressed(problem, settings, weights, cache)
    if new < length:
        step = _step(problem, compressed_key, compressed_value, choice, window, gates)
        return step.run(), step.counts.transpose(1, 2)
    band, group = Band(2 * stride, stride), query.shape[1] // key.shape[1]
    # Gradients need the branches one by one; else each adds its gated output to one tensor.
    apart = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, gates))
    gate = (None, None, None) if apart else gates.unbind(-1)
    out, lse = band_attention(query, compressed_key, compressed_value, band, gate=gate[0])
    onto = None if apart else out
    mask, active = select(query, compressed_key, lse, choice)
    routes = routes_of_mask(mask, block, group)
    outputs = [out, block_sparse_attention(query, key, value, routes, gate=gate[1], onto=onto)[0]]
    if window:
        outputs.append(band_attention(query, key, value, Band(window=window), gate=gate[2], onto=onto)[0])
    return gated_sum(gates, *outputs) if apart else out, active


def _step(problem: Problem, compressed_key, compressed_value, choice, window: int, gates, **launch):
    tensors = (problem.query, problem.key, problem.value, compressed_key, compressed_value)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, gates)):
        raise ValueError("a step with fewer queries than keys has no gradients")
    query, key, value, compressed_key, compressed_value = (
        x if x.stride(-1) == 1 else x.contiguous() for x in tensors
    )
    lengths = torch.full((key.shape[0],), key.shape[2], dtype=torch.int32, device=key.device)
    return BlockDecodeStep(
        query, key, value, lengths, compressed_key, choice, compressed_value=compressed_value,
        window=window, gates=gates, **launch,
    )  # fmt: skip


def _attend_reference(problem: Problem, settings: NsaSettings, gates, weights, want_active: bool):
    query, key, value = (getattr(problem, n) for n in NAMES)
    state = compress(settings.compression, key, value, problem.block_size // 4, weights, kernels=False)
    method = _specification(problem, settings)
    out = method.forward(query, key, value, state, gates, problem.start)
    active = None
    if want_active:
        with torch.no_grad():
            active = method.selection(problem, tuple(x.detach() for x in state)).sum(-1)
    return out, active


def _specification(problem: Problem, settings: NsaSettings) -> Nsa:
    """The specification's selection and attention; compressed tensors and gates come from outside."""
    plain = NsaSettings(**{**vars(settings), "compression": "avgpool"})
    return Nsa(problem, plain)


def prepare(problem: Problem, *, preset: str = "nsa", **settings: Any) -> Operator:
    """NSA by our kernels for one problem; `settings` and seeded weights are `nsa_reference`'s."""
    chosen = settings_for(problem, preset, **settings)
    method = Nsa(problem, chosen)
    try:
        kernels_for("kernels", problem.query, problem.block_size)
        choice = choice_of(chosen, problem.block_size)
    except ValueError as refused:
        raise Unsupported(str(refused)) from None
    notes = {
        "preset": preset,
        "top_k": settings.get("top_k") or PRESETS[preset].top_k,
        "top_k_used": chosen.top_k,
        "init_blocks": chosen.init_blocks,
        "local_blocks": chosen.local_blocks,
        "window": method.window,
        "compression": chosen.compression,
        "rule": chosen.rule,
        "compressed_tokens": method.windows.count(problem.key.shape[2]),
        "gates": "from the query, before the timed region" if problem.phase != "train" else "from the query",
    }
    if problem.phase == "decode":
        return _decode(problem, method, chosen, choice, notes)
    return _sequence(problem, method, chosen, choice, notes, {"preset": preset, **settings})


def _sequence(problem: Problem, method: Nsa, settings, choice: BlockChoice, notes, given) -> Operator:
    """Prefill and training."""
    query, key, value = (getattr(problem, n) for n in NAMES)
    block, blocks = problem.block_size, -(-key.shape[2] // problem.block_size)
    group, weights = query.shape[1] // key.shape[1], method.compressor.weights
    band = Band(block // 2, block // 4)
    with torch.no_grad():
        gates = method.gates(query).to(query.dtype)
        compressed = _compressed(problem, settings, weights)
        lse = band_attention(query, *compressed, band)[1]
        mask, active = select(query, compressed[0], lse, choice)
        routes = routes_of_mask(mask, block, group)
    notes |= {"tile": routes.tile, "kernel": kernel_for(query, key, value, routes)}

    def selected(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(query.device)
        return blocks_of_mask(mask[:, :, rows], rows, block, blocks)

    def kept() -> torch.Tensor:
        return kept_of_active(active, torch.arange(key.shape[2], device=key.device), block)

    shared = {
        "reference": lambda rows, chosen: method.expected(problem, rows, chosen),
        "selected": selected,
        "kept": kept,
        "notes": notes,
    }
    function = {"block_size": block, "backend": "kernels", "compression_weights": weights, **given}
    if problem.phase == "prefill":

        @torch.no_grad()
        def run() -> torch.Tensor:
            return nsa_attention(query, key, value, gates, **function)

        gate, out = gates.unbind(-1), torch.zeros_like(query)
        stages = {
            "compress": lambda: _compressed(problem, settings, weights),
            "compressed": lambda: band_attention(query, *compressed, band, gate=gate[0]),
            "select": lambda: routes_of_mask(select(query, compressed[0], lse, choice)[0], block, group),
            "attend": lambda: block_sparse_attention(query, key, value, routes, gate=gate[1], onto=out),
        }
        if method.window:
            slide = Band(window=method.window)
            stages["window"] = lambda: band_attention(query, key, value, slide, gate=gate[2], onto=out)
        return Operator(run=run, stages=stages, **shared)

    small = small_enough_for_gradients(problem)
    if not small and settings.compression not in ("avgpool", "weightedpool"):
        raise Unsupported(
            f"gradients of compression {settings.compression!r} cannot be checked at {key.shape[2]} tokens"
        )
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    source = leaves[0].detach().clone().requires_grad_()  # the gates' own leaf
    grads: dict[str, torch.Tensor] = {}

    def run_train() -> torch.Tensor:
        live = method.gates(source).to(query.dtype)
        out = nsa_attention(*leaves, live, **function)
        grads.update(gradients_beside_gates(out, leaves, source, problem.grad_output))
        return out.detach()

    def exact_gradients() -> dict[str, torch.Tensor]:
        """fp64, over the kernels' own selection."""
        exact = [x.detach().double().requires_grad_() for x in leaves]
        chosen = selected(torch.arange(key.shape[2]))
        state, live = method.compress(*exact[1:]), method.gates(exact[0])
        out = method.forward(*exact, state, live, 0, chosen)
        return dict(zip(NAMES, torch.autograd.grad(out, exact, problem.grad_output.double()), strict=True))

    return Operator(
        run=run_train,
        gradients=lambda: {name: grads[name] for name in NAMES},
        score_gradient=lambda: grads["query by scores"],
        reference_gradients=exact_gradients if small else None,
        **shared,
    )


def _decode(problem: Problem, method: Nsa, settings, choice: BlockChoice, notes) -> Operator:
    """One new token against a cache that holds all tokens before it, and their windows."""
    length, block, stride = problem.key.shape[2], problem.block_size, problem.block_size // 4
    weights = method.compressor.weights
    key, value = problem.key.clone(), problem.value.clone()
    new_key, new_value = (x[:, :, -1:].contiguous() for x in (problem.key, problem.value))
    key[:, :, -1], value[:, :, -1] = 0, 0  # `append` writes them
    with torch.no_grad():
        gates = method.gates(problem.query).to(problem.query.dtype)
        compressed = tuple(x.clone() for x in _compressed(problem, settings, weights))
    completes = window_count(length, stride) > window_count(length - 1, stride)
    if completes:
        for x in compressed:
            x[:, :, -1] = 0
    overlap = key.is_cuda and torch.cuda.get_device_capability(key.device)[0] >= 9
    filled = Problem("decode", problem.query.detach(), key, value, problem.summary_query, block_size=block)
    try:
        step = _step(filled, *compressed, choice, method.window, gates, overlap=overlap)
    except ValueError as refused:
        raise Unsupported(str(refused)) from None
    means = settings.compression == "avgpool"

    @torch.no_grad()
    def append() -> None:
        kept = compressed if means else (None, None)
        append_token(new_key, new_value, key, value, step.lengths, stride, *kept, overlap=overlap)
        if completes and not means:
            recent = (x[:, :, -2 * stride :] for x in (key, value))
            made = compress(settings.compression, *recent, stride, weights)
            for x, new in zip(compressed, made, strict=True):
                x[:, :, -1:] = new

    def run() -> torch.Tensor:
        append()
        return step.run()

    run()  # the stages below start from a finished step
    notes |= {"splits": step.splits, "windows_appended": int(completes)}
    blocks = -(-length // block)
    stages = {"append": append, "select": step.select, "attend": step.attend}
    if method.window:
        stages["window"] = step.slide
    return Operator(
        run=run,
        reference=lambda rows, chosen: method.expected(problem, rows, chosen),
        selected=lambda rows: blocks_of_lists(step.lists, step.counts, blocks).expand(-1, -1, len(rows), -1),
        kept=lambda: kept_of_active(
            step.counts.transpose(1, 2), torch.tensor([length - 1], device=key.device), block
        ),
        stages={**stages, "combine": step.combine},
        notes=notes,
        weights_bytes=sum(x.numel() * x.element_size() for x in compressed),
    )
