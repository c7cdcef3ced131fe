"""Rows of cells as text."""

import re
from typing import List

_MARKUP = re.compile(r"[\\`*\[\]<&~]|(?<!\w)_|_(?!\w)")
"""What Markdown may take for markup; an underscore within a word is none."""


def escape(text: str) -> str:
    """Text of users (names, settings, paths) for Markdown, on one line, to be shown as it is."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.splitlines()))


def format_table(rows: List[List[str]]) -> str:
    """Rows of cells as text: the first column left-aligned, the others right-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )


def markdown(rows: List[List[str]]) -> str:
    """A Markdown table; the first row is its head, the first column is text.

    Cells may hold markup: text of users goes through :func:`escape` first.
    """
    rows = [[" ".join(cell.splitlines()).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]

    def line(cells: List[str]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(rows[0]), "| " + " | ".join(rule) + " |", *map(line, rows[1:])])
