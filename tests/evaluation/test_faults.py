"""An evaluation that is killed at any moment goes on to the report of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from command_line import zepad
from tiny import colour_ensemble, toy_data
from zepad.attacks import PGD
from zepad.evaluation import Attacker, EvalReport, evaluate
from zepad.evaluation.state import _FILES

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="only a fork of a warm process is quick to kill")

VICTIM = "zepad:digits-barlow-twins"
IMAGES, LABELS = toy_data(25, size=4)
LOADER = list(zip(IMAGES.split(3), LABELS.split(3), strict=True))


def kill(work: Callable[[], object], after: float) -> bool:
    """Do some work in a copy of this process that is killed after some seconds; whether that was in the midst of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, where a library has threads
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)  # nothing of pytest is run twice
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def run(folder: Path | None) -> EvalReport:
    crowd = [
        Attacker(name=f"PGD {steps}", threat_model="white-box", attack=PGD(eps=0.2, steps=steps)) for steps in (1, 3)
    ]
    return evaluate(
        colour_ensemble(),
        LOADER,
        crowd,
        folder=folder,
        resume=folder is not None,
        sanity=False,
        progress=False,
        samples=3,
    )


def strip(report: EvalReport) -> EvalReport:
    """The report without what time and machine put into it."""
    attacks = tuple(replace(result, cost=replace(result.cost, seconds=0)) for result in report.attacks)
    return replace(report, provenance={}, attacks=attacks)


@pytest.fixture(scope="module")
def undisturbed() -> tuple[EvalReport, float]:
    """The report of an evaluation that nobody disturbs, and the seconds that it takes."""
    run(None)  # what is imported late is imported now
    start = time.perf_counter()
    return strip(run(None)), time.perf_counter() - start


@pytest.mark.parametrize(
    ("seed", "kills"), [(0, 3), *(pytest.param(seed, 4, marks=pytest.mark.exhaustive) for seed in range(1, 4))]
)
def test_a_killed_evaluation_goes_on(undisturbed: Any, tmp_path: Path, seed: int, kills: int) -> None:
    report, seconds = undisturbed
    moments, hit = random.Random(seed), 0
    for _ in range(kills):
        hit += kill(lambda: run(tmp_path), moments.uniform(0, 1.2 * seconds / kills))
    assert hit
    files = {file: file.read_bytes() for file in tmp_path.glob(_FILES)}
    assert strip(run(tmp_path)) == report
    assert all(file.read_bytes() == content for file, content in files.items())  # what was there was whole
    assert len(list(tmp_path.glob(_FILES))) == 2 * len(LOADER)


def command(out: Path) -> Any:
    few = ("--steps", 1, "--queries", 2, "--limit", 4, "--train-limit", 16, "--universal", "", "--quiet", "--json")
    return zepad("evaluate", VICTIM, "--victim", VICTIM, "--out", out, *few)


def found(out: Path) -> dict[str, Any]:
    """The report of the command without what time puts into it."""
    report = json.loads((out / "report.json").read_text())
    del report["provenance"]
    for attack in report["attacks"]:
        attack["cost"]["seconds"] = 0
    return report


@pytest.fixture(scope="module")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    out = tmp_path_factory.mktemp("undisturbed")
    command(out / "warm")
    start = time.perf_counter()
    done = command(out / "report")
    assert done.returncode == 0, done.stderr
    return found(out / "report"), time.perf_counter() - start


@pytest.mark.exhaustive
@pytest.mark.parametrize(("seed", "kills"), [(seed, 4) for seed in range(3)])
def test_a_killed_command_goes_on(commanded: Any, tmp_path: Path, seed: int, kills: int) -> None:
    report, seconds = commanded
    moments, hit = random.Random(seed), 0
    for _ in range(kills):
        hit += kill(lambda: command(tmp_path), moments.uniform(0, seconds))
    assert hit
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    assert found(tmp_path) == report


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--limit", 5), "the number of images (4 then, 5 now)"),
        (("--seed", 1), "seed (0 then, 1 now)"),
        (("--eps", "8/255"), "eps (0.0"),
        (("--steps", 2), "steps (1 then, 2 now)"),
        (("--victim", "zepad:digits-simclr"), "public encoders (victim "),
        (("--train-limit", 17), None),
    ],
)
def test_the_command_refuses_to_go_on_with_another_evaluation(
    commanded: Any, tmp_path_factory: pytest.TempPathFactory, change: tuple[Any, ...], named: str | None
) -> None:
    """Before anything is crafted, and by the name of what was changed."""
    out = next(tmp_path_factory.getbasetemp().glob("undisturbed*")) / "report"
    held = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    few = ("--steps", 1, "--queries", 2, "--limit", 4, "--train-limit", 16, "--universal", "", "--quiet")
    done = zepad("evaluate", VICTIM, "--victim", VICTIM, "--out", out, *few, *change)
    assert done.returncode == 1
    assert "was another; what differs: " in done.stderr
    assert "Traceback" not in done.stderr
    # The head of the undefended encoder is fitted to the training images, so that it is another model.
    assert (named or "the model (model_digest)") in done.stderr
    assert held == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
