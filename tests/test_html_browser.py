"""Reports in a real browser: they request nothing, do not overflow, are accessible, and can be printed.

`chromium.py` says what this needs; the validity of pages is checked by the Nu HTML checker, which needs Java.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import example_reports as examples
from chromium import DESKTOP, PHONE, from_npm, missing, violations
from zepad.evaluation.rendering import comparison_html
from zepad.evaluation.rendering.page import html_page

pytestmark = pytest.mark.slow

SCREENS = 3  # of a desktop, before what is folded
NAMES = [*sorted(examples.EXAMPLES), "ladder", "comparison"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    texts = {name: html_page(make()) for name, make in examples.EXAMPLES.items()}
    texts["ladder"] = html_page(examples.ladder())
    texts["comparison"] = comparison_html([examples.report(), examples.plain()])
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


class Visit:
    """A page opened offline, and everything it did."""

    def __init__(self, browser: Any, path: Path, viewport: dict[str, int], scheme: str = "light") -> None:
        mobile = viewport is PHONE  # a phone lays out at 980 pixels what does not ask for its own width
        self.context = browser.new_context(viewport=viewport, is_mobile=mobile, color_scheme=scheme, offline=True)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.trouble: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.trouble.append(dialog.message), dialog.dismiss()))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_page_works_offline_without_requests_errors_or_overflow(browser: Any, pages, name: str) -> None:
    for viewport in (PHONE, DESKTOP):
        with Visit(browser, pages[name], viewport) as visit:
            visit.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            width = visit.page.evaluate("document.documentElement.scrollWidth")
            assert width <= viewport["width"], f"{width} pixels in {viewport['width']}"
            assert visit.page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
            assert visit.page.evaluate(CUT) == []
            assert visit.page.evaluate("document.scripts.length") == 0
            assert visit.requests == [pages[name].as_uri()]
            assert visit.trouble == []


# Text of a chart that leaves its drawing, and tables that are wider than the screen has room for.
CUT = """
[...document.querySelectorAll('svg text')].filter(text => {
    const inner = text.getBoundingClientRect(), outer = text.ownerSVGElement.getBoundingClientRect();
    const beside = inner.left < outer.left - 1 || inner.right > outer.right + 1;
    return inner.width && (beside || inner.bottom > outer.bottom + 1);
}).map(text => text.textContent).concat(
    [...document.querySelectorAll('.scroll')].filter(region => region.scrollWidth > region.clientWidth)
    .map(region => region.getAttribute('aria-label'))
)
"""


@pytest.mark.parametrize("name", ["full", "compared", "ladder", "plain", "unattacked"])
def test_what_is_not_folded_fits_three_screens_and_the_answer_the_first(browser: Any, pages, name: str) -> None:
    with Visit(browser, pages[name], DESKTOP) as visit:
        assert visit.page.evaluate("document.documentElement.scrollHeight") <= SCREENS * DESKTOP["height"]
        for edge in ("'.verdict').getBoundingClientRect().bottom", "'.lines').getBoundingClientRect().top"):
            assert visit.page.evaluate(f"document.querySelector({edge}") < DESKTOP["height"]


def test_a_link_opens_the_section_that_it_leads_to(browser: Any, pages) -> None:
    with Visit(browser, pages["compared"], DESKTOP) as visit:
        visit.page.click("nav a[href='#cost']")
        visit.page.wait_for_function("document.querySelector('#cost').closest('details').open")


@pytest.mark.parametrize(
    ("name", "viewport", "scheme"),
    [
        *(("compared", viewport, scheme) for viewport in (PHONE, DESKTOP) for scheme in ("light", "dark")),
        ("hostile", PHONE, "light"),
        ("unattacked", PHONE, "dark"),
        ("comparison", DESKTOP, "light"),
        ("comparison", PHONE, "dark"),
    ],
    ids=str,
)
def test_a_page_is_accessible(browser: Any, pages, name: str, viewport: dict[str, int], scheme: str) -> None:
    with Visit(browser, pages[name], viewport, scheme) as visit:
        visit.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert violations(visit.page) == []


@pytest.mark.parametrize("name", ["compared", "comparison"])
def test_a_page_prints_with_everything_on_paper(browser: Any, pages, name: str) -> None:
    with Visit(browser, pages[name], DESKTOP, "dark") as visit:
        pdf = visit.page.pdf(format="A4")
        visit.page.emulate_media(media="print", color_scheme="dark")
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) > 0
        assert visit.page.evaluate(
            "[...document.querySelectorAll('details td')].every(cell => cell.getBoundingClientRect().height > 0)"
        ), "a closed detail is not printed"
        assert visit.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        visit.page.set_viewport_size({"width": 703, "height": 1000})  # A4 less its margins
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 703, "a table is cut"


def test_pages_are_valid_html(pages: dict[str, Path]) -> None:
    checker, java = from_npm("vnu-jar/build/dist/vnu.jar"), shutil.which("java")
    if java is None:
        missing("Java is not installed (apt-get install default-jre-headless)")
    command = [
        java,
        "-jar",
        str(checker),
        "--format",
        "json",
        "--stdout",
        "--exit-zero-always",
        *map(str, pages.values()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    messages = [(Path(m["url"]).name, m["message"]) for m in json.loads(done.stdout)["messages"]]
    # The checker takes `img-src data:` to forbid data: pictures; that they load is tested above.
    assert [said for said in messages if "blocked by “img-src” directive" not in said[1]] == []
