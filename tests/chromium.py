"""Chromium, in which tests open what people look at, and axe-core, which says what not everybody can read.

Needs Chromium, the dependency group `browser`, and a `node_modules` folder, named by ZEPAD_NODE_MODULES, with axe-core
and vnu-jar (`npm install --ignore-scripts axe-core vnu-jar`). A test that lacks one of them is skipped, unless
ZEPAD_REQUIRE_BROWSER=1 is set.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def missing(what: str) -> NoReturn:
    """Skip a test that needs what is not installed, or fail it where all of that has to be there."""
    if os.environ.get("ZEPAD_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{what}, and ZEPAD_REQUIRE_BROWSER=1 is set")
    pytest.skip(what)


def from_npm(file: str) -> Path:
    """Return a file of a package from npm."""
    path = Path(os.environ.get("ZEPAD_NODE_MODULES", "node_modules"), file)
    if not path.is_file():
        missing(f"{path} does not exist (npm install --ignore-scripts axe-core vnu-jar; set ZEPAD_NODE_MODULES)")
    return path


@contextmanager
def launched() -> Iterator[Any]:
    """Start the system's Chromium, and end it after the block."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        missing("Chromium is not installed (apt-get install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed (pip install --group browser)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser
        browser.close()


def violations(page: Any) -> list[tuple[str, str]]:
    """Return what axe-core finds to be inaccessible on a page: rule and element."""
    page.evaluate(from_npm("axe-core/axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    assert {"color-contrast", "document-title"} <= {rule["id"] for rule in found["passes"]}
    return [(rule["id"], node["html"]) for rule in found["violations"] for node in rule["nodes"]]
