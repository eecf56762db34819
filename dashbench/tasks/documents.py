"""Documents of lm-eval tasks, one list a task and length, frozen by hash; lm-eval is used as a library.

lm-eval builds the prompts and scores the answers; what is between is ours, so that every answer can be stored
at once. Nothing is cached across configurations and nothing truncated.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dashbench.tasks.ruler import PREFIX, TASKS

PROMPTS = Path(__file__).parent / "ruler_prompts"
# lm-eval generates 500 documents whatever is asked for, by these functions.
GENERATORS = {
    "niah_utils": "generate_samples",
    "vt_utils": "sys_vartrack_w_noise_random",
    "cwe_utils": "sys_word_pair_random",
    "fwe_utils": "sys_kwext",
    "qa_utils": "generate_samples",
}


RULER = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
    "niah_multikey_3", "niah_multiquery", "niah_multivalue", "ruler_vt", "ruler_cwe", "ruler_fwe",
    "ruler_qa_squad", "ruler_qa_hotpot",
)  # fmt: skip
"""lm-eval's own RULER tasks, at any length. The five with essays and the two of question answering need data
that lm-eval downloads; the other six are made from nothing."""


class TaskSkipped(Exception):
    """A task that cannot be run here; the message is the reason of a skip."""


@dataclass(frozen=True)
class Document:
    """One question.

    Attributes:
        task: name in lm-eval.
        doc_id: its number in the task.
        prompt: what the model reads.
        target: the references, as text.
        new_tokens: at most so many are generated.
        until: texts that end an answer.
        score: answer -> score between 0 and 1.
    """

    task: str
    doc_id: int
    prompt: str
    target: str
    new_tokens: int
    until: tuple[str, ...]
    score: Callable[[str], float]

    @property
    def prompt_hash(self) -> str:
        """The first 12 digits of the prompt's SHA-256."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:12]


def documents(
    task: str, length: int, samples: int, tokenizer: Path, folder: Path | None = None
) -> list[Document]:
    """The first documents of a task.

    Args:
        task: `ruler_prompts_NAME` for released prompts, else any generating task of lm-eval.
        length: tokens asked for, of tasks that lm-eval generates by length.
        samples: how many.
        tokenizer: folder of the tokenizer, for generated tasks.
        folder: of released prompts.

    Raises:
        TaskSkipped: the task is unknown, its data cannot be reached, or it is not answered by generation.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise TaskSkipped("lm-eval is not installed; pip install 'dashbench[accuracy]' enables it") from None
    released = task.startswith(PREFIX)
    if released and (folder is None or task.removeprefix(PREFIX) not in TASKS):
        raise TaskSkipped(f"{task} needs `folder` and one of the tasks {', '.join(TASKS)}")
    metadata = {"max_seq_lengths": [length], "tokenizer": str(tokenizer)}
    if released:
        metadata = {"ruler_folder": str(folder), "samples": samples}
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Indexing all of lm-eval's tasks takes half a minute; its RULER has a folder of its own.
    own = _ruler_folder() if task in RULER else None
    path = PROMPTS if released else own
    manager = TaskManager(
        include_path=str(path) if path else None, include_defaults=path is None, metadata=metadata
    )
    # lm-eval's progress bars are nobody's here.
    quiet = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
    few = contextlib.nullcontext() if released else _few_documents(samples)
    with _seeded(), few, quiet[0], quiet[1]:
        try:
            loaded = manager.load([task])["tasks"][task] if hasattr(manager, "load") else _old(manager, task)
            loaded.build_all_requests(limit=samples, rank=0, world_size=1)
        except (KeyError, OSError, ValueError, ConnectionError, ImportError) as problem:
            lines = str(problem).strip().splitlines() or [type(problem).__name__]
            raise TaskSkipped(f"{task}: {lines[0]}") from None
    if loaded.OUTPUT_TYPE != "generate_until":
        raise TaskSkipped(f"{task} is scored by {loaded.OUTPUT_TYPE}; only generated answers are")
    return [_document(loaded, task, instance) for instance in loaded.instances]


def _ruler_folder() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent / "ruler"


def _old(manager: Any, task: str) -> Any:
    from lm_eval.tasks import get_task_dict

    return get_task_dict([task], manager)[task]


def _document(loaded: Any, task: str, instance: Any) -> Document:
    prompt, options = instance.args
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else until

    def score(answer: str) -> float:
        found = loaded.process_results(instance.doc, [answer])
        # Lengths that were not asked for are −1 in lm-eval's RULER.
        values = [v for v in found.values() if isinstance(v, (int, float)) and v >= 0]
        if not values:
            raise ValueError(f"{task} gave no score: {found}")
        return float(values[0])

    return Document(
        task=task,
        doc_id=instance.doc_id,
        prompt=prompt,
        target=str(loaded.doc_to_target(instance.doc)),
        new_tokens=int(options.get("max_gen_toks", 256)),
        until=tuple(text for text in until if text),
        score=score,
    )


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Generated documents are the same each time: lm-eval draws them from the global generators."""
    before = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@contextlib.contextmanager
def _few_documents(samples: int) -> Iterator[None]:
    """lm-eval's RULER generates `samples` documents and not 500, while this lasts."""
    from importlib import import_module

    changed = []
    for module_name, function_name in GENERATORS.items():
        try:
            module = import_module(f"lm_eval.tasks.ruler.{module_name}")
        except ImportError:  # an extra that this task may not need
            continue
        original = getattr(module, function_name)

        def fewer(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            if kwargs.get("num_samples", 500) > 1:  # one is an example
                kwargs["num_samples"] = samples
            return _original(*args, **kwargs)

        setattr(module, function_name, fewer)
        # lm-eval loads a task's module anew unless it carries this mark.
        marked = getattr(module, "__mtime__", None)
        module.__mtime__ = Path(module.__file__).stat().st_mtime_ns
        changed.append((module, function_name, original, marked))
    try:
        yield
    finally:
        for module, function_name, original, marked in changed:
            setattr(module, function_name, original)
            if marked is None:
                del module.__mtime__
