"""Data and attacks that the benchmarks share."""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
from pathlib import Path
from types import ModuleType

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from zepad import Encoder, EncoderSpec, Preprocessing
from zepad.attacks import PGD, cross_entropy, margin
from zepad.data import LabelledImages, digits
from zepad.encoders import build_encoder


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def load_images(name: str, shared: Path | None, limit: int | None, size: int = 32) -> LabelledImages:
    """Return `"digits-train"`, `"digits-test"` or one of the files in `shared/data`, as floats in [0, 1]."""
    if name.startswith("digits-"):
        data = digits(name.removeprefix("digits-"))
        return LabelledImages(data.images[:limit], data.labels[:limit], data.classes)
    if name == "cifar10_train":  # stored in two halves
        halves = [load_images(f"cifar10_train_{half}", shared, limit) for half in "ab"]
        images, targets = (torch.cat([getattr(half, what) for half in halves])[:limit] for what in ("images", "labels"))
        return LabelledImages(images, targets, halves[0].classes)
    array, labels, classes = _module(shared / "data" / "load.py").load(name, limit)
    images = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
    return LabelledImages(images, torch.from_numpy(labels), classes)


def part(data: LabelledImages, rows: Tensor) -> LabelledImages:
    """Return some images of a data set."""
    return LabelledImages(data.images[rows], data.labels[rows], data.classes)


def split(
    train_name: str, shared: Path | None, limit: int | None, seed: int
) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """Return training, validation and test images.

    Of the digits a fifth of the training images, by seed, is held out. The public encoders of CIFAR-10 saw every
    training image, so that the second half of the test images serves as validation set and the first as test set.
    """
    images = load_images(train_name, shared, limit)
    if train_name == "digits-train":
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        cut = math.ceil(len(images) / 5)
        return part(images, order[cut:]), part(images, order[:cut]), load_images("digits-test", None, None)
    test = load_images("cifar10_test", shared, None)
    first, second = torch.arange(len(test)).chunk(2)
    return images, part(test, second), part(test, first)


def cifar_resnet18() -> nn.Module:
    """Return torchvision's ResNet-18 with the stem of small images (3x3, stride 1, no pooling) and no classifier."""
    model = torchvision.models.resnet18()
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool, model.fc = nn.Identity(), nn.Identity()
    return model


def load_encoders(name: str, shared: Path | None, folder: Path | None = None) -> tuple[nn.Module, nn.Module]:
    """Return victim and auxiliary.

    The packaged digits encoders, the supervised CIFAR ResNets of depth 20 and 32, or, from the folder where
    `pretrain_cifar.py` left them, ResNet-18s by Barlow Twins and SimCLR.
    """
    if name == "resnet18":
        return tuple(_pretrained(folder / f"resnet18-{method}.safetensors") for method in ("barlow-twins", "simclr"))
    if name == "digits":
        return tuple(
            build_encoder(EncoderSpec.parse(f"zepad:digits-{m}"), pretrained=True) for m in ("barlow-twins", "simclr")
        )
    load = _module(shared / "encoders" / "cifar_resnet.py").load
    return tuple(Encoder(load(depth), preprocessing=Preprocessing(size=(32, 32))) for depth in (20, 32))


def _pretrained(file: Path) -> Encoder:
    model = cifar_resnet18()
    model.load_state_dict(load_file(file))
    half = (0.5, 0.5, 0.5)
    return Encoder(model.eval(), preprocessing=Preprocessing(mean=half, std=half, size=(32, 32)))


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
