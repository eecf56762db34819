"""InfLLMv2 by its authors' CUDA kernels (package `infllm_v2`), prefill, called as their own models call them.

Install: `pip install git+https://github.com/OpenBMB/infllmv2_cuda_impl` (compiles CUDA; the branch whose
`infllmv2_attn_stage1` takes query, key and a placeholder for the values); written from the source of
September 2025, not tested here: the package is not on PyPI. Paper: https://arxiv.org/abs/2509.24663.

Parameters: `top_k`, `init_blocks`, `local_blocks` as in `infllmv2_reference`'s default preset.

Debts and facts:
    * The kernels fix 16 heads a group, blocks of 64, windows of 32 every 16, bf16 or fp16.
    * Scores pass through memory in the working dtype: a block within its rounding of the k-th may fall either
      way, which the reference counts as undecided.
    * Batches are one sequence; top-k and sort are torch's, as in the authors' models.
"""

from __future__ import annotations

from importlib import util

import torch

from dashbench.baselines.api import Operator, Problem, Unsupported
from dashbench.baselines.attention_reference import kept_tokens, row_slices
from dashbench.baselines.block_selection import Windows
from dashbench.baselines.block_sparse_reference import block_count, bytes_per_row
from dashbench.baselines.infllmv2_reference import InfLLMv2, settings_for


def prepare(problem: Problem, *, top_k: int = 64, init_blocks: int = 1, local_blocks: int = 16) -> Operator:
    """The authors' kernels for one problem.

    Raises:
        Unsupported: no GPU, no library, or a shape that its kernels do not take.
    """
    batch, heads, length, _ = problem.query.shape
    kv_heads, block = problem.key.shape[1], problem.block_size
    if not problem.query.is_cuda:
        raise Unsupported("the authors' kernels need a GPU")
    if util.find_spec("infllm_v2") is None:
        raise Unsupported(
            "infllm_v2 is not installed: pip install git+https://github.com/OpenBMB/infllmv2_cuda_impl"
        )
    if problem.phase != "prefill" or batch != 1 or heads != 16 * kv_heads or block != 64:
        raise Unsupported("the adapter takes the prefill of one sequence, 16 heads a group and blocks of 64")
    from infllm_v2 import infllmv2_attn_stage1, infllmv2_attn_varlen_func, max_pooling_1d

    settings = settings_for(problem, top_k=top_k, init_blocks=init_blocks, local_blocks=local_blocks)
    method = InfLLMv2(problem, settings)
    windows = Windows(block // 2, block // 4)
    count, blocks = windows.count(length), block_count(problem.key, block)
    if count == 0:
        raise Unsupported(f"no window of {windows.kernel} tokens in {length}")
    tensors = (problem.query, problem.key, problem.value)
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in tensors)
    integer = {"dtype": torch.int32, "device": query.device}
    ends, compressed_ends = torch.tensor([0, length], **integer), torch.tensor([0, count], **integer)
    own = torch.arange(length, device=query.device)[:, None] // block

    @torch.no_grad()
    def compress() -> torch.Tensor:
        return key.unfold(0, windows.kernel, windows.stride).mean(-1)  # [T, Hkv, D]

    @torch.no_grad()
    def select(compressed: torch.Tensor) -> torch.Tensor:
        scores = infllmv2_attn_stage1(
            query, compressed, compressed, cu_seqlens_q=ends, cu_seqlens_k=compressed_ends,
            max_seqlen_q=length, max_seqlen_k=count, causal=True,
        )  # fmt: skip
        pooled = max_pooling_1d(scores, 0, local_blocks, init_blocks, block, windows.stride)
        indices = pooled.topk(min(settings.top_k, blocks), -1).indices.sort(-1).values
        return torch.where(indices > own, -1, indices).to(torch.int32)

    @torch.no_grad()
    def attend(indices: torch.Tensor) -> torch.Tensor:
        out = infllmv2_attn_varlen_func(
            query, key, value, ends, ends, length, length, causal=True, topk_idx=indices
        )
        return out.transpose(0, 1)[None]

    def run() -> torch.Tensor:
        return attend(select(compress()))

    compressed = compress()
    chosen = select(compressed)

    def selected(rows: torch.Tensor) -> torch.Tensor:
        listed = chosen[:, rows.to(query.device)].long()
        mask = torch.zeros(kv_heads, len(rows), blocks + 1, dtype=torch.bool, device=query.device)
        return mask.scatter(-1, torch.where(listed < 0, blocks, listed), True)[None, ..., :blocks]

    def kept() -> torch.Tensor:
        rows = torch.arange(length, device=query.device)
        parts = [
            kept_tokens(selected(rows[part]), rows[part], block)
            for part in row_slices(length, bytes_per_row(problem.query, problem.key))
        ]
        return torch.cat(parts, -1)

    return Operator(
        run=run,
        reference=lambda rows, given: method.expected(problem, rows, given),
        selected=selected,
        kept=kept,
        stages={
            "compress": compress,
            "select": lambda: select(compressed),
            "attend": lambda: attend(chosen),
        },
        notes={"top_k": top_k, "top_k_used": settings.top_k, "package": "infllm_v2"},
    )
