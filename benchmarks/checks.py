"""What do the checks cost? Loading, deciding and calling, on a defense of three ResNet-18.

python benchmarks/checks.py

Prints a Markdown table of milliseconds of processor time on one thread, each the median of several runs. Weights are
random: no check depends on what they say. The operating system keeps the files in memory after the first run.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from zepad import BenignConfig, HardenConfig, HeadConfig, Preprocessing, ZePAD
from zepad.arguments import checked
from zepad.inputs import check_images
from zepad.persistence import read_config


def milliseconds(call: Callable[[], object], runs: int) -> float:
    """Return the median time of a call, after one that does not count."""
    call()
    times = []
    for _ in range(runs):
        start = time.process_time()
        call()
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times)


def defended() -> ZePAD:
    """Return a fitted defense of three ResNet-18 with random weights, trained too shortly to defend anything."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    normal = Preprocessing.imagenet()
    defense = ZePAD.from_encoders(resnet18(), resnet18(), preprocess=normal, num_classes=10, preset="paper")
    loader = DataLoader(TensorDataset(torch.rand(20, 3, 32, 32), torch.arange(20) % 10), batch_size=20)
    defense.harden(loader, HardenConfig(epochs=1, steps=1, val_fraction=0), progress=False)
    return defense.fit_benign(
        loader, BenignConfig(epochs=1, val_fraction=0), head_config=HeadConfig(epochs=1), progress=False
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    defense = defended()
    images = torch.rand(16, 3, 224, 224)

    @checked
    def plain(
        loader: list[int], config: HardenConfig, *, progress: bool = True, folder: str | Path | None = None
    ) -> None:
        del loader, config, progress, folder

    config = HardenConfig()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        defense.save_pretrained(folder)
        files = [folder / file for file in read_config(folder / "config.json").files]
        size = sum(file.stat().st_size for file in files) / 1e6
        rows = {
            f"`from_pretrained`, {size:.0f} MB in all": lambda: ZePAD.from_pretrained(folder),
            "of which config.json, read through its schema": lambda: read_config(folder / "config.json"),
            "of which the SHA-256 of every file": lambda: [hashlib.sha256(file.read_bytes()) for file in files],
            "whether all weights are finite": lambda: all(t.isfinite().all() for t in defense.state_dict().values()),
            "`predict` on 16 images of 224x224": lambda: defense.predict(images),
            "of which the check of shape, range and finite pixels": lambda: check_images(images, channels=3),
            "the types of four arguments": lambda: plain([1, 2], config, progress=False, folder=folder),
        }
        print("| what | ms |\n|---|---|")
        for row, call in rows.items():
            print(f"| {row} | {milliseconds(call, options.runs):.3g} |")


if __name__ == "__main__":
    main()
