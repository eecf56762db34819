"""One decode step of NSA or InfLLMv2: a few new tokens against a cache with compressed keys.

Sources: NSA (arXiv 2502.11089), InfLLMv2 (arXiv 2509.24663). Stages, each callable on its own on one
`BlockDecodeStep`:

    windows   logits against the compressed keys, and their softmax statistics; with compressed values their
              attention as well; with coarse keys those statistics instead
    scores    probabilities summed over the group, carried to blocks
    choose    the best blocks, in ascending order
    attend    attention over them, every split an equal share (`decode_kernels.attend_kernel`)
    slide     attention over the last tokens, where there is a window
    combine   join the splits, and the branches by their gates

No stage reads a length on the host, so a step can be captured in a CUDA graph and replayed while the cache
grows.

Letters: B sequences, T new tokens a sequence, Hq query heads, Hkv KV heads, G = Hq / Hkv, D head dim, M
blocks that the cache can hold, S splits. "Step row" is (sequence, new token).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dashbench.kernels.band import Band
from dashbench.kernels.decode_kernels import _after_previous_kernel, attend_kernel, combine_kernel
from dashbench.kernels.selection import BlockChoice, choose_blocks

LOG2_E = 1.4426950408889634
MAX_SPLITS = 128


@triton.jit
def _band_split_kernel(
    query, key, value, lengths, logits, partial_output, partial_statistics,
    query_strides, key_strides, value_strides, new_tokens, capacity, window, scale_log2,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, WINDOW: tl.constexpr, VALUES: tl.constexpr,
    LOGITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One group's softmax statistics over one split of the band of keys that a new token sees, its attention
    if there are values, and its logits (base 2) if they are wanted."""
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _after_previous_kernel(PDL)
    splits, kv_heads = tl.num_programs(0), tl.num_programs(1)
    sequence = (row // new_tokens).to(tl.int64)
    token = row % new_tokens
    position = tl.load(lengths + sequence) - new_tokens + token
    stop = tl.minimum(tl.maximum(position + (1 + STRIDE - KERNEL), 0) // STRIDE, capacity)
    low = 0
    if WINDOW:
        low = tl.maximum(position - window + 1, 0)
    first_block = low // BLOCK
    blocks = tl.cdiv(stop, BLOCK) - first_block
    begin, end = first_block + blocks * split // splits, first_block + blocks * (split + 1) // splits
    group = row.to(tl.int64) * kv_heads + head
    o_g, o_d, o_t = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK)
    p_query = query + sequence * query_strides[0] + token * query_strides[2]
    p_query += (head * G + o_g)[:, None].to(tl.int64) * query_strides[1] + o_d[None, :]
    b_query = tl.load(p_query, (o_g < G)[:, None], 0.0)  # [ROWS, D]
    p_key = key + sequence * key_strides[0] + head * key_strides[1]
    p_value = value + sequence * value_strides[0] + head * value_strides[1]
    p_logits = logits + (group * G + o_g)[:, None] * capacity
    running_max = tl.full([ROWS], float("-inf"), tl.float32)
    running_sum = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, D], tl.float32)
    for block in tl.range(begin, end, num_stages=STAGES):
        t = block * BLOCK + o_t
        keep = (t < stop) & (t >= low)
        o_key = t.to(tl.int64) * key_strides[2]
        b_key = tl.load(p_key + o_key[None, :] + o_d[:, None], keep[None, :], 0.0)  # [D, BLOCK]
        scores = tl.dot(b_query, b_key, input_precision="ieee") * scale_log2
        if LOGITS:
            tl.store(p_logits + t[None, :], scores, (o_g < G)[:, None] & keep[None, :])
        scores = tl.where(keep[None, :], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp2(running_max - finite_max)
        probability = tl.exp2(scores - finite_max[:, None])
        running_sum = running_sum * rescale + tl.sum(probability, 1)
        if VALUES:
            o_value = t.to(tl.int64) * value_strides[2]
            b_value = tl.load(p_value + o_value[:, None] + o_d[None, :], keep[:, None], 0.0)  # [BLOCK, D]
            accumulator = accumulator * rescale[:, None]
            accumulator += tl.dot(probability.to(b_value.dtype), b_value, input_precision="ieee")
        running_max = new_max
    row_index = (group * G + o_g) * splits + split
    if VALUES:
        tl.store(partial_output + row_index[:, None] * D + o_d[None, :], accumulator, (o_g < G)[:, None])
    tl.store(partial_statistics + row_index * 2, running_max, o_g < G)
    tl.store(partial_statistics + row_index * 2 + 1, running_sum, o_g < G)


@triton.jit
def _denominators(statistics, group, splits, G: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """Base-2 logarithms of the softmax denominators of a group's heads `[ROWS]`, −inf where nothing is
    seen."""
    o_g, o_s = tl.arange(0, ROWS), tl.arange(0, SPLITS)
    place = ((group * G + o_g)[:, None] * splits + o_s[None, :]) * 2
    inside = (o_g < G)[:, None] & (o_s < splits)[None, :]
    maximum = tl.load(statistics + place, inside, float("-inf"))
    total = tl.load(statistics + place + 1, inside, 0.0)
    peak = tl.max(maximum, 1)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    summed = tl.sum(total * tl.exp2(maximum - safe[:, None]), 1)
    return tl.where(summed > 0, safe + tl.log2(tl.where(summed > 0, summed, 1.0)), float("-inf"))


@triton.jit
def _scores_kernel(
    logits, statistics, coarse_statistics, lengths, scores, new_tokens, capacity, width, splits,
    coarse_splits,
    G: tl.constexpr, ROWS: tl.constexpr, STRIDE: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr,
    COARSE_SPLITS: tl.constexpr, MAX_RULE: tl.constexpr, COARSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCKS blocks of one group."""
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _after_previous_kernel(PDL)
    kv_heads = tl.num_programs(1)
    position = tl.load(lengths + row // new_tokens) - new_tokens + (row % new_tokens).to(tl.int32)
    if tile * BLOCKS <= position // (4 * STRIDE):
        group = row.to(tl.int64) * kv_heads + head
        seen = tl.minimum(tl.maximum(position + (1 - STRIDE), 0) // STRIDE, capacity)
        level = _denominators(statistics, group, splits, G, ROWS, SPLITS)
        if COARSE:
            coarse = _denominators(coarse_statistics, group, coarse_splits, G, ROWS, COARSE_SPLITS)
            level = tl.where(coarse == float("-inf"), level, coarse)
        o_g = tl.arange(0, ROWS)
        block = tile * BLOCKS + tl.arange(0, BLOCKS)
        p_logits = logits + (group * G + o_g)[:, None] * capacity
        score = tl.zeros([BLOCKS], tl.float32)
        for offset in tl.static_range(-1, 4):
            t = block * 4 + offset
            inside = (t >= 0) & (t < seen)
            z = tl.load(p_logits + t[None, :], (o_g < G)[:, None] & inside[None, :], 0.0)
            weight = tl.where(inside[None, :] & (o_g < G)[:, None], tl.exp2(z - level[:, None]), 0.0)
            importance = tl.sum(weight, 0)
            if MAX_RULE:
                score = tl.maximum(score, importance)
            elif offset == -1 or offset == 3:
                score += importance
            else:
                score += 2.0 * importance
        tl.store(scores + group * width + block, score, block < width)


@triton.jit
def _choose_kernel(
    scores, lists, counts, lengths, new_tokens, width, top_k, init_blocks, local_blocks,
    BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The chosen blocks of one group in ascending order; the own one is last."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _after_previous_kernel(PDL)
    position = tl.load(lengths + row // new_tokens) - new_tokens + (row % new_tokens).to(tl.int32)
    own = position // BLOCK_SIZE
    group = row * tl.num_programs(0) + head
    block = tl.arange(0, BLOCKS)
    score = tl.load(scores + group * width + block, block <= own, 0.0)
    chosen = choose_blocks(score, block, own, top_k, init_blocks, local_blocks, True)
    rank = tl.cumsum(chosen, 0) - chosen
    tl.store(lists + group * width + rank, block, chosen != 0)
    tl.store(counts + group, tl.sum(chosen, 0))


@triton.jit
def _joined(
    partial_output, partial_statistics, row_index, splits, o_d, D: tl.constexpr, SPLITS: tl.constexpr
):
    """One row's `[WIDTH]` outputs from its splits; zero where nothing was seen."""
    o_s = tl.arange(0, SPLITS)
    place = row_index * splits + o_s
    maximum = tl.load(partial_statistics + place * 2, o_s < splits, float("-inf"))
    total = tl.load(partial_statistics + place * 2 + 1, o_s < splits, 0.0)
    peak = tl.max(maximum, 0)
    factor = tl.exp2(maximum - tl.where(peak == float("-inf"), 0.0, peak))
    part = tl.load(partial_output + place[:, None] * D + o_d[None, :], (o_s < splits)[:, None], 0.0)
    denominator = tl.sum(factor * total, 0)
    return tl.sum(part * factor[:, None], 0) / tl.where(denominator > 0, denominator, 1.0)


@triton.jit
def _gated_combine_kernel(
    compressed_output, compressed_statistics, selected_output, selected_statistics, window_output,
    window_statistics, gates, output, gate_strides, output_strides, new_tokens, compressed_splits,
    selected_splits, window_splits,
    D: tl.constexpr, COMPRESSED_SPLITS: tl.constexpr, SELECTED_SPLITS: tl.constexpr,
    WINDOW_SPLITS: tl.constexpr, WINDOW: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gated sum of the branches for one query head, WIDTH of its D outputs a program."""
    part, query_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    _after_previous_kernel(PDL)
    o_d = part * WIDTH + tl.arange(0, WIDTH)
    row_index = row * tl.num_programs(1) + query_head
    sequence, token = row // new_tokens, row % new_tokens
    head = query_head.to(tl.int64)
    p_gate = gates + sequence * gate_strides[0] + head * gate_strides[1] + token * gate_strides[2]
    result = tl.load(p_gate).to(tl.float32) * _joined(
        compressed_output, compressed_statistics, row_index, compressed_splits, o_d, D, COMPRESSED_SPLITS
    )
    result += tl.load(p_gate + gate_strides[3]).to(tl.float32) * _joined(
        selected_output, selected_statistics, row_index, selected_splits, o_d, D, SELECTED_SPLITS
    )
    if WINDOW:
        result += tl.load(p_gate + 2 * gate_strides[3]).to(tl.float32) * _joined(
            window_output, window_statistics, row_index, window_splits, o_d, D, WINDOW_SPLITS
        )
    p_output = output + sequence * output_strides[0] + head * output_strides[1] + token * output_strides[2]
    tl.store(p_output + o_d, result.to(output.dtype.element_ty))


@triton.jit
def _append_kernel(
    new_key, new_value, key, value, mean_key, mean_value, coarse_key, lengths,
    new_key_strides, new_value_strides, key_strides, value_strides, mean_key_strides, mean_value_strides,
    coarse_strides,
    STRIDE: tl.constexpr, D: tl.constexpr, MEANS: tl.constexpr, VALUES: tl.constexpr, COARSE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Write the new token of one sequence and KV head behind its cache, and the means it completes."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _after_previous_kernel(PDL)
    length = tl.load(lengths + sequence)  # counts the new token
    o_d = tl.arange(0, D)
    b_key = tl.load(new_key + sequence * new_key_strides[0] + head * new_key_strides[1] + o_d)
    b_value = tl.load(new_value + sequence * new_value_strides[0] + head * new_value_strides[1] + o_d)
    p_key = key + sequence * key_strides[0] + head * key_strides[1]
    p_value = value + sequence * value_strides[0] + head * value_strides[1]
    last = (length - 1).to(tl.int64)
    tl.store(p_key + last * key_strides[2] + o_d, b_key)
    tl.store(p_value + last * value_strides[2] + o_d, b_value)
    if MEANS and length >= 2 * STRIDE and length % STRIDE == 0:
        # Earlier tokens come from the cache and the new one from registers: no read after write.
        earlier = (length - 2 * STRIDE + tl.arange(0, 2 * STRIDE)).to(tl.int64)
        old = (earlier < length - 1)[:, None]
        window = (length // STRIDE - 2).to(tl.int64)
        b_old = tl.load(p_key + earlier[:, None] * key_strides[2] + o_d[None, :], old, 0.0)
        mean = (tl.sum(b_old.to(tl.float32), 0) + b_key.to(tl.float32)) / (2 * STRIDE)
        p_mean = mean_key + sequence * mean_key_strides[0] + head * mean_key_strides[1]
        tl.store(p_mean + window * mean_key_strides[2] + o_d, mean.to(mean_key.dtype.element_ty))
        if VALUES:
            b_old = tl.load(p_value + earlier[:, None] * value_strides[2] + o_d[None, :], old, 0.0)
            mean = (tl.sum(b_old.to(tl.float32), 0) + b_value.to(tl.float32)) / (2 * STRIDE)
            p_mean = mean_value + sequence * mean_value_strides[0] + head * mean_value_strides[1]
            tl.store(p_mean + window * mean_value_strides[2] + o_d, mean.to(mean_value.dtype.element_ty))
    if COARSE and length >= 8 * STRIDE and length % (4 * STRIDE) == 0:
        earlier = (length - 8 * STRIDE + tl.arange(0, 8 * STRIDE)).to(tl.int64)
        old = (earlier < length - 1)[:, None]
        b_old = tl.load(p_key + earlier[:, None] * key_strides[2] + o_d[None, :], old, 0.0)
        mean = (tl.sum(b_old.to(tl.float32), 0) + b_key.to(tl.float32)) / (8 * STRIDE)
        window = (length // (4 * STRIDE) - 2).to(tl.int64)
        p_mean = coarse_key + sequence * coarse_strides[0] + head * coarse_strides[1]
        tl.store(p_mean + window * coarse_strides[2] + o_d, mean.to(coarse_key.dtype.element_ty))


def append_token(
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    stride: int,
    mean_key: torch.Tensor | None = None,
    mean_value: torch.Tensor | None = None,
    coarse_key: torch.Tensor | None = None,
    overlap: bool = False,
) -> None:
    """Write one new token a sequence into its cache, and the means of the windows that it completes.

    Args:
        new_key, new_value: `[B, Hkv, 1, D]`, D contiguous, after position embedding.
        key, value: `[B, Hkv, capacity, D]`, written at `lengths - 1`.
        lengths: `[B]` int32 on the device, the new token counted.
        stride: S of the windows of 2 S tokens.
        mean_key, mean_value: `[B, Hkv, windows, D]` of windows of 2 S tokens every S, or None.
        coarse_key: `[B, Hkv, windows, D]` of windows of 8 S tokens every 4 S, or None.
        overlap: launch before the previous kernel has drained (capability 9.0 and later).
    """
    batch, kv_heads, _, dim = new_key.shape
    tensors = [key, value, *(key if x is None else x for x in (mean_key, mean_value, coarse_key))]
    launch = {"launch_pdl": True} if overlap else {}
    _append_kernel[(kv_heads, batch)](
        new_key, new_value, *tensors, lengths, *((x.stride()[:3]) for x in (new_key, new_value, *tensors)),
        STRIDE=stride, D=dim, MEANS=mean_key is not None, VALUES=mean_value is not None,
        COARSE=coarse_key is not None, PDL=overlap, num_warps=4, **launch,
    )  # fmt: skip


class BlockDecodeStep:
    """One step bound to its tensors; the methods are the stages, `run` is all of them.

    Args:
        query: `[B, Hq, T, D]`, the sequences' last T tokens, after position embedding; D contiguous.
        key, value: `[B, Hkv, capacity, D]`, those tokens included.
        lengths: `[B]` int32 on the device: tokens in the cache, the T new ones counted.
        compressed_key: `[B, Hkv, windows, D]`, at least those that are complete.
        choice: numbers of blocks and rule.
        compressed_value: likewise; with it the compressed attention is a branch of its own and `gates` are
            needed.
        coarse_key: `[B, Hkv, windows, D]` of windows of two blocks every block: the softmax denominators come
            from them where one is complete.
        window: tokens of the sliding window, 0 for no such branch.
        gates: `[B, Hq, T, branches]` of compressed, selected (and window) attention.
        splits: programs that share a group's blocks; None fills the device twice.
        overlap: launch each kernel before the previous one has drained (capability 9.0 and later).
        stages: of the attend loop's pipeline; None takes what leaves room for a second program beside one.

    Raises:
        ValueError: an unsupported shape, named.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: torch.Tensor,
        compressed_key: torch.Tensor,
        choice: BlockChoice,
        *,
        compressed_value: torch.Tensor | None = None,
        coarse_key: torch.Tensor | None = None,
        window: int = 0,
        gates: torch.Tensor | None = None,
        splits: int | None = None,
        overlap: bool = False,
        stages: int | None = None,
    ):
        batch, heads, new_tokens, dim = query.shape
        kv_heads, capacity = key.shape[1], key.shape[2]
        if heads % kv_heads or dim not in (64, 128):
            raise ValueError(f"unsupported: {heads} query heads over {kv_heads}, head dim {dim}")
        if (compressed_value is None) != (gates is None) or (window and gates is None):
            raise ValueError("gates belong to a compressed branch and perhaps a window; both or neither")
        if gates is not None and gates.shape[-1] != (3 if window else 2):
            raise ValueError(f"{3 if window else 2} branches need as many gates, not {gates.shape[-1]}")
        for name, x in (("query", query), ("key", key), ("value", value), ("compressed", compressed_key)):
            if x.stride(-1) != 1:
                raise ValueError(f"{name}: the head dim must be contiguous")
        self.query, self.key, self.value, self.lengths = query, key, value, lengths
        self.compressed_key, self.compressed_value = compressed_key, compressed_value
        self.coarse_key, self.choice, self.window, self.gates = coarse_key, choice, window, gates
        self.tile = max(64, choice.block_size)
        self.overlap = overlap
        self.stages = stages or _stages(4 * self.tile * dim, query.device)
        self.group, self.kv_heads, self.new_tokens, self.dim = heads // kv_heads, kv_heads, new_tokens, dim
        self.rows, self.scale = batch * new_tokens, dim**-0.5
        self.blocks = triton.cdiv(capacity, choice.block_size)
        self.windows_known = compressed_key.shape[2]
        groups = self.rows * kv_heads
        self.splits = splits or _splits(groups, self.blocks, query.device)
        self.window_splits = min(self.splits, triton.cdiv(window, 64) + 1) if window else 1
        self.band_splits = min(self.splits, triton.cdiv(max(1, self.windows_known), 64))
        known_coarse = 0 if coarse_key is None else coarse_key.shape[2]
        self.coarse_splits = min(self.splits, triton.cdiv(max(1, known_coarse), 64))

        def single(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=query.device)

        rows = self.rows * heads
        self.logits = single(rows, max(1, self.windows_known))
        self.statistics = single(rows, self.band_splits, 2)
        self.coarse_statistics = single(rows, self.coarse_splits, 2)
        self.block_scores = single(groups, self.blocks)
        integer = {"dtype": torch.int32, "device": query.device}
        self.lists = torch.empty(batch, new_tokens, kv_heads, self.blocks, **integer)
        self.counts = torch.empty(batch, new_tokens, kv_heads, **integer)
        self.partial_output = single(rows, self.splits, dim)
        self.partial_statistics = single(rows, self.splits, 2)
        gated = gates is not None
        self.compressed_output = single(rows, self.band_splits, dim) if gated else self.partial_output
        self.window_output = single(rows, self.window_splits, dim) if window else self.partial_output
        self.window_statistics = single(rows, self.window_splits, 2) if window else self.partial_statistics
        self.output = torch.empty_like(query)

    def _common(self) -> dict:
        return {"PDL": self.overlap, **({"launch_pdl": True} if self.overlap else {})}

    def _band(self, key, value, band: Band, splits: int, logits, output, statistics) -> None:
        keep_logits = logits is not None
        _band_split_kernel[(splits, self.kv_heads, self.rows)](
            self.query, key, key if value is None else value, self.lengths,
            logits if keep_logits else statistics, output, statistics,
            self.query.stride()[:3], key.stride()[:3], (key if value is None else value).stride()[:3],
            self.new_tokens, key.shape[2], band.window, self.scale * LOG2_E,
            G=self.group, ROWS=_rows(self.group), D=self.dim, KERNEL=band.kernel, STRIDE=band.stride,
            BLOCK=64, STAGES=3, WINDOW=band.window > 0, VALUES=value is not None,
            LOGITS=keep_logits, num_warps=4, **self._common(),
        )  # fmt: skip

    def windows(self) -> None:
        """Logits, statistics and attention of the compressed keys; statistics of the coarse ones."""
        stride = self.choice.stride
        self._band(
            self.compressed_key, self.compressed_value, Band(2 * stride, stride), self.band_splits,
            self.logits, self.compressed_output, self.statistics,
        )  # fmt: skip
        if self.coarse_key is not None:
            self._band(
                self.coarse_key, None, Band(8 * stride, 4 * stride), self.coarse_splits,
                None, self.partial_output, self.coarse_statistics,
            )  # fmt: skip

    def scores(self) -> None:
        """Scores of all blocks."""
        tile = 32
        _scores_kernel[(triton.cdiv(self.blocks, tile), self.kv_heads, self.rows)](
            self.logits, self.statistics, self.coarse_statistics, self.lengths, self.block_scores,
            self.new_tokens, self.logits.shape[1], self.blocks, self.band_splits, self.coarse_splits,
            G=self.group, ROWS=_rows(self.group), STRIDE=self.choice.stride, BLOCKS=tile,
            SPLITS=triton.next_power_of_2(self.band_splits),
            COARSE_SPLITS=triton.next_power_of_2(self.coarse_splits),
            MAX_RULE=self.choice.rule == "max", COARSE=self.coarse_key is not None, num_warps=4,
            **self._common(),
        )  # fmt: skip

    def choose(self) -> None:
        """Lists of the chosen blocks."""
        width = triton.next_power_of_2(self.blocks)
        _choose_kernel[(self.kv_heads, self.rows)](
            self.block_scores, self.lists, self.counts, self.lengths, self.new_tokens, self.blocks,
            self.choice.top_k, self.choice.init_blocks, self.choice.local_blocks,
            BLOCK_SIZE=self.choice.block_size, BLOCKS=width, num_warps=4 if width >= 1024 else 1,
            **self._common(),
        )  # fmt: skip

    def attend(self) -> None:
        """Partial attention over the chosen blocks."""
        attend_kernel[(self.splits, self.kv_heads, self.rows)](
            self.query, self.key, self.value, self.lists, self.lists, self.block_scores, self.counts,
            self.lengths, self.lengths, self.partial_output, self.partial_statistics,
            self.key, self.query, self.lengths,  # of summaries: there are none
            self.query.stride()[:3], self.key.stride()[:3], self.value.stride()[:3], self.key.stride()[:3],
            0, self.blocks, self.new_tokens, self.blocks, self.splits, self.scale, self.scale * LOG2_E,
            G=self.group, ROWS=_rows(self.group), C=self.choice.block_size, D=self.dim,
            BLOCK=self.tile, STAGES=self.stages, BIAS="none", SUMMARIZE=False,
            PADDED=False, PAGED=False, num_warps=4, **self._common(),
        )  # fmt: skip

    def slide(self) -> None:
        """Partial attention over the last `window` tokens."""
        self._band(
            self.key, self.value, Band(window=self.window), self.window_splits, None, self.window_output,
            self.window_statistics,
        )  # fmt: skip

    def combine(self) -> torch.Tensor:
        """Join splits and branches; returns the output `[B, Hq, T, D]`."""
        common, width = self._common(), 32
        grid = (self.dim // width, self.kv_heads * self.group, self.rows)
        strides = self.output.stride()[:3]
        if self.gates is None:
            combine_kernel[grid](
                self.partial_output, self.partial_statistics, self.output, strides, self.new_tokens,
                self.splits,
                D=self.dim, SPLITS=triton.next_power_of_2(self.splits), WIDTH=width, num_warps=4, **common,
            )  # fmt: skip
            return self.output
        _gated_combine_kernel[grid](
            self.compressed_output, self.statistics, self.partial_output, self.partial_statistics,
            self.window_output, self.window_statistics, self.gates, self.output, self.gates.stride(), strides,
            self.new_tokens, self.band_splits, self.splits, self.window_splits,
            D=self.dim, COMPRESSED_SPLITS=triton.next_power_of_2(self.band_splits),
            SELECTED_SPLITS=triton.next_power_of_2(self.splits),
            WINDOW_SPLITS=triton.next_power_of_2(self.window_splits), WINDOW=self.window > 0, WIDTH=width,
            num_warps=4, **common,
        )  # fmt: skip
        return self.output

    def select(self) -> None:
        """windows, scores, choose."""
        self.windows()
        self.scores()
        self.choose()

    def run(self) -> torch.Tensor:
        """All stages."""
        self.select()
        self.attend()
        if self.window:
            self.slide()
        return self.combine()


def _rows(group: int) -> int:
    """Rows of the matrix product: the group padded to what tensor cores take."""
    return max(16, triton.next_power_of_2(group))


def _splits(groups: int, blocks: int, device: torch.device) -> int:
    """Programs a group so that all groups together fill the device twice, one block a program at least."""
    processors = 4
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(2 * processors // groups, MAX_SPLITS, blocks))


def _stages(tile_bytes: int, device: torch.device) -> int:
    """Pipeline stages of an attend loop whose tiles of keys and values have so many bytes: a block's place is
    loaded before its keys, so n tiles are in flight from 2n + 1 stages; up to three of them, in half of a
    processor's shared memory (LOG.md, The rivals)."""
    if device.type != "cuda":
        return 3
    known = torch.cuda.get_device_properties(device)
    # ROCm's properties lack it; every device has 48 KiB.
    room = getattr(known, "shared_memory_per_block_optin", 48 * 2**10) // 2 - 2**13
    return 2 * max(1, min(3, room // tile_bytes)) + 1
