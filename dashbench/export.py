"""A store as one flat table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dashbench.store import stored_rows

DROPPED = ("samples", "log_tail")


class ExportError(Exception):
    """A table that cannot be written; the message is one sentence."""


def flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as dotted names; lists as text, except an interval, which becomes `.low` and `.high`."""
    out: dict[str, Any] = {}
    for name, value in row.items():
        if prefix == "" and name in DROPPED:
            continue
        full = f"{prefix}{name}"
        if isinstance(value, dict):
            out |= flat(value, f"{full}.")
        elif name == "latency_ci_ms":
            low, high = value if value else (None, None)
            out |= {f"{full}.low": low, f"{full}.high": high}
        elif isinstance(value, list):
            out[full] = " ".join(map(str, value))
        else:
            out[full] = value
    return out


def export_rows(store: Path, target: Path, kind: str) -> int:
    """Writes the newest rows of a store.

    Args:
        store: a row file or a folder of them.
        target: the file to write.
        kind: `csv` or `parquet`.

    Returns:
        How many rows.

    Raises:
        StoreError: there are no rows.
        ExportError: the file cannot be written.
    """
    import pandas

    rows = [flat(row) for row in stored_rows(store)]
    frame = pandas.DataFrame(rows)
    # Columns of mixed types (a knob that is a number here and a word there) are text in Parquet.
    for name in frame.select_dtypes(object).columns:
        if frame[name].map(type).nunique() > 1:
            frame[name] = frame[name].map(lambda v: None if v is None or v != v else str(v))
    try:
        if kind == "csv":
            frame.to_csv(target, index=False)
        else:
            frame.to_parquet(target, index=False)
    except ImportError:
        raise ExportError("writing Parquet needs pyarrow; pip install pyarrow") from None
    except OSError as problem:
        raise ExportError(f"cannot write {target}: {problem.strerror or problem}") from None
    return len(frame)
