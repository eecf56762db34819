"""FlashAttention-3, forward only, as its users run it at its best.

Prefill is `flash_attn_func(causal=True)`; decode is `flash_attn_with_kvcache` with packed grouped heads, the
library's own choice of the number of splits and scheduler metadata computed beforehand. Paper:
FlashAttention-3, arXiv 2407.08608. The module is `flash_attn_interface` (built from the authors' repository)
or, without it, `fa3_fwd_interface` (PyPI: `fa3-fwd`, read at version 0.0.3: bf16 and fp8, no fp16, no
backward, no paged cache).

Parameters, all for decode: `num_splits` (0 lets the library choose), `pack_gqa`, `lengths`: `tensor` gives
    the cache's lengths as a growing cache needs them, with scheduler metadata computed beforehand; `full`
    says nothing of lengths, so that the whole cache is read (3 % faster at 128k and batch 8 on an H200, 7 %
    at 16k and batch 1).

Debts and facts:
    * Queries, keys and values lie in the library's own layout `[B, N, H, D]`, made before the timed region;
      the output is handed back as a view `[B, H, N, D]`.
    * `fa3@fp8` quantises query, key and value to e4m3 before the timed region, one scale for each (batch
      element, key/value head) as the library's descale arguments want it. Its reference is exact attention
      over the *quantised* inputs: it judges the kernel, whose own error (probabilities in e4m3) is far above
      that of bf16; `notes["arithmetic"]` names it for the gate.
    * Only compute capability 9.0: the kernels of these builds are compiled for sm_90a, and other devices get
      sm_80 code or none.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module, metadata, util
from types import ModuleType
from typing import Any

import torch

from dashbench.baselines.api import Expected, Operator, Problem, Unsupported
from dashbench.baselines.attention_reference import attention_rows

MODULES = {
    "flash_attn_interface": ("flash_attn_3", "fa3_config"),
    "fa3_fwd_interface": ("fa3_fwd", "fa3_fwd_config"),
}
"""Module that holds the functions: (distribution, module with the flags of the build)."""

E4M3_MAX = 448.0


def prepare(
    problem: Problem, *, num_splits: int = 0, pack_gqa: bool = True, lengths: str = "full"
) -> Operator:
    """bf16 (and fp16 where the build has it)."""
    module, flags, notes = _load(problem)
    if problem.query.dtype == torch.float16 and flags.get("FLASHATTENTION_DISABLE_FP16"):
        raise Unsupported(f"{notes['module']} {notes['version']} is built without fp16 kernels; use bfloat16")
    tensors = {name: _token_major(getattr(problem, name)) for name in ("query", "key", "value")}
    return _operator(problem, module, tensors, {}, notes, num_splits, pack_gqa, lengths)


def prepare_fp8(
    problem: Problem, *, num_splits: int = 0, pack_gqa: bool = True, lengths: str = "full"
) -> Operator:
    """fp8 (e4m3) inputs, bf16 output."""
    module, flags, notes = _load(problem)
    if flags.get("FLASHATTENTION_DISABLE_FP8"):
        raise Unsupported(f"{notes['module']} {notes['version']} is built without fp8 kernels")
    kv_heads = problem.key.shape[1]
    tensors, descales = {}, {}
    for name in ("query", "key", "value"):
        quantised, descale = quantise(getattr(problem, name), kv_heads)
        tensors[name] = _token_major(quantised)
        descales[f"{name[0]}_descale"] = descale
    notes["arithmetic"] = "float8_e4m3fn"
    notes["quantised"] = "before the timed region, one scale a (batch element, key/value head)"
    exact = replace(
        problem, **{name: _dequantised(tensors[name], descales[f"{name[0]}_descale"]) for name in tensors}
    )
    return _operator(exact, module, tensors, descales, notes, num_splits, pack_gqa, lengths)


def quantise(x: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 copy of `x` `[B, H, N, D]` and its scales `[B, kv_heads]` fp32 (`x ~ copy * scale`), the H /
    kv_heads heads of a group sharing one.
    """
    batch, heads, tokens, head_dim = x.shape
    grouped = x.float().reshape(batch, kv_heads, heads // kv_heads * tokens, head_dim)
    scale = grouped.abs().amax((2, 3)).clamp_min(1e-12) / E4M3_MAX
    return (grouped / scale[..., None, None]).to(torch.float8_e4m3fn).reshape(x.shape), scale


def _dequantised(token_major: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`[B, H, N, D]` fp32 values that the library reads out of `[B, N, H, D]` e4m3 and `[B, Hkv]` scales."""
    x = token_major.float().transpose(1, 2)
    return x * scale.repeat_interleave(x.shape[1] // scale.shape[1], 1)[..., None, None]


def _token_major(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, N, D]` to a contiguous `[B, N, H, D]`."""
    return x.detach().transpose(1, 2).contiguous()


def _load(problem: Problem) -> tuple[ModuleType, dict[str, bool], dict[str, Any]]:
    """The library's module, its build flags, and notes on both.

    Raises:
        Unsupported: training, no Hopper GPU, or no library.
    """
    if problem.phase == "train":
        raise Unsupported("FlashAttention-3 is measured forward only: the wheel fa3-fwd has no backward")
    if not problem.query.is_cuda:
        raise Unsupported("FlashAttention-3 needs an NVIDIA Hopper GPU")
    capability = torch.cuda.get_device_capability(problem.query.device)
    if capability != (9, 0):
        raise Unsupported(
            f"FlashAttention-3's kernels are sm_90a; this GPU is {capability[0]}.{capability[1]}"
        )
    for name, (distribution, config) in MODULES.items():
        if util.find_spec(name) is None:
            continue
        module = import_module(name)
        flags = import_module(config).CONFIG["build_flags"] if util.find_spec(config) else {}
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            version = getattr(module, "__version__", "unknown")
        return module, flags, {"module": name, "version": version, "build": "sm_90a"}
    raise Unsupported("no FlashAttention-3: pip install fa3-fwd==0.0.3")


def _operator(
    problem: Problem,
    module: ModuleType,
    tensors: dict[str, torch.Tensor],
    descales: dict[str, torch.Tensor],
    notes: dict[str, Any],
    num_splits: int,
    pack_gqa: bool,
    lengths: str,
) -> Operator:
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    options: dict[str, Any] = {"softmax_scale": problem.scale, **descales}
    notes["layout"] = "[B, N, H, D], made before the timed region"

    if problem.phase == "prefill":

        def run() -> torch.Tensor:
            output = module.flash_attn_func(query, key, value, causal=True, **options)
            return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    else:
        if lengths not in ("tensor", "full"):
            raise ValueError(f"lengths must be 'tensor' or 'full', not {lengths!r}")
        batch, length = key.shape[:2]
        options |= {"num_splits": num_splits, "pack_gqa": pack_gqa}
        if lengths == "tensor":
            cache_seqlens = torch.full((batch,), length, dtype=torch.int32, device=key.device)
            options |= {
                "cache_seqlens": cache_seqlens,
                "scheduler_metadata": module.get_scheduler_metadata(
                    batch, query.shape[1], length, query.shape[2], key.shape[2], query.shape[3],
                    cache_seqlens, qkv_dtype=query.dtype, causal=False, num_splits=num_splits,
                    pack_gqa=pack_gqa,
                ),
            }  # fmt: skip
        notes |= {"num_splits": num_splits, "pack_gqa": pack_gqa, "lengths": lengths}

        def run() -> torch.Tensor:
            return module.flash_attn_with_kvcache(query, key, value, **options).transpose(1, 2)

    def reference(rows: torch.Tensor, selected: torch.Tensor | None) -> Expected:
        rows = rows.to(query.device)
        return Expected(
            attention_rows(problem.query[:, :, rows], problem.key, problem.value, rows + problem.start)
        )

    return Operator(run=run, reference=reference, stages={"attend": run}, notes=notes)
