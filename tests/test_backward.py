"""Every gradient of the backward against autograd through float64."""
import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dashbench.kernels.backward import BackwardLaunch, RoutingGradient, attention_gradients
from dashbench.kernels.backward_lists import chunk_list_start, chunk_lists, tile_lists

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def entmax(z, alpha):
    """Entmax of the last dimension by bisection; the gradient flows through one exact Newton step at the root."""
    x = (alpha - 1) * z
    low, high = x.max(-1, keepdim=True).values - 1, x.max(-1, keepdim=True).values
    for _ in range(80):
        middle = (low + high) / 2
        total = (x - middle).clamp(min=0).pow(1 / (alpha - 1)).sum(-1, keepdim=True)
        low, high = torch.where(total > 1, middle, low), torch.where(total > 1, high, middle)
    fixed = high.detach()
    excess = (x - fixed).clamp(min=0)
    inside = excess > 0
    safe = torch.where(inside, excess, torch.ones_like(excess))
    slope = torch.where(inside, safe.pow(1 / (alpha - 1) - 1), 0) / (alpha - 1)
    total = torch.where(inside, safe.pow(1 / (alpha - 1)), 0).sum(-1, keepdim=True)
    tau = fixed + (total - 1) / slope.sum(-1, keepdim=True).detach()
    excess = (x - tau).clamp(min=0)
    return torch.where(inside, torch.where(inside, excess, 1.0).pow(1 / (alpha - 1)), 0), fixed


def dash(q, k, v, q_bar, chunk, gamma, sigma, alpha, mode, detach):
    """DashAttention in the inputs' dtype, dense: output, lse, summaries, tau, bit mask."""
    batch, query_heads, n, d = q.shape
    kv_heads = k.shape[1]
    group, chunks = query_heads // kv_heads, math.ceil(n / chunk)
    scale = d**-0.5
    own = torch.arange(n, device=q.device) // chunk
    per_chunk = q_bar.expand(batch, chunks, kv_heads, d).transpose(1, 2) if q_bar.ndim == 2 else q_bar
    full = max(chunks - 1, 0)
    kc = k[:, :, : full * chunk].reshape(batch, kv_heads, full, chunk, d)
    a = torch.softmax((kc * per_chunk[:, :, :full, None]).sum(-1) * scale, -1)
    k_bar = (a[..., None] * kc).sum(-2)
    visible = torch.arange(full, device=q.device)[None] < own[:, None]
    qg = q.reshape(batch, kv_heads, group, n, d)
    tau = torch.zeros(batch, kv_heads, group, n, dtype=q.dtype, device=q.device)
    bias = torch.zeros(batch, kv_heads, n, chunks, dtype=q.dtype, device=q.device)
    routed = torch.zeros(batch, kv_heads, n, chunks, dtype=torch.bool, device=q.device)
    first = min(chunk, n)
    if full and n > chunk:
        z = torch.einsum("bhgid,bhcd->bhgic", qg, k_bar) * (gamma * scale)
        z = z.masked_fill(~visible, -1e4)[..., first:, :]
        p, tau_late = entmax(z, alpha)
        tau = torch.cat([tau[..., :first], tau_late[..., 0]], -1)
        w = p.mean(2)
        member = w > 1e-20
        log_w = torch.where(member, torch.where(member, w, 1.0).log(), 0)
        if mode == "centered":
            mean = log_w.sum(-1, keepdim=True) / member.sum(-1, keepdim=True)
            log_w = (log_w - (mean.detach() if detach else mean)) / sigma
        elif mode == "none":
            log_w = torch.zeros_like(log_w)
        log_w = torch.where(member, log_w, 0)
        bias = torch.cat([bias[:, :, :first], torch.nn.functional.pad(log_w, (0, chunks - full))], 2)
        routed = torch.cat([routed[:, :, :first], torch.nn.functional.pad(member, (0, chunks - full))], 2)
    out, lse = attend(q, k, v, routed, bias, chunk)
    return out, lse, k_bar, tau.reshape(batch, query_heads, n), routed


def attend(q, k, v, routed, bias, chunk):
    batch, query_heads, n, d = q.shape
    kv_heads = k.shape[1]
    own = torch.arange(n, device=q.device) // chunk
    causal = torch.arange(n, device=q.device)[None] <= torch.arange(n, device=q.device)[:, None]
    diagonal = own[None] == own[:, None]
    allowed = (routed[..., own] | diagonal) & causal
    scores = torch.einsum("bhgid,bhtd->bhgit", q.reshape(batch, kv_heads, -1, n, d), k) * d**-0.5
    scores = scores + torch.where(diagonal, 0, bias[..., own])[:, :, None]
    scores = scores.masked_fill(~allowed[:, :, None], float("-inf"))
    out = torch.einsum("bhgit,bhtd->bhgid", scores.softmax(-1), v).reshape(q.shape)
    return out, scores.logsumexp(-1).reshape(batch, query_heads, n)


def pack(routed):
    words = math.ceil(routed.shape[-1] / 32)
    bits = torch.nn.functional.pad(routed, (0, words * 32 - routed.shape[-1])).long().unflatten(-1, (words, 32))
    packed = (bits << torch.arange(32, device=routed.device)).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def make(n, group, kv_heads=2, d=64, batch=1, dtype=torch.bfloat16, seed=0, per_chunk=0):
    g = torch.Generator().manual_seed(seed)
    q, o = (torch.randn(batch, kv_heads * group, n, d, generator=g).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, kv_heads, n, d, generator=g).to(dtype) for _ in range(2))
    shape = (batch, kv_heads, per_chunk, d) if per_chunk else (kv_heads, d)
    return [x.to(DEVICE) for x in (q, k, v, torch.randn(*shape, generator=g).to(dtype), o)]


def relative(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def gradients(n, group, mode="centered", sigma=1.0, alpha=1.5, gamma=6.0, detach=False, chunk=16, launch=None,
              deterministic=False, per_chunk=0, **shape):
    q, k, v, q_bar, grad = make(n, group, per_chunk=per_chunk, **shape)
    exact = [x.double().requires_grad_() for x in (q, k, v, q_bar)]
    out, lse, k_bar, tau, routed = dash(*exact, chunk, gamma, sigma, alpha, mode, detach)
    out.backward(grad.double())
    routing = RoutingGradient(k_bar.detach().to(q.dtype), q_bar, tau.detach().float(), mode, gamma, sigma, alpha, detach)
    ours = attention_gradients(
        grad, q, k, v, out.detach().to(q.dtype), lse.detach().float(), pack(routed), chunk, routing, deterministic, launch
    )
    return ours, [x.grad for x in exact], routed


def test_first():
    ours, exact, routed = gradients(70, 4, dtype=torch.float32)
    print(routed.float().sum(-1).mean())
    for a, b in zip(ours, exact):
        print(relative(a, b))
