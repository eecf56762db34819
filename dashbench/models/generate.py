"""Greedy generation, one row at a time: a row's tokens never depend on what else is in the batch.

Left padding would move the grid of chunks, so rows of different lengths are not padded but run one after the
other; the answers at any batch size are the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dashbench.models.sequence import Sequences


@dataclass
class Generated:
    """What a row came to.

    Attributes:
        tokens: new tokens, an end-of-sequence token not included.
        ended: whether one was met.
        prompt_tokens: how many were read.
        prompt_ms, generate_ms: wall time of reading and of continuing.
        sparsity: `Ledger.summary()`.
    """

    tokens: list[int]
    ended: bool
    prompt_tokens: int
    prompt_ms: float
    generate_ms: float
    sparsity: dict[str, Any] = field(default_factory=dict)


def end_tokens(model: nn.Module) -> set[int]:
    """Tokens that end a sequence: the config's and the generation config's, one or a list."""
    found: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        told = getattr(config, "eos_token_id", None)
        if told is not None:
            found |= set(told) if isinstance(told, (list, tuple)) else {told}
    return found


def new_sequences(model: nn.Module, batch: int, capacity: int) -> Sequences:
    """Empty state for `batch` sequences of up to `capacity` tokens."""
    config, state = model.config, model.dashbench
    heads = config.num_key_value_heads, config.head_dim
    size = state.block_size
    capacity = -(-capacity // size) * size
    sizes = config.num_hidden_layers, batch, *heads, capacity
    return Sequences(*sizes, state.kind, state.settings, model.dtype, model.device)


AT_ONCE = 1 << 17
"""Tokens of prompts that go through the model together. Longer batches are read some sequences at a time, one
at least: such a prompt fills a GPU by itself, and what the 8B shape makes on the way stays below 10 GiB."""


def rows_at_once(batch: int, tokens: int) -> int:
    """How many of `batch` prompts of `tokens` tokens are read together: parts of equal size, but the last."""
    parts = -(-batch // max(1, AT_ONCE // tokens))
    return -(-batch // parts)


@torch.no_grad()
def read(model: nn.Module, tokens: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Reads tokens `[B, T]` behind what the sequences hold; returns the logits `[B, V]` behind the last.

    Prompts of a large batch are read some at a time, see `AT_ONCE`.
    """
    batch = tokens.shape[0]
    rows = rows_at_once(*tokens.shape)
    if rows == batch or sequences.length:
        return _read(model, tokens, sequences)
    parts, logits = [], []
    for first in range(0, batch, rows):
        parts.append(sequences.part(first, min(first + rows, batch)))
        logits.append(_read(model, tokens[first : first + rows], parts[-1]))
    sequences.join(parts)
    return torch.cat(logits)


def _read(model: nn.Module, tokens: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    start = sequences.length
    position = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
    hidden = model.model(
        input_ids=tokens, position_ids=position, use_cache=False, sequences=sequences
    ).last_hidden_state
    sequences.length = start + tokens.shape[1]
    return model.lm_head(hidden[:, -1]).float()


@torch.no_grad()
def generate(model: nn.Module, prompt: list[int], new_tokens: int, stop=None) -> Generated:
    """Continues one prompt greedily.

    Args:
        model: of `checkpoint.load`.
        prompt: its tokens.
        new_tokens: at most so many are generated.
        stop: called with the new tokens after each one; true ends the row.

    Raises:
        ValueError: the prompt and its answer do not fit the model.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and len(prompt) + new_tokens > longest:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {new_tokens} new ones do not fit a model of {longest}"
        )
    ends = end_tokens(model)
    sequences = new_sequences(model, 1, len(prompt) + new_tokens)
    began = time.perf_counter()
    logits = read(model, torch.tensor([prompt], device=model.device), sequences)
    token = int(logits.argmax(-1))
    middle = time.perf_counter()
    found: list[int] = []
    ended = False
    while True:
        if token in ends:
            ended = True
            break
        found.append(token)
        if len(found) == new_tokens or (stop is not None and stop(found)):
            break
        token = int(read(model, torch.tensor([[token]], device=model.device), sequences).argmax(-1))
    end = time.perf_counter()
    times = 1e3 * (middle - began), 1e3 * (end - middle)
    return Generated(found, ended, len(prompt), *times, sequences.ledger.summary())
