"""README and documentation: pages say what they are for, figures show recorded numbers, modules have a page."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import example_reports as examples
from test_public_names import PUBLIC

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "api").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Names that are better known by their letters, and of things that have no other name.
KNOWN = {"API", "BSD", "CIFAR", "CLIP", "CPU", "GPU", "HTML", "JSON", "MIT", "PNG", "URL"}


@pytest.fixture(scope="module")
def recorded() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import recorded

        return recorded
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def first_block(page: str) -> str:
    """Return what follows the title of a page, comments left out, up to the next empty line."""
    _, _, body = re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL).strip().partition("\n")
    return body.strip().split("\n\n")[0]


def is_prose(block: str) -> bool:
    """Return whether a block is sentences: no code, table, list, heading or picture, and a full stop at the end."""
    return (
        bool(re.match(r"[A-Z`*\[]", block)) and not re.match(r"\* |```", block) and bool(re.search(r"[.:]\W*$", block))
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_a_page_starts_with_what_it_is_for(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert is_prose(first_block(text)), first_block(text)


@pytest.mark.parametrize(
    "block", ["```python\nx = 1.\n```", "| a. |", "* A list.", "## A title.", "1. One.", "![A picture.](x)", "no stop"]
)
def test_what_is_no_prose_is_found(block: str) -> None:
    assert not is_prose(first_block(f"# Title\n\n{block}\n"))


def acronyms(text: str) -> set[str]:
    """Return words of two or more capitals, such as PGD or PGD-20, outside of code and addresses."""
    plain = re.sub(r"```.*?```|`[^`]*`|<[^>]*>|\]\([^)]*\)|\(#[^)]*\)", " ", text, flags=re.DOTALL)
    return set(re.findall(r"\b[A-Z]{2,}s?\b", plain))


def test_the_first_screen_of_the_readme_has_no_acronym_that_it_does_not_spell_out() -> None:
    screen = "\n".join(README.splitlines()[:50])
    assert acronyms("A DAE and PGD-20, `RFDM`.") == {"DAE", "PGD"}
    assert acronyms(screen) - KNOWN == set()


def test_both_commands_stand_in_the_readme_word_for_word() -> None:
    demo = "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/zepad demo"
    tests = "python3 -m venv .venv && .venv/bin/pip install -U pip && .venv/bin/pip install -e . --group test"
    assert f"```bash\n{demo}\n```" in README
    assert f"```bash\n{tests} && .venv/bin/pytest\n```" in README


def test_every_public_module_is_documented_on_one_page() -> None:
    written = Counter(re.findall(r"^::: ([\w.]+)$", "\n".join(page.read_text() for page in PAGES), flags=re.MULTILINE))
    assert set(written.values()) == {1}
    # The names of `zepad` itself are documented one by one or with the module that defines them.
    missing = set(PUBLIC) - set(written) - {"zepad", "zepad.encoders.sources", "zepad.attacks.universal"}
    assert missing == set()


def test_figures_and_table_show_the_recorded_numbers(recorded: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import figures

    for path, content in figures.drawn():
        assert path.read_text(encoding="utf-8") == content, f"run: python benchmarks/figures.py draw ({path.name})"


def test_an_entry_is_what_it_was_written_from(recorded: ModuleType, tmp_path: Path) -> None:
    for name, entry in recorded.load().items():
        assert entry.command
        assert entry.seeds
        recorded.save(entry, tmp_path / f"{name}.json")
    assert recorded.load(tmp_path) == recorded.load()


def test_a_report_becomes_an_entry(recorded: ModuleType, tmp_path: Path) -> None:
    report = examples.report()
    (tmp_path / "report.json").write_text(report.to_json(), encoding="utf-8")
    entry = recorded.from_report(tmp_path / "report.json", command="zepad compare", encoders="two")
    assert entry.benign.mean == pytest.approx(100 * report.benign_accuracy.value, abs=0.005)
    for group in report.groups:
        worst = 100 * report.worst[group].robust_accuracy.value
        assert entry.attacked[group].worst.mean == pytest.approx(worst, abs=0.005)
        assert set(entry.attacked[group].attackers) == {row.name for row in report.group(group)}


def test_only_models_that_were_measured_alike_share_a_table(recorded: ModuleType) -> None:
    first = next(iter(recorded.load().values()))
    for change in (
        {"data": "x"},
        {"eps": "1/255"},
        {"protocol": "x"},
        {"encoders": "x"},
        {"images": {"attacked": 1, "benign": 2}},
    ):
        other = recorded.Entry(**{**vars(first), "model": "other", **change})
        assert recorded.leaderboard({"a": first, "b": other}).count("\n## ") == 1  # and one at the very start
    assert (
        recorded.leaderboard({"a": first, "b": recorded.Entry(**{**vars(first), "model": "other"})}).count("\n## ") == 0
    )


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert cells[0]["source"][0].startswith("# ")
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
