"""Block selection of NSA and InfLLMv2: from compressed keys to a bit mask of the best blocks, on the device.

Sources: NSA (arXiv 2502.11089, equations 8 to 12), InfLLMv2 (arXiv 2509.24663, section 3). A compressed key t
stands for tokens `[stride t, stride t + 2 stride)`; a block of 4 strides overlaps five of them, t = 4j-1 ..
4j+3. Given the softmax denominators (`band.band_forward`), two kernels:

1.  scores. A tile is T consecutive queries times the heads of one KV head. Scores are computed transposed,
    windows × rows, with a row's number being head · T + query: then all heads of a query lie in the
    registers of one thread, and the sum over the group is additions instead of exchanges between threads.
    On Hopper, where its shapes allow, `selection_hopper` does the same.
    Two numbers a block are written, what its own four windows give and what the last of them gives to the
    next block;
2.  choice. One warp a query holds the scores of all its blocks in registers and finds the k-th largest by
    bisection on the bits (scores are not negative, so their bits order like integers). It stops as soon
    as a level has exactly k above it; equal scores at the level are taken from the left, as a stable sort
    would.

The scores of a slab of queries are in memory at a time, at most `SCRATCH_BYTES`; no N × L matrix is.

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, N query rows, L windows, M blocks, D head dim,
T queries a tile, W = ceil(M / 32).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dashbench.kernels.backward import _bulk, _rows

LOG2_E = 1.4426950408889634
SCRATCH_BYTES = 128 * 2**20
CELLS = 4
"""Strides in a block; a window is two strides long."""
MAX_BLOCKS = 8192
FORCED = tl.constexpr(0x7FFFFFFF)
"""Above the bits of every score, infinity included."""


@dataclass(frozen=True)
class BlockChoice:
    """How blocks are chosen.

    Attributes:
        block_size: tokens in a block; windows are half as long and a quarter apart.
        top_k: blocks chosen in total, forced ones included; fewer where the past has fewer. Not below
            `init_blocks + local_blocks`.
        init_blocks: the first blocks are forced.
        local_blocks: the last blocks up to the query's own are forced, its own counted; at least 1.
        rule: `max` (InfLLMv2: the best of the five windows) or `sum` (NSA: weights 1, 2, 2, 2, 1).
    """

    block_size: int
    top_k: int
    init_blocks: int
    local_blocks: int
    rule: str

    def __post_init__(self):
        if self.rule not in ("max", "sum"):
            raise ValueError(f"rule must be 'max' or 'sum', not {self.rule!r}")
        if self.block_size not in (16, 32, 64, 128):
            raise ValueError(f"block size must be 16, 32, 64 or 128, got {self.block_size}")
        if self.local_blocks < 1 or self.init_blocks < 0:
            raise ValueError(f"local_blocks starts at 1, init_blocks at 0: {self}")
        if self.top_k < self.init_blocks + self.local_blocks:
            raise ValueError(f"top_k is less than the forced blocks: {self}")

    @property
    def stride(self) -> int:
        """Tokens between two windows."""
        return self.block_size // CELLS


@triton.jit
def block_parts(importance, MAX_RULE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """(what four windows give to their own block, what the last gives to the next): `[BLOCKS, WIDTH]` each,
    from `[4 · BLOCKS, WIDTH]`."""
    cells = tl.reshape(importance, [BLOCKS, 4, WIDTH])
    cell = tl.arange(0, 4)[None, :, None]
    last = tl.sum(tl.where(cell == 3, cells, 0.0), 1)
    if MAX_RULE:
        own = tl.max(cells, 1)
    else:
        own = 2.0 * tl.sum(cells, 1) - last
    return own, last


@triton.jit
def choose_blocks(score, block, own, top_k, init_blocks, local_blocks, FOURTHS: tl.constexpr):
    """1 for the chosen of a row of blocks (own one included), 0 for the others; int32, shape of `block`.

    score: fp32, not negative, NaN-free; block: their numbers, ascending; own: the query's own block. With
    FOURTHS a step finds two bits of the level by three counts in one sum, which halves the number of sums
    where their latency is what a lone program waits for.
    """
    key = score.to(tl.int32, bitcast=True)
    forced = (block < init_blocks) | (block > own - local_blocks)
    key = tl.where(forced, FORCED, key)
    key = tl.where(block <= own, key, -1)
    level = top_k * 0
    bit = 29 if FOURTHS else 30
    enough = tl.sum((key >= 0).to(tl.int32), 0)
    # Fewer than k blocks in the past: level 0 takes them all. Else the largest level that k blocks reach.
    while (bit >= 0) & (enough > top_k):
        step = 1 << bit
        if FOURTHS:
            reached = (key >= level + step).to(tl.int64)
            reached += (key >= level + 2 * step).to(tl.int64) << 20
            reached += (key >= level + 3 * step).to(tl.int64) << 40
            counts = tl.sum(reached, 0)
            one, two, three = counts & 0xFFFFF, (counts >> 20) & 0xFFFFF, counts >> 40
            up = (one >= top_k).to(tl.int32) + (two >= top_k).to(tl.int32) + (three >= top_k).to(tl.int32)
            found = tl.where(up == 3, three, tl.where(up == 2, two, one)).to(tl.int32)
            level += up * step
            enough = tl.where(up > 0, found, enough)
            # 31 bits: the last step has one bit to find, the two levels above it are known to be too high.
            bit = tl.where(bit == 1, 0, bit - 2)
        else:
            reach = tl.sum((key >= level + step).to(tl.int32), 0)
            level = tl.where(reach >= top_k, level + step, level)
            enough = tl.where(reach >= top_k, reach, enough)
            bit -= 1
    above = (key > level).to(tl.int32)
    level_with = (key == level).to(tl.int32)
    room = top_k - tl.sum(above, 0)
    rank = tl.cumsum(level_with, 0)
    return above | (level_with & (rank <= room).to(tl.int32))


@triton.jit(do_not_specialize=["rows", "count", "start", "tiles", "width"])
def _scores_kernel(
    query, keys, lse, own_part, next_part,
    query_stride_b, query_stride_h, query_stride_n, lse_stride_b, lse_stride_h,
    rows, count, start, tiles, width, kv_heads, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, MAX_RULE: tl.constexpr,
):  # fmt: skip
    """One program a tile and KV head; late tiles, which have most to do, first."""
    index = tl.program_id(0) % (tl.num_programs(0) // tiles)
    tile = tiles - 1 - tl.program_id(0) // (tl.num_programs(0) // tiles)
    batch, kv_head = index // kv_heads, index % kv_heads
    row = tl.arange(0, TILE * HEADS)
    head, n = row // TILE, tile * TILE + row % TILE
    real = (head < GROUP) & (n < rows)
    dim = tl.arange(0, HEAD_DIM)
    offset = (
        batch.to(tl.int64) * query_stride_b
        + (kv_head * GROUP + head).to(tl.int64) * query_stride_h
        + n.to(tl.int64) * query_stride_n
    )
    q = tl.load(query + offset[:, None] + dim[None, :], mask=real[:, None], other=0.0)  # [ROWS, D]
    q = tl.trans(q)
    lse_offset = batch.to(tl.int64) * lse_stride_b + (kv_head * GROUP + head).to(tl.int64) * lse_stride_h + n
    level = tl.load(lse + lse_offset, mask=real, other=float("inf")) * 1.4426950408889634
    limit = tl.minimum(tl.maximum(start + n + (1 - STRIDE), 0) // STRIDE, count)
    least = tl.minimum(tl.maximum(start + tile * TILE + (1 - STRIDE), 0) // STRIDE, count)
    own = (start + tl.minimum(tile * TILE + TILE, rows) - 1) // (4 * STRIDE)
    window = tl.arange(0, BLOCK)
    n_out = tile * TILE + tl.arange(0, TILE)
    BLOCKS: tl.constexpr = BLOCK // 4
    out = (index.to(tl.int64) * rows + n_out[None, :]) * width + tl.arange(0, BLOCKS)[:, None]
    whole = least // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        k = tl.reshape(keys.load([batch, kv_head, first, 0]), [BLOCK, HEAD_DIM])
        weights = tl.exp2(tl.dot(k, q) * scale_log2 - level[None, :])  # [BLOCK, ROWS]
        importance = tl.sum(tl.reshape(weights, [BLOCK, HEADS, TILE]), 1)
        mine, after = block_parts(importance, MAX_RULE, BLOCKS, TILE)
        tl.store(own_part + out + first // 4, mine, mask=(n_out < rows)[None, :])
        tl.store(next_part + out + first // 4, after, mask=(n_out < rows)[None, :])
    for first in range(whole, (own + 1) * 4, BLOCK):
        k = tl.reshape(keys.load([batch, kv_head, first, 0]), [BLOCK, HEAD_DIM])
        weights = tl.exp2(tl.dot(k, q) * scale_log2 - level[None, :])
        weights = tl.where((first + window)[:, None] < limit[None, :], weights, 0.0)
        importance = tl.sum(tl.reshape(weights, [BLOCK, HEADS, TILE]), 1)
        mine, after = block_parts(importance, MAX_RULE, BLOCKS, TILE)
        inside = (n_out < rows)[None, :] & ((first // 4 + tl.arange(0, BLOCKS)) < width)[:, None]
        tl.store(own_part + out + first // 4, mine, mask=inside)
        tl.store(next_part + out + first // 4, after, mask=inside)


@triton.jit(do_not_specialize=["rows", "start", "width", "words", "tokens", "first_row", "top_k"])
def _choice_kernel(
    own_part, next_part, mask, active, rows, start, width, words, tokens, first_row, top_k, init_blocks,
    local_blocks,
    BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, MAX_RULE: tl.constexpr,
):  # fmt: skip
    """One program a query and KV head; BLOCKS is at least the number of blocks up to the last query's own."""
    n = rows - 1 - tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    own = (start + n) // BLOCK_SIZE
    block = tl.arange(0, BLOCKS)
    base = (index * rows + n) * width
    score = tl.load(own_part + base + block, mask=block <= own, other=0.0)
    before = tl.load(next_part + base + block - 1, mask=(block <= own) & (block > 0), other=0.0)
    score = tl.maximum(score, before) if MAX_RULE else score + before
    chosen = choose_blocks(score, block, own, top_k, init_blocks, local_blocks, False)
    row = index * tokens + first_row + n
    tl.store(active + row, tl.sum(chosen, 0))
    chosen = tl.where(block < own, chosen, 0)
    bit = tl.arange(0, 32)
    packed = tl.sum(tl.reshape(chosen, [BLOCKS // 32, 32]) << bit[None, :], 1)
    word = tl.arange(0, BLOCKS // 32)
    tl.store(mask + row * words + word, packed, mask=word < words)
    for first in range(BLOCKS // 32, words, 32):
        tl.store(mask + row * words + first + bit, tl.zeros([32], tl.int32), mask=first + bit < words)


def kernel_for_scores(query: torch.Tensor, compressed: torch.Tensor) -> str:
    """`hopper` or `portable`: which kernel `select_blocks` runs for these inputs."""
    from dashbench.kernels import hopper

    group = query.shape[1] // compressed.shape[1]
    # Smaller groups have too many sums for their registers.
    taken = group >= 8 and hopper.supports(query, compressed, compressed, hopper.tile_of(group))
    return "hopper" if taken else "portable"


def select_blocks(
    query: torch.Tensor,
    compressed: torch.Tensor,
    lse: torch.Tensor,
    choice: BlockChoice,
    *,
    kernel: str | None = None,
    launch: dict | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the blocks of every query of a causal sequence; no gradient flows through it.

    Args:
        query: `[B, Hq, N, D]`, bf16 or fp16, any strides with a contiguous last dimension; row n at position
            n.
        compressed: `[B, Hkv, L, D]`, keys of the complete windows of N tokens, in the dtype of `query`.
        lse: `[B, Hq, N]` fp32, logarithm of the softmax denominator of every query head over the windows it
            sees (+inf: it sees none).
        choice: numbers of blocks and rule.
        kernel: `hopper` or `portable`, which computes the scores; default: what `kernel_for_scores` says.
        launch: launch options of the portable kernel that replace the default ones: ROWS of a tile (queries
            times heads), BLOCK windows at a time, and Triton's num_warps, num_stages, maxnreg.
        scratch_bytes: most bytes of block scores in memory at a time (one tile of queries at least).

    Returns:
        (mask `[B, Hkv, N, W]` int32 as `attend.routes_of_mask` takes it: bit c % 32 of word c // 32, the own
        block not included; chosen blocks `[B, Hkv, N]` int32, the own one included).

    Raises:
        ValueError: more than 8192 blocks, or windows that do not belong to N tokens.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, count = compressed.shape[1], compressed.shape[2]
    stride, blocks = choice.stride, triton.cdiv(tokens, choice.block_size)
    if blocks > MAX_BLOCKS:
        raise ValueError(f"{tokens} tokens are more than {MAX_BLOCKS} blocks of {choice.block_size}")
    if count != max(0, tokens - stride) // stride:
        raise ValueError(f"{count} compressed keys are not those of {tokens} tokens")
    group = heads // kv_heads
    words = triton.cdiv(blocks, 32)
    device = query.device
    mask = torch.empty(batch, kv_heads, tokens, words, dtype=torch.int32, device=device)
    active = torch.empty(batch, kv_heads, tokens, dtype=torch.int32, device=device)
    padded = triton.next_power_of_2(group)
    settings = {"ROWS": 128, "BLOCK": 64, "num_warps": 4, "num_stages": 2, **(launch or {})}
    tile = max(1, settings.pop("ROWS") // padded)
    if count == 0:  # a descriptor needs memory to point at; lse says that nobody sees it
        compressed = compressed.new_zeros(batch, kv_heads, 1, dim)
    keys = _bulk(_rows(compressed), [1, 1, settings["BLOCK"], dim])
    query = query if query.stride(-1) == 1 else query.contiguous()
    lse = lse if lse.stride(-1) == 1 else lse.contiguous()
    most = max(tile, scratch_bytes // (8 * batch * kv_heads * blocks) // tile * tile)
    scratch = torch.empty(
        2, batch * kv_heads * min(most, tokens) * blocks, dtype=torch.float32, device=device
    )
    max_rule = choice.rule == "max"
    kernel = kernel or ("portable" if launch else kernel_for_scores(query, compressed))
    for first in range(0, tokens, most):
        rows = min(most, tokens - first)
        width = triton.cdiv(first + rows, choice.block_size)
        part = query[:, :, first : first + rows]
        part_lse = lse[:, :, first : first + rows]
        tiles = triton.cdiv(rows, tile)
        if kernel == "hopper":
            from dashbench.kernels.selection_hopper import block_scores_hopper

            block_scores_hopper(part, compressed, part_lse, *scratch, first, width, stride, max_rule)
        else:
            _scores_kernel[(tiles * batch * kv_heads,)](
                part, keys, part_lse, *scratch, *part.stride()[:3], *part_lse.stride()[:2],
                rows, count, first, tiles, width, kv_heads, dim**-0.5 * LOG2_E,
                GROUP=group, HEADS=padded, TILE=tile, HEAD_DIM=dim, STRIDE=stride, MAX_RULE=max_rule,
                **settings,
            )  # fmt: skip
        _choice_kernel[(rows, batch * kv_heads)](
            scratch[0], scratch[1], mask, active, rows, first, width, words, tokens, first, choice.top_k,
            choice.init_blocks, choice.local_blocks,
            BLOCK_SIZE=choice.block_size, BLOCKS=max(32, triton.next_power_of_2(width)), MAX_RULE=max_rule,
            num_warps=1 if width <= 2048 else 4,
        )  # fmt: skip
    return mask, active
