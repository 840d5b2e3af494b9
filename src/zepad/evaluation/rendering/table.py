"""A table as a value, and its two spellings."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

from .wording import clean

_MARKDOWN_MARKS = re.compile(r"([\\`*_\[\]|~#])")


@dataclass(frozen=True)
class Cell:
    """What is said in one place.

    Attributes:
        text: The value.
        note: Its interval, counts or unit, set smaller.
    """

    text: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        name: Its header.
        cells: One per further column.
        summary: Set apart from the lines it sums up.
    """

    name: str
    cells: tuple[Cell, ...]
    summary: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows below a header, in sections.

    Attributes:
        caption: What is shown; unique on a page, since it names the region that scrolls.
        columns: Headers, that of the row names first.
        sections: A title, empty for none, and its rows.
    """

    caption: str
    columns: tuple[str, ...]
    sections: tuple[tuple[str, tuple[Row, ...]], ...]


def escape_html(text: str) -> str:
    """Return text for an HTML element or a quoted attribute."""
    return html.escape(clean(text))


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is, also in a table cell."""
    entities = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN_MARKS.sub(r"\\\1", entities)


def html_table(table: Table) -> str:
    """Return the table in a region of its own, which scrolls sideways where the screen is narrow."""
    head = "".join(f'<th scope="col">{escape_html(column)}</th>' for column in table.columns)
    caption = escape_html(table.caption)
    return (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0">\n<table>\n'
        f"<caption>{caption}</caption>\n<thead>\n<tr>{head}</tr>\n</thead>\n"
        + "".join(_html_section(title, rows, len(table.columns)) for title, rows in table.sections)
        + "</table>\n</div>\n"
    )


def _html_section(title: str, rows: tuple[Row, ...], width: int) -> str:
    top = f'<tr><th scope="rowgroup" colspan="{width}">{escape_html(title)}</th></tr>\n' if title else ""
    return "<tbody>\n" + top + "".join(_html_row(row) for row in rows) + "</tbody>\n"


def _html_row(row: Row) -> str:
    kind = ' class="summary"' if row.summary else ""
    cells = "".join(f"<td>{_html_cell(cell)}</td>" for cell in row.cells)
    return f'<tr{kind}><th scope="row">{escape_html(row.name)}</th>{cells}</tr>\n'


def _html_cell(cell: Cell) -> str:
    note = f" <small>{escape_html(cell.note)}</small>" if cell.note else ""
    return escape_html(cell.text) + note


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
