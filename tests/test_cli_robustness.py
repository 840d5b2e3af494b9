"""`zepad attack`, `evaluate` and `compare`, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from command_line import zepad
from zepad import BenignConfig, ConfigError, HardenConfig, HeadConfig, ZePAD
from zepad.attacks import UniversalPerturbation
from zepad.cli.settings import parse_eps
from zepad.data import digits
from zepad.evaluation import EvalReport
from zepad.evaluation.attackers import THREAT_MODELS

VICTIM, AUXILIARY = "zepad:digits-barlow-twins", "zepad:digits-simclr"
QUICK = ("--steps", 2, "--queries", 3, "--limit", 6, "--train-limit", 32, "--quiet")


@pytest.fixture(scope="module")
def perturbation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("attack") / "pap.safetensors"
    done = zepad("attack", VICTIM, "--method", "PAP", "--eps", "32/255", "--limit", 16, "--out", file, "--quiet")
    assert done.returncode == 0, done.stderr
    assert f"eps 32/255, 16 images of digits: {file}" in done.stdout
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with a recipe far too short to defend anything."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    loader = DataLoader(Subset(digits("train"), range(128)), batch_size=64, shuffle=True)
    defense = ZePAD.from_encoders(VICTIM, AUXILIARY, num_classes=10, preset="paper", fusion="bounded")
    defense.harden(loader, HardenConfig(epochs=1, steps=1), progress=False)
    defense.fit_benign(loader, BenignConfig(epochs=1), head_config=HeadConfig(epochs=5), progress=False)
    defense.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(model: Path, perturbation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    arguments = ("--universal", "", "--perturbation", perturbation, "--eps", "32/255", "--out", out, *QUICK)
    done = zepad("evaluate", model, "--replica", "digits", *arguments)
    assert done.returncode == 0, done.stderr
    assert "white-box" in done.stdout
    assert str(out / "report.html") in done.stdout
    return out


def test_attack_writes_a_perturbation_that_fits_the_data(perturbation: Path) -> None:
    found = UniversalPerturbation.load(perturbation)
    assert found.eps == pytest.approx(32 / 255)
    assert found.delta.shape == (1, 3, 32, 32)
    assert found.provenance["images"] == 16
    assert "digits-barlow-twins" in str(found.provenance["encoders"])


def test_evaluate_attacks_in_every_group_and_writes_every_report(evaluated: Path) -> None:
    assert {"report.html", "report.md", "report.json", "report.png"} <= {path.name for path in evaluated.iterdir()}
    report = EvalReport.load(evaluated)
    assert report.groups == THREAT_MODELS
    assert report.images == 6
    assert {a.eps for a in report.attacks} == {32 / 255}
    assert any(a.name == "PAPBase #1" for a in report.attacks)
    assert any("detector-evading" in a.name for a in report.attacks)
    assert set(report.benign_branches) == {"victim", "auxiliary", "benign"}
    assert str(evaluated.parent) not in report.model  # a local path is nobody's title
    page = (evaluated / "report.html").read_text()
    assert "Replica attackers" in page
    assert "Published attackers" in page


def test_evaluate_shows_what_the_same_attackers_leave_of_the_undefended_encoder(evaluated: Path) -> None:
    report = EvalReport.load(evaluated)
    assert report.baseline is not None
    assert report.baseline.model == f"undefended {VICTIM}"
    assert report.baseline.benign_branches == {}
    attackers = {group: {result.name for result in report.group(group)} for group in THREAT_MODELS}
    bare = {group: {result.name for result in report.baseline.group(group)} for group in THREAT_MODELS}
    for group in ("semi-black-box", "semi-black-box+", "replica"):
        assert bare[group] == attackers[group]
    assert bare["published"] == set()  # nobody hardened it
    assert set() < bare["white-box"] < attackers["white-box"]
    assert "undefended" in (evaluated / "report.md").read_text()


def test_evaluate_goes_on_where_it_was_and_refuses_other_settings(
    evaluated: Path, model: Path, perturbation: Path
) -> None:
    files = {path: path.stat().st_mtime_ns for path in evaluated.rglob("state/**/*.safetensors")}
    files |= {path: path.stat().st_mtime_ns for path in evaluated.rglob("replica/**/epoch-*.pt")}
    assert {path.suffix for path in files} == {".safetensors", ".pt"}
    common = ("--replica", "digits", "--universal", "", "--eps", "32/255", "--out", evaluated, *QUICK)
    again = zepad("evaluate", model, "--perturbation", perturbation, *common, "--json")
    assert again.returncode == 0, again.stderr
    record = json.loads(again.stdout)
    assert record["images"] == 6
    assert {path: path.stat().st_mtime_ns for path in files} == files  # nothing was computed twice
    other = zepad("evaluate", model, *common)  # without the perturbation
    assert other.returncode == 1
    assert "what differs: perturbations (#1 " in other.stderr
    more = zepad("evaluate", model, "--perturbation", perturbation, *common, "--limit", 7)
    assert more.returncode == 1
    assert "what differs: the number of images (6 then, 7 now). Resume" in more.stderr
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_compare_puts_a_report_beside_an_undefended_encoder(
    evaluated: Path, perturbation: Path, tmp_path: Path
) -> None:
    arguments = ("--universal", "", "--perturbation", perturbation, "--eps", "32/255", "--out", tmp_path, *QUICK)
    done = zepad("compare", evaluated, VICTIM, "--victim", VICTIM, "--auxiliary", AUXILIARY, *arguments)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "compare.md").read_text()
    assert table.strip() in done.stdout
    row = next(line for line in table.splitlines() if line.startswith("| APGD-CE-2 "))
    assert row.count("%") == 2
    assert "<table" in (tmp_path / "compare.html").read_text()


def test_evaluate_reads_npz_files(tmp_path: Path) -> None:
    for split in ("train", "test"):
        data = digits(split)
        pixels = (data.images[:24].permute(0, 2, 3, 1) * 255).round().byte().numpy()
        classes = np.array([str(name) for name in range(10)])
        np.savez(tmp_path / f"{split}.npz", images=pixels, labels=data.labels[:24].numpy(), classes=classes)
    source = f"npz:{tmp_path}/{{split}}.npz"
    done = zepad("evaluate", VICTIM, "--data", source, "--universal", "", "--out", tmp_path / "out", *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"] == f"{source} (test)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attack", VICTIM, "--eps", "10", "--out", "x.safetensors"], "Write 10 / 255"),
        (["attack", VICTIM, "--method", "FGSM", "--out", "x.safetensors"], "AdvEncoder, PAP, UAP, UAPGD, SSP"),
        (["attack", VICTIM, "--data", "mnist", "--out", "x.safetensors"], "source must be one of"),
        (["evaluate", VICTIM, "--universal", "PAP,FGSM", "--out", "x"], "got FGSM"),
        (["evaluate", VICTIM, "--perturbation", "absent.safetensors", "--out", "x"], "absent.safetensors"),
        (["evaluate", "timm:no_such_model", "--out", "x"], "no_such_model"),
        (
            ["evaluate", VICTIM, "--replica", "digits", "--train-limit", "64", "--limit", "4", "--out", "x"],
            "an undefended encoder has none",
        ),
        (["compare", __file__, "--out", "x"], "spec"),
    ],
)
def test_bad_arguments_give_a_message_and_an_exit_code(arguments, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = zepad(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "eps"), [("10/255", 10 / 255), (" 8 / 255 ", 8 / 255), ("0.04", 0.04), ("1", 1.0)])
def test_budgets_are_read_as_people_write_them(text: str, eps: float) -> None:
    assert parse_eps(text) == pytest.approx(eps)


@pytest.mark.parametrize("text", ["10", "ten", "", "1/0", "-1/255", "nan", "1/2/3"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="eps"):
        parse_eps(text)
