"""The built site in a real browser: pages fit their window, axe-core finds nothing, and search finds commands.

Needs what `chromium.py` names, and a built site whose folder ZEPAD_SITE names:
`mkdocs build --strict --site-dir /tmp/site && ZEPAD_SITE=/tmp/site pytest -m slow tests/test_site_browser.py`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from chromium import DESKTOP, PHONE, missing, violations

pytestmark = pytest.mark.slow

PAGES = ["", "results/", "api/model/", "cli/", "leaderboard/", "notebooks/quickstart/"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    folder = os.environ.get("ZEPAD_SITE", "")
    if not Path(folder, "index.html").is_file():
        missing("ZEPAD_SITE names no built site (mkdocs build --strict --site-dir FOLDER)")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("viewport", "scheme"), [(PHONE, "dark"), (DESKTOP, "light")], ids=["phone", "desktop"])
def test_a_page_fits_its_window_and_is_accessible(browser: Any, site: str, viewport: Any, scheme: str) -> None:
    context = browser.new_context(viewport=viewport, is_mobile=viewport is PHONE, color_scheme=scheme)
    found = {}
    for name in PAGES:
        page = context.new_page()
        requests: list[str] = []
        page.on("request", lambda request, requests=requests: requests.append(request.url))
        page.goto(site + name)
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], name
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)"), name
        assert [url for url in requests if not url.startswith((site, "data:", "blob:"))] == []
        found[name] = violations(page)
        page.close()
    context.close()
    assert found == {name: [] for name in PAGES}


def test_search_finds_a_command(browser: Any, site: str) -> None:
    context = browser.new_context(viewport=DESKTOP)
    page = context.new_page()
    page.goto(site)
    page.locator("[data-md-component=search-query]").press_sequentially("zepad evaluate")  # the page listens to keys
    first = page.locator(".md-search-result__link").first
    first.wait_for()
    assert "/cli/" in first.get_attribute("href")
    hits = page.locator(".md-search-result__link")
    assert any("#zepad-evaluate" in hits.nth(i).get_attribute("href") for i in range(min(hits.count(), 5)))
    context.close()
