"""Public names are sorted, exist, and are used by the package, its documentation, its benchmarks or its examples."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src"


def syntax(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path):
    return ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__")


def exported(tree):
    """Return the names in `__all__`, or None for a module without it."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return ast.literal_eval(node.value)
    return None


def identifiers(tree):
    """Return the names that code imports or reads as an attribute, such as `resolve` in `fusion.resolve`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.attr


def words_of_code(text):
    """Return the words in the code of a Markdown page, in fences and between backticks."""
    fences = re.findall(r"```.*?```", text, flags=re.DOTALL)
    inline = re.findall(r"`[^`\n]+`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return re.findall(r"\w+", " ".join([*fences, *inline]))


PUBLIC = {
    module_name(path): names for path in sorted(SOURCES.rglob("*.py")) if (names := exported(syntax(path))) is not None
}
CASES = [pytest.param(module, name, id=f"{module}.{name}") for module, names in PUBLIC.items() for name in names]


@pytest.fixture(scope="module")
def used_in_package():
    """Identifiers by the module of the package that uses them; `__init__` only passes names on."""
    paths = (path for path in SOURCES.rglob("*.py") if path.name != "__init__.py")
    return {module_name(path): set(identifiers(syntax(path))) for path in paths}


@pytest.fixture(scope="module")
def used_outside():
    """Words in the code of pages, benchmarks and examples.

    The API pages, in a folder of their own, list names without using them.
    """
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    scripts = chain((ROOT / "benchmarks").glob("*.py"), (ROOT / "examples").glob("*.py"))
    words = (words_of_code(page.read_text(encoding="utf-8")) for page in pages)
    return {*chain.from_iterable(words), *chain.from_iterable(identifiers(syntax(script)) for script in scripts)}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_sorted_and_exist(module):
    names = PUBLIC[module]
    assert names == sorted(set(names), key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert [name for name in names if not hasattr(import_module(module), name)] == []


@pytest.mark.parametrize(("module", "name"), CASES)
def test_every_public_name_is_used(module, name, used_in_package, used_outside):
    home = getattr(getattr(import_module(module), name), "__module__", None)
    in_package = {user for user, names in used_in_package.items() if name in names and user != home}
    assert in_package or name in used_outside, f"{module}.{name} is used nowhere; use it, or leave it out of __all__"


def test_an_unused_name_is_found(used_in_package, used_outside):
    assert "weight" in set().union(*used_in_package.values())
    assert "no_such_name" not in {*used_outside, *chain.from_iterable(used_in_package.values())}
