"""Causal dense attention for lengths at which sparsity does not pay: FlashAttention-3, or PyTorch's own.

Not a method of the benchmark (those are in baselines, each backend pinned): this picks the best backend that
takes the inputs and says which one it was.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata, util

import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# Module: (distribution, module with the flags of its build, whether it has a backward).
FLASH_ATTENTION_3 = {
    "flash_attn_interface": ("flash_attn_3", "fa3_config", True),
    "fa3_fwd_interface": ("fa3_fwd", "fa3_fwd_config", False),
}


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, left_padding: torch.Tensor | None = None
) -> tuple[torch.Tensor, str]:
    """Causal attention over all tokens.

    Args:
        query: `[B, Hq, N, D]`; key, value: `[B, Hkv, N, D]`, last dimension contiguous.
        left_padding: `[B]` int32, leading padding tokens: never attended, their rows give zeros. Or None. A
            mask of `[B, N, N]` is made for it, so it is for short sequences.

    Returns:
        (output `[B, Hq, N, D]`, name of the backend).
    """
    inputs = (query, key, value)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    name = None if left_padding is not None else _flash_attention_3(query, training)
    if name is not None:
        # Strides are free in the library, so its `[B, N, H, D]` is a view.
        out = import_module(name).flash_attn_func(*(x.transpose(1, 2) for x in inputs), causal=True)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2), f"{name} {_version(FLASH_ATTENTION_3[name][0])}"
    mask = padding = None
    if left_padding is not None:
        position = torch.arange(query.shape[2], device=query.device)
        padding = position < left_padding[:, None]  # [B, N]
        # Rows of padding see themselves, for a softmax over nothing is no number; they are zeroed below.
        seen = ~padding[:, None] | (position[:, None] == position)
        mask = (seen & (position <= position[:, None]))[:, None]
    backend = _sdpa_backend(query, key, value, mask)
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
        )
    if padding is not None:
        out = out.masked_fill(padding[:, None, :, None], 0.0)
    return out, f"torch {torch.__version__} {backend.name.lower()}"


def dense_step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Causal attention of the last T of L tokens, T < L; as `dense_attention` otherwise.

    FlashAttention-3 runs by its interface for caches, which splits the keys over the GPU.
    """
    tokens, length = query.shape[2], key.shape[2]
    name = _flash_attention_3(query, False)
    if name is not None:
        step = import_module(name).flash_attn_with_kvcache
        lengths = torch.full((len(query),), length, dtype=torch.int32, device=query.device)
        heads = (x.transpose(1, 2) for x in (query, key, value))
        out = step(*heads, cache_seqlens=lengths, causal=True, num_splits=0, pack_gqa=True)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2), f"{name} {_version(FLASH_ATTENTION_3[name][0])}"
    mask = None
    if tokens > 1:
        position = torch.arange(length - tokens, length, device=query.device)
        mask = torch.arange(length, device=query.device) <= position[:, None]
    grouped = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)
    return out, f"torch {torch.__version__}"


def _flash_attention_3(query: torch.Tensor, training: bool) -> str | None:
    """The installed module that takes this query, or None."""
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) != (9, 0):
        return None
    for name, (_, config, backward) in FLASH_ATTENTION_3.items():
        if not _installed(name) or (training and not backward):
            continue
        flags = import_module(config).CONFIG["build_flags"] if _installed(config) else {}
        if query.dtype == torch.bfloat16 or (
            query.dtype == torch.float16 and not flags.get("FLASHATTENTION_DISABLE_FP16")
        ):
            return name
    return None


# A model asks for every layer of every step, and looking on the disk takes a millisecond.
@cache
def _installed(module: str) -> bool:
    return util.find_spec(module) is not None


@cache
def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def _sdpa_backend(query, key, value, mask) -> SDPBackend:
    """The fastest backend of PyTorch that takes these inputs."""
    grouped = query.shape[1] != key.shape[1]
    asked = cuda.SDPAParams(query, key, value, mask, 0.0, mask is None, grouped)
    if query.is_cuda:
        for backend, takes in (
            (SDPBackend.CUDNN_ATTENTION, cuda.can_use_cudnn_attention),
            (SDPBackend.FLASH_ATTENTION, cuda.can_use_flash_attention),
            (SDPBackend.EFFICIENT_ATTENTION, cuda.can_use_efficient_attention),
        ):
            if takes(asked, False):
                return backend
    return SDPBackend.MATH
