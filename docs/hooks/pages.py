"""What the site says that nobody types: the command line, the leaderboard, executed notebooks and tooltips.

MkDocs calls the functions whose names start with `on_`. A page that holds a marker, such as `<!-- command line -->`,
gets generated Markdown in its place, so that it is highlighted, searched and checked for broken links like any other.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "examples"
sys.path.insert(0, str(ROOT / "benchmarks"))

import recorded  # noqa: E402 - a script's module, found through the line above


def command_line() -> str:
    """Return every command with its arguments and options, as Typer describes them."""
    described = subprocess.run(
        [sys.executable, "-m", "typer", "zepad.cli", "utils", "docs", "--name", "zepad"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"},
    ).stdout
    # The page has a title of its own, and its headings list the commands without cutting their descriptions short.
    return re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", described.partition("\n")[2])


def leaderboard() -> str:
    """Return one table for each set of models that were measured alike."""
    return recorded.leaderboard(recorded.load(ROOT / "benchmarks" / "recorded"))


MARKERS = {
    "<!-- command line -->": command_line,
    "<!-- leaderboard -->": leaderboard,
    "<!-- summary -->": lambda: recorded.summary(recorded.load(ROOT / "benchmarks" / "recorded")),
}


@functools.lru_cache  # `mkdocs serve` executes a notebook again only when it changed
def executed(notebook: bytes) -> tuple[str, dict[str, bytes]]:
    """Execute a notebook.

    Args:
        notebook: Content of an `.ipynb` file.

    Returns:
        The notebook with its outputs as Markdown, and the pictures that it shows by file name.
    """
    import nbclient
    import nbformat
    from nbconvert import MarkdownExporter

    cells = nbformat.reads(notebook.decode(), as_version=4)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),  # for `!zepad`
        "PYTHONWARNINGS": "ignore:IProgress not found",  # of tqdm; a page shows no moving bar
    }
    quiet = ["--log-level=ERROR"]  # the kernel warns that it listens on this machine
    nbclient.NotebookClient(cells, timeout=120, kernel_name="python3", extra_arguments=quiet).execute(env=environment)
    text, resources = MarkdownExporter().from_notebook_node(cells)
    return text, resources["outputs"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each notebook of `examples/`, executed, as a page."""
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    with ThreadPoolExecutor() as pool:
        pages = list(pool.map(executed, [path.read_bytes() for path in paths]))
    for path, (text, pictures) in zip(paths, pages, strict=True):
        content = text
        for name, picture in pictures.items():
            own = f"{path.stem}-{name}"
            content = content.replace(f"![png]({name})", f"![What the code above draws]({own})")
            files.append(File.generated(config, f"notebooks/{own}", content=picture))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=content))
    return files


def abbreviations() -> str:
    """Return a tooltip for each acronym of the glossary."""
    rows = re.findall(
        r"^\| ([A-Z][\w-]*) \| ([^|]+?) \|", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.M
    )
    return "\n".join(f"*[{term}]: {meaning}" for term, meaning in rows)


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill the markers of a page, and explain its acronyms where the mouse rests on them."""
    for marker, generate in MARKERS.items():
        if marker in markdown:
            markdown = markdown.replace(marker, generate())
    return markdown if page.file.src_uri == "glossary.md" else f"{markdown}\n\n{abbreviations()}\n"
