"""Whether the benign (BMP) encoder should be frozen, fine-tuned, or the better of the two on held-out images.

The packaged SimCLR encoder meets many digits, few digits, and digits that are turned and inverted; the same
encoder, fine-tuned with the labels of 1,000 digits, meets 60 others.

python benchmarks/benign_forms.py --seeds 3
"""

from __future__ import annotations

import argparse
import copy

import torch
from common import benign, cell, header, part, row
from torch import Tensor
from torch.utils.data import DataLoader

from zepad import BenignConfig
from zepad.data import LabelledImages, digits
from zepad.encoders import Encoder
from zepad.encoders.given import as_encoder
from zepad.training import train_benign

FORMS = {"fine-tuned": False, "frozen": True, "default": None}


def turned(images: Tensor) -> Tensor:
    """Return images on their side with black and white exchanged, unlike anything the encoder has seen."""
    return 1 - images.flip(-1).transpose(-1, -2)


def train(encoder: Encoder, data: LabelledImages, config: BenignConfig) -> tuple[torch.nn.Module, bool | None]:
    """Return the benign branch, and whether its encoder was left frozen where that was a choice."""
    loader = DataLoader(data, batch_size=min(128, max(16, len(data) // 8)), shuffle=True)
    branch, record = train_benign(copy.deepcopy(encoder), loader, config, num_classes=10, progress=False)
    return branch, record.get("choice", {}).get("freeze_encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="number of passes; the default of BenignConfig if left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known, test = digits("train"), digits("test")
    public = as_encoder("benign", "zepad:digits-simclr")
    labelled = part(known, torch.arange(1000))
    supervised = train(public, labelled, BenignConfig(freeze_encoder=False, epochs=options.epochs))[0].encoder
    far_known, far_test = (LabelledImages(turned(data.images), data.labels, data.classes) for data in (known, test))
    tasks = {
        "1,300 digits": (public, known, test, 0, 1300),
        "300 digits": (public, known, test, 0, 300),
        "100 digits": (public, known, test, 0, 100),
        "300 digits, turned and inverted": (public, far_known, far_test, 0, 300),
        "60 digits, encoder pre-trained with labels": (supervised, known, test, 1000, 60),
    }
    print("\n".join(header("local data", *FORMS, "frozen kept")))
    for name, (encoder, data, unseen, start, count) in tasks.items():
        results: dict[str, list[float]] = {form: [] for form in FORMS}
        kept = 0
        for seed in range(options.seeds):
            order = torch.randperm(len(data) - start, generator=torch.Generator().manual_seed(seed))[:count] + start
            for form, freeze in FORMS.items():
                config = BenignConfig(freeze_encoder=freeze, seed=seed, epochs=options.epochs)
                branch, frozen = train(encoder, part(data, order), config)
                results[form].append(benign(branch, unseen.images, unseen.labels))
                kept += bool(frozen)
        print(row(name, *map(cell, results.values()), f"{kept} of {options.seeds}"), flush=True)


if __name__ == "__main__":
    main()
