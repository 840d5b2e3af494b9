"""A table as a value, and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from ...escaping import escape_markdown


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: The value.
        note: Interval, counts or unit of the value, set smaller.
    """

    text: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: Header of the row.
        cells: One cell per further column.
        summary: Whether the row sums up those above it and is set apart from them.
    """

    name: str
    cells: tuple[Cell, ...]
    summary: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows below a header, in sections.

    Attributes:
        caption: Caption; unique on a page, since it names the region that scrolls.
        columns: Headers of the columns, that of the row names first.
        sections: Pairs of a title, empty for none, and the rows below it.
    """

    caption: str
    columns: tuple[str, ...]
    sections: tuple[tuple[str, tuple[Row, ...]], ...]


def markdown_table(table: Table) -> str:
    """Return the table as GitHub's Markdown, its caption above it."""
    lines = [f"**{escape_markdown(table.caption)}**", "", _markdown_line(table.columns)]
    lines.append("|---" * len(table.columns) + "|")
    for title, rows in table.sections:
        if title:
            lines.append(f"| **{escape_markdown(title)}** " + "| " * (len(table.columns) - 1) + "|")
        lines += [_markdown_line((row.name, *map(_markdown_cell, row.cells))) for row in rows]
    return "\n".join(lines) + "\n"


def _markdown_cell(cell: Cell) -> str:
    return f"{cell.text} ({cell.note})" if cell.note else cell.text


def _markdown_line(texts: tuple[str, ...]) -> str:
    return "| " + " | ".join(map(escape_markdown, texts)) + " |"
