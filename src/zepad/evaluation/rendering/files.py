"""A report as files."""

from __future__ import annotations

from pathlib import Path

from ...arguments import checked
from ...errors import InputError
from ..report import EvalReport
from .markdown import markdown_tables
from .page import html_page
from .picture import overview_png


@checked
def save_report(report: EvalReport, folder: str | Path) -> Path:
    """Write report.html, report.md, report.json and report.png.

    Args:
        report: Report to render.
        folder: Folder, which is created if it does not exist.

    Returns:
        The path of report.html.

    Raises:
        InputError: If the folder cannot be written.
    """
    out = Path(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
        (out / "report.md").write_text(markdown_tables(report), encoding="utf-8")
        (out / "report.html").write_text(html_page(report), encoding="utf-8")
        (out / "report.png").write_bytes(overview_png(report))
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}. Choose a writable folder.") from error
    return out / "report.html"
