"""The command line as a user calls it, and the demo at small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import zepad
from zepad import BenignConfig, HardenConfig, InputError, ZePAD, __version__
from zepad.data import digits
from zepad.demo import format_table, run_demo

COUNT = 32  # test images


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory):
    """The demo with a recipe far too short to defend anything, but with every step and file of the real one."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("demo")
    lines: list[str] = []
    result = run_demo(
        folder,
        hardening=HardenConfig(eps=25 / 255, epochs=1, steps=1),
        benign=BenignConfig(epochs=6),
        limit=COUNT,
        progress=False,
        say=lines.append,
    )
    return folder, result, lines


def test_the_demo_leaves_a_picture_the_numbers_and_a_model_that_predicts_the_same(demo) -> None:
    folder, result, lines = demo
    assert len(lines) == 5
    assert result.reload_equal
    with Image.open(folder / "picture.png") as picture:
        assert picture.size[0] > 1000
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50  # not an empty canvas
    assert json.loads((folder / "result.json").read_text()) == json.loads(result.to_json())
    images, labels = digits("test").images[:COUNT], digits("test").labels[:COUNT]
    reloaded = ZePAD.from_pretrained(folder / "model")
    assert float((reloaded.predict(images) == labels).float().mean()) == pytest.approx(
        result.recommended.benign_accuracy
    )
    assert reloaded.fusion.name == "bounded"
    flagged = float(reloaded.detect(images).float().mean())
    assert flagged == pytest.approx(result.false_positive_rate)


def test_the_demo_attacks_break_the_undefended_classifier(demo) -> None:
    _, result, _ = demo
    assert result.undefended.benign_accuracy > 0.95
    assert result.undefended.robust_accuracy["universal"] < 0.3
    assert result.undefended.robust_accuracy["per_image"] < 0.3
    assert result.undefended.robust_accuracy["white_box"] < 0.05


def test_the_demos_json_has_the_promised_shape_and_accuracies_lie_in_0_1(demo) -> None:
    record = json.loads(demo[1].to_json())
    for model in ("undefended", "zepad", "recommended"):
        assert set(record[model]) == {"benign_accuracy", "robust_accuracy"}
        assert set(record[model]["robust_accuracy"]) == {"universal", "per_image", "white_box"}
        assert all(0 <= value <= 1 for value in record[model]["robust_accuracy"].values())
    assert set(record["detection_auroc"]) == {"gap", "features"}
    assert all(set(aurocs) == {"universal", "per_image"} for aurocs in record["detection_auroc"].values())
    assert record["seconds"] > 0


def test_the_demos_table_shows_every_number(demo) -> None:
    _, result, _ = demo
    table = format_table(result)
    for model in (result.undefended, result.zepad, result.recommended):
        for value in (model.benign_accuracy, *model.robust_accuracy.values()):
            assert f"{value:.1%}" in table
    assert "One image at a time (feature PGD-20)" in table
    assert "per_image" not in table
    assert "eps 32/255" in table


def test_the_demo_refuses_a_folder_it_cannot_write_before_it_computes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    lines: list[str] = []
    with pytest.raises(InputError, match="cannot be written"):
        run_demo(tmp_path / "file" / "out", say=lines.append)
    assert lines == []


def test_info_says_what_a_model_is(demo) -> None:
    done = zepad("info", demo[0] / "model")
    assert done.returncode == 0
    for part in (
        "fitted",
        "10 (0, 1, 2",
        "bounded (vote",
        "features, threshold",
        "zepad:digits-barlow-twins",
        "eps 25/255",
        f"zepad {__version__}",
    ):
        assert part in done.stdout
    record = json.loads(zepad("info", demo[0] / "model", "--json").stdout)
    assert record["stage"] == "fitted"


def test_predict_prints_label_probability_and_verdict(demo, tmp_path: Path) -> None:
    images, labels = digits("test").images[:3], digits("test").labels[:3]
    paths = []
    for i, image in enumerate(images):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(paths[-1])
    done = zepad("predict", demo[0] / "model", *paths, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    defense = ZePAD.from_pretrained(demo[0] / "model")
    stored = torch.stack([torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1).float() / 255 for p in paths])
    assert [row["label"] for row in record["predictions"]] == [str(int(x)) for x in defense.predict(stored)]
    assert [row["attacked"] for row in record["predictions"]] == defense.detect(stored).tolist()
    assert [row["probability"] for row in record["predictions"]] == pytest.approx(
        defense.predict_proba(stored).amax(1).tolist(), abs=1e-5
    )
    text = zepad("predict", demo[0] / "model", *paths).stdout
    assert len(text.splitlines()) == 3
    assert all(str(path) in text for path in paths)
    assert len(labels) == 3


HOSTILE = ("\x1b[2J\x1b[31m", "a\nstage       built", "\u202egnp.tac\x07")


def test_no_name_in_a_file_reaches_the_terminal_as_a_command(demo, tmp_path: Path) -> None:
    defense = ZePAD.from_pretrained(demo[0] / "model")
    defense.class_names = tuple(f"{number}{HOSTILE[number % 3]}" for number in range(10))
    defense.provenance["harden"] = {"config": {"eps": 0.1, "steps": HOSTILE[0]}, "images": HOSTILE[1]}
    defense.save_pretrained(tmp_path)
    Image.fromarray((digits("test").images[0].permute(1, 2, 0) * 255).byte().numpy()).save(tmp_path / "one.png")
    plain = zepad("info", demo[0] / "model").stdout
    outputs = zepad("info", tmp_path).stdout, zepad("predict", tmp_path, tmp_path / "one.png").stdout
    assert [line.partition(" ")[0] for line in outputs[0].splitlines()] == [
        line.partition(" ")[0] for line in plain.splitlines()
    ]
    assert len(outputs[1].splitlines()) == 1
    report = str(defense.inspect(digits("test").images[:8]))
    assert len(report.split("\n\n")) == 8
    refused = zepad("info", tmp_path / HOSTILE[0])
    assert refused.returncode == 1
    for text in (*outputs, report, refused.stderr):
        assert all(line.isprintable() for line in text.split("\n")), text


def test_info_takes_a_record_of_hardening_that_zepad_did_not_write(demo, tmp_path: Path) -> None:
    defense = ZePAD.from_pretrained(demo[0] / "model")
    for record in ({"config": {"eps": "8/255"}}, {"config": None}, {"images": 3}):
        defense.provenance["harden"] = record
        defense.save_pretrained(tmp_path)
        done = zepad("info", tmp_path)
        assert done.returncode == 0, done.stderr
        assert "hardened    in a way that zepad does not know" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["info", "nowhere"], 1, "holds no config.json"),
        (["predict", "nowhere", __file__], 1, "nowhere is no folder"),
        (["predict", "MODEL", __file__], 1, "is no image that can be read"),
        (["predict", "MODEL", "missing.png"], 2, "does not exist"),
        (["predict", "MODEL"], 2, "Missing argument"),
        (["demo", "--seed", "-1"], 2, "Invalid value"),
        (["demo", "--out", f"{__file__}/sub"], 1, "cannot be written"),
        (["unknown"], 2, "No such command"),
    ],
)
def test_bad_arguments_give_a_message_and_an_exit_code(demo, arguments, code: int, message: str) -> None:
    done = zepad(*(str(demo[0] / "model") if argument == "MODEL" else argument for argument in arguments))
    assert done.returncode == code, done.stderr
    plain = " ".join(done.stderr.replace("│", " ").split())
    assert message in plain
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_installed_module_runs_in_a_process_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-m", "zepad", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == zepad("--version").stdout.strip() == f"zepad {__version__}"
