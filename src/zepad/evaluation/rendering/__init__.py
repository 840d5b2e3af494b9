"""Show what an evaluation found: a web page, Markdown and a picture, of one model or of several side by side."""

from .comparison import comparison_html, comparison_markdown
from .markdown import markdown_tables
from .summary import summary

__all__ = ["comparison_html", "comparison_markdown", "markdown_tables", "summary"]
