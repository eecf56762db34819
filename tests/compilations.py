"""Which kernels a call would compile, found without a GPU: `python tests/compilations.py [--compile WORD]`.

Every launch stops where Triton has chosen what to compile: its key is recorded (the signature, with what is
specialised on values, and the constants). Prints one JSON object: scenario → the kernels that it compiled and
the scenarios before it had not. With `--compile` the scenarios that have WORD in their name are compiled for
an H200 (sm_90a), and a kernel is followed by what `pending_products` finds overwritten or released early in
it.
"""

from __future__ import annotations

import json
import os
import sys
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from pending_products import overwritten, released_early
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

COMPILE = sys.argv[2] if sys.argv[1:2] == ["--compile"] else None


class NoDevice:
    """A driver that stands for an H200 until something is launched."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def tensors(batch, heads, kv_heads, tokens, dim, dtype=torch.bfloat16):
    q = torch.zeros(batch, heads, tokens, dim, dtype=dtype)
    k, v = (torch.zeros(batch, kv_heads, tokens, dim, dtype=dtype) for _ in range(2))
    return q, k, v, torch.zeros(kv_heads, dim, dtype=dtype)


def prefill(tokens, batch=1, gamma=1.0, cu_seqlens=None, pad=None, **options):
    from dashbench.kernels import dash_attention

    q, k, v, s = tensors(batch, 32, 2, tokens, 128)
    padding = None if pad is None else torch.full((batch,), pad, dtype=torch.int32)
    with torch.no_grad():
        dash_attention(
            q, k, v, s, scaling_factor=gamma, cu_seqlens=cu_seqlens, left_padding=padding,
            return_active_blocks=True, **options,
        )  # fmt: skip


def train(tokens, batch=1, gamma=1.0, **options):
    from dashbench.kernels import dash_attention

    inputs = [x.requires_grad_() for x in tensors(batch, 32, 2, tokens, 128)]
    dash_attention(*inputs, scaling_factor=gamma, **options).sum().backward()


def train_rival(method, tokens=2048):
    from dashbench.baselines.infllmv2 import infllmv2_attention
    from dashbench.baselines.nsa import nsa_attention

    q, k, v = (x.requires_grad_() for x in tensors(1, 32, 2, tokens, 128)[:3])
    if method == "nsa":
        gates = torch.zeros(1, 32, tokens, 3, dtype=q.dtype)
        out = nsa_attention(q, k, v, gates, backend="kernels")
    else:
        out = infllmv2_attention(q, k, v, backend="kernels")
    out.sum().backward()


def prefill_nsa(tokens=2048):
    from dashbench.baselines.nsa import nsa_attention

    q, k, v = tensors(1, 32, 2, tokens, 128)[:3]
    nsa_attention(q, k, v, torch.zeros(1, 32, tokens, 3, dtype=q.dtype), backend="kernels")


def decode(tokens, batch=1, new_tokens=1, page_size=None, overlap=False, pad=None, balanced=False):
    from dashbench.kernels.decode import DecodeCache, DecodeLaunch, DecodeStep, append
    from dashbench.kernels.reference import DashOptions

    pages = 1 if page_size is None else tokens // page_size
    size = page_size or tokens
    _, k, v, s = tensors(batch * pages, 32, 2, size, 128)
    table = None if page_size is None else torch.zeros(batch, pages, dtype=torch.int32)
    lengths = torch.full((batch,), tokens - 64, dtype=torch.int32)
    padding = None if pad is None else torch.full((batch,), pad, dtype=torch.int32)
    cache = DecodeCache(
        k, v, torch.zeros(batch * pages, 2, size // 64, 128, dtype=k.dtype), lengths, table, padding
    )
    new = [torch.zeros(batch, h, new_tokens, 128, dtype=k.dtype) for h in (32, 2, 2)]
    launch = DecodeLaunch(splits=8, overlap=overlap, balanced=balanced)
    step = DecodeStep(new[0], cache, DashOptions(), launch)
    append(cache, new[1], new[2], s, 64, step.workspace.append_tickets, overlap)
    step.run()


SCENARIOS = {
    "prefill 4096": lambda: prefill(4096),
    "prefill 640, batch 3, sparser": lambda: prefill(640, 3, 0.3),
    "prefill 16384": lambda: prefill(16384),
    "prefill 1000, no whole chunks": lambda: prefill(1000),
    "prefill 4095, no whole chunks": lambda: prefill(4095, 2),
    "prefill 1": lambda: prefill(1),
    "prefill biased": lambda: prefill(2048, bias_mode="raw"),
    "prefill biased, no whole chunks": lambda: prefill(1000, 2, bias_mode="raw"),
    "packed": lambda: prefill(1000, cu_seqlens=torch.tensor([0, 100, 1000])),
    "packed otherwise": lambda: prefill(4096, cu_seqlens=torch.tensor([0, 1, 2, 4000, 4096])),
    "padded": lambda: prefill(1000, 2, pad=3),
    "padded otherwise": lambda: prefill(2048, 3, pad=64),
    "train 2048": lambda: train(2048),
    "train 512, batch 3, sparser": lambda: train(512, 3, 0.3),
    "train 1000": lambda: train(1000),
    "train 64": lambda: train(64, 2),
    "train biased": lambda: train(2048, bias_mode="raw"),
    "train biased, deterministic": lambda: train(2048, bias_mode="raw", deterministic=True),
    "train deterministic": lambda: train(2048, deterministic=True),
    "train nsa": lambda: train_rival("nsa"),
    "train infllmv2": lambda: train_rival("infllmv2"),
    "prefill nsa": prefill_nsa,
    "decode 4096": lambda: decode(4096),
    "decode 8192, batch 3": lambda: decode(8192, 3),
    "decode 4032": lambda: decode(4032),
    "decode 3 new tokens": lambda: decode(4096, 2, 3),
    "decode 16 new tokens": lambda: decode(4096, 1, 16),
    "decode paged": lambda: decode(4096, 2, page_size=256),
    "decode paged otherwise": lambda: decode(4096 + 64, 3, page_size=64),
    "decode padded": lambda: decode(4096, 2, pad=5),
    "decode balanced": lambda: decode(4096, balanced=True),
    "decode balanced, 6 groups": lambda: decode(4032, 3, balanced=True),
    "decode balanced, 16 groups": lambda: decode(4096, 4, 2, balanced=True),
    "decode balanced, 32 groups": lambda: decode(4096, 1, 16, balanced=True),
    "decode balanced, 30 groups": lambda: decode(4096, 3, 5, balanced=True),
    "decode balanced, paged": lambda: decode(4096, 2, page_size=256, balanced=True),
    "decode balanced, padded": lambda: decode(4096, 2, pad=5, balanced=True),
}


def count() -> dict[str, list[str]]:
    """Runs the scenarios in order, with Hopper's attention kernel where its shapes allow."""
    from dashbench.kernels import hopper

    def on_hopper(query, key, value, tile, onto=None):
        # `is_cuda` and what follows from it is all that a tensor without a device lacks.
        return query.shape[1] // key.shape[1] * tile == 128

    seen: set[tuple] = set()
    found: dict[str, list[str]] = {}
    do_compile = JITFunction._do_compile
    run = JITFunction.run

    def record(self, key, signature, device, constexprs, options, attrs, warmup):
        place = (self.fn.__module__, self.fn.__qualname__, key)
        if place not in seen:
            seen.add(place)
            name = f"{self.fn.__module__.split('.')[-1]}.{self.fn.__qualname__}"
            if COMPILE:
                kernel = do_compile(self, key, signature, device, constexprs, options, attrs, warmup)
                ttgir = kernel.asm["ttgir"]
                name = " ".join([name, *overwritten(ttgir), *released_early(ttgir)])
            found[scenario].append(name)
        return mock.sentinel.compiled

    def stop(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    with (
        mock.patch.object(triton.runtime.driver, "_active", NoDevice()),
        mock.patch.object(JITFunction, "_do_compile", record),
        mock.patch.object(JITFunction, "run", stop),
        mock.patch.object(hopper, "supports", on_hopper),
        mock.patch.object(hopper, "programs", lambda works, device: min(works, 132)),
    ):
        for scenario, call in SCENARIOS.items():
            if COMPILE and COMPILE not in scenario:
                continue
            found[scenario] = []
            call()
    return found


if __name__ == "__main__":
    print(json.dumps(count(), indent=1))
