"""Native Sparse Attention by the Triton kernels of flash-linear-attention, as its users call it.

Prefill and training are `fla.ops.nsa.parallel_nsa`; decode calls its parts with the compressed keys and
values cached. Code: https://github.com/fla-org/flash-linear-attention (PyPI: `fla-core`, `pip install
fla-core==0.6.0`; written from and tested with 0.6.0); paper: https://arxiv.org/abs/2502.11089.

Parameters: `top_k`, blocks selected in total, the first and the last two among them; at least 3, at most
    block_size / 2.

Debts and facts:
    * The library's windows are its blocks: means of 64 tokens every 64, one score a block, not the paper's 32
      every 16.
    * No sliding window: it would be another library's kernel (flash-attn) and is left out here. Two gates, as
      in `dashbench.baselines.nsa_reference`, whose seeded weights they share.
    * The library's top-k keeps at most half a block's worth of indices: 32 at blocks of 64. More is
      `Unsupported`.
    * A `top_k` that is no power of two goes in as a tensor of counts, which `parallel_nsa` reads back on the
      host: slower, and not capturable in a CUDA graph.
    * The scaled query, pooled keys and values, gates and the output of each branch are rounded to the working
      dtype, which a single kernel would not do: with bfloat16 its results are judged by limits twice as wide.
    * Queries, keys, values and gates lie in the library's layout `[B, N, H, D]`, made before the timed
      region. `parallel_nsa` pools the whole cache at every call; the cached decode here pools only a block
      that the new token completes.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata, util

import torch

from dashbench.baselines.api import Operator, Problem, Unsupported
from dashbench.baselines.attention_reference import kept_tokens, row_slices, small_enough_for_gradients
from dashbench.baselines.block_selection import Windows
from dashbench.baselines.block_sparse_reference import block_count, bytes_per_row
from dashbench.baselines.nsa_reference import Nsa, NsaSettings, clamp_top_k, gradients_beside_gates

FORCED = 3
"""The library forces the first block, the own one and the one before it."""


def prepare(problem: Problem, *, top_k: int = 16) -> Operator:
    """NSA by fla for one problem.

    Raises:
        Unsupported: no GPU, no library, or a shape that its kernels do not take.
    """
    query, key = problem.query, problem.key
    group, block = query.shape[1] // key.shape[1], problem.block_size
    if not query.is_cuda:
        raise Unsupported("fla's Triton kernels need a GPU")
    if util.find_spec("fla") is None:
        raise Unsupported("fla is not installed: pip install fla-core==0.6.0")
    if group < 16 or group & (group - 1):
        raise Unsupported(
            f"fla's NSA needs a power of two of at least 16 query heads a key/value head, not {group}"
        )
    if block < 16 or block & (block - 1):
        raise Unsupported(f"fla's NSA needs a block size that is a power of two of at least 16, not {block}")
    used = clamp_top_k(top_k, FORCED, problem)
    if 1 << (used - 1).bit_length() > block // 2:
        raise Unsupported(f"fla's NSA selects at most {block // 2} blocks of {block}, not {used}")
    settings = NsaSettings(top_k=used, init_blocks=1, local_blocks=2, window_blocks=0)
    method = Nsa(problem, settings, windows=Windows(block, block))
    notes = {
        "fla-core": metadata.version("fla-core"),
        "top_k": top_k,
        "top_k_used": used,
        "window": 0,
        "compression": f"avgpool {block}/{block}",
        "layout": "[B, N, H, D], made before the timed region",
    }
    if query.dtype == torch.bfloat16:
        notes["arithmetic"] = "bfloat16 between branches"  # looser limits in the gate, see `check.TOLERANCE`
    build = {"prefill": _prefill, "decode": _decode, "train": _train}[problem.phase]
    return build(problem, method, notes)


def _token_major(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, N, D]` to a contiguous `[B, N, H, D]`."""
    return x.detach().transpose(1, 2).contiguous()


def _counts(problem: Problem, top_k: int) -> torch.Tensor | int:
    """`block_counts` as the library wants it: an int means the next power of two, so other numbers need a
    tensor.
    """
    if top_k & (top_k - 1) == 0:
        return top_k
    batch, kv_heads, rows = problem.query.shape[0], problem.key.shape[1], problem.query.shape[2]
    return torch.full((batch, rows, kv_heads), top_k, dtype=torch.int64, device=problem.query.device)


def _shared(problem: Problem, method: Nsa, indices) -> dict:
    """What every phase offers beside `run`; `indices()` gives the library's block indices `[B, N, Hkv, S]`,
    best first, -1 for none.
    """
    top_k, block = method.top.top_k, problem.block_size
    blocks = block_count(problem.key, block)
    prepared = cache(indices)

    def selected(rows: torch.Tensor) -> torch.Tensor:
        chosen = prepared()[:, rows.to(problem.query.device), :, :top_k].transpose(1, 2).long()
        mask = torch.zeros((*chosen.shape[:3], blocks + 1), dtype=torch.bool, device=chosen.device)
        return mask.scatter(-1, torch.where(chosen < 0, blocks, chosen), True)[..., :blocks]

    def kept() -> torch.Tensor:
        rows = torch.arange(problem.query.shape[2], device=problem.query.device)
        counts = [
            kept_tokens(selected(rows[part]), rows[part] + problem.start, block)
            for part in row_slices(len(rows), bytes_per_row(problem.query, problem.key))
        ]
        return torch.cat(counts, -1)

    def reference(rows: torch.Tensor, chosen: torch.Tensor | None):
        return method.expected(problem, rows, chosen)

    return {"selected": selected, "kept": kept, "reference": reference}


def _pooled_selection(problem: Problem, method: Nsa):
    """The selection that `parallel_nsa` makes inside, by the same functions."""
    from fla.ops.nsa.compression import parallel_nsa_compression
    from fla.ops.nsa.parallel import parallel_nsa_topk
    from fla.ops.utils.pooling import mean_pooling

    query, key, value = (_token_major(x) for x in (problem.query, problem.key, problem.value))
    block = problem.block_size
    with torch.no_grad():
        keys, values = mean_pooling(key, block), mean_pooling(value, block)
        shape = {"TK": key.shape[1], "block_size": block, "scale": problem.scale}
        _, lse = parallel_nsa_compression(q=query, k=keys, v=values, **shape)
        return parallel_nsa_topk(q=query, k=keys, lse=lse, block_counts=method.top.top_k, **shape)


def _prefill(problem: Problem, method: Nsa, notes: dict) -> Operator:
    from fla.ops.nsa import parallel_nsa

    query, key, value = (_token_major(x) for x in (problem.query, problem.key, problem.value))
    with torch.no_grad():
        gates = method.gates(problem.query).transpose(1, 2).to(query.dtype)
    compressed_gate, selected_gate = (gate.contiguous() for gate in gates.unbind(-1))
    counts = _counts(problem, method.top.top_k)

    @torch.no_grad()
    def run() -> torch.Tensor:
        output = parallel_nsa(
            query, key, value, compressed_gate, selected_gate,
            block_counts=counts, block_size=problem.block_size, scale=problem.scale,
        )  # fmt: skip
        return output.transpose(1, 2)

    shared = _shared(problem, method, lambda: _pooled_selection(problem, method))
    return Operator(run=run, notes=notes, **shared)


def _decode(problem: Problem, method: Nsa, notes: dict) -> Operator:
    from fla.ops.nsa.compression import parallel_nsa_compression
    from fla.ops.nsa.parallel import ParallelNSAFunction, parallel_nsa_topk
    from fla.ops.utils.pooling import mean_pooling

    query, key, value = (_token_major(x) for x in (problem.query, problem.key, problem.value))
    block, length, top_k = problem.block_size, key.shape[1], method.top.top_k
    shape = {"TK": length, "block_size": block, "scale": problem.scale}
    counts = _counts(problem, top_k)
    with torch.no_grad():
        gates = method.gates(problem.query).transpose(1, 2).to(query.dtype)[..., None]
        compressed_gate, selected_gate = (gate.contiguous() for gate in gates.unbind(-2))
        keys, values = mean_pooling(key, block), mean_pooling(value, block)
        if length % block == 0:
            keys[:, -1], values[:, -1] = 0, 0  # `append` fills them in
    notes["windows_appended"] = int(length % block == 0)

    @torch.no_grad()
    def append() -> None:
        if length % block == 0:
            keys[:, -1] = mean_pooling(key[:, -block:].contiguous(), block)[:, 0]
            values[:, -1] = mean_pooling(value[:, -block:].contiguous(), block)[:, 0]

    @torch.no_grad()
    def select():
        output, lse = parallel_nsa_compression(q=query, k=keys, v=values, **shape)
        return output, parallel_nsa_topk(q=query, k=keys, lse=lse, block_counts=top_k, **shape)

    @torch.no_grad()
    def attend(compressed: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        output = ParallelNSAFunction.apply(query, key, value, indices, counts, block, problem.scale, None)
        return torch.addcmul(output * selected_gate, compressed, compressed_gate).transpose(1, 2)

    def run() -> torch.Tensor:
        append()
        return attend(*select())

    append()
    prepared = select()
    return Operator(
        run=run,
        stages={"append": append, "select": select, "attend": lambda: attend(*prepared)},
        notes=notes,
        weights_bytes=2 * keys.numel() * keys.element_size(),
        **_shared(problem, method, lambda: select()[1]),
    )


def _train(problem: Problem, method: Nsa, notes: dict) -> Operator:
    from fla.ops.nsa import parallel_nsa

    names = ("query", "key", "value")
    leaves = [_token_major(getattr(problem, name)).requires_grad_() for name in names]
    grad_output = _token_major(problem.grad_output)
    counts = _counts(problem, method.top.top_k)
    source = leaves[0].detach().clone().requires_grad_()  # the gates' own leaf
    grads: dict[str, torch.Tensor] = {}

    def run() -> torch.Tensor:
        gates = method.gates(source).to(source.dtype)
        output = parallel_nsa(
            *leaves, gates[..., 0].contiguous(), gates[..., 1].contiguous(),
            block_counts=counts, block_size=problem.block_size, scale=problem.scale,
        )  # fmt: skip
        new = gradients_beside_gates(output, leaves, source, grad_output)
        grads.update({name: x.transpose(1, 2) for name, x in new.items()})
        return output.detach().transpose(1, 2)

    shared = _shared(problem, method, lambda: _pooled_selection(problem, method))

    def reference_gradients() -> dict[str, torch.Tensor]:
        exact = [getattr(problem, name).detach().double().requires_grad_() for name in names]
        query, key, value = exact
        chosen = shared["selected"](torch.arange(query.shape[2]))
        output = method.forward(
            query, key, value, method.compress(key, value), method.gates(query), 0, chosen
        )
        new = torch.autograd.grad(output, exact, problem.grad_output.double())
        return dict(zip(names, new, strict=True))

    return Operator(
        run=run,
        gradients=lambda: {name: grads[name] for name in names},
        score_gradient=lambda: grads["query by scores"],
        reference_gradients=reference_gradients if small_enough_for_gradients(problem) else None,
        notes=notes,
        **shared,
    )
