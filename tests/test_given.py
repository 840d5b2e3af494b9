"""Images come in as people have them, and say the same in every form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchvision import transforms
from torchvision.transforms import v2

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, HardenConfig, HeadConfig, Preprocessing, ZePAD
from zepad.attacks import PGD, SSP
from zepad.data import columns, read_image
from zepad.data import given as given_images
from zepad.encoders import Encoder
from zepad.errors import InputError
from zepad.evaluation import Attacker, accuracy, evaluate

datasets = pytest.importorskip("datasets")

PIXELS = (toy_data(12)[0] * 255).round().byte()  # as a file holds them
IMAGES, LABELS = PIXELS.float() / 255, toy_data(12)[1]
CALLS = ("predict", "predict_proba", "detection_score", "detect")


def array(index: int) -> np.ndarray[Any, Any]:
    """One image as NumPy and Pillow have it, uint8 `(H, W, 3)`."""
    return PIXELS[index].permute(1, 2, 0).numpy()


def picture(index: int) -> Image.Image:
    return Image.fromarray(array(index))


def at_sizes(fitted: ZePAD, *preprocessing: Preprocessing) -> ZePAD:
    """Give the encoders of a defense input sizes."""
    defense = copy.deepcopy(fitted)
    for role, each in zip(("victim", "auxiliary", "benign"), preprocessing, strict=True):
        branch = defense.branch(role)
        branch.encoder = Encoder(branch.encoder.backbone, preprocessing=each).eval()
    return defense


# one image --------------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[int, Path], Any]] = {
    "a PIL image": lambda i, _: picture(i),
    "a path": lambda i, folder: saved(i, folder),
    "a path as text": lambda i, folder: str(saved(i, folder)),
    "an array": lambda i, _: array(i),
    "an array of float64": lambda i, _: array(i) / 255,
    "an array of big-endian floats": lambda i, _: (array(i) / 255).astype(">f4"),
    "an array that is read-only and reversed": lambda i, _: read_only(array(i)[:, ::-1])[:, ::-1],
    "a tensor": lambda i, _: IMAGES[i],
    "a tensor of bytes": lambda i, _: PIXELS[i],
}


def saved(index: int, folder: Path) -> Path:
    picture(index).save(folder / f"{index}.png")
    return folder / f"{index}.png"


def read_only(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    pixels = pixels.copy()
    pixels.flags.writeable = False
    return pixels


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_an_image_gets_the_answer_of_its_tensor(
    fitted: ZePAD, form: Callable[[int, Path], Any], tmp_path: Path
) -> None:
    given = [form(index, tmp_path) for index in range(4)]
    for call in CALLS:
        answer = getattr(fitted, call)
        expected = answer(IMAGES[:4])
        assert torch.equal(answer(given), expected)
        assert torch.equal(answer(tuple(given)), expected)
        for index, image in enumerate(given):
            alone = answer(image)
            assert alone.shape == expected.shape[1:]  # one image in, one answer out
            torch.testing.assert_close(alone, expected[index])
    assert torch.equal(fitted.inspect(given).probabilities, fitted.inspect(IMAGES[:4]).probabilities)
    assert fitted.inspect(given[0]).labels.shape == (1,)


def test_the_forms_may_be_mixed_and_the_answers_keep_their_order(fitted: ZePAD, tmp_path: Path) -> None:
    given = [form(index, tmp_path) for index, form in enumerate(FORMS.values())]
    assert torch.equal(fitted.predict_proba(given), fitted.predict_proba(IMAGES[: len(given)]))


def test_batches_of_arrays_and_bytes_are_batches(fitted: ZePAD) -> None:
    expected = fitted.predict_proba(IMAGES)
    for batch in (PIXELS, PIXELS.permute(0, 2, 3, 1).numpy(), IMAGES.permute(0, 2, 3, 1).numpy()):
        assert torch.equal(fitted.predict_proba(batch), expected)
        assert torch.equal(fitted.predict_proba([batch[:5], batch[5:]]), expected)
    assert fitted.predict(PIXELS[:1].permute(0, 2, 3, 1).numpy()).shape == (1,)  # a batch of one stays a batch


def test_grey_and_transparent_images_are_read_as_their_files_are(fitted: ZePAD, tmp_path: Path) -> None:
    grey, clear = np.arange(256, dtype=np.uint8).reshape(16, 16), np.full((16, 16, 4), (200, 30, 90, 0), np.uint8)
    for pixels, mode in ((grey, "L"), (clear, "RGBA")):
        path = tmp_path / f"{mode}.png"
        Image.fromarray(pixels).save(path)
        expected = fitted.predict_proba(read_image(path)[None])[0]
        forms = [path, Image.open(path), pixels, pixels / 255, *([grey[..., None]] if mode == "L" else [])]
        for form in forms:
            assert torch.equal(fitted.predict_proba(form), expected)


def test_a_pil_image_is_turned_upright_as_its_file_is_and_left_as_it_was(fitted: ZePAD, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(array(0)[:, :9]).save(tmp_path / "turned.png", exif=exif)
    image = Image.open(tmp_path / "turned.png")
    assert torch.equal(given_images.as_batches(image).batches.__next__()[0], read_image(tmp_path / "turned.png"))
    assert image.size == (9, 16)
    assert image.getexif()[0x0112] == 6


def test_a_model_of_grey_images_gets_grey_images() -> None:
    (batch,) = given_images.as_batches([picture(0), np.zeros((16, 16), np.uint8)], channels=1).batches
    assert batch.shape == (2, 1, 16, 16)
    assert torch.equal((batch[0] * 255).round().byte()[0], torch.from_numpy(np.array(picture(0).convert("L"))))
    five = np.random.default_rng(0).random((7, 6, 5))
    (batch,) = given_images.as_batches(five, channels=5).batches
    assert torch.equal(batch[0], torch.from_numpy(five.transpose(2, 0, 1)).float())


# sizes ------------------------------------------------------------------------------------------------------------

SIZED = {
    "one size": [Preprocessing.imagenet(size=(12, 10), interpolation="bicubic")] * 3,
    "a size each": [Preprocessing(size=(12, 12)), Preprocessing(size=(9, 9)), Preprocessing(size=(12, 12))],
}


@pytest.mark.parametrize("preprocessing", SIZED.values(), ids=SIZED.keys())
def test_images_of_several_sizes_are_answered_as_each_alone(fitted: ZePAD, preprocessing: list[Preprocessing]) -> None:
    defense = at_sizes(fitted, *preprocessing)
    images = [IMAGES[0], IMAGES[1][:, :9], IMAGES[2][:, :, 3:], IMAGES[3], picture(4).resize((30, 20))]
    alone = torch.stack([defense.predict_proba(image) for image in images])
    torch.testing.assert_close(defense.predict_proba(images), alone)
    assert torch.equal(defense.inspect(images).labels, alone.argmax(dim=1))


def test_one_encoder_without_a_size_forbids_several(fitted: ZePAD) -> None:
    defense = at_sizes(fitted, Preprocessing(size=(12, 12)), Preprocessing(), Preprocessing(size=(12, 12)))
    with pytest.raises(InputError, match="not every encoder states an input size"):
        defense.predict([IMAGES[0], IMAGES[0, :, 1:]])


def test_a_long_list_is_read_a_part_at_a_time(fitted: ZePAD, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given_images, "_TOGETHER", 5 * IMAGES[0].numel())
    batches = given_images.as_batches([picture(i) for i in range(12)]).batches
    assert [len(batch) for batch in batches] == [5, 5, 2]


# loaders ----------------------------------------------------------------------------------------------------------


class Dicts(Dataset[Any]):
    """Items as `datasets` has them, under chosen names."""

    def __init__(self, image: str = "image", label: str = "label") -> None:
        self.image, self.label = image, label

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {self.image: PIXELS[index], self.label: int(LABELS[index]), "name": f"number {index}"}


class Stream(IterableDataset[Any]):
    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return (self.items[index] for index in range(len(self.items)))


def hugging_face(image: str = "image", label: str = "label") -> Any:
    features = {image: datasets.Image(), label: datasets.ClassLabel(names=["red", "green", "blue"])}
    rows = {image: [picture(i) for i in range(len(IMAGES))], label: LABELS.tolist()}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features)).with_format("torch")


def loaded(data: Any, **settings: Any) -> Any:
    return DataLoader(data, batch_size=5, **settings)


HUGGING_FACE = hugging_face()
OTHER_NAMES = hugging_face("img", "fine_label")
LOADERS: dict[str, Callable[[], Any]] = {
    "dicts": lambda: loaded(Dicts()),
    "pixel_values and labels": lambda: loaded(Dicts("pixel_values", "labels")),
    "images": lambda: [{"images": IMAGES[:5], "labels": LABELS[:5]}, {"images": IMAGES[5:], "labels": LABELS[5:]}],
    "datasets": lambda: loaded(HUGGING_FACE),
    "columns of datasets": lambda: columns(loaded(OTHER_NAMES), image="img", label="fine_label"),
    "columns of batches": lambda: columns([{"a": PIXELS, "b": LABELS}], image="a", label="b"),
    "a stream": lambda: loaded(Stream(Dicts())),
    "a stream of datasets": lambda: loaded(HUGGING_FACE.to_iterable_dataset().with_format("torch")),
    "bytes": lambda: loaded(TensorDataset(PIXELS, LABELS)),
}
loaders = pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())


@loaders
def test_a_loader_of_dicts_says_what_a_loader_of_pairs_says(fitted: ZePAD, make: Callable[[], Any]) -> None:
    pairs = [(IMAGES, LABELS)]
    torch.testing.assert_close(fitted.predict_proba(make()), fitted.predict_proba(pairs))
    assert torch.equal(fitted.inspect(make()).labels, fitted.inspect(pairs).labels)
    assert accuracy(fitted, make()) == accuracy(fitted, pairs)
    calibrated, expected = (copy.deepcopy(fitted).calibrate(data, fpr=0.3) for data in (make(), pairs))
    assert calibrated.threshold == pytest.approx(expected.threshold)


@pytest.mark.parametrize("name", ["dicts", "datasets", "columns of datasets", "columns of batches", "a stream"])
def test_training_on_dicts_is_training_on_pairs(name: str) -> None:
    def trained(loader: Any) -> ZePAD:
        torch.manual_seed(0)
        defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder())
        defense.harden(loader, HardenConfig(epochs=1, steps=1, val_fraction=0.2), progress=False)
        defense.fit_benign(loader, BenignConfig(epochs=1), head_config=None, progress=False)
        return defense.fit_heads(loader, HeadConfig(epochs=1), progress=False)

    data = TensorDataset(IMAGES, LABELS)
    pairs = {"columns of batches": [(IMAGES, LABELS)], "a stream": loaded(Stream(data))}.get(name, loaded(data))
    ours, expected = trained(LOADERS[name]()), trained(pairs)
    assert ours.num_classes == expected.num_classes == 3
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


def test_class_names_of_datasets_become_those_of_the_model(fitted: ZePAD) -> None:
    attacker = Attacker(name="PGD", threat_model="white-box", attack=PGD(eps=8 / 255, steps=1))
    for loader in (LOADERS["datasets"](), LOADERS["columns of datasets"]()):
        defense = copy.deepcopy(fitted)
        defense.harden(loader, HardenConfig(epochs=1, steps=1, val_fraction=0.3), progress=False)
        assert defense.class_names == ("red", "green", "blue")  # looking through the part that was not held out
        assert defense.provenance["harden"]["images"] == 12
        report = evaluate(fitted, loader, [attacker], sanity=False, progress=False)
        assert report.classes == ("red", "green", "blue")


def test_a_universal_attack_is_crafted_on_dicts_as_on_pairs() -> None:
    encoder, attack = TinyEncoder(), SSP(eps=8 / 255, epochs=1)
    found = [attack.fit(encoder, data, progress=False).delta for data in (LOADERS["datasets"](), [*IMAGES.split(5)])]
    assert torch.equal(*found)


def test_columns_keep_a_loader_as_it_is() -> None:
    loader = loaded(OTHER_NAMES, shuffle=True, generator=torch.Generator().manual_seed(3))
    renamed = columns(loader, image="img")
    assert isinstance(renamed, DataLoader)
    assert (renamed.dataset, renamed.sampler, len(renamed)) == (loader.dataset, loader.sampler, len(loader))
    assert [set(batch) for batch in loader] == [{"img", "fine_label"}] * 3
    assert [set(batch) for batch in renamed] == [{"image"}] * 3
    with pytest.raises(InputError, match="with the column 'picture'; got a dict of img, fine_label. Name columns"):
        next(iter(columns(loader, image="picture")))
    with pytest.raises(InputError, match="with the column 'image'; got list"):
        next(iter(columns([[IMAGES, LABELS]], image="image")))
    once = columns(iter([{"a": IMAGES}]), image="a")
    assert hasattr(once, "__next__"), "a one-shot iterator stays one, so that training refuses it"


def test_the_first_of_the_known_columns_counts(fitted: ZePAD) -> None:
    both = {"image": torch.zeros_like(IMAGES), "pixel_values": IMAGES}
    assert torch.equal(fitted.predict(both), fitted.predict(IMAGES))


# normalised pipelines ---------------------------------------------------------------------------------------------

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class Transformed(Dataset[Any]):
    """Images through a transform, as torchvision's data sets apply it."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.transform(picture(index)), int(LABELS[index])


class Processor:
    """What an image processor of transformers has for our purpose."""

    do_normalize = True
    image_mean, image_std = MEAN, STD

    def __call__(self, images: list[Image.Image]) -> Tensor:
        return torch.stack([transforms.functional.to_tensor(image) * 4 - 2 for image in images])


def through_a_closure() -> Any:
    processor = Processor()
    data = hugging_face().with_format(None)
    data.set_transform(lambda rows: {"pixel_values": processor(rows["image"]), "label": torch.tensor(rows["label"])})
    return data


def with_timm() -> Any:
    timm_data = pytest.importorskip("timm.data")
    return Transformed(timm_data.create_transform(16, mean=MEAN, std=STD))


def with_weights() -> Any:
    from torchvision.models import ResNet18_Weights

    return Transformed(ResNet18_Weights.DEFAULT.transforms(crop_size=16, resize_size=16))


NORMALISED: dict[str, tuple[Callable[[], Any], str]] = {
    "torchvision": (
        lambda: Transformed(transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])),
        r"torchvision's Normalize\(mean=\(0.5, 0.5, 0.5\), std=\(0.25, 0.25, 0.25\)\): remove it\.",
    ),
    "nested, of torchvision's second version": (
        lambda: Transformed(
            v2.Compose([v2.PILToTensor(), v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])])
        ),
        r"torchvision's Normalize\(.*\): remove it\.",
    ),
    "in a subset": (
        lambda: torch.utils.data.Subset(
            Transformed(transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])), [0, 1]
        ),
        r"torchvision's Normalize\(",
    ),
    "weights of torchvision": (
        with_weights,
        r"ImageClassification\(mean=\(0.485, .* weights.transforms\(mean=\(0, 0, 0\)",
    ),
    "timm": (with_timm, r"Normalize\(mean=\(0.5, .*: remove it, or write normalize=False in timm's create_transform"),
    "a processor in set_transform": (
        through_a_closure,
        r"call Processor\(mean=\(0.5, 0.5, 0.5\).*set do_normalize=False",
    ),
    "something else": (
        lambda: TensorDataset(IMAGES * 4 - 2, LABELS),
        r"Remove Normalize from torchvision's and albumentations' transforms; .*normalize=False.*do_normalize=False",
    ),
}


@pytest.mark.parametrize(("make", "message"), NORMALISED.values(), ids=NORMALISED.keys())
def test_a_normalised_pipeline_is_recognised_and_the_message_names_it(
    fitted: ZePAD, make: Callable[[], Any], message: str
) -> None:
    loader = DataLoader(make(), batch_size=2)
    for call in (
        lambda: fitted.predict(loader),
        lambda: fitted.fit_heads(loader, num_classes=3, progress=False),
        lambda: fitted.calibrate(loader),
        lambda: accuracy(fitted, loader),
    ):
        with pytest.raises(InputError, match=rf"\(looks normalised\). Pass raw pixels.* {message}"):
            call()


def test_a_transform_that_raises_when_it_is_looked_at_does_not_hide_the_error(fitted: ZePAD) -> None:
    class Odd(Transformed):
        @property
        def transforms(self) -> Any:
            raise RuntimeError("not now")

    with pytest.raises(InputError, match=r"looks normalised.*Remove Normalize from"):
        fitted.predict(DataLoader(Odd(lambda image: transforms.functional.to_tensor(image) * 4 - 2)))


def test_what_the_messages_advise_is_taken(fitted: ZePAD) -> None:
    timm_data = pytest.importorskip("timm.data")
    from torchvision.models import ResNet18_Weights

    plain = ResNet18_Weights.DEFAULT.transforms(crop_size=16, resize_size=16, mean=(0, 0, 0), std=(1, 1, 1))
    without = timm_data.create_transform(16, crop_pct=1.0, normalize=False)
    for transform in (
        plain,
        transforms.Compose([without, v2.ToDtype(torch.float32, scale=True)]),
        transforms.ToTensor(),
    ):
        assert torch.equal(fitted.predict(DataLoader(Transformed(transform), batch_size=2)), fitted.predict(IMAGES[:4]))


# reports ----------------------------------------------------------------------------------------------------------


def test_the_report_on_one_image_is_its_own_and_has_the_names_of_classes(fitted: ZePAD) -> None:
    fitted.class_names = ("red", "green", "blue")
    one, two = fitted.inspect(picture(0)), fitted.inspect([picture(0), picture(1)])
    assert str(one).startswith(f"{one.name(int(one.labels[0]))} (")
    assert "image 0" not in str(one)
    assert str(two).startswith("image 0: ")
    assert str(two).partition("\n")[0] == f"image 0: {str(one).partition(chr(10))[0]}"
    probabilities = fitted.predict_proba([picture(0), picture(1)])
    torch.testing.assert_close(two.class_probabilities, probabilities)
