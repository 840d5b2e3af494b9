"""Escaping of untrusted text for Markdown and HTML."""

from __future__ import annotations

import html
import re

_JOINERS = "\u200c\u200d"  # invisible characters that Persian, Indic scripts and emoji need
_MARKDOWN_MARKS = re.compile(r"([\\`*_\[\]|~#])")


def clean(text: str) -> str:
    """Join text into one line and substitute the replacement character for control characters."""
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() or c in _JOINERS else "\ufffd" for c in joined)


def escape_html(text: str) -> str:
    """Clean and escape text for an HTML element or a quoted attribute."""
    return html.escape(clean(text))


def escape_markdown(text: str) -> str:
    """Clean and escape text so that Markdown shows it literally, also in a table cell."""
    entities = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN_MARKS.sub(r"\\\1", entities)
