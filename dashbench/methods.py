"""The methods dashbench knows, as data: name, where its code is, its knob, what it can do.

Import strings keep torch out of `dashbench list` and `--help`. Methods from outside the tree plug in through
the entry point group `dashbench.methods`: each entry point names a `Method` object.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any, Literal

ENTRY_POINT_GROUP = "dashbench.methods"


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: as users write it in a suite.
        target: `module:function` of `prepare(problem, **knobs) -> Operator` (see `dashbench.baselines.api`).
        summary: one line for `dashbench list methods`.
        devices: kinds of device it runs on.
        phases: phases it supports.
        dtypes: dtypes it supports.
        knob: the parameter that sets sparsity, or None if the method is dense.
        knob_kind: how a target sparsity becomes a knob: `arithmetic` (tokens kept are a known function of
            it) or `bisect` (sparsity is an outcome, monotone in the knob).
        requires: distributions to import, `{module: pip requirement}`; missing ones make a skip with the
            command that enables it.
        min_capability: smallest CUDA compute capability, e.g. (9, 0).
        defaults: knob values used when the suite gives none.
        tested: what it was tested with, or `untested`.
        family: which colour it gets in figures.
    """

    name: str
    target: str
    summary: str
    devices: tuple[Literal["cpu", "cuda"], ...] = ("cuda",)
    phases: tuple[str, ...] = ("prefill", "decode")
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    knob: str | None = None
    knob_kind: Literal["arithmetic", "bisect"] | None = None
    requires: dict[str, str] = field(default_factory=dict)
    min_capability: tuple[int, int] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    tested: str = "untested"
    family: str = ""


_ALL = ("float32", "bfloat16", "float16")

BUILT_IN: tuple[Method, ...] = (
    Method(
        "dense@flash",
        "dashbench.baselines.dense:prepare_flash",
        "FlashAttention-2 inside PyTorch (SDPA, backend pinned)",
        devices=("cpu", "cuda"),
        phases=("prefill", "decode", "train"),
        dtypes=_ALL,
        tested="torch 2.11 on an H200, torch 2.13 on a CPU",
        family="dense",
    ),
    Method(
        "dense@cudnn",
        "dashbench.baselines.dense:prepare_cudnn",
        "cuDNN's fused attention (SDPA, backend pinned)",
        phases=("prefill", "decode", "train"),
        tested="torch 2.11 on an H200",
        family="dense",
    ),
    Method(
        "dense@efficient",
        "dashbench.baselines.dense:prepare_efficient",
        "xFormers-style memory-efficient attention inside PyTorch (SDPA, backend pinned)",
        phases=("prefill", "decode", "train"),
        dtypes=_ALL,
        tested="torch 2.11 on an H200",
        family="dense",
    ),
    Method(
        "dense@math",
        "dashbench.baselines.dense:prepare_math",
        "unfused attention inside PyTorch (SDPA, backend pinned); materialises the scores",
        devices=("cpu", "cuda"),
        phases=("prefill", "decode", "train"),
        dtypes=_ALL,
        tested="torch 2.11 on an H200, torch 2.13 on a CPU",
        family="dense",
    ),
    Method(
        "fa3",
        "dashbench.baselines.flash_attention3:prepare",
        "FlashAttention-3, forward only: prefill by flash_attn_func, decode by flash_attn_with_kvcache",
        requires={"flash_attn_interface|fa3_fwd_interface": "fa3-fwd==0.0.3"},
        min_capability=(9, 0),
        tested="fa3-fwd 0.0.3 on an H200",
        family="fa3",
    ),
    Method(
        "fa3@fp8",
        "dashbench.baselines.flash_attention3:prepare_fp8",
        "FlashAttention-3 on e4m3 inputs quantised before the timed region, bf16 output, forward only",
        dtypes=("bfloat16",),
        requires={"flash_attn_interface|fa3_fwd_interface": "fa3-fwd==0.0.3"},
        min_capability=(9, 0),
        tested="fa3-fwd 0.0.3 on an H200",
        family="fa3",
    ),
    Method(
        "dash",
        "dashbench.baselines.dash:prepare",
        "DashAttention by our kernels: prefill, decode with a cache, training",
        phases=("prefill", "decode", "train"),
        knob="scaling_factor",
        knob_kind="bisect",
        min_capability=(8, 0),
        tested="torch 2.11 and triton 3.6 on an H200 and an H100, Triton's interpreter",
        family="dash",
    ),
    Method(
        "dash@reference",
        "dashbench.baselines.dash_reference:prepare",
        "DashAttention in eager PyTorch: the specification, slow",
        devices=("cpu", "cuda"),
        phases=("prefill", "decode", "train"),
        dtypes=_ALL,
        knob="scaling_factor",
        knob_kind="bisect",
        tested="torch 2.13 on a CPU",
        family="dash",
    ),
    Method(
        "nsa",
        "dashbench.baselines.nsa:prepare",
        "Native Sparse Attention by our kernels: prefill, decode with a cache, training",
        phases=("prefill", "decode", "train"),
        knob="top_k",
        knob_kind="arithmetic",
        min_capability=(8, 0),
        tested="torch 2.11 and triton 3.6 on an H100 (prefill, decode), Triton's interpreter",
        family="nsa",
    ),
    Method(
        "infllmv2",
        "dashbench.baselines.infllmv2:prepare",
        "InfLLMv2 by our kernels: prefill, decode with a cache, training",
        phases=("prefill", "decode", "train"),
        knob="top_k",
        knob_kind="arithmetic",
        min_capability=(8, 0),
        tested="torch 2.11 and triton 3.6 on an H100 (prefill, decode), Triton's interpreter",
        family="infllmv2",
    ),
    Method(
        "nsa@reference",
        "dashbench.baselines.nsa_reference:prepare",
        "Native Sparse Attention in eager PyTorch: the specification, slow",
        devices=("cpu", "cuda"),
        phases=("prefill", "decode", "train"),
        dtypes=_ALL,
        knob="top_k",
        knob_kind="arithmetic",
        tested="torch 2.11 on an H200, torch 2.13 on a CPU",
        family="nsa",
    ),
    Method(
        "infllmv2@reference",
        "dashbench.baselines.infllmv2_reference:prepare",
        "InfLLMv2 in eager PyTorch: the specification, slow",
        devices=("cpu", "cuda"),
        phases=("prefill", "decode", "train"),
        dtypes=_ALL,
        knob="top_k",
        knob_kind="arithmetic",
        tested="torch 2.11 on an H200, torch 2.13 on a CPU",
        family="infllmv2",
    ),
    Method(
        "nsa@fla",
        "dashbench.baselines.fla_nsa:prepare",
        "Native Sparse Attention by flash-linear-attention's Triton kernels; at most 32 selected blocks",
        phases=("prefill", "decode", "train"),
        knob="top_k",
        knob_kind="arithmetic",
        requires={"fla": "fla-core==0.6.0"},
        min_capability=(8, 0),
        tested="fla-core 0.6.0 on an H200 (prefill, decode) and an H100 (decode)",
        family="nsa",
    ),
    Method(
        "infllmv2@openbmb",
        "dashbench.baselines.openbmb_infllmv2:prepare",
        "InfLLMv2 by its authors' CUDA kernels, forward only",
        phases=("prefill",),
        knob="top_k",
        knob_kind="arithmetic",
        requires={"infllm_v2": "git+https://github.com/OpenBMB/infllmv2_cuda_impl"},
        min_capability=(8, 0),
        tested="untested",
        family="infllmv2",
    ),
    Method(
        "dash@fasa-org",
        "dashbench.baselines.fasa_dash:prepare",
        "DashAttention by its authors' Triton kernels, forward only",
        knob="scaling_factor",
        knob_kind="bisect",
        requires={"dash_attn": "git+https://github.com/fasa-org/dash-attention"},
        min_capability=(8, 0),
        tested="untested",
        family="dash",
    ),
    Method(
        "entmax@adasplash",
        "dashbench.baselines.adasplash_entmax:prepare",
        "entmax-1.5 attention token by token (AdaSplash-2), causal; its sparsity is the inputs'",
        phases=("prefill", "train"),
        requires={"adasplash": "adasplash==0.2.2"},
        min_capability=(8, 0),
        tested="adasplash 0.2.2 on an H100 (prefill; training misses the gate)",
        family="entmax",
    ),
)


@cache
def registry() -> dict[str, Method]:
    """Every known method by name: the built-in ones and those other packages add by entry point.

    Raises:
        ValueError: two methods share a name, or an entry point is not a `Method`.
    """
    methods = {m.name: m for m in BUILT_IN}
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        method = entry.load()
        if not isinstance(method, Method):
            raise ValueError(f"entry point {entry.name!r} of {entry.value} is not a dashbench.methods.Method")
        if method.name in methods:
            raise ValueError(f"method {method.name!r} is defined twice (entry point {entry.value})")
        methods[method.name] = method
    return methods
