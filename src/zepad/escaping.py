"""Text that somebody chose, made safe to show in Markdown and HTML."""

from __future__ import annotations

import html
import re

_JOINERS = "\u200c\u200d"  # invisible, and part of how Persian, Indic scripts and emoji are spelt
_MARKDOWN_MARKS = re.compile(r"([\\`*_\[\]|~#])")


def clean(text: str) -> str:
    """Return text on one line in which control characters, which no format may hold, are replacement marks."""
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() or c in _JOINERS else "\ufffd" for c in joined)


def escape_html(text: str) -> str:
    """Return cleaned text for an HTML element or a quoted attribute."""
    return html.escape(clean(text))


def escape_markdown(text: str) -> str:
    """Return cleaned text that Markdown shows as it is, also in a table cell."""
    entities = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN_MARKS.sub(r"\\\1", entities)
