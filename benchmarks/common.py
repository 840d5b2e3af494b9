"""Data, encoders, scores and table lines that the benchmarks share."""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
from public_encoders import CifarResNet, load_public
from safetensors.torch import load_file
from torch import Tensor, nn

from zepad import Encoder, EncoderSpec, Preprocessing
from zepad.attacks import PGD, cross_entropy, margin
from zepad.data import ImageDataset, LabelledImages, load_data
from zepad.encoders import build_encoder
from zepad.evaluation import UniversalAttack, universal_attacks

MIRROR_HELP = "local mirror of CIFAR-10 and the public encoders; without it they are downloaded"
MIRRORED = {
    ("cifar10", "train"): ("cifar10_train_a", "cifar10_train_b"),
    ("cifar10", "test"): ("cifar10_test",),
    ("imagenette64", "train"): ("imagenette64_train",),
    ("imagenette64", "test"): ("imagenette64_test",),
}
"""The `.npz` files of a local mirror, by data set and split."""


def add_universal(parser: argparse.ArgumentParser) -> None:
    """Let the caller leave out universal attacks, each of which is fitted for minutes."""
    names = list(universal_attacks(eps=0.1))
    parser.add_argument(
        "--universal", nargs="*", choices=names, default=names, help="universal attacks to fit; by default all five"
    )


def universal(names: Collection[str], *, eps: float, seed: int) -> dict[str, UniversalAttack]:
    """Return the universal attacks of these names with their default settings."""
    return {name: attack for name, attack in universal_attacks(eps=eps, seed=seed).items() if name in names}


def load_images(
    source: str,
    split: Literal["train", "test"],
    *,
    shared: Path | None = None,
    size: int = 32,
    limit: int | None = None,
) -> LabelledImages:
    """Return the first images of a data set in memory.

    Args:
        source: `"digits"`; `"cifar10"`, which is downloaded where it is missing; anything else that
            `zepad.data.load_data` takes; or, where there is a local mirror, `"imagenette64"`.
        split: `"train"` or `"test"`.
        shared: Local mirror with CIFAR-10 and Imagenette below `data/`.
        size: Side of the images in pixels.
        limit: Number of images at most.

    Returns:
        Images, float32 `(N, 3, size, size)` in [0, 1], labels and class names. The first 10,000 training images and all
        test images of CIFAR-10 are in the same order from the mirror and from the published archive.
    """
    names = MIRRORED.get((source, split)) if shared is not None else None
    if names is not None:
        parts = [load_data(f"npz:{shared / 'data' / name}.npz", "all", size=size) for name in names]
    else:
        parts = [load_data(source, split, size=size, download=True)]
        if source == "cifar10":
            with np.load(Path(__file__).with_name("cifar10_order.npz")) as recorded:
                parts = [parts[0].select(order_by_digest(parts[0], recorded[split].tolist()))]
    return in_memory(parts, limit)


def in_memory(parts: list[ImageDataset], limit: int | None) -> LabelledImages:
    """Read the first images of several data sets, one after the other."""
    left = sum(map(len, parts)) if limit is None else limit
    images, labels = [], []
    for part in parts:
        chosen = part.select(torch.arange(min(left, len(part))))
        images += [image for image, _ in map(chosen.__getitem__, range(len(chosen)))]
        labels.append(chosen.labels)
        left -= len(chosen)
    return LabelledImages(torch.stack(images), torch.cat(labels), parts[0].classes)


def order_by_digest(data: ImageDataset, wanted: list[int]) -> Tensor:
    """Return the positions of the wanted images, and after them those of all others in their own order.

    `cifar10_order.npz` has the digests of the images that the tables of docs/results.md used, in their order there.

    Args:
        data: The images to choose from.
        wanted: Digests of images, as `short_digest` returns them.

    Raises:
        ValueError: If an image is missing.
    """
    where = {short_digest(data[index][0]): index for index in range(len(data))}
    missing = sum(digest not in where for digest in wanted)
    if missing:
        raise ValueError(
            f"{missing} of {len(wanted)} recorded images are missing: is this another version of the data?"
        )
    first = [where[digest] for digest in wanted]
    return torch.tensor([*first, *sorted(set(range(len(data))) - set(first))])


def short_digest(image: Tensor) -> int:
    """Return the first four bytes of the SHA-256 digest of an image's pixels, as bytes `(H, W, C)`."""
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    return int.from_bytes(hashlib.sha256(pixels.numpy().tobytes()).digest()[:4], "big")


def part(data: LabelledImages, rows: Tensor) -> LabelledImages:
    """Return some images of a data set."""
    return LabelledImages(data.images[rows], data.labels[rows], data.classes)


def split(
    source: str, shared: Path | None, limit: int | None, seed: int
) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """Return training, validation and test images of `"digits"` or `"cifar10"`.

    Of the digits a fifth of the training images, by seed, is held out. The public encoders of CIFAR-10 saw every
    training image, so that the second half of the test images serves as validation set and the first as test set.
    """
    images = load_images(source, "train", shared=shared, limit=limit)
    test = load_images(source, "test", shared=shared)
    if source == "digits":
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        cut = math.ceil(len(images) / 5)
        return part(images, order[cut:]), part(images, order[:cut]), test
    first, second = torch.arange(len(test)).chunk(2)
    return images, part(test, second), part(test, first)


def cifar_resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 with the stem of small images (3x3, stride 1, no pooling) and no classifier."""
    model = torchvision.models.resnet18()
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool, model.fc = nn.Identity(), nn.Identity()
    return model


ARCHITECTURES: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "resnet18": lambda: (cifar_resnet18(), 512),
    "resnet20": lambda: (CifarResNet(20), 64),
}
"""The encoders that `pretrain_cifar.py` trains, each with its number of features."""

HALF = 0.5
"""Mean and standard deviation of the preprocessing of those encoders."""


def load_encoders(name: str, shared: Path | None = None, folder: Path | None = None) -> tuple[Encoder, Encoder]:
    """Return victim and auxiliary.

    Args:
        name: `"digits"`, the two encoders inside the package; `"resnet18"` or `"resnet20"`, encoders of CIFAR-10
            pre-trained without labels by Barlow Twins and SimCLR; any other name, the public supervised CIFAR ResNets
            of depth 20 and 32.
        shared: Local mirror with the public encoders below `encoders/`; None downloads them.
        folder: Where `pretrain_cifar.py` left its encoders; None is `benchmarks/encoders`, which has ResNet-20s.
    """
    methods = ("barlow-twins", "simclr")
    if name == "digits":
        victim, auxiliary = (build_encoder(EncoderSpec.parse(f"zepad:digits-{m}"), pretrained=True) for m in methods)
    elif name in ARCHITECTURES:
        victim, auxiliary = (_pretrained(name, method, folder) for method in methods)
    else:
        victim, auxiliary = (load_public(f"cifar-resnet{depth}", shared) for depth in (20, 32))
    return victim, auxiliary


def _pretrained(name: str, method: str, folder: Path | None) -> Encoder:
    file = (folder or Path(__file__).with_name("encoders")) / f"{name}-{method}.safetensors"
    if not file.exists():
        raise SystemExit(f"{file} is missing. Make it with benchmarks/pretrain_cifar.py --encoder {name}.")
    model, _ = ARCHITECTURES[name]()
    model.load_state_dict(load_file(file))
    mean = std = (HALF,) * 3
    return Encoder(model.eval(), preprocessing=Preprocessing(mean=mean, std=std, size=(32, 32)))


def white_box(model: nn.Module, images: Tensor, labels: Tensor, eps: float, *, steps: int = 20) -> float:
    """Return the accuracy left by PGD on cross-entropy and on the margin, the worse of the two for each image."""
    survives = torch.ones(len(labels), dtype=torch.bool)
    for loss_fn in (cross_entropy, margin):
        attack = PGD(eps=eps, steps=steps, step_size=eps / 8, loss_fn=loss_fn)
        generator = torch.Generator().manual_seed(0)
        for chunk in torch.arange(len(labels)).split(250):
            attacked = attack(model, images[chunk], labels[chunk], generator=generator)
            with torch.no_grad():
                survives[chunk] &= model(attacked).argmax(1) == labels[chunk]
    return float(survives.float().mean())


def autoattack(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, seed: int) -> Tensor:
    """Return the images as the standard version of AutoAttack leaves them, by the package of its authors."""
    from autoattack import AutoAttack  # not on PyPI: everything else does without

    attack = AutoAttack(model, norm="Linf", eps=eps, seed=seed, device=images.device)
    attacked: Tensor = attack.run_standard_evaluation(images, labels)
    assert (attacked - images).abs().max() <= eps + 1e-6
    return attacked


def benign(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy on images as they are."""
    with torch.no_grad():
        hits = [(model(images[c]).argmax(1) == labels[c]).sum() for c in torch.arange(len(labels)).split(500)]
    return float(sum(hits)) / len(labels)


def header(*names: str) -> tuple[str, str]:
    """Format the first two lines of a table."""
    return row(*names), "|" + "---|" * len(names)


def row(*cells: str) -> str:
    """Format a line of a table."""
    return "| " + " | ".join(cells) + " |"


def cell(values: list[float], scale: int = 100) -> str:
    """Format a mean, with the standard deviation where there are several values."""
    digits = 1 if scale == 100 else 3
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"
