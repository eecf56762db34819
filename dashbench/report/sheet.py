"""A table of text, and the forms in which it is written: terminal, CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass


@dataclass(frozen=True)
class Sheet:
    """A table as a reader sees it.

    Attributes:
        name: of its files.
        title: one line above it.
        columns: names; those that end in `*` are numbers and are set to the right (the mark is not shown).
        rows: cells, as many as columns.
        note: a sentence below it.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""

    @property
    def heads(self) -> list[str]:
        """Column names without marks."""
        return [c.rstrip("*") for c in self.columns]


def to_csv(sheet: Sheet) -> str:
    """Comma-separated, a head line first."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(sheet.heads)
    writer.writerows(sheet.rows)
    return out.getvalue()


def to_markdown(sheet: Sheet) -> str:
    """A pipe table with its title and note."""
    lines = [f"**{sheet.title}**", "", "| " + " | ".join(sheet.heads) + " |"]
    lines.append("|" + "|".join("---:" if c.endswith("*") else "---" for c in sheet.columns) + "|")
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in sheet.rows]
    return "\n".join([*lines, *(["", sheet.note] if sheet.note else [])]) + "\n"


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
        "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "×": r"$\times$", "±": r"$\pm$",
        "−": r"$-$", "≥": r"$\geq$", "≤": r"$\leq$", "<": r"$<$", ">": r"$>$",
    }
)  # fmt: skip


def to_latex(sheet: Sheet) -> str:
    """A `tabular` for booktabs, inside a table environment with its title as caption."""
    body = [" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in sheet.rows]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            rf"\caption{{{sheet.title.translate(_LATEX)}}}",
            rf"\begin{{tabular}}{{{''.join('r' if c.endswith('*') else 'l' for c in sheet.columns)}}}",
            r"\toprule",
            " & ".join(h.translate(_LATEX) for h in sheet.heads) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def print_sheet(sheet: Sheet, titled: bool = True) -> None:
    """Prints it to the terminal."""
    from rich.table import Table

    from dashbench.tables import wide_console

    console = wide_console()
    if titled:
        console.print(sheet.title, markup=False)
    table = Table(header_style="bold", pad_edge=False)
    for name in sheet.columns:
        table.add_column(
            name.rstrip("*"), justify="right" if name.endswith("*") else "left", no_wrap=console.width >= 160
        )
    from rich.text import Text

    for row in sheet.rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    if sheet.note:
        console.print(sheet.note, markup=False)
