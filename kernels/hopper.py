"""What our attention kernels for Hopper GPUs have in common, in Gluon.

A program is persistent: it walks its share of the tiles (T queries of a KV head's G heads, G · T = 128 rows).
One producer warp brings each tile's queries and then its blocks of keys and values, these into two rings,
from memory to shared memory with the bulk tensor copy engine; it does not stop at the end of a tile. Two
warpgroups consume them, each with half of the tile's queries: Q stays in registers, QKᵀ of the next block is
issued before PV of the last one, so the softmax runs while the tensor cores work, and the two warpgroups fill
each other's gaps. They share nothing but the rings: a barrier over both would march them in step and cost the
overlap (LOG.md, attend 2). Outputs leave by the copy engine too, while the next tile is under way.

Tile `n` of a program uses its consumers' query and output buffers for the n-th time; block `turn`, counted
over all its tiles, has slot `turn % STAGES` of the rings. A consumer's row is head · (T / 2) + query. The
softmax between `scores_while_pending` and `weigh_values` is the kernels' own: online, in base 2
(FlashAttention, arXiv 2205.14135).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

CONSUMERS = 2
ROWS = 64
"""Of a consumer: one warpgroup's matrix instruction."""
BLOCK = 64
"""Keys and values of a slot."""
STAGES = 4
"""Slots of the rings: 4 × 32 KiB at D = 128, beside 64 KiB of queries and outputs."""


def tile_of(group: int) -> int:
    """T for so many query heads a KV head."""
    return CONSUMERS * ROWS // group


def supports(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: int, onto: torch.Tensor | None = None
) -> bool:
    """Whether these kernels take the inputs: Hopper, all bf16 or all fp16, D = 128, G · T = 128, and strides
    that the copy engine takes."""
    tensors = (query, key, value, query if onto is None else onto)
    group = query.shape[1] // key.shape[1]
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device)[0] == 9
        and query.dtype in (torch.bfloat16, torch.float16)
        and all(x.dtype == query.dtype and _bulk_copied(x) for x in tensors)
        and query.shape[-1] == 128
        and group * tile == CONSUMERS * ROWS
        and tile % CONSUMERS == 0
    )


def _bulk_copied(x: torch.Tensor) -> bool:
    return (
        x.data_ptr() % 16 == 0
        and x.stride(-1) == 1
        and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:-1])
    )


def descriptor(x: torch.Tensor, heads: int, rows: int):
    """Bulk copies of `rows` tokens of `heads` heads of `[B, H, N, D]`; zeros behind the last token."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    shape = (1, heads, rows, x.shape[-1])
    return TensorDescriptor.from_tensor(x, list(shape), _layout(shape, x.dtype))


@lru_cache  # two thirds of a descriptor's 7 µs
def _layout(shape: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for(list(shape), element)


def programs(works: int, device: torch.device) -> int:
    """Persistent programs for so many tiles: one a multiprocessor, whose registers they fill."""
    return min(works, torch.cuda.get_device_properties(device).multi_processor_count)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers that so many arrivals complete."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def open_memory(key_descriptor, query_descriptor, STAGES: gl.constexpr):
    """The buffers and barriers that producer and consumers share."""
    BLOCK: gl.constexpr = key_descriptor.block_type.shape[2]
    HEAD_DIM: gl.constexpr = key_descriptor.block_type.shape[3]
    GROUP: gl.constexpr = query_descriptor.block_type.shape[1]
    QUERIES: gl.constexpr = query_descriptor.block_type.shape[2]
    dtype: gl.constexpr = key_descriptor.dtype
    key_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, HEAD_DIM], key_descriptor.layout)
    value_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, HEAD_DIM], key_descriptor.layout)
    queries = gl.allocate_shared_memory(dtype, [2, 1, GROUP, QUERIES, HEAD_DIM], query_descriptor.layout)
    outputs = gl.allocate_shared_memory(dtype, [2, 1, GROUP, QUERIES, HEAD_DIM], query_descriptor.layout)
    key_full, value_full = barriers(STAGES, 1), barriers(STAGES, 1)
    key_empty, value_empty = barriers(STAGES, 2), barriers(STAGES, 2)  # both consumers
    query_full, query_empty = barriers(2, 1), barriers(2, 1)
    output_full, output_empty = barriers(2, 1), barriers(2, 1)
    fence_async_shared()
    rings = (key_ring, value_ring, key_full, value_full, key_empty, value_empty)
    return rings, (queries, query_full, query_empty), (outputs, output_full, output_empty)


@gluon.jit
def work_count(total):
    """How many of `total` works this program does."""
    program, count = gl.program_id(0), gl.num_programs(0)
    turn = total // count
    place = program + (turn & 1) * (count - 1 - 2 * program)
    return turn + (place < total % count).to(gl.int32)


@gluon.jit
def place_of(n, heads, kv_heads, tiles):
    """(number of the KV head among all sequences', tile, sequence, KV head) of this program's tile `n`.

    Late tiles, which have most to do, come first. As works get smaller, every other round is dealt backwards:
    no program gets the larger one every time.
    """
    program, count = gl.program_id(0), gl.num_programs(0)
    work = n * count + program + (n & 1) * (count - 1 - 2 * program)
    index = work % heads
    return index, tiles - 1 - work // heads, index // kv_heads, index % kv_heads


@gluon.jit
def bring(source, batch, head, first, held, full, empty, slot, use):
    """The producer: rows of `source` from `first` on into a slot, for its `use`-th time, once it is free."""
    mbarrier.wait(empty.index(slot), (use & 1) ^ 1)
    mbarrier.expect(full.index(slot), source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, [batch, head, first, 0], full.index(slot), held.index(slot))


@gluon.jit
def bring_tile(source, buffers, n, batch, head, tile):
    """The producer: a tile's part of `source` into the buffers of both consumers."""
    held, full, empty = buffers
    QUERIES: gl.constexpr = source.block_type.shape[2]
    for part in gl.static_range(2):
        bring(source, batch, head, (2 * tile + part) * QUERIES, held, full, empty, part, n)


@gluon.jit
def bring_block(key_descriptor, value_descriptor, rings, turn, batch, kv_head, first, STAGES: gl.constexpr):
    """The producer: keys and values from `first` on into the slots of block `turn`."""
    key_ring, value_ring, key_full, value_full, key_empty, value_empty = rings
    slot, use = turn % STAGES, turn // STAGES
    bring(key_descriptor, batch, kv_head, first, key_ring, key_full, key_empty, slot, use)
    bring(value_descriptor, batch, kv_head, first, value_ring, value_full, value_empty, slot, use)


@gluon.jit
def take_query(buffers, n, PART: gl.constexpr, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, Q: gl.constexpr):
    """A consumer: its rows `[ROWS, D]` of tile `n` in layout Q; `free_query` gives the buffer back."""
    held, full, _ = buffers
    mbarrier.wait(full.index(PART), n & 1)
    return held.index(PART).reshape([ROWS, HEAD_DIM]).load(Q)


@gluon.jit
def free_query(buffers, PART: gl.constexpr):
    """A consumer: its query buffer is free, once a product with the rows is issued and not before: loads that
    nothing has waited for can be overtaken by the copy engine's next tile (LOG.md, The rivals 3)."""
    _, _, empty = buffers
    mbarrier.arrive(empty.index(PART), count=1)


@gluon.jit
def scores_of_first(q, zero, rings, turn, STAGES: gl.constexpr):
    """QKᵀ of a tile's first block, which is block `turn`."""
    key_ring, _, key_full, _, key_empty, _ = rings
    slot = turn % STAGES
    k = key_ring.index(slot).reshape([zero.shape[1], q.shape[1]])
    mbarrier.wait(key_full.index(slot), (turn // STAGES) & 1)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(key_empty.index(slot), count=1)
    return s


@gluon.jit
def scores_while_pending(q, zero, p, accumulator, rings, turn, STAGES: gl.constexpr):
    """(QKᵀ of block `turn`, the pending product of weights `p` with the values of the block before)."""
    key_ring, value_ring, key_full, value_full, key_empty, _ = rings
    slot, before = turn % STAGES, (turn - 1) % STAGES
    k = key_ring.index(slot).reshape([zero.shape[1], q.shape[1]])
    v = value_ring.index(before).reshape([zero.shape[1], q.shape[1]])
    mbarrier.wait(key_full.index(slot), (turn // STAGES) & 1)
    s_token = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(value_full.index(before), ((turn - 1) // STAGES) & 1)
    o_token = warpgroup_mma(p, v, accumulator, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s_token,))
    mbarrier.arrive(key_empty.index(slot), count=1)
    return s, o_token


@gluon.jit
def weigh_values(weights, rescale, total, p, o_token, rings, turn, STAGES: gl.constexpr):
    """(softmax sum with block `turn`, accumulator up to the block before, weights as an operand)."""
    _, _, _, _, _, value_empty = rings
    total = total * rescale + gl.sum(weights, 1)
    p_next = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    accumulator, _ = warpgroup_mma_wait(0, deps=(o_token, p))
    mbarrier.arrive(value_empty.index((turn - 1) % STAGES), count=1)
    rescale = gl.convert_layout(rescale, gl.SliceLayout(1, accumulator.type.layout))
    return total, accumulator * rescale[:, None], p_next


@gluon.jit
def weigh_last(p, accumulator, rings, turn, STAGES: gl.constexpr):
    """The accumulator with the values of a tile's last block, which is block `turn`."""
    _, value_ring, _, value_full, _, value_empty = rings
    slot = turn % STAGES
    v = value_ring.index(slot).reshape([p.shape[1], accumulator.shape[1]])
    mbarrier.wait(value_full.index(slot), (turn // STAGES) & 1)
    accumulator = warpgroup_mma(p, v, accumulator, is_async=True)
    accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
    mbarrier.arrive(value_empty.index(slot), count=1)
    return accumulator


@gluon.jit
def give_rows(result, out_descriptor, buffers, n, batch, head, first, PART: gl.constexpr, ONTO: gl.constexpr):
    """A consumer: its rows of tile `n` on their way to memory; with ONTO added to what was there."""
    outputs, full, _ = buffers
    rows = outputs.index(PART)
    flat = rows.reshape([result.shape[0], result.shape[1]])
    if ONTO:
        mbarrier.wait(full.index(PART), n & 1)
        result += flat.load(result.type.layout).to(gl.float32)
    flat.store(result.to(out_descriptor.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_descriptor, [batch, head, first, 0], rows)


@gluon.jit
def free_output(buffers, n, PART: gl.constexpr, ONTO: gl.constexpr):
    """A consumer: waits until the rows of the tile before tile `n` have left its buffer."""
    _, _, empty = buffers
    tma.store_wait(0)
    if ONTO:
        mbarrier.arrive(empty.index(PART), count=1, pred=n > 0)


@gluon.jit
def store_lse(lse, base, stride_h, peak, total, first, rows, QUERIES: gl.constexpr):
    """Logarithm of the softmax sums (natural), +inf for a row that saw nothing; 1 / sum, or 1."""
    row = gl.arange(0, total.shape[0], total.type.layout)
    safe = gl.where(total > 0, total, 1.0)
    gl.store(
        lse + base + (row // QUERIES).to(gl.int64) * stride_h + first + row % QUERIES,
        gl.where(total > 0, (peak + gl.log2(safe)) * 0.6931471805599453, float("inf")),
        mask=first + row % QUERIES < rows,
    )
    return 1.0 / safe


@gluon.jit
def load_gate(
    gate, strides, batch, head, first, rows,
    QUERIES: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The gates of a consumer's rows, fp32."""
    row = gl.arange(0, ROWS, LAYOUT)
    offset = batch.to(gl.int64) * strides[0] + (head + row // QUERIES).to(gl.int64) * strides[1]
    offset += (first + row % QUERIES).to(gl.int64) * strides[2]
    return gl.load(gate + offset, mask=first + row % QUERIES < rows, other=0.0).to(gl.float32)
