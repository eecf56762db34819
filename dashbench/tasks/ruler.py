"""RULER from prompts that somebody released: the lm-eval tasks in `ruler_prompts/` call these functions.

A folder holds `TASK.jsonl`, `TASK.jsonl.gz` or `TASK/validation.jsonl`, a record a line with `input` (the
whole prompt, chat template included) and `outputs` (the references). Scores are RULER's own (Hsieh et al.
2024, arXiv 2404.06654): the share of references that the answer contains, and for question answering whether
it contains any; letters' case does not count, and control characters become line breaks.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

TASKS: dict[str, int] = {
    "niah_single_1": 128, "niah_single_2": 128, "niah_single_3": 128, "niah_multikey_1": 128,
    "niah_multikey_2": 128, "niah_multikey_3": 128, "niah_multivalue": 128, "niah_multiquery": 128,
    "vt": 128, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32,
}  # fmt: skip
"""Task -> tokens that an answer may have."""

PREFIX = "ruler_prompts_"
_CONTROL = re.compile(r"[\x00-\x1f]")


def read_prompts(folder: Path, task: str) -> list[dict[str, Any]]:
    """Records of a task, in the file's order: {input, outputs, line}.

    Raises:
        FileNotFoundError: no file of that task.
        ValueError: a line that is no record.
    """
    for path in (folder / f"{task}.jsonl", folder / f"{task}.jsonl.gz", folder / task / "validation.jsonl"):
        if path.exists():
            break
    else:
        raise FileNotFoundError(f"{folder}: no {task}.jsonl, {task}.jsonl.gz or {task}/validation.jsonl")
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    records = []
    for number, line in enumerate(text.strip("\n").split("\n")):
        try:
            record = json.loads(line)
            records.append({"input": record["input"], "outputs": record["outputs"], "line": number})
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number + 1}: not a record with input and outputs") from None
    return records


def load(ruler_task: str, ruler_folder: str, samples: int | None = None, **_: Any) -> dict[str, Any]:
    """What lm-eval calls for the documents of a task."""
    import datasets

    records = read_prompts(Path(ruler_folder), ruler_task)[:samples]
    return {"test": datasets.Dataset.from_list(records, split=datasets.Split.TEST)}


def cleaned(answer: str) -> str:
    """An answer as RULER compares it."""
    return _CONTROL.sub("\n", answer.strip()).strip().lower()


def match_all(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Share of the references that the answer contains."""
    answer, references = cleaned(results[0]), doc["outputs"]
    return {"string_match": sum(r.lower() in answer for r in references) / len(references)}


def match_part(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the answer contains any reference."""
    answer = cleaned(results[0])
    return {"string_match": float(any(r.lower() in answer for r in doc["outputs"]))}
