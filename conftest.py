"""Run the examples as tests.

They are the Python blocks of README.md, CONTRIBUTING.md and docs/*.md, and the doctests in the docstrings of src.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from sybil import Sybil
from sybil.integration.pytest import SybilItem
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser


def _setup(namespace: dict[str, Any]) -> None:  # noqa: ARG001 - Sybil passes the names a document starts with
    import torch

    torch.set_num_threads(1)  # two threads on a busy two-core machine wait for each other
    torch.manual_seed(0)


def _enter_folder(namespace: dict[str, Any]) -> None:
    _setup(namespace)
    namespace["_home"], namespace["_folder"] = Path.cwd(), tempfile.TemporaryDirectory()
    os.chdir(namespace["_folder"].name)


def _leave_folder(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_home"])
    namespace["_folder"].cleanup()


# The blocks of a page share their names and a temporary working folder.
_pages = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "CONTRIBUTING.md", "docs/*.md"],
    setup=_enter_folder,
    teardown=_leave_folder,
)
# A module is imported, and only when it has an example: no script ever runs.
_docstrings = Sybil(parsers=[DocTestParser()], path="src", patterns=["*.py"], setup=_setup)

pytest_collect_file = (_pages + _docstrings).pytest()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the examples of a page together and in order, whatever plugin shuffles tests: each builds on those before.

    With pytest-xdist use `--dist loadfile`, for the same reason.
    """
    pages: dict[object, list[SybilItem]] = defaultdict(list)
    for item in items:
        if isinstance(item, SybilItem):
            pages[item.path].append(item)
    ordered: list[pytest.Item] = []
    for item in items:
        if isinstance(item, SybilItem):
            ordered += sorted(pages.pop(item.path, ()), key=lambda example: example.example.region.start)
        else:
            ordered.append(item)
    items[:] = ordered
