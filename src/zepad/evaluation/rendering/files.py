"""A report as files."""

from __future__ import annotations

from pathlib import Path

from ...arguments import checked
from ...errors import InputError
from ...files import write_together, writing
from ..report import EvalReport
from .markdown import markdown_tables
from .page import html_page
from .picture import overview_png


@checked
def save_report(report: EvalReport, folder: str | Path) -> Path:
    """Write report.html, report.md, report.json and report.png, each in the place of an older one once all are written.

    Args:
        report: Report to render.
        folder: Folder, which is created if it does not exist.

    Returns:
        The path of report.html.

    Raises:
        InputError: If the folder cannot be written.
    """
    out = Path(folder)
    contents = {
        "report.json": (report.to_json() + "\n").encode(),
        "report.md": markdown_tables(report).encode(),
        "report.html": html_page(report).encode(),
        "report.png": overview_png(report),
    }
    with writing(out, InputError):
        write_together(out, contents)
    return out / "report.html"
