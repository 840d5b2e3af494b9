"""`zepad harden`, `fit`, `calibrate`, `export` and `predict --out` as a user calls them."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from PIL import Image
from pyarrow import parquet

from command_line import zepad
from zepad import HardenConfig, HeadConfig, ZePAD, training
from zepad.cli.root import app
from zepad.data import digits, load_part, read_image

VICTIM, AUXILIARY = "zepad:digits-barlow-twins", "zepad:digits-simclr"
DATA = ("--data", "digits", "--limit", 64)


def harden(out: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return zepad("harden", VICTIM, AUXILIARY, *DATA, "--out", out, "--epochs", 1, "--steps", 1, *options)


@pytest.fixture(scope="module")
def hardened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("hardened") / "model"
    # On a busy machine progress would be shown after a minute.
    done = harden(folder, "--fusion", "bounded", "--detector", "features", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "(hardened, 10 classes)" in done.stdout
    assert f"Next: zepad fit {folder} --data digits" in done.stdout
    assert done.stderr == ""
    return folder


@pytest.fixture(scope="module")
def fitted(hardened: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted") / "model"
    done = zepad("fit", hardened, *DATA, "--out", folder, "--epochs", 1, "--keep-heads", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"path": str(folder), "stage": "fitted", "classes": 10, "threshold": None}
    done = zepad("calibrate", folder, "--data", "digits", "--benign-floor", 0.5)
    assert done.returncode == 0, done.stderr
    assert f"Next: zepad evaluate {folder} --data digits --out report" in done.stdout
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images in two folders, of two sizes."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    for number, image in enumerate(digits("test").images[:11]):
        path = folder / ("even", "odd")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
        (picture if number != 4 else picture.resize((48, 40))).save(path)
    return folder


# a model, step by step --------------------------------------------------------------------------------------------


def test_each_command_leaves_a_whole_model_at_its_stage(hardened: Path, fitted: Path) -> None:
    first, then = ZePAD.from_pretrained(hardened), ZePAD.from_pretrained(fitted)
    assert (first.stage, then.stage) == ("hardened", "fitted")
    assert first.threshold is None
    assert then.threshold is not None
    assert torch.equal(*(model.heads["victim"].state_dict()["0.weight"] for model in (first, then)))  # --keep-heads
    assert first.provenance["harden"]["images"] == 64
    assert then.provenance["calibration"]["images"] == 130
    assert then.class_names == tuple("0123456789")


def test_new_heads_are_fitted_in_place_and_nothing_else_changes(fitted: Path, tmp_path: Path) -> None:
    model = shutil.copytree(fitted, tmp_path / "model")
    done = zepad("fit", model, *DATA, "--heads-only", "--epochs", 1)
    assert done.returncode == 0, done.stderr
    before, after = ZePAD.from_pretrained(fitted), ZePAD.from_pretrained(model)
    assert all(
        torch.equal(a, b) for a, b in zip(before.encoders.parameters(), after.encoders.parameters(), strict=True)
    )
    assert not torch.equal(*(model.heads["victim"].state_dict()["0.weight"] for model in (before, after)))
    assert after.provenance["heads"]["config"]["epochs"] == 1


def test_what_is_calibrated_on_was_not_trained_on() -> None:
    parts = [load_part("digits", part) for part in ("train", "validation", "test")]
    images = [{image.numpy().tobytes() for image, _ in part} for part in parts]
    assert len(set.union(*images)) == sum(map(len, images))
    assert [round(len(part) / 130) for part in parts[:2]] == [9, 1]
    assert set(parts[1].labels.tolist()) == set(range(10))
    for limit, seed in ((100, 0), (300, 5)):  # whatever is drawn, it is drawn from the same parts
        drawn = load_part("digits", "train", limit=limit, seed=seed)
        assert {image.numpy().tobytes() for image, _ in drawn} < images[0]


def test_a_fitted_model_is_exported(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(defense: ZePAD, path: Path, *, image_size: tuple[int, int] | None) -> Path:
        assert defense.stage == "fitted"
        path.write_text(str(image_size))
        return path

    monkeypatch.setattr("zepad.model.export_model", export)  # which has tests of its own and takes seconds
    done = zepad("export", fitted, tmp_path / "model.onnx", "--size", 48, "--json")
    assert json.loads(done.stdout) == {"path": str(tmp_path / "model.onnx"), "bytes": 8}
    assert (tmp_path / "model.onnx").read_text() == "(48, 48)"


# settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["yaml", pytest.param("json", marks=pytest.mark.slow)])
def test_saved_settings_train_the_same_model_again_and_options_win(hardened: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"run.{suffix}"
    done = harden(tmp_path / "one", "--save-config", file, "--eps", "4/255")
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text()) if suffix == "json" else yaml.safe_load(file.read_text())
    assert written == {"harden": HardenConfig(epochs=1, steps=1, eps=4 / 255).to_dict()}
    done = zepad("harden", VICTIM, AUXILIARY, *DATA, "--out", tmp_path / "two", "--config", file, "--eps", "0.02")
    assert done.returncode == 0, done.stderr
    record = ZePAD.from_pretrained(tmp_path / "two").provenance["harden"]["config"]
    assert (record["epochs"], record["steps"], record["eps"]) == (1, 1, 0.02)


def test_two_commands_share_a_file_of_settings(hardened: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("harden: {eps: 8/255, lr: 1e-4}\nheads: {epochs: 3}\n")
    options = ("--out", tmp_path / "m", "--epochs", 1, "--config", file, "--save-config", file)
    done = zepad("fit", hardened, *DATA, *options)
    assert done.returncode == 0, done.stderr
    written = yaml.safe_load(file.read_text())
    assert list(written) == ["harden", "heads", "benign"]
    assert written["heads"] == HeadConfig(epochs=3).to_dict()
    assert written["benign"]["epochs"] == 1
    done = harden(tmp_path / "again", "--config", file)
    record = ZePAD.from_pretrained(tmp_path / "again").provenance["harden"]["config"]
    assert (record["eps"], record["lr"]) == (8 / 255, 1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("harden: {epoch: 3}", "HardenConfig has no field epoch; it has epochs, eps, gradient_accumulation_steps"),
        ("hardening: {epochs: 3}", "has no section hardening; it can have harden, benign, heads"),
        ("harden: {epochs: many}", "epochs must be at least 1"),
        ("harden: 3", "must map harden, benign, heads to their settings"),
        ("- harden", "must map harden, benign, heads to their settings"),
        ("harden: {epochs: 3", "is neither YAML nor JSON"),
        ("harden: !!python/object/apply:os.system [touch x]", "is neither YAML nor JSON"),
    ],
)
def test_settings_that_no_config_has_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    done = zepad("harden", VICTIM, AUXILIARY, *DATA, "--out", tmp_path / "m", "--config", tmp_path / "run.yaml")
    assert done.returncode == 1
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


# tables of predictions --------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".parquet":
        found: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return found
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def table(fitted: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The predictions on a folder, undisturbed."""
    file = tmp_path_factory.mktemp("table") / "table.jsonl"
    done = zepad("predict", fitted, photos, "--out", file, "--batch-size", 3)
    assert done.returncode == 0, done.stderr
    assert f"predictions {file}   (11 rows)" in done.stdout
    assert [path.name for path in file.parent.iterdir()] == ["table.jsonl"]
    return rows(file)


def test_a_folder_is_predicted_as_each_image_is_alone(fitted: Path, photos: Path, table: list[dict[str, Any]]) -> None:
    defense = ZePAD.from_pretrained(fitted)
    files = sorted(photos.rglob("*.png"))
    assert [row["image"] for row in table] == list(map(str, files))
    for row, file in zip(table, files, strict=True):
        report = defense.inspect(read_image(file)[None])
        assert row["label"] == report.name(int(report.labels[0]))
        assert row["probability"] == pytest.approx(float(report.probabilities[0]), abs=1e-4)
        assert row["score"] == pytest.approx(float(report.scores[0]), abs=1e-4)
        assert row["attacked"] == bool(report.flagged[0])
    printed = json.loads(zepad("predict", fitted, photos, "--json").stdout)["predictions"]
    shown = [{key: row[key] for key in printed[0]} for row in table]
    assert [row["image"] for row in printed] == [row["image"] for row in shown]
    assert [row["label"] for row in printed] == [row["label"] for row in shown]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_every_format_says_the_same_and_is_gone_on_with(
    fitted: Path, photos: Path, table: list[dict[str, Any]], tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"table.{suffix}"
    first = sorted(photos.rglob("*.png"))[:5]
    assert zepad("predict", fitted, *first, "--out", file, "--batch-size", 3).returncode == 0
    done = zepad("predict", fitted, photos, "--out", file, "--batch-size", 3, "--json")
    assert json.loads(done.stdout) == {"path": str(file), "rows": 11, "found": 5, "failed": []}
    expected = [{**row, "error": row["error"]} for row in table]
    if suffix == "csv":
        expected = [{key: "" if value is None else str(value) for key, value in row.items()} for row in table]
    found = rows(file)
    for row in (*found, *expected):  # batches of another size may round the last digit in another way
        row["probability"], row["score"] = (round(float(row[name]), 4) for name in ("probability", "score"))
    assert found == expected


def test_an_archive_is_read_without_unpacking_by_workers_too(
    fitted: Path, photos: Path, table: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(photos, "photos")
        archive.add(__file__, "photos/readme.txt")
    monkeypatch.chdir(tmp_path)
    arguments = ("photos.tar", "--out", "table.jsonl", "--batch-size", 3, "--workers", 1)
    done = zepad("predict", fitted, *arguments)
    assert done.returncode == 0, done.stderr
    found = {row["image"]: row["label"] for row in rows(tmp_path / "table.jsonl")}
    assert found == {f"photos.tar/photos/{Path(row['image']).relative_to(photos)}": row["label"] for row in table}
    assert {path.name for path in tmp_path.iterdir()} == {"photos.tar", "table.jsonl"}


@pytest.mark.parametrize("torn", ["", '{"image": "x'])
def test_an_interrupted_table_goes_on_where_it_was_and_predicts_nothing_twice(
    fitted: Path, photos: Path, table: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: str
) -> None:
    inspected: list[int] = []
    inspect = ZePAD.inspect

    def interrupted(self: ZePAD, images: torch.Tensor) -> Any:
        if sum(inspected) >= 6:
            raise KeyboardInterrupt
        inspected.append(len(images))
        return inspect(self, images)

    file = tmp_path / "table.jsonl"
    command = ("predict", fitted, photos, "--out", file, "--batch-size", 3)
    with monkeypatch.context() as patch:
        patch.setattr(ZePAD, "inspect", interrupted)
        done = zepad(*command)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == (
        f"Interrupted. Kept: the predictions so far, in {file}.part.\n"
        f"Go on with: {shlex.join(['zepad', *map(str, command)])}\n"
    )
    assert not file.exists()
    with Path(f"{file}.part").open("a") as journal:
        journal.write(torn)  # what a process leaves that is killed while it writes
    again = zepad(*command, "--json")
    assert json.loads(again.stdout)["found"] == 6
    assert rows(file) == table
    assert [path.name for path in tmp_path.iterdir()] == ["table.jsonl"]


def test_a_table_of_another_model_is_left_alone(
    fitted: Path, photos: Path, table: list[dict[str, Any]], tmp_path: Path
) -> None:
    file = tmp_path / "table.jsonl"
    content = "".join(json.dumps({**row, "model": "another"}) + "\n" for row in table)
    file.write_text(content)
    done = zepad("predict", fitted, photos, "--out", file)
    assert done.returncode == 1
    assert "holds predictions of another model" in done.stderr
    assert file.read_text() == content
    file.write_text("image,label\n1.png,2\n")
    assert "holds no predictions of zepad" in zepad("predict", fitted, photos, "--out", file).stderr
    csv_file = file.rename(tmp_path / "table.csv")
    assert "holds no predictions of zepad" in zepad("predict", fitted, photos, "--out", csv_file).stderr
    assert csv_file.read_text() == "image,label\n1.png,2\n"


def test_an_image_that_cannot_be_read_is_a_row_and_is_tried_again(fitted: Path, photos: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    good = (folder / "odd" / "01.png").read_bytes()
    (folder / "odd" / "01.png").write_bytes(good[:60])
    command = ("predict", fitted, folder, "--out", tmp_path / "table.jsonl")
    done = zepad(*command)
    assert done.returncode == 1
    assert "error: 1 of 11 images could not be read: " in done.stderr
    bad = [row for row in rows(tmp_path / "table.jsonl") if row["error"]]
    assert [(row["label"], row["probability"], row["attacked"]) for row in bad] == [(None, None, None)]
    assert "01.png is no image that can be read" in bad[0]["error"]
    (folder / "odd" / "01.png").write_bytes(good)
    assert json.loads(zepad(*command, "--json").stdout)["found"] == 10
    assert not any(row["error"] for row in rows(tmp_path / "table.jsonl"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("empty", "holds no image"), ("photos.tar.gz", "Decompress it"), ("photos.tar", "is no tar archive")],
)
def test_what_holds_no_image_is_refused(fitted: Path, tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / name
    path.mkdir() if name == "empty" else path.write_bytes(b"no archive")
    done = zepad("predict", fitted, path, "--out", tmp_path / "table.csv")
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "table.csv").exists()


# interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kept", "option"), [(True, "--resume"), (False, "--checkpoint-dir")])
def test_an_interrupted_training_says_what_is_kept_and_the_command_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool, option: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "harden", interrupted)
    folder = ("--checkpoint-dir", tmp_path / "kept") if kept else ()
    done = harden(tmp_path / "model", *folder)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("Interrupted. Kept: every epoch" if kept else "Interrupted. Nothing is kept")
    command = re.search(r"^Go on with: zepad (.*)$", done.stderr, re.MULTILINE)
    assert command is not None
    assert option in shlex.split(command[1])
    assert not (tmp_path / "model").exists()


def interrupt(command: list[str], until: str, folder: Path) -> list[str]:
    """Start a command, press Ctrl-C when it has written a file, and return the arguments to go on with."""
    log = folder / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "zepad", *command],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in the tests' own process: sums depend on it
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
        )
        try:
            for _ in range(2400):
                if any(path.stat().st_size for path in folder.glob(until)):
                    break
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    said = log.read_text()
    assert process.returncode == 130, said
    assert out == b""
    assert "Traceback" not in said
    assert len(said) <= 5000
    assert "Interrupted. Kept: " in said
    found = re.search(r"^Go on with: zepad (.*)$", said, re.MULTILINE)
    assert found is not None
    return shlex.split(found[1])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["harden", "predict", "evaluate"])
def test_ctrl_c_ends_a_real_process_that_the_command_it_prints_goes_on_with(
    fitted: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for number in range(40):
        shutil.copytree(photos, tmp_path / "many" / str(number))
    arguments, until = {
        "harden": (
            [
                VICTIM,
                AUXILIARY,
                *map(str, DATA),
                "--out",
                "m",
                "--epochs",
                "4",
                "--steps",
                "1",
                "--checkpoint-dir",
                "kept",
            ],
            "kept/victim/epoch-*.pt",
        ),
        "predict": ([str(fitted), "many", "--out", "table.csv", "--batch-size", "2"], "table.csv.part"),
        "evaluate": (
            [VICTIM, "--out", "report", "--steps", "2", "--queries", "2", "--limit", "8", "--train-limit", "64"],
            "report/state/**/*.safetensors",
        ),
    }[command]
    following = interrupt([command, *arguments], until, tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    monkeypatch.chdir(tmp_path)
    done = zepad(*following)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert len(done.stderr) <= 5000
    assert {"harden": "(hardened, 10 classes", "predict": "440 rows, ", "evaluate": "report.html"}[
        command
    ] in done.stdout
    if command == "evaluate":
        assert len(done.stdout.splitlines()) <= 11


# help -------------------------------------------------------------------------------------------------------------

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_json_and_those_that_compute_take_a_device(name: str) -> None:
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert ("--json" in options) == (name != "app")  # which prints no result
    computes = name in ("harden", "fit", "calibrate", "predict", "attack", "evaluate", "compare")
    assert ({"--device", "--workers"} <= options) == computes


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_values_by_what_they_are_and_not_by_their_type(name: str) -> None:
    done = zepad(name, "--help")
    assert done.returncode == 0
    options = done.stdout.partition(" Options ")[2]
    assert not re.findall(r"<(?!bool)[a-z ]+>|\b(?:TEXT|INTEGER|FLOAT)\b", options)


def test_completion_is_on() -> None:
    assert "--install-completion" in zepad("--help").stdout
