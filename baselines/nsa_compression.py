"""NSA's compressors as differentiable functions of their weights: windows of keys and values to vectors.

Paper: arXiv 2502.11089, equation 7. The learned MLP is the one of the benchmark of the DashAttention paper
(arXiv 2605.18753): a channel's 32 keys and 32 values of a window go through Linear(64, 128), ReLU,
Linear(128, 2) to that channel's compressed key and value, shared by all heads and channels, without position
embedding.

Weights, by kind (S stride, windows of 2 S tokens, D head dim, F width of the network):

    avgpool       none
    weightedpool  key, value `[Hkv, 2 S]`
    linear        key, value `[Hkv, 2 S · D, D]`, position `[Hkv, 2 S, D]` (added to the keys)
    mlp           first `[F, 4 S]`, bias `[F]`, second `[2, F]`, second_bias `[2]` (zero if absent)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dashbench.kernels.compress import mean_windows, mlp_windows, mlp_windows_eager, window_count

KINDS = ("avgpool", "weightedpool", "linear", "mlp")


def compress(
    kind: str,
    key: torch.Tensor,
    value: torch.Tensor,
    stride: int,
    weights: Mapping[str, torch.Tensor] | None = None,
    kernels: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compressed keys and values of all complete windows; differentiable in keys, values and weights.

    Args:
        kind: one of `KINDS`.
        key, value: `[B, Hkv, L, D]`.
        stride: S.
        weights: see the module's table; they are used in the dtype of `key`.
        kernels: whether Triton may do what it has kernels for (means and the network).

    Returns:
        (keys, values), each `[B, Hkv, T, D]` in the dtype of `key`.

    Raises:
        ValueError: an unknown kind, or a weight that is missing.
    """
    if kind not in KINDS:
        raise ValueError(f"compression must be one of {', '.join(KINDS)}, not {kind!r}")
    weights = {name: w.to(key.dtype) for name, w in (weights or {}).items()}
    needed = {"avgpool": (), "mlp": ("first", "bias", "second")}.get(kind, ("key", "value"))
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(f"compression {kind} needs weights {', '.join(missing)}")
    if kind == "avgpool":
        means = mean_windows if kernels else _mean_windows_eager
        return means(key, stride), means(value, stride)
    if kind == "mlp":
        network = mlp_windows if kernels else mlp_windows_eager
        second_bias = weights.get("second_bias")
        if second_bias is None:
            second_bias = weights["second"].new_zeros(2)
        return network(key, value, stride, weights["first"], weights["bias"], weights["second"], second_bias)
    if window_count(key.shape[2], stride) == 0:
        return key[:, :, :0], value[:, :, :0]
    if kind == "weightedpool":
        return tuple(_pooled(x, weights[n], stride) for n, x in (("key", key), ("value", value)))
    compressed_key, compressed_value = (
        _projected(x, weights[n], stride) for n, x in (("key", key), ("value", value))
    )
    if "position" in weights:  # added to every window's keys alike: its image is one vector a head
        image = torch.einsum("hx,hxd->hd", weights["position"].flatten(1), weights["key"])
        compressed_key = compressed_key + image[:, None]
    return compressed_key, compressed_value


def _mean_windows_eager(x: torch.Tensor, stride: int) -> torch.Tensor:
    if window_count(x.shape[2], stride) == 0:
        return x[:, :, :0]
    return x.unfold(2, 2 * stride, stride).mean(-1)


def _cells(x: torch.Tensor, stride: int) -> torch.Tensor:
    """`[B, H, L, D]` to `[B, H, cells, S, D]`, a partial last cell left out."""
    cells = x.shape[2] // stride
    return x[:, :, : cells * stride].unflatten(2, (cells, stride))


def _pooled(x: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """Weighted sums of windows: a window's two cells each take their half of the weights."""
    halves = weight.unflatten(1, (2, stride))
    parts = torch.einsum("bhcsd,hps->pbhcd", _cells(x, stride), halves)
    return parts[0, :, :, :-1] + parts[1, :, :, 1:]


def _projected(x: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """Linear images of windows: one product a cell gives its share of both windows that hold it."""
    dim = weight.shape[-1]
    halves = weight.unflatten(1, (2, -1)).transpose(1, 2).flatten(2)  # [Hkv, S · D, 2 D]
    parts = _cells(x, stride).flatten(3) @ halves
    return parts[:, :, :-1, :dim] + parts[:, :, 1:, dim:]
