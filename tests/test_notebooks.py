"""The notebooks run from top to bottom on the committed rows and show what they promise."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parent.parent / "notebooks"


def executed(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    where = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    text = "\n".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)
    return text, sum("image/png" in o.get("data", {}) for o in outputs)


def test_all_are_tested():
    assert {p.stem for p in FOLDER.glob("*.ipynb")} == {"pareto", "short_context", "new_method"}


def test_pareto_shows_speedups_crossovers_and_claims():
    text, figures = executed("pareto")
    assert figures >= 3 and "ahead from" in text and "REPRODUCED" in text


def test_short_context_takes_a_step_apart():
    text, figures = executed("short_context")
    assert figures == 4 and "decode, batch 1, eager" in text and "route" in text


def test_new_method_is_gated_calibrated_and_drawn():
    text, figures = executed("new_method")
    rows = [line for line in text.splitlines() if line.startswith("[") and "sinks@eager" in line]
    assert len(rows) == 4 and all("] ok " in line for line in rows)
    assert figures == 1 and "'blocks': " in text
