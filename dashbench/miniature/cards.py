"""Model cards of the small checkpoints, written from the rows of their training. Nothing here needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dashbench.models.kinds import KNOBS
from dashbench.rows_train import mean_by_length

TEMPLATE = Path(__file__).with_name("card.md.j2")
NAMES = {"dense": "full attention", "infllmv2": "InfLLMv2", "nsa": "NSA", "dash": "DashAttention"}


def write_card(folder: Path, spec: Any, rows: list[dict[str, Any]]) -> Path:
    """Writes `README.md` beside a checkpoint.

    Args:
        folder: of the checkpoint.
        spec: `suite_train.TrainSuite` it was trained by.
        rows: all finished rows of its stage, one a tenth.

    Returns:
        The card's path.
    """
    path = folder / "README.md"
    path.write_text(card(spec, rows))
    return path


def card(spec: Any, rows: list[dict[str, Any]]) -> str:
    """The card's Markdown; arguments as `write_card`'s."""
    import jinja2

    rows = sorted(rows, key=lambda row: row["report"])
    last = rows[-1]
    base, method = last["stage"] == "base", last["method"]
    found = last["exact_match"]
    lengths = sorted({int(name.rpartition("@")[2]) for name in found})
    tasks = list(dict.fromkeys(name.rpartition("@")[0] for name in found))
    scores = [(task, [_share(found.get(f"{task}@{n}")) for n in lengths]) for task in tasks]
    by_layer = last["notes"].get("s_by_layer", {})
    scores.append(("S_flop, mean over layers", [_mean(by_layer.get(str(n))) for n in lengths]))
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(TEMPLATE.read_text())
    return template.render(
        spec=spec, shape=spec.model, plan=spec.base if base else spec.continuation, last=last, base=base,
        earlier=rows[-4] if len(rows) > 3 and not base else None,
        shared=any(row["notes"].get("other_processes") for row in rows),
        rate=spec.base.rate if base else spec.continuation.rate_of(method),
        method=method, attention=NAMES[method], lengths=lengths, scores=scores, knob=KNOBS.get(method),
        settings=", ".join(f"{k} {v}" for k, v in last["notes"].get("settings", {}).items()),
        sweep=[_swept(entry, lengths) for entry in last["notes"].get("sweep") or []],
        course=[_course(row, lengths[-1]) for row in rows],
    )  # fmt: skip


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _mean(layers: list[float] | None) -> str:
    return f"{sum(layers) / len(layers):.3f}" if layers else ""


def _swept(entry: dict[str, Any], lengths: list[int]) -> tuple[str, list[str]]:
    exact = mean_by_length(entry["exact_match"])
    cells = [(_mean(entry["s_by_layer"].get(str(n))), _share(exact.get(n))) for n in lengths]
    return f"{entry['value']:g}", [cell for pair in cells for cell in pair]


def _course(row: dict[str, Any], length: int) -> list[str]:
    return [
        f"{row['tokens'] / 1e6:.1f}",
        f"{row['loss']:.3f}",
        _share(mean_by_length(row["exact_match"]).get(length)),
        f"{row['s_flop']:.2f}",
    ]
