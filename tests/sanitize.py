"""One small call of every kernel on a GPU, for a memory checker.

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python tests/sanitize.py

Every tensor gets an allocation of its own (`PYTORCH_NO_CUDA_MEMORY_CACHING`), so that a step outside one is
seen. Run it once without the checker before: compiling under it takes minutes. `python tests/sanitize.py
NAME …` runs the calls whose names contain one of the words.

racecheck reports the compiler's own hand-over to the specialised warps of the Hopper kernels, and nothing
else; `test_operator_gpu.dispatch_lines` says why that is none.
"""

from __future__ import annotations

import os
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from dashbench.kernels.attend import block_sparse_attention
from dashbench.kernels.dash import dash_attention
from dashbench.kernels.decode import DecodeCache, DecodeLaunch, DecodeStep, append
from dashbench.kernels.reference import DashOptions
from dashbench.kernels.route import route_chunks
from dashbench.kernels.summarize import summarize_chunks

DEVICE = "cuda"


def drawn(tokens=320, batch=1, kv_heads=1, group=16, dim=128, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype)

    q, k, v = (normal(batch, h, tokens, dim) for h in (kv_heads * group, kv_heads, kv_heads))
    return 3 * q, k, v, 0.3 * normal(kv_heads, dim)


def prefill(tokens=320, kernel=None, **options):
    q, k, v, s = drawn(tokens)
    summaries = summarize_chunks(k, s, 64)
    routes = route_chunks(q, summaries, 64, **options)
    block_sparse_attention(q, k, v, routes, kernel=kernel)


def operator(tokens=200, train=False, batch=1, group=16, dim=128, dtype=torch.bfloat16, **options):
    inputs = drawn(tokens, batch, group=group, dim=dim, dtype=dtype)
    if train:
        inputs = [x.requires_grad_() for x in inputs]
        dash_attention(*inputs, **options).float().sum().backward()
    else:
        with torch.no_grad():
            dash_attention(*inputs, return_active_blocks=True, **options)


def decode(new_tokens=1, page_size=None, pad=None, beside=False, overlap=False, balanced=False, **options):
    size = page_size or 256
    pages = 256 // size
    _, k, v, s = drawn(size, 2 * pages)
    table = None
    if page_size:
        table = torch.randperm(2 * pages, device=DEVICE).reshape(2, pages).int()
    lengths = torch.tensor([250, 127], dtype=torch.int32, device=DEVICE)
    padding = None if pad is None else torch.tensor([pad, 0], dtype=torch.int32, device=DEVICE)
    cache = DecodeCache(k, v, k[:, :, : size // 64].contiguous(), lengths, table, padding)
    query, new_key, new_value, _ = drawn(new_tokens, 2)
    launch = DecodeLaunch(overlap=overlap, balanced=balanced)
    new = (new_key, new_value, s) if beside else None
    step = DecodeStep(query, cache, DashOptions(**options), launch, new=new)
    if beside:
        lengths += 1
    else:
        append(cache, new_key, new_value, s, 64, step.workspace.append_tickets, overlap)
    step.run()


def rival(name, train=False):
    """NSA or InfLLMv2 on the same building blocks, with what each compresses and selects."""
    from dashbench.baselines.infllmv2 import infllmv2_attention
    from dashbench.baselines.nsa import nsa_attention

    q, k, v, _ = (x.requires_grad_(train) for x in drawn(200))
    with torch.set_grad_enabled(train):
        if name == "nsa":
            gates = torch.rand(*q.shape[:3], 3, device=q.device, dtype=q.dtype)
            out = nsa_attention(q, k, v, gates, top_k=3)
        else:
            out = infllmv2_attention(q, k, v, top_k=2, init_blocks=1, local_blocks=1)
    if train:
        out.float().sum().backward()


def device_tensor(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


CALLS = {
    "prefill hopper": lambda: prefill(kernel="hopper"),
    "prefill portable": lambda: prefill(kernel="portable"),
    "prefill one token": lambda: operator(1),
    "prefill short of a chunk": lambda: operator(259),
    "route candidates": lambda: prefill(640, resident=0),
    "route bit mask": lambda: prefill(64 * 34, resident=0, save=True),
    "route biased": lambda: operator(200, bias_mode="raw", forced="own_and_previous", alpha=1.25),
    "route completed": lambda: operator(200, visibility="completed", sigma=1.0),
    "padded": lambda: operator(200, batch=2, left_padding=device_tensor(3, 130)),
    "packed": lambda: operator(200, cu_seqlens=device_tensor(0, 1, 70, 200)),
    "group 1, head dim 64, fp16": lambda: operator(140, group=1, dim=64, dtype=torch.float16, chunk_size=16),
    "train": lambda: operator(200, train=True, sigma=1.0),
    "train deterministic": lambda: operator(200, train=True, deterministic=True),
    "train packed": lambda: operator(130, train=True, cu_seqlens=device_tensor(0, 67, 130)),
    "train padded": lambda: operator(150, train=True, left_padding=device_tensor(70)),
    "infllmv2": lambda: rival("infllmv2"),
    "infllmv2 train": lambda: rival("infllmv2", train=True),
    "nsa": lambda: rival("nsa"),
    "nsa train": lambda: rival("nsa", train=True),
    "decode": lambda: decode(),
    "decode beside": lambda: decode(beside=True),
    "decode overlapping": lambda: decode(overlap=True),
    "decode paged": lambda: decode(3, page_size=64),
    "decode padded": lambda: decode(2, pad=70, bias_mode="raw"),
    "decode balanced": lambda: decode(balanced=True),
    "decode balanced beside, overlapping": lambda: decode(beside=True, overlap=True, balanced=True),
    "decode balanced, paged": lambda: decode(3, page_size=64, balanced=True),
    "decode balanced, padded": lambda: decode(2, pad=70, bias_mode="raw", balanced=True),
}


def main() -> None:
    words = sys.argv[1:]
    for name, call in CALLS.items():
        if words and not any(word in name for word in words):
            continue
        call()
        torch.cuda.synchronize()
        print(name, flush=True)


if __name__ == "__main__":
    main()
