"""A report as files."""

from __future__ import annotations

from pathlib import Path

from ...arguments import checked
from ...errors import InputError
from ...files import write_together
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
    try:
        write_together(out, contents)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}. Choose a writable folder.") from error
    return out / "report.html"
