"""What a release takes along says the same as pyproject.toml: the conda recipe, the Dockerfile, citation and Zenodo."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from zepad import __version__

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RECIPE = yaml.safe_load((ROOT / "recipe" / "recipe.yaml").read_text(encoding="utf-8"))
ON_CONDA = {"torch": "pytorch", "huggingface-hub": "huggingface_hub", "matplotlib": "matplotlib-base"}


def required(lines: list[str]) -> dict[str, str]:
    """The least version by package."""
    found = [re.fullmatch(r"([\w-]+) ?>=([\d.]+)", line) for line in lines]
    assert all(found), lines
    return {match[1]: match[2] for match in found if match}


def test_the_conda_recipe_requires_what_the_wheel_requires() -> None:
    wheel = required(PROJECT["project"]["dependencies"])
    python, *others = RECIPE["requirements"]["run"]
    assert required(others) == {ON_CONDA.get(name, name): least for name, least in wheel.items()}
    assert python == "python >=${{ python_min }}"
    assert PROJECT["project"]["requires-python"] == f">={RECIPE['context']['python_min']}"
    assert PROJECT["build-system"]["requires"][0] == RECIPE["requirements"]["host"][-1].replace(" ", "")
    scripts = [f"{name} = {call}" for name, call in PROJECT["project"]["scripts"].items()]
    assert RECIPE["build"]["python"]["entry_points"] == scripts


def test_the_conda_recipe_is_of_this_version() -> None:
    assert RECIPE["context"]["version"] == __version__
    assert RECIPE["about"]["license"] == PROJECT["project"]["license"]


def test_the_image_installs_the_pytorch_that_the_wheel_requires() -> None:
    wheel = required(PROJECT["project"]["dependencies"])
    asked = dict(re.findall(r'"(torch|torchvision)>=([\d.]+)"', (ROOT / "Dockerfile").read_text(encoding="utf-8")))
    assert asked == {name: wheel[name] for name in ("torch", "torchvision")}


def test_zenodo_and_the_citation_name_the_same_work() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    zenodo = json.loads((ROOT / ".zenodo.json").read_text(encoding="utf-8"))
    for field in ("title", "license", "keywords"):
        assert zenodo[field] == citation[field]
    assert zenodo["description"] == citation["abstract"].strip() == PROJECT["project"]["description"]
    assert [author["name"] for author in zenodo["creators"]] == [author["name"] for author in citation["authors"]]
    paper = citation["preferred-citation"]["identifiers"][0]["value"]
    assert [related["identifier"] for related in zenodo["related_identifiers"]] == [paper]
