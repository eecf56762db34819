"""InfLLMv2 on our own kernels: one function for prompts, steps and training, and its method.

Paper: https://arxiv.org/abs/2509.24663; the specification, its settings and presets are
`infllmv2_reference`'s. Keys are mean-pooled, softmax denominators and block scores are computed without ever
storing a score a window, the choice is made on the device, and the chosen blocks are attended by the same
kernel as DashAttention's. Any number of blocks up to all, any length up to 2^19 tokens at blocks of 64.

Timed in prefill and training: compression, selection, attention, from q, k, v as a model has them after RoPE.
Timed in decode: writing the new token and the window that it completes, and the step.

Debts to the paper: as the specification's, but for its slowness. Decode keeps one tensor a cache, no pages.
"""

from __future__ import annotations

from typing import Any

import torch

from dashbench.baselines.api import Operator, Problem, Unsupported
from dashbench.baselines.attention_reference import small_enough_for_gradients
from dashbench.baselines.infllmv2_reference import PRESETS, InfLLMv2, InfLLMv2Settings, settings_for
from dashbench.baselines.selected_blocks import (
    CompressedCache,
    blocks_of_lists,
    blocks_of_mask,
    kept_of_active,
    kernels_for,
    with_layout,
)
from dashbench.kernels.attend import block_sparse_attention, kernel_for, routes_of_mask
from dashbench.kernels.band import Band, band_forward
from dashbench.kernels.compress import mean_windows
from dashbench.kernels.decode_blocks import BlockDecodeStep, append_token
from dashbench.kernels.selection import BlockChoice, select_blocks

NAMES = ("query", "key", "value")


def infllmv2_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    preset: str = "infllmv2_paper",
    block_size: int = 64,
    cache: CompressedCache | None = None,
    layout: str = "bhnd",
    backend: str = "auto",
    return_active_blocks: bool = False,
    **settings: Any,
):
    """Causal InfLLMv2 attention of the last N of L tokens; differentiable where N = L.

    Args:
        query: `[B, Hq, N, D]` (or `[B, N, Hq, D]` with `layout="bnhd"`), after position embedding; the last N
            positions. N = L is a prompt or training, N < L a step.
        key, value: `[B, Hkv, L, D]` (or `[B, L, Hkv, D]`), all tokens so far, the queries' own included.
        preset: `paper` or `infllmv2_paper`, see `infllmv2_reference`.
        block_size: tokens in a block; windows are half as long and a quarter apart.
        cache: compressed keys of earlier calls, one object a layer; without it a step compresses all keys
            again.
        layout: `bhnd` or `bnhd`; neither is copied.
        backend: `kernels`, `reference` (eager PyTorch), or `auto`: kernels on a GPU, else the reference.
        return_active_blocks: also return `[B, Hkv, N]` int: blocks attended, the own one included.
        **settings: top_k, init_blocks, local_blocks, lse_mode, dense_len in place of the preset's.

    Returns:
        The output in the layout and dtype of `query`; with `return_active_blocks` (output, blocks).

    Raises:
        ValueError: an unknown setting, a shape that the kernels do not take, or a cache of other sequences.
    """
    query, key, value = with_layout(layout, query, key, value)
    problem = _as_problem(query, key, value, block_size)
    chosen = settings_for(problem, preset, **settings)
    if kernels_for(backend, query, block_size):
        out, active = _attend(problem, chosen, cache, return_active_blocks)
    else:
        out, active = _attend_reference(problem, chosen, return_active_blocks)
    (out,) = with_layout(layout, out)
    return (out, active) if return_active_blocks else out


def _as_problem(query, key, value, block_size: int) -> Problem:
    phase = "prefill" if query.shape[2] == key.shape[2] else "decode"
    return Problem(phase, query, key, value, key.new_zeros(0), block_size=block_size)


def _dense(problem: Problem, settings: InfLLMv2Settings) -> bool:
    return problem.key.shape[2] < settings.dense_len


def choice_of(problem: Problem, settings: InfLLMv2Settings) -> BlockChoice:
    """The kernels' description of the selection; `local_blocks` counts the own block there."""
    forced = settings.init_blocks + settings.local_blocks + 1
    blocks = -(-problem.key.shape[2] // problem.block_size)
    top_k = blocks if _dense(problem, settings) else settings.top_k
    return BlockChoice(
        problem.block_size, max(top_k, forced), settings.init_blocks, settings.local_blocks + 1, "max"
    )


def compressed_keys(
    key: torch.Tensor, settings: InfLLMv2Settings, block_size: int, cache: CompressedCache | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(means of the windows, means of the coarse windows or None in `exact` mode)."""
    key = key.detach()

    def means(stride: int) -> torch.Tensor:
        if cache is None:
            return mean_windows(key, stride)
        return cache.windows(stride, lambda first: (mean_windows(key[:, :, first:], stride),))[0]

    return means(block_size // 4), means(block_size) if settings.lse_mode == "coarse" else None


def denominators(
    query: torch.Tensor, fine: torch.Tensor, coarse: torch.Tensor | None, block_size: int
) -> torch.Tensor:
    """Logarithms of the softmax denominators `[B, Hq, N]` fp32: over the coarse windows where a query sees
    one, else over the fine ones."""
    stride = block_size // 4
    if coarse is None:
        return band_forward(query, fine, None, Band(2 * stride, stride))[1]
    lse = band_forward(query, coarse, None, Band(2 * block_size, block_size))[1]
    early = 2 * block_size - 1  # the first query that sees a coarse window
    part = query[:, :, :early]
    lse[:, :, :early] = band_forward(part, fine, None, Band(2 * stride, stride))[1]
    return lse


def select(
    query: torch.Tensor, fine: torch.Tensor, coarse: torch.Tensor | None, choice: BlockChoice
) -> tuple[torch.Tensor, torch.Tensor]:
    """(bit mask, chosen blocks) of a prompt, see `select_blocks`."""
    query = query.detach()
    return select_blocks(query, fine, denominators(query, fine, coarse, choice.block_size), choice)


def _attend(problem: Problem, settings: InfLLMv2Settings, cache: CompressedCache | None, want_active: bool):
    query, key, value = (getattr(problem, n) for n in NAMES)
    new, length = query.shape[2], key.shape[2]
    if cache is not None:
        cache.seen(length, new)
    with torch.no_grad():
        fine, coarse = compressed_keys(key, settings, problem.block_size, cache)
    choice = choice_of(problem, settings)
    if new < length:
        step = _step(query, key, value, fine, coarse, choice)
        out = step.run()
        return out, step.counts.transpose(1, 2)
    if _dense(problem, settings):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        own = torch.arange(length, device=key.device) // choice.block_size + 1
        return out, own.expand(*key.shape[:2], -1)
    with torch.no_grad():
        mask, active = select(query, fine, coarse, choice)
        routes = routes_of_mask(mask, choice.block_size, query.shape[1] // key.shape[1])
    return block_sparse_attention(query, key, value, routes)[0], active


def _step(query, key, value, fine, coarse, choice: BlockChoice, **launch) -> BlockDecodeStep:
    lengths = torch.full((key.shape[0],), key.shape[2], dtype=torch.int32, device=key.device)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError("a step with fewer queries than keys has no gradients")
    query, key, value, fine = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, fine))
    return BlockDecodeStep(query, key, value, lengths, fine, choice, coarse_key=coarse, **launch)


def _attend_reference(problem: Problem, settings: InfLLMv2Settings, want_active: bool):
    method = InfLLMv2(problem, settings)
    query, key, value = (getattr(problem, n) for n in NAMES)
    with torch.no_grad():
        state = method.compress(key, value)
    out = method.forward(query, key, value, state, None, problem.start)
    active = method.selection(problem, state).sum(-1) if want_active else None
    return out, active


def prepare(problem: Problem, *, preset: str = "infllmv2_paper", **settings: Any) -> Operator:
    """InfLLMv2 by our kernels for one problem; `settings` as in `infllmv2_reference`."""
    chosen = settings_for(problem, preset, **settings)
    method = InfLLMv2(problem, chosen)
    try:
        kernels_for("kernels", problem.query, problem.block_size)
        choice = choice_of(problem, chosen)
    except ValueError as refused:
        raise Unsupported(str(refused)) from None
    notes = {
        "preset": preset,
        "top_k": settings.get("top_k") or PRESETS[preset].top_k,
        "top_k_used": chosen.top_k,
        "init_blocks": chosen.init_blocks,
        "local_blocks": chosen.local_blocks,
        "lse_mode": chosen.lse_mode,
        "dense_len": chosen.dense_len,
    }
    if method.dense:
        notes["fallback"] = f"dense below {chosen.dense_len}"
    if problem.phase == "decode":
        return _decode(problem, method, chosen, choice, notes)
    return _sequence(problem, method, chosen, choice, notes, {"preset": preset, **settings})


def _sequence(problem: Problem, method: InfLLMv2, settings, choice: BlockChoice, notes, given) -> Operator:
    """Prefill and training."""
    query, key, value = (getattr(problem, n) for n in NAMES)
    block, blocks = problem.block_size, -(-key.shape[2] // problem.block_size)
    group = query.shape[1] // key.shape[1]
    with torch.no_grad():
        fine, coarse = compressed_keys(key, settings, block)
        mask, active = select(query, fine, coarse, choice)
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
    function = {"block_size": block, "backend": "kernels", **given}
    if problem.phase == "prefill":

        @torch.no_grad()
        def run() -> torch.Tensor:
            return infllmv2_attention(query, key, value, **function)

        stages = {
            "compress": lambda: compressed_keys(key, settings, block),
            "select": lambda: routes_of_mask(select(query, fine, coarse, choice)[0], block, group),
            "attend": lambda: block_sparse_attention(query, key, value, routes)[0],
        }
        return Operator(run=run, stages={} if method.dense else stages, **shared)

    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    grads: dict[str, torch.Tensor] = {}

    def run_train() -> torch.Tensor:
        out = infllmv2_attention(*leaves, **function)
        grads.update(zip(NAMES, torch.autograd.grad(out, leaves, problem.grad_output), strict=True))
        return out.detach()

    def exact_gradients() -> dict[str, torch.Tensor]:
        """fp64, over the kernels' own selection."""
        exact = [x.detach().double().requires_grad_() for x in leaves]
        chosen = selected(torch.arange(key.shape[2]))
        out = method.forward(*exact, method.compress(*exact[1:]), None, 0, chosen)
        return dict(zip(NAMES, torch.autograd.grad(out, exact, problem.grad_output.double()), strict=True))

    return Operator(
        run=run_train,
        gradients=lambda: dict(grads),
        reference_gradients=exact_gradients if small_enough_for_gradients(problem) else None,
        **shared,
    )


def _decode(problem: Problem, method: InfLLMv2, settings, choice: BlockChoice, notes) -> Operator:
    """One new token against a cache that holds all tokens before it, and their windows."""
    length, block = problem.key.shape[2], problem.block_size
    key, value = problem.key.clone(), problem.value.clone()
    new_key, new_value = (x[:, :, -1:].contiguous() for x in (problem.key, problem.value))
    key[:, :, -1], value[:, :, -1] = 0, 0  # `append` writes them
    fine, coarse = (None if x is None else x.clone() for x in compressed_keys(problem.key, settings, block))
    for level, stride in ((fine, block // 4), (coarse, block)):
        if level is not None and length >= 2 * stride and length % stride == 0:
            level[:, :, -1] = 0
    overlap = key.is_cuda and torch.cuda.get_device_capability(key.device)[0] >= 9
    try:
        step = _step(problem.query.detach(), key, value, fine, coarse, choice, overlap=overlap)
    except ValueError as refused:
        raise Unsupported(str(refused)) from None

    def append() -> None:
        append_token(
            new_key, new_value, key, value, step.lengths, block // 4, fine, coarse_key=coarse,
            overlap=overlap,
        )  # fmt: skip

    def run() -> torch.Tensor:
        append()
        return step.run()

    run()  # the stages below start from a finished step
    notes["splits"] = step.splits
    blocks = -(-length // block)
    return Operator(
        run=run,
        reference=lambda rows, chosen: method.expected(problem, rows, chosen),
        selected=lambda rows: blocks_of_lists(step.lists, step.counts, blocks).expand(-1, -1, len(rows), -1),
        kept=lambda: kept_of_active(
            step.counts.transpose(1, 2), torch.tensor([length - 1], device=key.device), block
        ),
        stages={"append": append, "select": step.select, "attend": step.attend, "combine": step.combine},
        notes=notes,
        weights_bytes=sum(x.numel() * x.element_size() for x in (fine, coarse) if x is not None),
    )
