"""Runs a suite of kind `accuracy`: a checkpoint is loaded once, set to each sparsity, and answers question
after question; every answer is stored at once, and a killed run goes on at the next question.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from dashbench.answerer import Crew, Died
from dashbench.models.kinds import CheckpointError
from dashbench.models.sizes import SIZES, random_size
from dashbench.plan import Planned
from dashbench.rows_accuracy import AccuracyPoint, AccuracyRow
from dashbench.runner import DONE, Event, Summary
from dashbench.store import Store
from dashbench.suite import Suite
from dashbench.tasks.documents import Document, TaskSkipped, documents

MEANINGLESS = "the score means nothing: it shows that the path runs, its times and its sparsity"
SECONDS_A_QUESTION = {"cuda": 4.0, "cpu": 20.0}


def plan_suite(suite: Suite, points: list[AccuracyPoint], device: dict[str, Any]) -> list[Planned]:
    """Every question, at what an 8B model takes for 16k tokens."""
    seconds = SECONDS_A_QUESTION.get(device.get("kind", "cpu"), 20.0)
    return [Planned(point, None, seconds) for point in points]


class Evaluation:
    """The suite's questions, who answers them, and the store."""

    def __init__(self, suite: Suite, store: Store, emit: Callable[[Event], None], jobs: int = 1):
        from dashbench import environment

        self.suite, self.store, self.emit = suite, store, emit
        self.summary = Summary(store.path)
        self.documents: dict[tuple, list[Document] | str] = {}
        self.crew, self.jobs = Crew(jobs), jobs
        self.facts: dict[str, Any] = {}
        self.folder: Path | None = None  # of the tokenizer, and of the checkpoint unless that is random
        self.loaded: str | None = None
        self.weights: str | None = None
        self.tokenizers: dict[str, tempfile.TemporaryDirectory] = {}  # of random weights, by size
        import torch

        self.environment = environment.describe("cuda" if torch.cuda.is_available() else "cpu")
        self.environment_key = environment.key(self.environment)

    def load(self, point: AccuracyPoint) -> None:
        """The checkpoint of a point, kept until another one is asked for.

        Raises:
            CheckpointError: it cannot be used.
        """
        from dashbench.models.checkpoint import _folder, weights_hash

        self.facts, self.weights = {}, None
        size = random_size(point.checkpoint)
        folder = self.random_tokenizer(size) if size else _folder(point.checkpoint)
        checkpoint = point.checkpoint if size else str(folder)
        self.crew.everyone("load", checkpoint, point.attention, point.preset, folder, point.seed)
        if checkpoint != self.loaded:
            self.folder, self.loaded = folder, checkpoint
            self.loaded_weights = f"{checkpoint} seed {point.seed}" if size else weights_hash(folder)
        self.weights = self.loaded_weights
        self.facts = self.crew.one("facts")

    def random_tokenizer(self, size: str) -> Path:
        """A folder with the tokenizer of random weights of a size, there until the run ends."""
        from dashbench.models.random_tokenizer import write_tokenizer

        if size not in self.tokenizers:
            self.tokenizers[size] = tempfile.TemporaryDirectory(prefix="dashbench-tokenizer-")
            shape = SIZES[size]["vocab_size"], SIZES[size]["max_position_embeddings"]
            write_tokenizer(Path(self.tokenizers[size].name), *shape)
        return Path(self.tokenizers[size].name)

    def close(self) -> None:
        """Ends the processes that answer and removes what the run kept on disk."""
        self.crew.close()
        for folder in self.tokenizers.values():
            folder.cleanup()

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

    def write(self, point: AccuracyPoint, began: float, status: str, reason: str | None = None, **fields):
        """Stores a row and shows it."""
        facts = fields.pop("facts", None) or self.facts
        kind = facts.get("kind", point.attention)
        row = AccuracyRow(
            key=point.key(), method=kind, label=point.label, checkpoint=point.checkpoint,
            weights=self.weights, preset=point.preset, attention=kind,
            settings=facts.get("settings", {}), sparsity_target=point.sparsity_target,
            task=point.task, length=point.length, doc_id=point.document, seed=point.seed,
            suite=self.suite.id, status=status, reason=reason, environment=self.environment,
            environment_key=self.environment_key,
            notes={k: facts[k] for k in ("sources", "dense_backend") if k in facts}
            | ({"jobs": self.jobs} if self.jobs > 1 else {})
            | ({"random_weights": MEANINGLESS} if random_size(point.checkpoint) else {}),
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
    jobs: int = 1,
) -> Summary:
    """Answers every question of a suite that is not answered yet; see `runner.run_suite`.

    `jobs` processes answer beside each other, each with the model in memory; times of rows are then those of
    a shared machine.
    """
    until = time.monotonic() + time_budget_s if time_budget_s is not None else None
    points = [p for p in suite.points() if only is None or p.label in only]
    with Store(out / f"{suite.spec.name}.jsonl") as store:
        for notice in store.notices:
            on_event(Event("notice", text=notice))
        run = Evaluation(suite, store, on_event, jobs)
        todo = []
        for point in points:
            row = store.find(point.key(), run.environment_key)
            if not again and row is not None and (row["status"] in DONE or not retry_failed):
                run.summary.already += 1
            else:
                todo.append(point)
        on_event(Event("start", total=len(todo), text=run.environment["device"]))
        try:
            for _, members in groupby(_by_setting(todo), key=_setting):
                _one_setting(run, list(members), until)
        except KeyboardInterrupt:
            run.summary.interrupted = True
        finally:
            run.close()
        run.summary.left = len(todo) - sum(run.summary.counts.values())
        return run.summary


def _setting(point: AccuracyPoint) -> tuple:
    """What shares one knob: a target is met by another knob at another length."""
    length = point.length if point.sparsity_target is not None else None
    return point.checkpoint, point.attention, point.preset, str(point.knobs), point.sparsity_target, length


def _by_setting(points: list[AccuracyPoint]) -> list[AccuracyPoint]:
    """Points of one setting beside each other, settings in the order in which they first come."""
    order: dict[tuple, int] = {}
    for point in points:
        order.setdefault(_setting(point), len(order))
    return sorted(points, key=lambda point: order[_setting(point)])


def _one_setting(run: Evaluation, points: list[AccuracyPoint], until: float | None) -> None:
    """All questions of one checkpoint at one setting."""
    first, began = points[0], time.monotonic()
    if until is not None and began >= until:
        return
    run.emit(Event("point", text=f"{first.label}: loading"))
    try:
        run.load(first)
        knobs = dict(first.knobs)
        run.crew.everyone("set_knobs", knobs)
        if first.sparsity_target is not None:
            run.emit(Event("point", text=f"{first.label}: calibrating S {100 * first.sparsity_target:g} %"))
            prompts = [document.prompt for document in _held_out(run, first)]
            wanted = first.sparsity_target, first.sparsity_tolerance
            knobs = run.crew.one("calibrate", *wanted, prompts)
            run.crew.everyone("set_knobs", knobs)
    except (CheckpointError, TaskSkipped) as problem:
        status = "skipped" if isinstance(problem, TaskSkipped) else "error"
        for point in points:
            run.write(point, began, status, str(problem))
        return
    for (point, document, asked_at), found in run.crew.answers(_prompts(run, points, knobs, until)):
        if isinstance(found, Died):
            run.write(point, asked_at, "crashed", str(found), knob=knobs)
        elif isinstance(found, ValueError):
            run.write(point, asked_at, "error", str(found), knob=knobs)
        elif isinstance(found, Exception):
            if "out of memory" not in str(found):
                raise found
            run.write(point, asked_at, "oom", str(found).splitlines()[0], knob=knobs)
        else:
            told = {"target": document.target, "prompt_hash": document.prompt_hash}
            told["score"] = document.score(found["answer"])
            run.write(point, asked_at, "ok", knob=knobs, **found, **told)


def _prompts(
    run: Evaluation, points: list[AccuracyPoint], knobs: dict[str, Any], until: float | None
) -> Iterator[tuple[Any, tuple]]:
    """What to ask, until time is up; questions that cannot be asked are rows at once."""
    for point in points:
        began = time.monotonic()
        if until is not None and began >= until:
            return
        run.emit(Event("point", text=f"{point.label} {point.task} {point.length or ''} #{point.document}"))
        try:
            found = run.asked(point, _samples(run, point))
            if point.document >= _evaluated(run, point, len(found)):
                raise TaskSkipped(f"{point.task} has {len(found)} documents")
        except TaskSkipped as reason:
            run.write(point, began, "skipped", str(reason), knob=knobs)
            continue
        document = found[point.document]
        yield (point, document, began), (document.prompt, document.new_tokens, document.until)


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
