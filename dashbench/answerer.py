"""A loaded checkpoint that answers prompts, in this process or in several beside each other.

A small model leaves most of a GPU idle, and greedy generation is a chain of small steps; a crew of processes,
each with its own copy of the model, fills it. Prompts and answers travel on pipes; documents, scores and rows
stay with the caller.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from dashbench.find_knob import find_knob
from dashbench.models.kinds import KNOBS, CheckpointError
from dashbench.tasks.documents import TaskSkipped


class Answerer:
    """One checkpoint at one setting."""

    def __init__(self) -> None:
        self.loaded: tuple | None = None
        self.model: Any = None
        self.tokenizer: Any = None

    def load(self, checkpoint: str, attention: str, preset: str, tokenizer: Path, seed: int) -> None:
        """Loads a checkpoint, unless it is the one that is loaded.

        Args:
            checkpoint: a folder, or `random:SIZE`.
            attention, preset: see `models.checkpoint.load`.
            tokenizer: its folder: the checkpoint's own, unless the weights are random.
            seed: of random weights.

        Raises:
            CheckpointError: see `models.checkpoint.load`.
        """
        wanted = checkpoint, attention, preset, seed
        if self.loaded == wanted:
            return
        from transformers import AutoTokenizer

        from dashbench.models.checkpoint import load

        self.loaded = self.model = None
        self.model = load(checkpoint, attention, preset=preset, seed=seed)
        self.defaults = dict(self.model.dashbench.settings)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.loaded = wanted

    def facts(self) -> dict[str, Any]:
        """What a row says of the model: kind, settings, where they came from, dense backend."""
        state = self.model.dashbench
        return {
            "kind": state.kind,
            "settings": dict(state.settings),
            "sources": dict(state.source),
            "dense_backend": state.backend,
        }

    def set_knobs(self, knobs: dict[str, Any]) -> None:
        """Settings of the loaded model: its own, with these in their place.

        Raises:
            CheckpointError: a setting that the kind does not have.
        """
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

    def calibrate(self, target: float, tolerance: float, prompts: list[str]) -> dict[str, Any]:
        """The knob at which reading the prompts has the sparsity asked for.

        Args:
            target: S_flop.
            tolerance: of it.
            prompts: to read.

        Raises:
            TaskSkipped: it cannot be reached; the message says how near one comes.
        """
        kind = self.model.dashbench.kind
        if kind == "dense":
            raise TaskSkipped("dense attention has no sparsity to set")
        knob = KNOBS[kind]

        def measure(value: float) -> float:
            self.set_knobs({knob: value})
            return self.reading_sparsity(prompts)

        most = max(len(self.encode(p)) for p in prompts) // self.model.dashbench.block_size + 1
        return {knob: find_knob(measure, knob, most, target, tolerance)}

    def reading_sparsity(self, prompts: list[str]) -> float:
        """s_flop of reading some prompts."""
        import torch

        from dashbench.models.generate import new_sequences, read

        kept = visible = 0.0
        for prompt in prompts:
            tokens = self.encode(prompt)
            sequences = new_sequences(self.model, 1, len(tokens))
            read(self.model, torch.tensor([tokens], device=self.model.device), sequences)
            kept += float(sequences.ledger.kept.sum())
            visible += float(sequences.ledger.visible.sum())
        return 1 - kept / visible

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a prompt, with the tokenizer's own beginning."""
        return self.tokenizer(prompt)["input_ids"]

    def answer(self, prompt: str, new_tokens: int, until: tuple[str, ...]) -> dict[str, Any]:
        """Greedy answer to a prompt.

        Args:
            prompt: text.
            new_tokens: at most so many are generated.
            until: texts that end an answer; left out of it.

        Returns:
            Row fields, and `facts` of the model while it answered.

        Raises:
            ValueError: the prompt and its answer do not fit the model.
        """
        from dashbench.models.generate import generate

        def stop(tokens: list[int]) -> bool:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            return any(end in text for end in until)

        found = generate(self.model, self.encode(prompt), new_tokens, stop if until else None)
        text = self.tokenizer.decode(found.tokens, skip_special_tokens=True)
        for end in until:
            text = text.partition(end)[0]
        reading = found.sparsity["prefill"]
        return {
            "answer": text, "prompt_tokens": found.prompt_tokens, "new_tokens": len(found.tokens),
            "prompt_ms": found.prompt_ms, "generate_ms": found.generate_ms, "s_flop": reading["s_flop"],
            "s_mean": reading["s_mean"], "s_up": reading["s_up"], "s_by_layer": reading["s_flop_by_layer"],
            "s_decode": found.sparsity.get("decode", {}).get("s_flop"), "facts": self.facts(),
        }  # fmt: skip


class Died(Exception):
    """A process of the crew ended without an answer; the message says how."""


class Crew:
    """Some answerers: one in this process, or several in processes of their own.

    Args:
        jobs: how many; 1 stays in this process.
    """

    def __init__(self, jobs: int = 1):
        self.here = Answerer() if jobs == 1 else None
        self.context = multiprocessing.get_context("spawn")
        self.members: list[tuple[Any, Connection]] = []
        self.state: list[tuple[str, tuple]] = []  # what a member that is started anew must be told
        if self.here is None:
            self.members = [self._start() for _ in range(jobs)]

    def _start(self) -> tuple[Any, Connection]:
        mine, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return process, mine

    def everyone(self, name: str, *arguments: Any) -> Any:
        """Calls a method of every answerer; the first one's result.

        Raises:
            Exception: what the first that failed raised.
        """
        if name == "load":
            self.state = []
        self.state = [(told, given) for told, given in self.state if told != name] + [(name, arguments)]
        if self.here is not None:
            return getattr(self.here, name)(*arguments)
        for index in range(len(self.members)):
            self._send(index, (name, arguments))
        results = [self._receive(index) for index in range(len(self.members))]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results[0]

    def one(self, name: str, *arguments: Any) -> Any:
        """Calls a method of one answerer."""
        if self.here is not None:
            return getattr(self.here, name)(*arguments)
        self._send(0, (name, arguments))
        result = self._receive(0)
        if isinstance(result, Exception):
            raise result
        return result

    def answers(self, prompts: Iterable[tuple[Any, tuple]]) -> Iterator[tuple[Any, Any]]:
        """Answers prompts, each by whoever is free.

        Args:
            prompts: (mark, arguments of `Answerer.answer`); drawn from only when somebody is free.

        Yields:
            (mark, the answer or the exception), in the order in which they are finished.
        """
        if self.here is not None:
            for mark, arguments in prompts:
                try:
                    yield mark, self.here.answer(*arguments)
                except Exception as problem:
                    yield mark, problem
            return
        waiting, asked = iter(prompts), {}
        free = list(range(len(self.members)))
        while True:
            while free and (job := next(waiting, None)) is not None:
                index = free.pop()
                asked[index] = job[0]
                self._send(index, ("answer", job[1]))
            if not asked:
                return
            pipes = {self.members[index][1]: index for index in asked}
            for pipe in wait(list(pipes)):
                index = pipes[pipe]
                yield asked.pop(index), self._receive(index)
                free.append(index)

    def _send(self, index: int, message: tuple[str, tuple]) -> None:
        """Sends to a member; to a new one in its place if it died while it had nothing to do."""
        try:
            self.members[index][1].send(message)
        except OSError:
            self._replace(index)
            self.members[index][1].send(message)

    def _receive(self, index: int) -> Any:
        """A member's answer; one that died is replaced."""
        process, pipe = self.members[index]
        try:
            return pipe.recv()
        except (EOFError, OSError):
            process.join(5)
            self._replace(index)
            return Died(f"the process that answered died (exit code {process.exitcode})")

    def _replace(self, index: int) -> None:
        """Starts a member anew and tells it what it must know."""
        process, pipe = self.members[index]
        pipe.close()
        process.kill()
        self.members[index] = self._start()
        for message in self.state:
            self.members[index][1].send(message)
            with contextlib.suppress(EOFError, OSError):
                self.members[index][1].recv()

    def close(self) -> None:
        """Ends all processes."""
        for process, pipe in self.members:
            pipe.close()
            process.terminate()
            process.join(5)
        self.members = []


def _serve(pipe: Connection) -> None:
    """What a process of the crew does: calls methods of its answerer as it is told."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # the crew shares the cores
    answerer = Answerer()
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result = getattr(answerer, name)(*arguments)
        except (CheckpointError, TaskSkipped, ValueError) as problem:
            result = problem
        except Exception as problem:  # not every exception can be sent
            result = RuntimeError(f"{type(problem).__name__}: {problem}")
        pipe.send(result)
