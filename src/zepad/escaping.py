"""Escaping of untrusted text for terminals, Markdown and HTML."""

from __future__ import annotations

import html
import re

_JOINERS = "\u200c\u200d"  # invisible characters that Persian, Indic scripts and emoji need
_KEPT = _JOINERS + "\n"
_MARKDOWN_MARKS = re.compile(r"([\\`*_\[\]|~#])")


def clean(text: str) -> str:
    """Join text into one line and substitute the replacement character for control characters."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """Substitute the replacement character for control characters, which can rewrite a terminal; lines stay lines."""
    return "".join(c if c.isprintable() or c in _KEPT else "\ufffd" for c in text)


def escape_html(text: str) -> str:
    """Clean and escape text for an HTML element or a quoted attribute."""
    return html.escape(clean(text))


def escape_markdown(text: str) -> str:
    """Clean and escape text so that Markdown shows it literally, also in a table cell."""
    entities = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN_MARKS.sub(r"\\\1", entities)
