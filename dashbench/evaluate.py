"""Runs a suite of kind `accuracy`: a checkpoint is loaded once, set to each sparsity, and answers question
after question; every answer is stored at once, and a killed run goes on at the next question.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from dashbench.models.kinds import KNOBS, CheckpointError
from dashbench.plan import Planned
from dashbench.rows_accuracy import AccuracyPoint, AccuracyRow
from dashbench.runner import DONE, Event, Summary
from dashbench.store import Store
from dashbench.suite import Suite
from dashbench.tasks.documents import Document, TaskSkipped, documents

SECONDS_A_QUESTION = {"cuda": 4.0, "cpu": 20.0}
STEPS = 12  # of a calibration


def plan_suite(suite: Suite, points: list[AccuracyPoint], device: dict[str, Any]) -> list[Planned]:
    """Every question, at what an 8B model takes for 16k tokens."""
    seconds = SECONDS_A_QUESTION.get(device.get("kind", "cpu"), 20.0)
    return [Planned(point, None, seconds) for point in points]


class Evaluation:
    """One loaded checkpoint and what it is asked."""

    def __init__(self, suite: Suite, store: Store, emit: Callable[[Event], None]):
        from dashbench import environment

        self.suite, self.store, self.emit = suite, store, emit
        self.summary = Summary(store.path)
        self.documents: dict[tuple, list[Document] | str] = {}
        self.loaded: tuple | None = None
        self.model: Any = None
        self.tokenizer: Any = None
        self.weights: str | None = None
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.environment = environment.describe(self.device)
        self.environment_key = environment.key(self.environment)

    def load(self, point: AccuracyPoint) -> None:
        """The checkpoint of a point, kept until another one is asked for."""
        wanted = point.checkpoint, point.attention, point.preset
        if self.loaded == wanted:
            return
        from transformers import AutoTokenizer

        from dashbench.models.checkpoint import _folder, load, weights_hash

        self.loaded = self.model = None
        folder = _folder(point.checkpoint)
        self.model = load(folder, point.attention, preset=point.preset, device=self.device)
        self.defaults = dict(self.model.dashbench.settings)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.folder, self.weights, self.loaded = folder, weights_hash(folder), wanted

    def asked(self, point: AccuracyPoint, samples: int) -> list[Document]:
        """Documents of a point's task; those behind the evaluated ones are for calibration."""
        key = point.task, point.length, point.folder, str(self.folder), samples
        if key not in self.documents:
            folder = Path(point.folder) if point.folder else None
            try:
                self.documents[key] = documents(point.task, point.length, samples, self.folder, folder)
            except TaskSkipped as reason:
                self.documents[key] = str(reason)
            except FileNotFoundError as missing:
                self.documents[key] = str(missing)
        found = self.documents[key]
        if isinstance(found, str):
            raise TaskSkipped(found)
        return found

    def set_knobs(self, knobs: dict[str, Any]) -> None:
        """Settings of the loaded model: its own, with these in their place."""
        settings = self.model.dashbench.settings
        settings.clear()
        settings.update(self.defaults)
        for key, value in knobs.items():
            if key not in settings:
                kind = self.model.dashbench.kind
                raise CheckpointError(
                    f"{kind} attention has no setting {key!r}; known: {', '.join(settings) or 'none'}"
                )
            settings[key] = value

    def calibrate(self, point: AccuracyPoint, prompts: list[Document]) -> dict[str, Any]:
        """The knob at which reading the prompts has the sparsity asked for.

        Raises:
            TaskSkipped: it cannot be reached; the message says how near one comes.
        """
        kind = self.model.dashbench.kind
        target = point.sparsity_target
        if kind == "dense":
            raise TaskSkipped("dense attention has no sparsity to set")
        knob = KNOBS[kind]
        tried: dict[float, float] = {}

        def measure(value: float) -> float:
            self.set_knobs({knob: value})
            tried[value] = self.reading_sparsity(prompts)
            return tried[value]

        if knob == "top_k":  # fewer blocks, more sparsity
            most = max(len(self.encode(d.prompt)) for d in prompts) // self.model.dashbench.block_size + 1
            low, high = 1, most
            while low < high:
                middle = (low + high) // 2
                if measure(middle) > target:
                    low = middle + 1
                else:
                    high = middle
            for value in (low, max(1, low - 1)):
                if value not in tried:
                    measure(value)
        else:
            low, high = 1e-2, 1e3
            for _ in range(STEPS):
                middle = math.sqrt(low * high)
                if measure(middle) < target:
                    low = middle
                else:
                    high = middle
                if abs(tried[middle] - target) <= point.sparsity_tolerance / 2:
                    break
        best = min(tried, key=lambda value: abs(tried[value] - target))
        if abs(tried[best] - target) > point.sparsity_tolerance:
            raise TaskSkipped(
                f"cannot reach s_flop {target:g} ± {point.sparsity_tolerance:g} on these prompts: nearest is "
                f"{tried[best]:.4f} at {knob} {best:g}"
            )
        return {knob: best}

    def reading_sparsity(self, prompts: list[Document]) -> float:
        """s_flop of reading some prompts."""
        import torch

        from dashbench.models.generate import new_sequences, read

        kept = visible = 0.0
        for document in prompts:
            tokens = self.encode(document.prompt)
            sequences = new_sequences(self.model, 1, len(tokens))
            read(self.model, torch.tensor([tokens], device=self.model.device), sequences)
            kept += float(sequences.ledger.kept.sum())
            visible += float(sequences.ledger.visible.sum())
        return 1 - kept / visible

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a prompt, with the tokenizer's own beginning."""
        return self.tokenizer(prompt)["input_ids"]

    def answer(self, document: Document) -> dict[str, Any]:
        """Row fields of one answered document."""
        from dashbench.models.generate import generate

        def stop(tokens: list[int]) -> bool:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            return any(end in text for end in document.until)

        given = self.encode(document.prompt)
        found = generate(self.model, given, document.new_tokens, stop if document.until else None)
        text = self.tokenizer.decode(found.tokens, skip_special_tokens=True)
        for end in document.until:
            text = text.partition(end)[0]
        read = found.sparsity["prefill"]
        return {
            "answer": text, "target": document.target, "score": document.score(text),
            "prompt_hash": document.prompt_hash, "prompt_tokens": found.prompt_tokens,
            "new_tokens": len(found.tokens), "prompt_ms": found.prompt_ms, "generate_ms": found.generate_ms,
            "s_flop": read["s_flop"], "s_mean": read["s_mean"], "s_up": read["s_up"],
            "s_by_layer": read["s_flop_by_layer"],
            "s_decode": found.sparsity.get("decode", {}).get("s_flop"),
        }  # fmt: skip

    def write(self, point: AccuracyPoint, began: float, status: str, reason: str | None = None, **fields):
        """Stores a row and shows it."""
        state = self.model.dashbench if self.model is not None else None
        notes = {"sources": state.source, "dense_backend": state.backend} if state else {}
        row = AccuracyRow(
            key=point.key(), method=state.kind if state else point.attention, label=point.label,
            checkpoint=point.checkpoint, weights=self.weights, preset=point.preset,
            attention=state.kind if state else point.attention,
            settings=dict(state.settings) if state else {}, sparsity_target=point.sparsity_target,
            task=point.task, length=point.length, doc_id=point.document, seed=point.seed,
            suite=self.suite.id, status=status, reason=reason, environment=self.environment,
            environment_key=self.environment_key, notes=notes,
            timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
            wall_s=round(time.monotonic() - began, 3), **{"knob": point.knobs, **fields},
        )  # fmt: skip
        self.store.append(row)
        self.summary.counts[status] = self.summary.counts.get(status, 0) + 1
        self.emit(Event("row", text=row_line(row), row=row.model_dump(mode="json"), seconds=row.wall_s))


def row_line(row: AccuracyRow) -> str:
    """One line for a progress display."""
    where = f"{row.label} {row.task} {row.length or ''} #{row.doc_id}".replace("  ", " ")
    if row.status != "ok":
        return f"{row.status:8} {where}: {row.reason}"
    sparsity = f"S {100 * row.s_flop:.1f} %"
    return (
        f"ok       {where}: score {row.score:.2f}, {sparsity}, {row.prompt_tokens} + {row.new_tokens} tokens"
    )


def run_suite(
    suite: Suite,
    out: Path,
    only: list[str] | None = None,
    time_budget_s: float | None = None,
    retry_failed: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    again: bool = False,
) -> Summary:
    """Answers every question of a suite that is not answered yet; see `runner.run_suite`."""
    until = time.monotonic() + time_budget_s if time_budget_s is not None else None
    points = [p for p in suite.points() if only is None or p.label in only]
    with Store(out / f"{suite.spec.name}.jsonl") as store:
        for notice in store.notices:
            on_event(Event("notice", text=notice))
        run = Evaluation(suite, store, on_event)
        todo = []
        for point in points:
            row = store.find(point.key(), run.environment_key)
            if not again and row is not None and (row["status"] in DONE or not retry_failed):
                run.summary.already += 1
            else:
                todo.append(point)
        on_event(Event("start", total=len(todo), text=run.environment["device"]))
        try:
            for _, members in groupby(todo, key=_setting):
                _one_setting(run, list(members), until)
        except KeyboardInterrupt:
            run.summary.interrupted = True
        run.summary.left = len(todo) - sum(run.summary.counts.values())
        return run.summary


def _setting(point: AccuracyPoint) -> tuple:
    return point.checkpoint, point.attention, point.preset, str(point.knobs), point.sparsity_target


def _one_setting(run: Evaluation, points: list[AccuracyPoint], until: float | None) -> None:
    """All questions of one checkpoint at one setting."""
    first, began = points[0], time.monotonic()
    if until is not None and began >= until:
        return
    run.emit(Event("point", text=f"{first.label}: loading"))
    try:
        run.load(first)
        knobs = dict(first.knobs)
        run.set_knobs(knobs)
        if first.sparsity_target is not None:
            run.emit(Event("point", text=f"{first.label}: calibrating S {100 * first.sparsity_target:g} %"))
            knobs = run.calibrate(first, _held_out(run, first))
            run.set_knobs(knobs)
    except (CheckpointError, TaskSkipped) as problem:
        status = "skipped" if isinstance(problem, TaskSkipped) else "error"
        for point in points:
            run.write(point, began, status, str(problem))
        return
    for point in points:
        began = time.monotonic()
        if until is not None and began >= until:
            return
        run.emit(Event("point", text=f"{point.label} {point.task} {point.length or ''} #{point.document}"))
        try:
            found = run.asked(point, _samples(run, point))
            if point.document >= _evaluated(run, point, len(found)):
                raise TaskSkipped(f"{point.task} has {len(found)} documents")
            fields = run.answer(found[point.document])
        except TaskSkipped as reason:
            run.write(point, began, "skipped", str(reason), knob=knobs)
        except ValueError as problem:
            run.write(point, began, "error", str(problem), knob=knobs)
        except Exception as problem:
            if "out of memory" not in str(problem):
                raise
            run.write(point, began, "oom", str(problem).splitlines()[0], knob=knobs)
        else:
            run.write(point, began, "ok", knob=knobs, **fields)


def _samples(run: Evaluation, point: AccuracyPoint) -> int:
    """Documents to make of a task: the evaluated ones and the held-out ones behind them."""
    return _evaluated(run, point, 10**9) + run.suite.spec.calibration_prompts


def _evaluated(run: Evaluation, point: AccuracyPoint, there: int) -> int:
    """Documents of a task that the suite evaluates, at most as many as there are."""
    for entry in run.suite.spec.tasks:
        if point.task in entry.names() and point.length in entry.length and point.folder == entry.folder:
            return min(entry.samples, there)
    raise ValueError(f"{point.task} is not in the suite")


def _held_out(run: Evaluation, point: AccuracyPoint) -> list[Document]:
    """Documents of the point's task behind the evaluated ones; the last ones where there are no more."""
    found = run.asked(point, _samples(run, point))
    return found[-run.suite.spec.calibration_prompts :]
