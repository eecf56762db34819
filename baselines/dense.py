"""Dense causal attention by PyTorch's `scaled_dot_product_attention`, one method for each backend, the
backend pinned.

Prefill is `is_causal=True`; decode is one query against the whole cache without a mask, as its position is
the last. Documentation:
https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
(FlashAttention-2: arXiv 2307.08691; memory-efficient attention: arXiv 2112.05682).

Debts and facts:
    * Grouped heads go to the backend by `enable_gqa=True`. A backend that refuses that (memory-efficient
      attention does) gets keys and values expanded to all query heads, as its users must: before the timed
      region in prefill and decode (the best case for it), inside it in training, where the sum of their
      gradients is part of the work. `notes["grouped_heads"]` says which.
    * The backend is pinned for the length of each call by PyTorch's four switches (`enable_flash_sdp`, ...),
      which are restored after it. `torch.nn.attention.sdpa_kernel` does the same with 28 microseconds of host
      time a call, more than a third of an eager decode step, which a model would pay once.
    * A backend that refuses the problem raises `Unsupported` with PyTorch's reason; another backend is never
      tried in its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dashbench.baselines.api import Operator, Problem, Unsupported
from dashbench.baselines.attention_reference import (
    dense_expected,
    dense_gradients,
    small_enough_for_gradients,
)

_SWITCHES = {
    SDPBackend.FLASH_ATTENTION: (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    SDPBackend.CUDNN_ATTENTION: (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    SDPBackend.EFFICIENT_ATTENTION: (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    SDPBackend.MATH: (cuda.math_sdp_enabled, cuda.enable_math_sdp),
}
"""Backend: (whether it may be used, how to allow or forbid it)."""

_REFUSALS = (
    "No available kernel",
    "No viable backend",
    "No valid execution plans",
    "No execution plans",
    "No valid engine configs",
    "is not supported",
    "not supported by",
)
"""How PyTorch and cuDNN word it that a backend does not take a problem; anything else is an error and stays
one.
"""


def prepare_flash(problem: Problem) -> Operator:
    """FlashAttention-2 inside PyTorch (on a CPU its blocked attention)."""
    return _prepare(problem, SDPBackend.FLASH_ATTENTION)


def prepare_cudnn(problem: Problem) -> Operator:
    """cuDNN's fused attention."""
    return _prepare(problem, SDPBackend.CUDNN_ATTENTION)


def prepare_efficient(problem: Problem) -> Operator:
    """The memory-efficient kernels inside PyTorch."""
    return _prepare(problem, SDPBackend.EFFICIENT_ATTENTION)


def prepare_math(problem: Problem) -> Operator:
    """Unfused attention: the scores are materialised."""
    return _prepare(problem, SDPBackend.MATH)


def _prepare(problem: Problem, backend: SDPBackend) -> Operator:
    try:
        return _operator(problem, backend, enable_gqa=True)
    except Unsupported as grouped:
        if problem.query.shape[1] == problem.key.shape[1]:
            raise
        try:
            return _operator(problem, backend, enable_gqa=False)
        except Unsupported as expanded:
            if str(expanded) == str(grouped):
                raise
            raise Unsupported(f"{expanded} (with enable_gqa: {grouped})") from expanded


def _operator(problem: Problem, backend: SDPBackend, enable_gqa: bool) -> Operator:
    """The operator with grouped heads by `enable_gqa`, or with keys and values expanded to all query heads.

    Raises:
        Unsupported: the backend refuses.
    """
    group = problem.query.shape[1] // problem.key.shape[1]
    causal = problem.phase != "decode"
    grouped = "none" if group == 1 else "enable_gqa" if enable_gqa else "expanded"
    notes = {"backend": backend.name.lower(), "torch": torch.__version__, "grouped_heads": grouped}

    def expand(x: torch.Tensor) -> torch.Tensor:
        return x if enable_gqa or group == 1 else x.repeat_interleave(group, dim=1)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        before = [enabled() for enabled, _ in _SWITCHES.values()]
        try:
            for which, (_, allow) in _SWITCHES.items():
                allow(which is backend)
            return scaled_dot_product_attention(
                query, key, value, is_causal=causal, scale=problem.scale, enable_gqa=enable_gqa and group > 1
            )
        finally:
            for (_, allow), was in zip(_SWITCHES.values(), before, strict=True):
                allow(was)

    def reference(rows, selected):
        return dense_expected(problem, rows)

    if problem.phase != "train":
        query = problem.query
        with torch.no_grad():
            key, value = expand(problem.key), expand(problem.value)
        if grouped == "expanded":
            notes["expanded"] = "before the timed region"

        def run() -> torch.Tensor:
            with torch.no_grad():
                return attend(query, key, value)

        operator = Operator(run=run, reference=reference, stages={"attend": run}, notes=notes)
        operator.weights_bytes = 2 * key.numel() * key.element_size() if grouped == "expanded" else 0
        _try(run, backend)
        return operator

    leaves = {
        name: getattr(problem, name).detach().clone().requires_grad_() for name in ("query", "key", "value")
    }
    grads: dict[str, torch.Tensor] = {}
    if grouped == "expanded":
        notes["expanded"] = "inside the timed region"

    def run_train() -> torch.Tensor:
        output = attend(leaves["query"], expand(leaves["key"]), expand(leaves["value"]))
        grads.update(
            zip(leaves, torch.autograd.grad(output, list(leaves.values()), problem.grad_output), strict=True)
        )
        return output.detach()

    _try(run_train, backend)
    small = small_enough_for_gradients(problem)
    return Operator(
        run=run_train,
        reference=reference,
        gradients=lambda: dict(grads),
        reference_gradients=(lambda: dense_gradients(problem)) if small else None,
        notes=notes,
    )


def _try(run: Callable[[], torch.Tensor], backend: SDPBackend) -> None:
    """One untimed call, to learn whether the backend takes this problem.

    Under `sdpa_kernel` too: beside the four switches it forbids the "overrideable" backend, which otherwise
    answers a refusal with "Invalid backend" before PyTorch has explained itself.

    Raises:
        Unsupported: it does not; the message holds the warnings in which PyTorch explains why.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with sdpa_kernel(backend):
                run()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or not any(r in str(error) for r in _REFUSALS):
                raise
            told = [str(w.message).split(" (Triggered")[0].strip() for w in said]
            own = backend.name.split("_")[0].lower()
            reasons, mine = [], False
            # "<Backend> attention kernel not used because:" heads the reasons that follow it.
            for line in told:
                if line.endswith("because:"):
                    mine = own in line.lower() or (own == "efficient" and "memory" in line.lower())
                elif mine and "runtime disabled" not in line:
                    reasons.append(line)
            why = "; ".join(dict.fromkeys(reasons)) or str(error).splitlines()[0]
            raise Unsupported(f"SDPA backend {backend.name} refuses: {why}") from error
