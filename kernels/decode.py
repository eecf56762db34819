"""One decode step of DashAttention: a few new tokens against a cache with chunk summaries.

Source: DashAttention (arXiv 2605.18753). Stages, each callable on its own on one `DecodeStep`:

    append    write new keys and values, summarise chunks that they complete, advance the lengths; for one new
              token `scores` and `attend` can do it on the side
    scores    γ ⟨q, k̄⟩ / √D over the visible chunks
    route     entmax, mean over the group, list of active chunks in ascending order
    attend    attention over the list, every split an equal share of it, or of all lists laid end to end
    combine   join the splits

No stage reads a length on the host, and every buffer is allocated by `DecodeWorkspace`, so a step can be
captured in a CUDA graph and replayed while the cache grows.

Letters: B sequences, T new tokens a sequence, Hq query heads, Hkv KV heads, G = Hq / Hkv, D head dim, C chunk
size, M chunks that the cache can hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from dashbench.kernels.decode_kernels import (
    append_kernel,
    attend_balanced_kernel,
    attend_kernel,
    combine_balanced_kernel,
    combine_kernel,
    route_kernel,
    scores_kernel,
)
from dashbench.kernels.reference import DashOptions
from dashbench.kernels.tuning import choose, setting_of


@dataclass(frozen=True)
class DecodeCache:
    """Tensors of one layer's cache.

    Attributes:
        key, value: `[pages, Hkv, page_size, D]` by strides (D contiguous); without a page table one page a
            sequence: `[B, Hkv, capacity, D]`.
        summaries: `[pages, Hkv, page_size / C, D]`, k̄ of complete chunks, paged alongside.
        lengths: `[B]` int32, tokens in the cache, on the device.
        page_table: `[B, pages a sequence]` int32, or None.
        left_padding: `[B]` int32, leading tokens of each sequence that are padding, counted by `lengths`, or
            None. Chunks keep their padded places.
    """

    key: torch.Tensor
    value: torch.Tensor
    summaries: torch.Tensor
    lengths: torch.Tensor
    page_table: torch.Tensor | None = None
    left_padding: torch.Tensor | None = None

    @property
    def capacity(self) -> int:
        """Tokens that one sequence can hold."""
        pages = 1 if self.page_table is None else self.page_table.shape[1]
        return pages * self.key.shape[2]


@dataclass(frozen=True)
class DecodeLaunch:
    """Launch choices that change no result beyond rounding.

    Attributes:
        splits: programs a group, with `balanced` on average; None fills the device once.
        stages: of the attend loop's pipeline. A chunk's place must be loaded before its keys, so Triton 3.6
            has n tiles in flight ahead of the product from 2n + 1 stages.
        attend_warps: warps of an attend program.
        score_tile: chunks of a scores program.
        route_warps: warps of a route program.
        overlap: launch each kernel before the previous one has drained (capability 9.0 and later).
        balanced: every program attends an equal share of all groups' chunks; without it each group has the
            same number of programs, however long its list. Up to `BALANCED_GROUPS` groups; LOG.md says where
            it pays.
    """

    splits: int | None = None
    stages: int = 3
    attend_warps: int = 4
    score_tile: int = 64
    route_warps: int = 8
    overlap: bool = False
    balanced: bool = False


LOG2_E = 1.4426950408889634

ROUTE_TILE = 4096
"""Chunks whose scores a route program keeps in registers; it reads the rest again in every step."""

ROUTE_LEAST = 64
"""The least such tile, for short caches too: more than one warp's 32 lanes hold. Sums of a tile that one warp
holds, a number a lane, may differ between its lanes in the last bit: the compiler fuses x · x into the
addition of the neighbour's rounded square. Lanes that then leave the threshold's loop one step apart wait
for one another for ever (LOG.md, Decode). A larger tile is summed in each lane first or through shared
memory, which gives all lanes one number.
"""


BALANCED_GROUPS = 256
"""Groups (sequences x new tokens x KV heads) whose counts every program of a balanced step reads."""

JOINED = 32
"""Splits that a program of a balanced combine joins at a time: one turn for most groups of a large batch."""

MOST_SPLITS = 128
"""Splits of a group that `combine` joins, unless more are asked for; one size, so that another batch does not
compile it anew."""

STEP_SCORES = 1 << 26
"""Routing scores (fp32) that one step of `attend_cache` may keep: 256 MiB."""

MAX_ROWS = 65535
"""Step rows of one launch: what the third axis of a CUDA grid holds."""


class DecodeWorkspace:
    """Buffers of a step; they may be shared by layers that run one after the other.

    After a step `lists[b, t, r, : counts[b, t, r]]` are the active chunks in ascending order (own chunk
    included) and `weights[b, t, r, : visible chunks]` the routing weights.

    Args:
        batch, new_tokens: B, T.
        query_heads, kv_heads, head_dim: Hq, Hkv, D.
        chunks: M.
        splits: programs that share a group's chunks; `balanced`: all groups' together.
        device: where.
        balanced: see `DecodeLaunch`.
    """

    def __init__(
        self, batch, new_tokens, query_heads, kv_heads, head_dim, chunks, splits, device, balanced=False
    ):
        rows = (batch, new_tokens)
        single = {"dtype": torch.float32, "device": device}
        integer = {"dtype": torch.int32, "device": device}
        self.splits, self.balanced = splits, balanced
        self.scores = torch.empty(*rows, query_heads, chunks, **single)
        self.weights = torch.empty(*rows, kv_heads, chunks, **single)
        self.biases = torch.empty(*rows, kv_heads, chunks, **single)
        self.lists = torch.empty(*rows, kv_heads, chunks, **integer)
        self.places = torch.empty(*rows, kv_heads, chunks, **integer)
        self.counts = torch.empty(*rows, kv_heads, **integer)
        # Kernels leave tickets at zero.
        self.route_tickets = torch.zeros(*rows, kv_heads, **integer)
        self.append_tickets = torch.zeros(batch, **integer)
        partial = (*rows, query_heads, splits)
        if balanced:  # a slot for every pair of a split and a group that can meet
            partial = splits + batch * new_tokens * kv_heads, query_heads // kv_heads
            self.spans = torch.empty(*rows, kv_heads, 2, **integer)  # each group's first and last split
        self.partial_output = torch.empty(*partial, head_dim, **single)
        self.partial_statistics = torch.empty(*partial, 2, **single)


BALANCED_FROM_GROUPS, BALANCED_FROM_TOKENS = 16, 65536


def known_launch(query: torch.Tensor, cache: DecodeCache, options: DashOptions) -> DecodeLaunch:
    """What the tables of launches say of a step; arguments as for `DecodeStep`.

    A rule that does not speak of `balanced` leaves it to the size of the step: on an H100 it took 9 % off 16
    groups of 128k tokens at 75 % sparsity and 4 % at 64k, changed nothing at 32k and cost a tenth at 2 groups
    (LOG.md).
    """
    kv_heads = cache.key.shape[1]
    setting = setting_of(query, kv_heads, options.chunk_size, cache.capacity)
    groups = query.shape[0] * query.shape[2] * kv_heads
    large = groups >= BALANCED_FROM_GROUPS and cache.capacity >= BALANCED_FROM_TOKENS
    return DecodeLaunch(**{"balanced": query.is_cuda and large, **choose("decode", setting)})


class DecodeStep:
    """One step bound to its tensors; the methods are the stages, `run` is scores to combine.

    Args:
        query: `[B, Hq, T, D]`, the sequences' last T tokens, after position embedding; D contiguous.
        cache: holds those tokens already (`append`), `lengths` counting them. A sequence must have at least
            T tokens.
        options: γ, α, σ and modes.
        launch: see `DecodeLaunch`; None: what `tuning` knows.
        workspace: buffers of earlier steps of the same shape, or None.
        output: `[B, Hq, T, D]` to write, or None.
        new: (new key, new value `[B, Hkv, 1, D]`, summary query `[Hkv, D]` contiguous): the cache does not
            hold the last token yet, though `lengths` counts it (a model advances them once a step, for all
            its layers), and `scores` writes it, in place of a launch of `append`. For one new token and
            visibility `own`.

    Raises:
        ValueError: an unsupported shape, named.
    """

    def __init__(
        self,
        query: torch.Tensor,
        cache: DecodeCache,
        options: DashOptions,
        launch: DecodeLaunch | None = None,
        workspace: DecodeWorkspace | None = None,
        output: torch.Tensor | None = None,
        new: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ):
        batch, query_heads, new_tokens, head_dim = query.shape
        kv_heads = cache.key.shape[1]
        _check(query, cache, options)
        if new is not None and (new_tokens > 1 or options.visibility != "own"):
            raise ValueError("scores can append one new token, with visibility `own`; call append for others")
        if launch is None:
            launch = known_launch(query, cache, options)
        self.query, self.cache, self.options, self.new = query, cache, options, new
        self.chunks = triton.cdiv(cache.capacity, options.chunk_size)
        self.group = query_heads // kv_heads
        if workspace is None:
            groups = batch * new_tokens * kv_heads
            balanced = launch.balanced and groups <= BALANCED_GROUPS
            if balanced:
                blocks = groups * triton.cdiv(self.chunks, _block(options) // options.chunk_size)
                splits = (launch.splits or 0) * groups or _balanced_splits(groups, blocks, query.device)
            else:
                splits = launch.splits or _splits(groups, self.chunks, query.device)
            shape = batch, new_tokens, query_heads, kv_heads, head_dim
            workspace = DecodeWorkspace(*shape, self.chunks, splits, query.device, balanced)
        self.workspace = workspace
        self.launch = replace(launch, balanced=workspace.balanced)
        self.output = torch.empty_like(query) if output is None else output
        self.rows = batch * new_tokens
        self.kv_heads, self.new_tokens, self.head_dim = kv_heads, new_tokens, head_dim
        self.scale = head_dim**-0.5

    def _pages(self):
        cache, size = self.cache, self.options.chunk_size
        if cache.page_table is None:
            return cache.lengths, 0, self.chunks  # the pointer is not read
        return cache.page_table, cache.page_table.stride(0), cache.key.shape[2] // size

    def _common(self):
        launch = {"launch_pdl": True} if self.launch.overlap else {}
        padded, paged = self.cache.left_padding is not None, self.cache.page_table is not None
        return {"PADDED": padded, "PAGED": paged, "PDL": self.launch.overlap, **launch}

    def scores(self) -> None:
        """Routing scores into the workspace, and the new token, if it was given, into the cache."""
        cache, space = self.cache, self.workspace
        table, table_stride, per_page = self._pages()
        tile = self.launch.score_tile
        tiles = triton.cdiv(self.chunks, tile) + (self.new is not None)
        new_key, new_value, _ = self.new or (self.query,) * 3  # not read without a new token
        scores_kernel[(tiles, self.kv_heads, self.rows)](
            self.query, cache.summaries, cache.lengths, _padding(cache), table, space.scores, space.weights,
            new_key, new_value, cache.key, cache.value,
            _strides(self.query), _strides(cache.summaries), _strides(new_key), _strides(new_value),
            _strides(cache.key), _strides(cache.value), table_stride, per_page, self.new_tokens,
            self.chunks, self.options.scaling_factor * self.scale,
            G=self.group, ROWS=_rows(self.group), C=self.options.chunk_size, D=self.head_dim, TILE=tile,
            COMPLETED=self.options.visibility == "completed", APPEND=self.new is not None, num_warps=4,
            **self._common(),
        )  # fmt: skip

    def route(self) -> None:
        """Weights and lists of active chunks from the scores."""
        space, options = self.workspace, self.options
        table, table_stride, per_page = self._pages()
        tile = min(ROUTE_TILE, max(ROUTE_LEAST, triton.next_power_of_2(self.chunks)))
        route_kernel[(self.kv_heads * self.group, self.rows)](
            space.scores, space.weights, space.lists, space.places, space.biases, space.counts,
            self.cache.lengths, _padding(self.cache), table, space.route_tickets, table_stride, per_page,
            self.new_tokens, self.chunks, 1 / (options.alpha - 1), 1 / options.sigma,
            G=self.group, C=options.chunk_size, TILE=tile,
            ALPHA_IS_1_5=options.alpha == 1.5, BIAS=options.bias_mode,
            FORCE_PREVIOUS=options.forced == "own_and_previous",
            COMPLETED=options.visibility == "completed", num_warps=self.launch.route_warps, **self._common(),
        )  # fmt: skip

    def attend(self) -> None:
        """Partial attention of every split."""
        cache, space = self.cache, self.workspace
        table, table_stride, per_page = self._pages()
        summary_query = self.new[2] if self.new else self.query  # not read without a new token
        kernel, groups, spans = attend_kernel, (), ()
        grid = space.splits + (self.new is not None), self.kv_heads, self.rows
        common = self._common()
        if space.balanced:
            kernel, groups = attend_balanced_kernel, (self.kv_heads, self.rows * self.kv_heads)
            spans = (space.spans,)
            grid = (space.splits + (groups[1] if self.new else 0),)
            common["GROUPS"] = _groups(groups[1])
            if _block(self.options) == 64:
                common["maxnreg"] = 168  # of three programs a multiprocessor; without spills
        kernel[grid](
            self.query, cache.key, cache.value,
            space.lists, space.lists if cache.page_table is None else space.places,
            space.biases, space.counts, cache.lengths, _padding(cache), space.partial_output,
            space.partial_statistics, *spans,
            cache.summaries, summary_query, table,
            _strides(self.query), _strides(cache.key), _strides(cache.value), _strides(cache.summaries),
            table_stride, per_page, self.new_tokens, self.chunks, *groups, space.splits, self.scale,
            self.scale * LOG2_E,
            G=self.group, ROWS=_rows(self.group), C=self.options.chunk_size, D=self.head_dim,
            BLOCK=_block(self.options), STAGES=self.launch.stages,
            BIAS=self.options.bias_mode, SUMMARIZE=self.new is not None,
            num_warps=self.launch.attend_warps, **common,
        )  # fmt: skip

    def combine(self) -> torch.Tensor:
        """Join the splits; returns the output `[B, Hq, T, D]`."""
        space, common, width = self.workspace, self._common(), 32
        del common["PADDED"], common["PAGED"]
        grid = self.head_dim // width, self.kv_heads * self.group, self.rows
        if space.balanced:
            combine_balanced_kernel[grid](
                space.partial_output, space.partial_statistics, space.counts, space.spans, self.output,
                _strides(self.output), self.new_tokens,
                G=self.group, D=self.head_dim, SPLITS=JOINED, WIDTH=width, num_warps=1, **common,
            )  # fmt: skip
            return self.output
        combine_kernel[grid](
            space.partial_output, space.partial_statistics, self.output, _strides(self.output),
            self.new_tokens, space.splits,
            D=self.head_dim, SPLITS=max(MOST_SPLITS, triton.next_power_of_2(space.splits)), WIDTH=width,
            num_warps=4, **common,
        )  # fmt: skip
        return self.output

    def run(self) -> torch.Tensor:
        """scores, route, attend, combine."""
        self.scores()
        self.route()
        self.attend()
        return self.combine()


def append(
    cache: DecodeCache,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    summary_query: torch.Tensor,
    chunk_size: int,
    tickets: torch.Tensor,
    overlap: bool = False,
) -> None:
    """Write new tokens behind each sequence's last, summarise chunks they complete, advance `lengths`.

    Writing a whole prompt into an empty cache this way also makes its summaries. The caller sees to it that
    lengths stay within the capacity: it cannot be checked without reading the device.

    Args:
        cache: changed in place.
        new_key, new_value: `[B, Hkv, T, D]`, D contiguous, after position embedding.
        summary_query: `[Hkv, D]` contiguous.
        chunk_size: C.
        tickets: `[B]` int32 zeros, left at zero (`DecodeWorkspace.append_tickets`).
        overlap: see `DecodeLaunch`.
    """
    batch, kv_heads, new_tokens, head_dim = new_key.shape
    table, table_stride, per_page = cache.lengths, 0, cache.capacity // chunk_size
    if cache.page_table is not None:
        table, table_stride = cache.page_table, cache.page_table.stride(0)
        per_page = cache.key.shape[2] // chunk_size
    launch = {"launch_pdl": True} if overlap else {}
    append_kernel[((new_tokens - 1) // chunk_size + 2, kv_heads, batch)](
        new_key, new_value, cache.key, cache.value, cache.summaries, summary_query, cache.lengths,
        _padding(cache), table, tickets, _strides(new_key), _strides(new_value), _strides(cache.key),
        _strides(cache.value), _strides(cache.summaries), table_stride, per_page, new_tokens, head_dim**-0.5,
        C=chunk_size, D=head_dim, PADDED=cache.left_padding is not None, PAGED=cache.page_table is not None,
        PDL=overlap, num_warps=4, **launch,
    )  # fmt: skip


def decode_attention(
    query: torch.Tensor,
    cache: DecodeCache,
    options: DashOptions = DashOptions(),
    launch: DecodeLaunch | None = None,
    workspace: DecodeWorkspace | None = None,
) -> tuple[torch.Tensor, DecodeWorkspace]:
    """DashAttention of the sequences' last T tokens, causal among themselves; see `DecodeStep`.

    Returns:
        (output `[B, Hq, T, D]`, workspace, whose `counts` are the active chunks and `lists` the routing).
    """
    step = DecodeStep(query, cache, options, launch, workspace)
    return step.run(), step.workspace


def attend_cache(
    query: torch.Tensor,
    cache: DecodeCache,
    options: DashOptions = DashOptions(),
    launch: DecodeLaunch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DashAttention of the sequences' last T tokens for any T: the next piece of a prompt, a speculative
    guess.

    A `decode_attention` whose buffers stay within `STEP_SCORES` numbers; longer queries run in slices. Every
    token is a row of its own there, so for many tokens at once a whole prefill is faster.

    Args:
        query: `[B, Hq, T, D]`, the last T tokens of each sequence in the cache, whatever its length.
        cache, options, launch: as for `DecodeStep`.

    Returns:
        (output `[B, Hq, T, D]`, active chunks `[B, Hkv, T]` int32, own ones included).
    """
    batch, heads, new_tokens, _ = query.shape
    chunks = triton.cdiv(cache.capacity, options.chunk_size)
    slice_tokens = max(1, min(STEP_SCORES // (batch * heads * chunks), MAX_ROWS // batch))
    outputs, counts = [], []
    for begin in range(0, new_tokens, slice_tokens):
        part = query[:, :, begin : begin + slice_tokens]
        behind = new_tokens - begin - part.shape[2]
        known = replace(cache, lengths=cache.lengths - behind) if behind else cache
        output, space = decode_attention(part, known, options, launch)
        outputs.append(output)
        counts.append(space.counts.transpose(1, 2))
    return torch.cat(outputs, 2), torch.cat(counts, 2)


def _rows(group: int) -> int:
    """Rows of the matrix product: the group padded to what tensor cores take."""
    return max(16, triton.next_power_of_2(group))


def _block(options: DashOptions) -> int:
    """Tokens that an attend program takes at a time: one chunk or several."""
    return max(64, options.chunk_size)


def _groups(groups: int) -> int:
    """Places for the groups' counts in a program; few sizes, so that few variants compile."""
    return max(16, triton.next_power_of_2(groups))


def _splits(groups: int, chunks: int, device: torch.device) -> int:
    """Programs a group: three for each multiprocessor, as many as its shared memory holds, but no more than
    `combine` joins cheaply, and one chunk a program at least. Measured: LOG.md, Decode."""
    return max(1, min(3 * _processors(device) // groups, MOST_SPLITS, chunks))


def _balanced_splits(groups: int, blocks: int, device: torch.device) -> int:
    """Programs of a balanced step: three for each multiprocessor with those that summarise among them, two at
    least, and one block a program at least."""
    processors = _processors(device)
    return min(max(3 * processors - groups, 2 * processors), blocks)


def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4


def _padding(cache: DecodeCache) -> torch.Tensor:
    """The pointer that kernels read with PADDED; else any."""
    return cache.lengths if cache.left_padding is None else cache.left_padding


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]


def _check(query: torch.Tensor, cache: DecodeCache, options: DashOptions) -> None:
    heads, head_dim, size = query.shape[1], query.shape[3], options.chunk_size
    if heads % cache.key.shape[1]:
        raise ValueError(f"{heads} query heads are no multiple of {cache.key.shape[1]} KV heads")
    if head_dim not in (64, 128):
        raise ValueError(f"head dim must be 64 or 128, got {head_dim}: pad it")
    if size not in (16, 32, 64, 128):
        raise ValueError(f"chunk size must be 16, 32, 64 or 128, got {size}")
    if cache.page_table is not None and cache.key.shape[2] % size:
        raise ValueError(f"{cache.key.shape[2]} tokens a page are no multiple of the chunk size {size}")
    if query.shape[0] * query.shape[2] > MAX_ROWS:
        raise ValueError(f"{query.shape[0]} x {query.shape[2]} rows exceed {MAX_ROWS}: see attend_cache")
    for name, x in (
        ("query", query),
        ("key", cache.key),
        ("value", cache.value),
        ("summaries", cache.summaries),
    ):
        if x.stride(-1) != 1:
            raise ValueError(f"{name}: the head dim must be contiguous")
