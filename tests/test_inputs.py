"""Inputs of public calls are checked once, rejected with an error that says what to do, and leave nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, HardenConfig, HeadConfig, ZePAD
from zepad.errors import InputError

IMAGES, LABELS = toy_data(12)
GOOD = (IMAGES, LABELS)
HARDEN, BENIGN, HEADS = HardenConfig(epochs=1, steps=1), BenignConfig(epochs=1), HeadConfig(epochs=1)
CALLS = ("harden", "fit_benign", "fit_heads")


def train(defense: ZePAD, call: str, loader: Any, **arguments: Any) -> ZePAD:
    config = {"harden": HARDEN, "fit_benign": BENIGN, "fit_heads": HEADS}[call]
    result: ZePAD = getattr(defense, call)(loader, config, progress=False, **arguments)
    return result


def snapshot(defense: ZePAD) -> dict[str, Any]:
    return {
        "tensors": {key: value.clone() for key, value in defense.state_dict().items()},
        "flags": {name: part.training for name, part in defense.named_modules()},
        "frozen": {name: weight.requires_grad for name, weight in defense.named_parameters()},
        "facts": copy.deepcopy(
            (defense.stage, defense.num_classes, defense.class_names, defense.threshold, defense.provenance)
        ),
    }


def assert_unchanged(defense: ZePAD, before: dict[str, Any]) -> None:
    after = snapshot(defense)
    tensors, expected = after.pop("tensors"), before["tensors"]
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in tensors.items())
    assert after == {key: value for key, value in before.items() if key != "tensors"}


# images ---------------------------------------------------------------------------------------------------------


def closed_image() -> Image.Image:
    image = Image.new("RGB", (4, 4))
    image.close()
    return image


def _with(value: float) -> Tensor:
    images = IMAGES.clone()
    images[3, 1, 2, 5] = value
    return images


BAD_IMAGES: dict[str, tuple[Any, str]] = {
    "normalised": (
        (IMAGES - 0.5) * 4,
        r"must lie in \[0, 1\]; got min -1.60, max 1.\d+ \(looks normalised\). Pass raw",
    ),
    "0..255": (
        IMAGES * 255,
        r"must lie in \[0, 1\]; got min 25.\d+, max 2\d\d.\d+ \(looks like 0..255\). Divide by 255",
    ),
    "just above": (_with(1.001), r"must lie in \[0, 1\]"),
    "just below": (_with(-0.001), r"must lie in \[0, 1\]"),
    "int64": ((IMAGES * 255).long(), r"floating point in \[0, 1\]; got dtype torch.int64. Convert with images.float"),
    "complex": (IMAGES.to(torch.complex64), "floating point"),
    "grey": (IMAGES[:, :1], r"3 channels.*got 1 in .* Repeat the grey channel with images.expand\(-1, 3, -1, -1\)"),
    "four channels": (torch.rand(12, 4, 16, 16), r"3 channels, shape \(N, 3, H, W\); got 4 in \(12, 4, 16, 16\)\.$"),
    "channels last": (IMAGES.permute(0, 2, 3, 1), r"looks like \(N, H, W, C\). Use images.permute\(0, 3, 1, 2\)"),
    "NaN": (_with(float("nan")), "finite; got NaN or infinity"),
    "inf": (_with(float("inf")), "finite; got NaN or infinity"),
    "-inf": (_with(float("-inf")), "finite; got NaN or infinity"),
    "one image": (IMAGES[0], r"shape \(N, C, H, W\); got \(3, 16, 16\). Add the batch dimension with images\[None\]"),
    "a vector": (IMAGES.flatten(1), r"shape \(N, C, H, W\); got \(12, 768\)\.$"),
    "no image": (IMAGES[:0], r"not be empty; got shape \(0, 3, 16, 16\)"),
    "no pixel": (IMAGES[:, :, :0], "not be empty"),
    "an array": (IMAGES.numpy(), r"torch.Tensor of shape .* got ndarray. Use torchvision.*to_tensor"),
    "None": (None, "got NoneType"),
    "a number": (7, "got int"),
    "a list": (IMAGES.tolist(), "got list"),
}

bad_images = pytest.mark.parametrize(("images", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())

# What a decision refuses when it is given without a loader: one image and arrays are legal there.
BAD_INPUTS = {name: bad for name, bad in BAD_IMAGES.items() if name != "one image"} | {
    "an array": (IMAGES.numpy(), r"an array must have shape .* got \(12, 3, 16, 16\). Pass channels first as a tensor"),
    "an array of int64": ((IMAGES.permute(0, 2, 3, 1) * 255).long().numpy(), r"got dtype int64.*astype\('uint8'\)"),
    "an array in 0..255": (IMAGES[0].permute(1, 2, 0).numpy() * 255, r"looks like 0..255\). Divide by 255"),
    "one image of 0..255": (IMAGES[0] * 255, r"looks like 0..255\). Divide by 255"),
    "one image, channels last": (IMAGES[0].permute(1, 2, 0), r"looks like \(H, W, C\). Use image.permute\(2, 0, 1\)"),
    "one grey image": (IMAGES[0, :1], r"image.expand\(3, -1, -1\)"),
    "bytes": (b"\x89PNG", r"got bytes. Open .* PIL.Image.open\(io.BytesIO"),
    "a data set": (TensorDataset(IMAGES), "Wrap a data set in torch.utils.data.DataLoader"),
    "a pair": ((IMAGES[0], 1), r"images\[1\]: one image must be .*; got int. Of a pair"),
    "a list with a bad one": ([IMAGES[0], IMAGES[1] * 255], r"images\[1\]: images must lie in"),
    "no file": ("nowhere.png", "nowhere.png is no image that can be read: No such file"),
    "a folder": (Path(__file__).parent, r"is a folder; .* sorted\(Path\(.*\).glob"),
    "no image file": (Path(__file__), "does not begin as one"),
    "16 bits": (Image.new("I;16", (4, 4)), "more than 8 bits"),
    "a closed image": (closed_image(), "is no image that can be read"),
    "no pixels": (Image.new("RGB", (0, 4)), "must not be empty"),
    "several sizes": ([IMAGES[0], IMAGES[0, :, 1:]], r"images\[1\] is 15 x 16 and those before it are 16 x 16"),
}


@pytest.mark.parametrize(("images", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
@pytest.mark.parametrize("call", ["predict", "predict_proba", "detection_score", "detect", "inspect", "calibrate"])
def test_images_that_do_not_fit_are_refused_by_every_decision(
    fitted: ZePAD, call: str, images: Any, message: str
) -> None:
    before = snapshot(fitted)
    if images is None or isinstance(images, (int, bytes, TensorDataset)):
        message = message if isinstance(images, (bytes, TensorDataset)) else "loader of such batches"
    elif isinstance(images, list) and isinstance(images[0], list):
        message = "images must be a torch.Tensor"  # iterated like a loader, whose first element is no batch
    with pytest.raises(InputError, match=message):
        getattr(fitted, call)(images)
    assert_unchanged(fitted, before)


@bad_images
def test_a_batch_that_does_not_fit_is_refused_wherever_it_comes(fitted: ZePAD, images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fitted.predict([IMAGES, GOOD, (images, LABELS)])


def test_rounding_may_leave_the_unit_interval(fitted: ZePAD) -> None:
    images = IMAGES.clone()
    images[:, :, 0], images[:, :, 1] = -5e-7, 1 + 5e-7
    assert len(fitted.predict(images)) == len(images)


def test_images_of_another_precision_are_taken(fitted: ZePAD) -> None:
    # NumPy computes in float64, so images from there often come in it.
    assert torch.equal(fitted.predict(IMAGES.double()), fitted.predict(IMAGES))


def test_a_loader_without_labels_will_do_for_decisions(fitted: ZePAD) -> None:
    for loader in ([IMAGES], [(IMAGES,)], [[IMAGES, LABELS]], iter([IMAGES]), DataLoader(TensorDataset(IMAGES))):
        assert torch.equal(fitted.predict(loader), fitted.predict(IMAGES))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "the loader is empty"),
        ([()], "got tuple"),
        ([{"x": 1}], r"got a dict of x, none of them .* image. Name the columns: zepad.data.columns\(loader, image="),
    ],
)
def test_loaders_that_hold_no_image_are_refused_for_decisions(fitted: ZePAD, loader: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fitted.predict(loader)


# training -------------------------------------------------------------------------------------------------------

BAD_LOADERS: dict[str, tuple[Any, str]] = {
    # A good batch comes first, so that the refusal meets a training that has begun.
    **{f"images: {name}": ([GOOD, (images, LABELS)], message) for name, (images, message) in BAD_IMAGES.items()},
    "no labels": ([GOOD, IMAGES], r"yield \(images, labels\); got Tensor. Training needs the label of every image"),
    "a tuple without labels": ([GOOD, (IMAGES,)], r"yield \(images, labels\); got tuple of length 1"),
    "a dict without labels": (
        [GOOD, {"image": IMAGES, "fine_label": LABELS}],
        r"yield \(images, labels\); got a dict of image, fine_label. Name the columns: zepad.data.columns\(loader",
    ),
    "a dict without images": ([GOOD, {"img": IMAGES, "label": LABELS}], r"got a dict of img, label.* Name the columns"),
    "label list": ([GOOD, (IMAGES, LABELS.tolist())], "labels must be a torch.Tensor of integers; got list"),
    "float labels": (
        [GOOD, (IMAGES, LABELS.float())],
        r"integer class indices; got dtype torch.float32. Use labels.long\(\)",
    ),
    "bool labels": ([GOOD, (IMAGES, LABELS > 0)], "integer class indices; got dtype torch.bool"),
    "float one-hot": (
        [GOOD, (IMAGES, torch.eye(3)[LABELS])],
        r"integer class indices.*labels.argmax\(1\) for one-hot rows",
    ),
    "integer one-hot": ([GOOD, (IMAGES, torch.eye(3).long()[LABELS])], r"shape \(12,\), one per image; got \(12, 3\)"),
    "too few labels": ([GOOD, (IMAGES, LABELS[:-1])], r"shape \(12,\), one per image; got \(11,\)"),
    "negative labels": (
        [GOOD, (IMAGES, LABELS - 1)],
        r"labels must lie in \[0, .*\); got min -1, max 1. Set num_classes",
    ),
    "an empty batch": ([GOOD, (IMAGES[:0], LABELS[:0])], "must not be empty"),
    "nothing": ([], "the loader is empty: it yielded no batch. Pass at least one labelled image"),
    "an iterator": (iter([GOOD]), "iterable more than once; got list_iterator, a one-shot iterator. Pass a DataLoader"),
    "a generator": ((batch for batch in [GOOD]), "got generator, a one-shot iterator"),
    "a tensor": (
        IMAGES,
        r"iterable of \(images, labels\) batches; got Tensor. Wrap tensors in torch.utils.data.DataLoader",
    ),
    "a data set": (TensorDataset(IMAGES, LABELS), r"iterable of \(images, labels\) batches; got TensorDataset"),
    "None": (None, r"iterable of \(images, labels\) batches; got NoneType"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("loader", "message"), BAD_LOADERS.values(), ids=BAD_LOADERS.keys())
def test_a_refused_loader_leaves_the_model_as_it_was(fitted: ZePAD, call: str, loader: Any, message: str) -> None:
    before = snapshot(fitted)
    with pytest.raises(InputError, match=message):
        train(fitted, call, loader)
    assert_unchanged(fitted, before)


def test_labels_beyond_the_declared_classes_are_refused() -> None:
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), num_classes=2)
    before = snapshot(defense)
    with pytest.raises(InputError, match=r"labels must lie in \[0, 2\); got min 0, max 2. Set num_classes"):
        train(defense, "harden", [GOOD])
    assert_unchanged(defense, before)


def test_labels_beyond_the_classes_of_the_new_task_are_refused(fitted: ZePAD) -> None:
    before = snapshot(fitted)
    with pytest.raises(InputError, match=r"labels must lie in \[0, 2\)"):
        train(fitted, "fit_heads", [GOOD], num_classes=2)
    assert_unchanged(fitted, before)


def test_labels_beyond_the_class_names_of_the_data_set_are_refused(fitted: ZePAD) -> None:
    class Named(Dataset[Any]):
        classes = ("one", "two")

        def __len__(self) -> int:
            return len(IMAGES)

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return IMAGES[index], LABELS[index]

    before = snapshot(fitted)
    for call in CALLS:
        with pytest.raises(InputError, match=r"labels must lie in \[0, 2\)"):
            train(fitted, call, DataLoader(Named(), batch_size=4))
        assert_unchanged(fitted, before)


@pytest.mark.parametrize("call", ["harden", "fit_benign"])
@pytest.mark.parametrize(
    ("val_loader", "message"),
    [([], "val_loader is empty"), ([(IMAGES * 255, LABELS)], "looks like 0..255"), ([IMAGES], "labels")],
    ids=["empty", "0..255", "no labels"],
)
def test_a_refused_val_loader_leaves_the_model_as_it_was(
    fitted: ZePAD, call: str, val_loader: Any, message: str
) -> None:
    before = snapshot(fitted)
    with pytest.raises(InputError, match=message):
        train(fitted, call, [GOOD], val_loader=val_loader)
    assert_unchanged(fitted, before)


class Spoils:
    """A loader whose images go bad after a number of good passes: a file that is overwritten while training runs."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes -= 1
        yield (IMAGES, LABELS) if self.passes >= 0 else (IMAGES * 255, LABELS)


@pytest.mark.parametrize(
    ("call", "passes", "needed"),
    [("harden", 1, 3), ("harden", 2, 3), ("fit_benign", 1, 3), ("fit_benign", 2, 3), ("fit_heads", 1, 2)],
    ids=["victim", "auxiliary", "benign", "heads after benign", "heads"],
)
def test_nothing_is_installed_until_everything_is_trained(fitted: ZePAD, call: str, passes: int, needed: int) -> None:
    before = snapshot(fitted)
    with pytest.raises(InputError, match=r"looks like 0..255"):
        train(fitted, call, Spoils(passes))
    assert_unchanged(fitted, before)
    train(fitted, call, Spoils(needed))
    with pytest.raises(AssertionError):
        assert_unchanged(fitted, before)
