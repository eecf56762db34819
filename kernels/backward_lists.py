"""Lists of the block-sparse backward, built on the device from the routing bit mask.

The backward walks the routing twice: once by tiles of queries (which chunks does this tile read?) and once
by chunks (which tiles read this chunk?). Both walks are compressed from the bit mask `[B, Hkv, N, ceil(M /
32)]` into storage whose offsets have a closed form: a tile in chunk c can list the c chunks before it, and
a chunk c can be listed by the tiles behind it, so the capacity is the causal triangle and no offset, count
or size ever travels to the host. Entries stand in ascending order, hence every sum that follows them is
deterministic.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl


@triton.jit
def tile_list_start(tile, TILES_PER_CHUNK: tl.constexpr):
    """First entry of a tile's list: the sum over earlier tiles of the number of chunks before each."""
    own = (tile // TILES_PER_CHUNK).to(tl.int64)
    return TILES_PER_CHUNK * (own * (own - 1) // 2) + (tile % TILES_PER_CHUNK) * own


@triton.jit
def chunk_list_start(chunk, tiles, TILES_PER_CHUNK: tl.constexpr):
    """First entry of a chunk's list: the sum over earlier chunks of the number of tiles behind each."""
    chunk = chunk.to(tl.int64)
    return chunk * tiles - TILES_PER_CHUNK * (chunk * (chunk + 1) // 2)


@lru_cache  # asked five times a training step, and each of Triton's functions takes 2 µs on the host
def list_capacity(tokens: int, chunk_size: int, tile: int) -> int:
    """Entries that the lists of one (batch, KV head) can hold; the same number for both walks."""
    tiles, chunks, tiles_per_chunk = (
        triton.cdiv(tokens, tile),
        triton.cdiv(tokens, chunk_size),
        chunk_size // tile,
    )
    last = chunks - 1
    return max(last * tiles - tiles_per_chunk * (last * (last + 1) // 2), 1)


@triton.jit(do_not_specialize=["tokens", "words", "tiles", "capacity"])
def _tile_lists_kernel(
    mask, entries, counts, tokens, words, tiles, capacity,
    TILE: tl.constexpr, TILES_PER_CHUNK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program a tile: union of its queries' masks, as `chunk | query_bits << 16`."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    own = tile // TILES_PER_CHUNK
    query = tl.arange(0, TILE)
    position = tile * TILE + query
    bit = tl.arange(0, 32)
    base = entries + head * capacity + tile_list_start(tile, TILES_PER_CHUNK)
    row = mask + (head * tokens + position.to(tl.int64)) * words
    found = 0
    for first in range(0, tl.cdiv(own, 32), WORDS):
        word = first + tl.arange(0, WORDS)
        value = tl.load(
            row[:, None] + word[None, :], mask=(position < tokens)[:, None] & (word < words)[None, :], other=0
        )
        chosen = ((value[:, :, None] >> bit[None, None, :]) & 1) << query[:, None, None]
        chunk = tl.reshape(word[:, None] * 32 + bit[None, :], [WORDS * 32])
        query_bits = tl.where(chunk < own, tl.reshape(tl.sum(chosen, 0), [WORDS * 32]), 0)
        listed = (query_bits != 0).to(tl.int32)
        slot = found + tl.cumsum(listed, 0) - listed
        tl.store(base + slot, chunk | (query_bits << 16), mask=listed != 0)
        found += tl.sum(listed, 0)
    tl.store(counts + head * tiles + tile, found)


@triton.jit(do_not_specialize=["tokens", "words", "tiles", "chunks", "capacity"])
def _chunk_lists_kernel(
    mask, entries, counts, tokens, words, tiles, chunks, capacity,
    TILE: tl.constexpr, TILES_PER_CHUNK: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program BITS chunks: a scan over the tiles behind them, as `tile << TILE | query_bits`."""
    first_chunk = tl.program_id(0) * BITS
    word = first_chunk // 32
    head = tl.program_id(1).to(tl.int64)
    bit = first_chunk % 32 + tl.arange(0, BITS)
    chunk = first_chunk + tl.arange(0, BITS)
    base = entries + head * capacity + chunk_list_start(chunk, tiles, TILES_PER_CHUNK)
    found = tl.zeros([BITS], tl.int32)
    for first in range((first_chunk + 1) * TILES_PER_CHUNK, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        chosen = tl.zeros([BLOCK, BITS], tl.int32)
        for query in tl.static_range(TILE):
            position = tile.to(tl.int64) * TILE + query
            value = tl.load(mask + (head * tokens + position) * words + word, mask=position < tokens, other=0)
            chosen |= ((value[:, None] >> bit[None, :]) & 1) << query
        behind = (tile[:, None] // TILES_PER_CHUNK) > chunk[None, :]
        query_bits = tl.where(behind, chosen, 0)
        listed = (query_bits != 0).to(tl.int32)
        slot = found[None, :] + tl.cumsum(listed, 0) - listed
        tl.store(base[None, :] + slot, (tile[:, None] << TILE) | query_bits, mask=listed != 0)
        found += tl.sum(listed, 0)
    tl.store(counts + head * chunks + chunk, found, mask=chunk < chunks)


def tile_lists(mask: torch.Tensor, chunk_size: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks that each tile of `tile` consecutive queries reads before its own chunk.

    mask: `[B, Hkv, N, W]` int32, contiguous; bit c % 32 of word c // 32 says that the query attends chunk
    c. Bits at or behind the query's own chunk are ignored. Returns entries `[B, Hkv, capacity]` int32
    (`chunk | query_bits << 16`) and counts `[B, Hkv, tiles]`.
    """
    batch, heads, tokens, words = mask.shape
    tiles, capacity = triton.cdiv(tokens, tile), list_capacity(tokens, chunk_size, tile)
    entries = torch.empty(batch, heads, capacity, dtype=torch.int32, device=mask.device)
    counts = torch.empty(batch, heads, tiles, dtype=torch.int32, device=mask.device)
    _tile_lists_kernel[(tiles, batch * heads)](
        mask, entries, counts, tokens, words, tiles, capacity,
        TILE=tile, TILES_PER_CHUNK=chunk_size // tile, WORDS=8, num_warps=2,
    )  # fmt: skip
    return entries, counts


def chunk_lists(mask: torch.Tensor, chunk_size: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of queries that read each chunk, from behind it: the transposed lists.

    mask as for `tile_lists`. Returns entries `[B, Hkv, capacity]` int32 (`tile << tile_size | query_bits`,
    ascending) and counts `[B, Hkv, M]` int32. Raises ValueError where tile number and query bits do not fit
    31 bits.
    """
    batch, heads, tokens, words = mask.shape
    tiles, chunks = triton.cdiv(tokens, tile), triton.cdiv(tokens, chunk_size)
    if tiles >= 1 << (31 - tile):
        raise ValueError(f"{tokens} tokens in tiles of {tile} queries do not fit a 31-bit list entry")
    capacity = list_capacity(tokens, chunk_size, tile)
    entries = torch.empty(batch, heads, capacity, dtype=torch.int32, device=mask.device)
    counts = torch.empty(batch, heads, chunks, dtype=torch.int32, device=mask.device)
    bits = 8
    _chunk_lists_kernel[(triton.cdiv(chunks, bits), batch * heads)](
        mask, entries, counts, tokens, words, tiles, chunks, capacity,
        TILE=tile, TILES_PER_CHUNK=chunk_size // tile, BITS=bits, BLOCK=512, num_warps=8,
    )  # fmt: skip
    return entries, counts
