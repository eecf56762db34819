"""Held-out rows: exact match by task and length, teacher-forced, and the measured sparsity.

An answer counts when every token of it is the likeliest one after the true tokens before it, which is what
greedy decoding would produce. The scores that the README shows come from lm-eval's tasks through the accuracy
suites; these are for watching a training run.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import nn

from dashbench.miniature.continuation import sparsity_by_layer
from dashbench.miniature.pieces import Pieces
from dashbench.miniature.rows import KINDS, Batch, draw_rows, mix
from dashbench.miniature.steps import batch_loss
from dashbench.models.kinds import KNOBS

FORMS = {"needles": 1.0, "noise": 0.0}
TOKENS_AT_ONCE = 65536


def parts(batch: Batch, rows: int) -> list[Batch]:
    """A batch in batches of up to `rows` rows."""
    count = batch.tokens.shape[0]
    return [
        Batch(**{f.name: getattr(batch, f.name)[i : i + rows] for f in fields(Batch)})
        for i in range(0, count, rows)
    ]


@torch.no_grad()
def evaluate(
    model: nn.Module, pieces: Pieces, lengths: list[int], tokens: int, settings: dict[str, Any], seed: int = 7
) -> dict[str, Any]:
    """Scores of a model on rows drawn from `seed`, the same for every model on one kind of device.

    Args:
        model: of `llama.Llama`.
        pieces: held-out ones.
        lengths: of the rows, tokens.
        tokens: of rows for each task and length.
        settings: of the model's attention, for the block size.

    Returns:
        `exact_match`: "task/form@length" -> share; `questions`: how many each; `s_by_layer`: "length" -> list
        of S_flop by layer, averaged over all rows of that length.
    """
    device = pieces.tokens.device
    exact: dict[str, float] = {}
    questions: dict[str, int] = {}
    sparsity: dict[str, list[float]] = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for length in lengths:
            seen: list[list[float]] = []
            for number, kind in enumerate(KINDS):
                for form, share in FORMS.items():
                    if kind == "track" and form == "needles":
                        continue
                    kinds = tuple(float(i == number) for i in range(len(KINDS)))
                    mixture = mix(str(device), kinds=kinds, needles_only=share, few=0.5)
                    batch = draw_rows(pieces, mixture, max(2, tokens // length), length)
                    count = torch.zeros(2, device=device)
                    for part in parts(batch, max(1, TOKENS_AT_ONCE // length)):
                        count += batch_loss(model, part, 8)[1][number]
                        seen.append(sparsity_by_layer(model, settings))
                    asked, right = count.tolist()
                    if asked:
                        exact[f"{kind}/{form}@{length}"] = right / asked
                        questions[f"{kind}/{form}@{length}"] = int(asked)
            sparsity[str(length)] = [sum(column) / len(column) for column in zip(*seen, strict=True)]
    return {"exact_match": exact, "questions": questions, "s_by_layer": sparsity}


def sweep(
    model: nn.Module,
    pieces: Pieces,
    lengths: list[int],
    tokens: int,
    method: str,
    settings: dict[str, Any],
    values: list[float],
) -> list[dict[str, Any]]:
    """`evaluate` at several values of a method's knob, on the same rows; the settings are put back after it.

    Returns:
        One dict a value: the value, and what `evaluate` returns.
    """
    knob = KNOBS[method]
    trained = settings[knob]
    found = []
    try:
        for value in values:
            settings[knob] = type(trained)(value)
            found.append({"value": value, **evaluate(model, pieces, lengths, tokens, settings)})
    finally:
        settings[knob] = trained
    return found
