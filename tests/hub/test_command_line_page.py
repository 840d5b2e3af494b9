"""The six commands of the page on the command line, from a folder of images to predictions, on the loopback Hub."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from hub.hub_client import HubClient
from hub.hub_server import WRITER, HubServer
from hub.test_cli_hub import CommandLine
from zepad.data import digits

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
QUICK = {
    "harden": ["--preset", "paper", "--epochs", "1", "--steps", "1", "--quiet"],
    "fit": ["--epochs", "1", "--quiet"],
    "push": ["--token", WRITER],
}


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """A folder of two classes of 125 images each, and one of photos."""
    data = digits("train")
    for label in (0, 1):
        folder = tmp_path / "birds" / ("robin", "wren")[label]
        folder.mkdir(parents=True)
        for number, index in enumerate((data.labels == label).nonzero().flatten()[:125].tolist()):
            pixels = (data.images[index].permute(1, 2, 0) * 255).round().byte().numpy()
            Image.fromarray(pixels).save(folder / f"{number}.png")
    shutil.copytree(tmp_path / "birds" / "wren", tmp_path / "photos")
    return tmp_path


@pytest.mark.slow
def test_the_six_commands_lead_from_a_folder_to_predictions(lfs: HubClient, hub: HubServer, birds: Path) -> None:
    block = re.search(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    commands = [shlex.split(line) for line in block[1].splitlines()]
    assert [words[1] for words in commands] == ["harden", "fit", "calibrate", "push", "pull", "predict"]
    zepad = CommandLine(lfs, birds)
    for _, name, *arguments in commands:
        done = zepad(name, *arguments, *QUICK.get(name, []))
        assert done.code == 0, f"{name}: {done.err}"
        if name == "pull":
            shutil.rmtree(birds / "model")
    assert hub.files("alice/birds")
    with (birds / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 125
    assert {row["label"] for row in rows} <= {"robin", "wren"}
    assert sum(row["label"] == "wren" for row in rows) > 100
    assert {row["attacked"] for row in rows} <= {"True", "False"}
