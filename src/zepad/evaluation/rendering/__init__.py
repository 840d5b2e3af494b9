"""Show what an evaluation found: a web page, Markdown and a picture, of one model or of several side by side."""

from .comparison import comparison_html, comparison_markdown
from .files import save_report
from .markdown import markdown_tables
from .page import html_page
from .picture import overview_png

__all__ = ["comparison_html", "comparison_markdown", "html_page", "markdown_tables", "overview_png", "save_report"]
