"""Data sets by name, from folders and from `.npz` files, against files written here in their exact layouts."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import shutil
import tarfile
import warnings
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets

from strategies import laws
from zepad import ConfigError, InputError
from zepad.data import digits, images, load_data, published, read_image
from zepad.data.load import NAMES

ANIMALS = ["cane", "cavallo", "elefante", "farfalla", "gallina", "gatto", "mucca", "pecora", "ragno", "scoiattolo"]
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
WNIDS = [f"n{number:08d}" for number in range(1440764, 1440784)]


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_classes(folder: Path, names: list[str], count: int = 2, size: int = 8) -> np.ndarray:
    """Write `count` PNG files per class; return the pixels in order of class and file name."""
    images = pixels(len(names) * count, size, size, 3)
    for number, image in enumerate(images):
        write_png(folder / names[number // count] / f"{number % count:03d}.png", image)
    return images


def as_floats(images: np.ndarray) -> torch.Tensor:
    """uint8 `(N, H, W, 3)` to `(N, 3, H, W)`, one image and channel at a time."""
    return torch.stack([torch.stack([torch.from_numpy(x[..., c] / np.float32(255)) for c in range(3)]) for x in images])


def everything(data) -> tuple[torch.Tensor, list[int]]:
    return torch.stack([image for image, _ in data]), [label for _, label in data]


# Published data sets, in the formats that torchvision downloads


def digest(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def write_cifar10(root: Path, monkeypatch, per_file: int = 3) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Pickles of `data`, a row per image of its red, green and blue planes, and of `labels`."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, names in (("train", [f"data_batch_{n}" for n in range(1, 6)]), ("test", ["test_batch"])):
        images = pixels(len(names) * per_file, 32, 32, 3, seed=len(names))
        labels = [(7 * number) % 10 for number in range(len(images))]
        for f, name in enumerate(names):
            part = slice(f * per_file, (f + 1) * per_file)
            rows = np.stack([np.concatenate([image[:, :, c].ravel() for c in range(3)]) for image in images[part]])
            (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": labels[part]}, protocol=2))
        written[split] = images, labels
        monkeypatch.setattr(datasets.CIFAR10, f"{split}_list", [[name, digest(folder / name)] for name in names])
    meta = folder / "batches.meta"
    meta.write_bytes(pickle.dumps({"label_names": CIFAR10_CLASSES}, protocol=2))
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": digest(meta)})
    return written


def write_stl10(root: Path, monkeypatch) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Planes column by column; labels from 1 to 10 in a file of their own."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    (folder / "unlabeled_X.bin").write_bytes(b"\x00")
    written = {}
    for split, count in (("train", 4), ("test", 3)):
        images, labels = pixels(count, 96, 96, 3, seed=count), [0, 9, 4, 1][:count]
        with (folder / f"{split}_X.bin").open("wb") as file:
            for image in images:
                for channel in range(3):
                    for column in range(96):
                        file.write(image[:, column, channel].tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(label + 1 for label in labels))
        written[split] = images, labels
        listed = [[name, digest(folder / name)] for name, _ in getattr(datasets.STL10, f"{split}_list")]
        monkeypatch.setattr(datasets.STL10, f"{split}_list", listed)
    return written


def write_svhn(root: Path, monkeypatch) -> dict[str, tuple[np.ndarray, list[int]]]:
    """MATLAB files with X `(32, 32, 3, N)` and y `(N, 1)`, the digit 0 written as 10."""
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, count in (("train", 5), ("test", 2)):
        images, labels = pixels(count, 32, 32, 3, seed=count), [0, 3, 9, 1, 0][:count]
        file = root / f"{split}_32x32.mat"
        y = np.array([[label or 10] for label in labels], dtype=np.uint8)
        savemat(file, {"X": np.moveaxis(images, 0, 3), "y": y}, do_compression=True)
        written[split] = images, labels
        monkeypatch.setitem(datasets.SVHN.split_list, split, [file.as_uri(), file.name, digest(file)])
    return written


def write_gtsrb(root: Path, monkeypatch) -> dict[str, tuple[list[np.ndarray], list[int]]]:
    """PPM files of many sizes; training classes are folders, test classes stand in a table."""
    folder = root / "gtsrb" / "GTSRB"
    train_labels = [0, *range(43)]
    train = [pixels(40 + n, 50 + n % 7, 3, seed=n) for n in range(len(train_labels))]
    for number, (image, label) in enumerate(zip(train, train_labels, strict=True)):
        write_png(folder / "Training" / f"{label:05d}" / f"{number:05d}_00000.ppm", image)
        (folder / "Training" / f"{label:05d}" / f"GT-{label:05d}.csv").write_text("Filename;ClassId\n")
    test, test_labels = [pixels(30, 20 + n, 3, seed=9 + n) for n in range(3)], [42, 1, 7]
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number, (image, label) in enumerate(zip(test, test_labels, strict=True)):
        write_png(folder / "Final_Test" / "Images" / f"{number:05d}.ppm", image)
        rows.append(f"{number:05d}.ppm;{image.shape[1]};30;5;6;48;49;{label}")
    (root / "gtsrb" / "GT-final_test.csv").write_text("\r\n".join(rows) + "\r\n")
    for split, count in (("train", len(train)), ("test", len(test))):
        monkeypatch.setitem(published.GTSRB_IMAGES, split, count)
    return {"train": (train, train_labels), "test": (test, test_labels)}


WRITERS = {"cifar10": write_cifar10, "stl10": write_stl10, "svhn": write_svhn}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", WRITERS)
def test_published_files_read_back_exactly(name, split, tmp_path, monkeypatch) -> None:
    images, labels = WRITERS[name](tmp_path, monkeypatch)[split]
    data = load_data(name, split, root=tmp_path)
    read, read_labels = everything(data)
    assert read.dtype == torch.float32
    assert torch.equal(read, as_floats(images))
    assert read_labels == labels == data.labels.tolist()
    assert data.labels.dtype == torch.int64
    assert len(data.classes) == 10


@pytest.mark.parametrize("split", ["train", "test"])
def test_gtsrb_is_stretched_to_64_by_default_and_has_43_signs(split, tmp_path, monkeypatch) -> None:
    images, labels = write_gtsrb(tmp_path, monkeypatch)[split]
    data = load_data("gtsrb", split, root=tmp_path)
    expected = [
        F.interpolate(as_floats(image[None]), (64, 64), mode="bilinear", antialias=True)[0].clamp(0, 1)
        for image in images
    ]
    read, read_labels = everything(data)
    assert torch.equal(read, torch.stack(expected))
    assert read_labels == labels
    assert (len(set(data.classes)), data.classes[14], data.classes[40]) == (43, "stop", "roundabout")


def test_cifar10_class_names_are_those_of_its_files(tmp_path, monkeypatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    assert load_data("cifar10", "test", root=tmp_path).classes == CIFAR10_CLASSES


def test_gtsrb_opens_no_image_before_it_is_asked_for(tmp_path, monkeypatch) -> None:
    _, labels = write_gtsrb(tmp_path, monkeypatch)["test"]
    (tmp_path / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / "00001.ppm").write_bytes(b"no image")
    data = load_data("gtsrb", "test", root=tmp_path)
    assert data.labels.tolist() == labels
    assert data[0][1] == 42
    with pytest.raises(InputError, match="00001.ppm is no image"):
        data[1]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", [*WRITERS, "gtsrb"])
def test_missing_files_say_what_where_and_how_to_get_them(name, split, tmp_path) -> None:
    where = f"{re.escape(str(tmp_path))}.* is missing"
    remedy = r"download=True \(--download\).*root= \(--root\)"
    with pytest.raises(InputError, match=rf"{name} \({split}\) .*{where}.*{remedy}"):
        load_data(name, split, root=tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_4"),
        ("cifar10", "cifar-10-batches-py/batches.meta"),
        ("stl10", "stl10_binary/train_X.bin"),
        ("stl10", "stl10_binary/train_y.bin"),
        ("svhn", "train_32x32.mat"),
    ],
)
def test_files_cut_short_are_never_read_as_smaller_data_sets(name, file, tmp_path, monkeypatch) -> None:
    WRITERS[name](tmp_path, monkeypatch)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) * 2 // 3])
    place = re.escape(str(tmp_path / file.split("/")[0]))
    with pytest.raises(InputError, match=f"{place} is damaged or incomplete.*Delete it.*--download.*--root"):
        load_data(name, "train", root=tmp_path)


class Response(io.BytesIO):
    """What `urlopen` returns, as far as torchvision looks at it."""

    def __init__(self, url: str, content: bytes) -> None:
        super().__init__(content)
        self.url, self.length = url, len(content)


@pytest.fixture
def web(monkeypatch) -> dict[str, bytes]:
    """All that can be downloaded, by address; empty unless a test adds something."""
    pages: dict[str, bytes] = {}

    def urlopen(request) -> Response:
        if request.full_url not in pages:
            raise URLError("no route to host")
        return Response(request.full_url, pages[request.full_url])

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return pages


class Payload:
    """A pickle of this makes a folder when it is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("file", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
@pytest.mark.parametrize("download", [False, True])
def test_a_tampered_pickle_of_cifar10_is_refused_unopened(file, download, tmp_path, monkeypatch, web) -> None:
    write_cifar10(tmp_path, monkeypatch)
    tampered = tmp_path / "cifar-10-batches-py" / file
    tampered.write_bytes(pickle.dumps({"data": Payload(tmp_path / "ran"), "labels": []}))
    for split in ("train", "test"):
        with pytest.raises(InputError, match="damaged"):
            load_data("cifar10", split, root=tmp_path, download=download)
    assert not (tmp_path / "ran").exists()
    pickle.loads(tampered.read_bytes())
    assert (tmp_path / "ran").exists()  # the payload would have run


def test_gtsrb_counts_its_images_and_reads_its_whole_table(tmp_path, monkeypatch) -> None:
    write_gtsrb(tmp_path, monkeypatch)
    answers = tmp_path / "gtsrb" / "GT-final_test.csv"
    text = answers.read_text()
    for damaged, problem in (
        (text.replace("00002.ppm", "00009.ppm"), "00009.ppm is missing"),
        (text.replace("ClassId", "Class"), "KeyError: 'ClassId'"),
        (text.replace(";7", ";43"), "max 43"),
        (text.replace(";7", ";seven"), "'seven'"),
        (text[: text.index("00002.ppm") + 12], "TypeError"),
        (text[: text.index("00002.ppm")], "it has 2 images instead of 3"),
        (text[: text.index("00000.ppm")], "it has 0 images instead of 3"),
    ):
        answers.write_text(damaged)
        with pytest.raises(InputError, match=f"Final_Test.Images is damaged or incomplete .*{problem}.*Delete it"):
            load_data("gtsrb", "test", root=tmp_path)
    answers.unlink()
    with pytest.raises(InputError, match="No such file.*GT-final_test.csv"):
        load_data("gtsrb", "test", root=tmp_path)
    (tmp_path / "gtsrb" / "GTSRB" / "Training" / "00000" / "00000_00000.ppm").unlink()
    with pytest.raises(InputError, match="it has 43 images instead of 44"):
        load_data("gtsrb", "train", root=tmp_path)


def test_gtsrb_without_one_of_its_classes_does_not_shift_the_others(tmp_path, monkeypatch) -> None:
    write_gtsrb(tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "gtsrb" / "GTSRB" / "Training" / "00014")
    with pytest.raises(InputError, match="it has 43 images instead of 44"):
        load_data("gtsrb", "train", root=tmp_path)


@pytest.mark.parametrize("name", [*WRITERS, "gtsrb"])
def test_a_download_that_fails_says_so(name, tmp_path, web) -> None:
    problem = rf"{name} \(test\) could not be downloaded into {re.escape(str(tmp_path))}.*no route to host.*--root"
    with pytest.raises(InputError, match=problem):
        load_data(name, "test", root=tmp_path, download=True)


@pytest.fixture
def served_cifar10(tmp_path, monkeypatch, web) -> dict[str, tuple[np.ndarray, list[int]]]:
    written = write_cifar10(tmp_path / "made", monkeypatch)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as packed:
        packed.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")
    web[datasets.CIFAR10.url] = archive.getvalue()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.getvalue()).hexdigest())
    return written


def test_download_mends_what_is_missing_or_damaged_and_is_not_repeated(served_cifar10, tmp_path, web) -> None:
    root = tmp_path / "new" / "root"
    (root / "cifar-10-batches-py").mkdir(parents=True)
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(b"half of it")
    data = load_data("cifar10", "train", root=root, download=True)
    assert torch.equal(everything(data)[0], as_floats(served_cifar10["train"][0]))
    web.clear()
    assert len(load_data("cifar10", "test", root=root, download=True)) == 3


def test_download_of_another_content_is_refused_before_it_is_unpacked(served_cifar10, tmp_path, web) -> None:
    web[datasets.CIFAR10.url] += b"\x00"
    with pytest.raises(InputError, match="could not be downloaded.*corrupted"):
        load_data("cifar10", "test", root=tmp_path / "root", download=True)
    assert not (tmp_path / "root" / "cifar-10-batches-py").exists()


# Folders


@pytest.mark.parametrize("source", ["folder:{}", "path"])
def test_folder_of_two_halves_reads_back_exactly(source, tmp_path) -> None:
    train = write_classes(tmp_path / "train", ["bee", "ant"], count=3)
    write_classes(tmp_path / "test", ["ant", "bee"], count=1)
    where = tmp_path if source == "path" else source.format(tmp_path)
    data = load_data(where, "train")
    read, labels = everything(data)
    assert data.classes == ["ant", "bee"]
    assert labels == [0, 0, 0, 1, 1, 1]
    assert torch.equal(read, as_floats(np.concatenate([train[3:], train[:3]])))
    assert len(load_data(where, "test")) == 2


def test_folder_without_halves_is_split_once_and_for_all(tmp_path) -> None:
    images = as_floats(write_classes(tmp_path, ["a", "b", "c"], count=10))
    parts = {split: load_data(f"folder:{tmp_path}", split, seed=seed) for seed, split in enumerate(("train", "test"))}
    assert torch.bincount(parts["train"].labels).tolist() == [8, 8, 8]
    assert torch.bincount(parts["test"].labels).tolist() == [2, 2, 2]
    together = torch.cat([everything(part)[0] for part in parts.values()])
    assert sorted(image.sum().item() for image in together) == sorted(image.sum().item() for image in images)
    assert torch.equal(load_data(f"folder:{tmp_path}", "test", seed=7).indices, parts["test"].indices)
    assert torch.equal(everything(load_data(f"folder:{tmp_path}", "all"))[0], images)


def test_folder_with_one_half_or_other_classes_is_refused(tmp_path) -> None:
    write_classes(tmp_path / "train", ["a", "b"])
    with pytest.raises(InputError, match="test is missing.*needs both"):
        load_data(f"folder:{tmp_path}", "train")
    write_classes(tmp_path / "test", ["a", "c"])
    with pytest.raises(InputError, match="b only in train, c only in test"):
        load_data(f"folder:{tmp_path}", "train")
    with pytest.raises(InputError, match="same classes"):
        load_data(f"folder:{tmp_path}", "test")


def test_folder_skips_what_is_no_image_and_finds_nested_ones(tmp_path) -> None:
    write_classes(tmp_path, ["a", "b"], count=2)
    write_classes(tmp_path / ".cache", ["x"])
    write_png(tmp_path / "a" / "deep" / "er.PNG", pixels(8, 8, 3))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "list.csv").write_text("no class")
    assert load_data(f"folder:{tmp_path}", "all").labels.tolist() == [0, 0, 0, 1, 1]


def test_folder_without_classes_or_images_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="no sub-folders"):
        load_data(f"folder:{tmp_path}", "train")
    write_classes(tmp_path, ["a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="classes without images: empty"):
        load_data(f"folder:{tmp_path}", "train")
    with pytest.raises(InputError, match="is missing"):
        load_data(f"folder:{tmp_path / 'none'}", "train")
    with pytest.raises(InputError, match="is a file"):
        load_data(f"folder:{tmp_path / 'a' / '000.png'}", "train")


@pytest.mark.parametrize(
    ("link", "target", "problem"),
    [
        ("c", ".", "a lies inside .*c, so its images have two labels"),
        ("c", "..", "lies inside .*c, so its images have two labels"),
        ("c", "a", "c is the same folder as .*a, so its images have two labels"),
        ("c", "c", "c is a symbolic link to c, which is not there"),
        ("c", "nowhere", "c is a symbolic link to nowhere, which is not there"),
        ("a/x.png", "nowhere.png", "x.png is a symbolic link to nowhere.png, which is not there"),
    ],
)
def test_links_that_lose_or_double_images_are_refused(link, target, problem, tmp_path) -> None:
    write_classes(tmp_path, ["a", "b"])
    (tmp_path / link).symlink_to(target)
    with pytest.raises(InputError, match=problem):
        load_data(f"folder:{tmp_path}", "all")


def test_links_to_other_places_are_followed_and_loops_below_are_not(tmp_path) -> None:
    write_classes(tmp_path / "kept", ["far"])
    write_classes(tmp_path / "data", ["a"])
    (tmp_path / "data" / "b").symlink_to(tmp_path / "kept" / "far")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a" / "linked.png").symlink_to(tmp_path / "kept" / "far" / "000.png")
    assert load_data(f"folder:{tmp_path / 'data'}", "all").labels.tolist() == [0, 0, 0, 1, 1]


def test_a_class_whose_name_is_no_text_is_refused(tmp_path) -> None:
    write_classes(tmp_path, ["猫", "b"])
    assert load_data(f"folder:{tmp_path}", "all").classes == ["b", "猫"]
    (tmp_path / "b").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(InputError, match=r"class name 'caf\\udce9' in .* is no text in UTF-8. Rename"):
        load_data(f"folder:{tmp_path}", "all")


def test_one_image_of_a_class_cannot_be_split(tmp_path) -> None:
    write_classes(tmp_path, ["a", "b"], count=1)
    with pytest.raises(InputError, match="class 'a'.*one image alone.*split='all'"):
        load_data(f"folder:{tmp_path}", "test")
    assert len(load_data(f"folder:{tmp_path}", "all")) == 2


def test_images_of_different_sizes_need_a_size(tmp_path) -> None:
    write_classes(tmp_path, ["a", "b"])
    write_png(tmp_path / "b" / "wide.png", pixels(8, 9, 3))
    with pytest.raises(InputError, match=r"differ in size: .*8 x 8, .*wide.png is 8 x 9.*size="):
        load_data(f"folder:{tmp_path}", "all")
    assert {image.shape for image, _ in load_data(f"folder:{tmp_path}", "all", size=(4, 6))} == {(3, 4, 6)}


@pytest.mark.parametrize("size", [None, 8])
def test_an_unreadable_image_is_named(size, tmp_path) -> None:
    write_classes(tmp_path, ["a", "b"])
    png = (tmp_path / "a" / "001.png").read_bytes()
    (tmp_path / "b" / "001.png").write_bytes(png[:20] if size is None else png[: len(png) // 2])
    with pytest.raises(InputError, match=r"b.001\.png is no image"):
        everything(load_data(f"folder:{tmp_path}", "all", size=size))


@given(st.data())
@laws
def test_pixels_in_any_pillow_mode_of_eight_bits_become_three_channels(data) -> None:
    mode, channels = data.draw(st.sampled_from([("L", 1), ("RGB", 3), ("RGBA", 4), ("LA", 2), ("1", 1)]))
    image = data.draw(arrays(np.uint8, (3, 5, channels)))
    if mode == "1":
        image = image // 128 * 255
    picture = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
    file = io.BytesIO()
    (picture.convert("1") if mode == "1" else picture).save(file, "png")
    file.seek(0)
    colours = image[..., :1].repeat(3, 2) if channels < 3 else image[..., :3]
    assert torch.equal(read_image(file), as_floats(colours[None])[0])


def test_sixteen_bit_images_are_refused(tmp_path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="more than 8 bits"):
        read_image(tmp_path / "deep.png")


@given(st.data())
@laws
def test_an_image_is_turned_as_its_exif_orientation_says(folder, data) -> None:
    """The eight orientations are the symmetries of a rectangle: what was done to the pixels is undone."""
    image = data.draw(arrays(np.uint8, (3, 5, 3)))
    orientation, how_it_was_held = data.draw(
        st.sampled_from(
            [
                (1, lambda x: x),
                (2, lambda x: x[:, ::-1]),
                (3, lambda x: x[::-1, ::-1]),
                (4, lambda x: x[::-1]),
                (5, lambda x: x.transpose(1, 0, 2)),
                (6, lambda x: np.rot90(x)),
                (7, lambda x: x[::-1, ::-1].transpose(1, 0, 2)),
                (8, lambda x: np.rot90(x, -1)),
            ]
        )
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(how_it_was_held(image))
    form = data.draw(st.sampled_from(["png", "webp", "tiff"]))
    Image.fromarray(stored).save(folder / "held", form, exif=exif, **({"lossless": True} if form == "webp" else {}))
    assert torch.equal(read_image(folder / "held"), as_floats(image[None])[0])
    assert images.ImageFiles((folder / "held",)).shape(0) == (3, 5)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_file_of_another_format_starts_no_program_whatever_its_name(suffix, tmp_path, monkeypatch) -> None:
    def started(*_, **__) -> None:
        pytest.fail("a program was started")

    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    path = tmp_path / f"picture{suffix}"
    for form in ("EPS", "GIF", "ICO", "TGA", "JPEG2000"):
        Image.fromarray(pixels(16, 16, 3)).save(path, form)
        with pytest.raises(InputError, match="it does not begin as one. Expected BMP, JPEG, PNG"):
            read_image(path)


def test_an_image_of_more_pixels_than_can_be_meant_is_refused_by_its_header(tmp_path) -> None:
    for name, side in (("large.png", 9_500), ("huge.png", 20_000)):
        Image.new("1", (side, side)).save(tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with pytest.raises(InputError, match=f"{name} (has 9500 x 9500 pixels; expected at most|is no image)"):
                read_image(tmp_path / name)


@pytest.mark.parametrize("mode", ["CMYK", "P", "LA", "RGBA", "YCbCr"])
def test_other_colour_models_are_converted(mode, tmp_path) -> None:
    form = {"CMYK": "tiff", "YCbCr": "jpeg"}.get(mode, "png")  # Pillow 12.3 cannot read its own YCbCr in TIFF
    Image.new("RGB", (4, 4), (200, 10, 60)).convert(mode).save(tmp_path / "picture", form)
    read = read_image(tmp_path / "picture")
    expected = torch.tensor([200, 10, 60]) / 255 if mode != "LA" else read[:1, 0, 0].expand(3)
    assert (read - expected[:, None, None]).abs().max() < 0.2  # a palette has few colours


@pytest.mark.parametrize("read", [read_image, lambda path: load_data(path, "all")], ids=["image", "npz"])
def test_what_is_no_file_is_refused_at_once(read, tmp_path) -> None:
    os.mkfifo(tmp_path / "fifo.npz")
    for path in (tmp_path / "fifo.npz", Path("/dev/zero")):
        with pytest.raises(InputError, match="no regular file|has no sub-folders|is a file"):
            read(path)


@pytest.mark.parametrize("halves", [False, True])
def test_animals10_has_the_ten_classes_of_kaggle(halves, tmp_path) -> None:
    place = tmp_path / "animals10"
    for part in [place / "train", place / "test"] if halves else [place]:
        write_classes(part, ANIMALS, size=70)
    data = load_data("animals10", "test", root=tmp_path)
    assert (data.classes, data[0][0].shape) == (ANIMALS, (3, 64, 64))
    for part in ["train", "test"] if halves else ["."]:
        (place / part / "cane").rename(place / part / "dog")
    with pytest.raises(InputError, match="missing cane and unknown dog"):
        load_data("animals10", "test", root=tmp_path)


def test_imagenet20_has_twenty_ids(tmp_path) -> None:
    write_classes(tmp_path / "imagenet20", WNIDS)
    assert load_data("imagenet20", "train", root=tmp_path).classes == WNIDS
    (tmp_path / "imagenet20" / WNIDS[3]).rename(tmp_path / "imagenet20" / "goldfish")
    with pytest.raises(InputError, match="it has 20, of which goldfish are no such ids"):
        load_data("imagenet20", "train", root=tmp_path)
    shutil.rmtree(tmp_path / "imagenet20" / "goldfish")
    with pytest.raises(InputError, match=r"it has 19\."):
        load_data("imagenet20", "train", root=tmp_path)


@pytest.mark.parametrize("name", ["animals10", "imagenet20"])
def test_missing_folders_say_the_layout_and_the_origin(name, tmp_path) -> None:
    with pytest.raises(InputError, match=f"{name} is not at .*{name}/train/<class>.*cannot be downloaded.*--root"):
        load_data(name, "train", root=tmp_path, download=True)


# npz files


@st.composite
def image_arrays(draw):
    """An array in any of the layouts, and `(N, 3, H, W)` float32 made of it pixel by pixel."""
    count, height, width = draw(st.tuples(st.integers(1, 4), st.integers(4, 6), st.integers(4, 6)))
    channels = draw(st.sampled_from([1, 3]))
    if draw(st.booleans()):
        canonical = draw(arrays(np.uint8, (count, height, width, channels)))
        divisor = 255
    else:
        dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
        elements = st.integers(0, 16).map(lambda value: value / 16)
        canonical = draw(arrays(dtype, (count, height, width, channels), elements=elements))
        divisor = 1
    expected = torch.empty(count, 3, height, width)
    for n, y, x, c in np.ndindex(count, height, width, 3):
        expected[n, c, y, x] = float(np.float32(canonical[n, y, x, min(c, channels - 1)]) / np.float32(divisor))
    layouts = [canonical, canonical.transpose(0, 3, 1, 2)] + [canonical[..., 0]] * (channels == 1)
    return draw(st.sampled_from(layouts)), expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("npz")


@given(image_arrays(), st.sampled_from([np.uint8, np.int32, np.int64, np.uint16]), st.booleans(), st.booleans())
@laws
def test_every_npz_layout_equals_the_naive_conversion(folder, drawn, dtype, named, compressed) -> None:
    images, expected = drawn
    labels = np.arange(len(images)).astype(dtype)[::-1]
    extra = {"classes": np.array(["zero", "uno", "två", "3"])} if named else {}
    (np.savez_compressed if compressed else np.savez)(folder / "a.npz", images=images, labels=labels, **extra)
    data = load_data(folder / "a.npz", "all")
    read, read_labels = everything(data)
    assert read.dtype == torch.float32
    assert torch.equal(read, expected)
    assert read_labels == labels.tolist()
    assert data.classes == (["zero", "uno", "två", "3"] if named else [str(n) for n in range(len(images))])


def join(images: np.ndarray, form: str = "png", **options) -> tuple[np.ndarray, np.ndarray]:
    blobs = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, form, **options)
        blobs.append(file.getvalue())
    return np.frombuffer(b"".join(blobs), np.uint8), np.cumsum([0, *map(len, blobs)])


@pytest.mark.parametrize(("key", "form", "options"), [("webp", "webp", {"lossless": True}), ("encoded", "png", {})])
def test_encoded_npz_reads_back_exactly(key, form, options, tmp_path) -> None:
    images = pixels(5, 7, 9, 3)
    joined, offsets = join(images, form, **options)
    np.savez(tmp_path / "e.npz", **{key: joined}, offsets=offsets, labels=[0, 1, 1, 0, 0], classes=["cat", "dog"])
    data = load_data(f"npz:{tmp_path / 'e.npz'}", "all")
    assert torch.equal(everything(data)[0], as_floats(images))
    assert data.classes == ["cat", "dog"]
    assert data.labels.tolist() == [0, 1, 1, 0, 0]


def test_a_split_in_the_path_takes_each_file_whole(tmp_path) -> None:
    for split, count in (("train", 6), ("test", 4)):
        np.savez(tmp_path / f"my_{split}.npz", images=pixels(count, 5, 5), labels=np.zeros(count, int))
    source = f"{tmp_path}/my_{{split}}.npz"
    assert [len(load_data(source, split)) for split in ("train", "test")] == [6, 4]
    with pytest.raises(ConfigError, match="'all' is for a source without a split"):
        load_data(source, "all")
    assert [len(load_data(tmp_path / "my_train.npz", split)) for split in ("train", "test", "all")] == [5, 1, 6]


GOOD = {"images": np.zeros((3, 5, 5), np.uint8), "labels": np.array([0, 1, 2])}
BLOB, OFFSETS = join(np.zeros((3, 5, 5, 3), np.uint8))
ENCODED = {"webp": BLOB, "offsets": OFFSETS, "labels": np.array([0, 1, 2])}
BAD_ARRAYS = [
    ({"images": GOOD["images"]}, "no key labels; it has images"),
    ({"labels": GOOD["labels"], "x": np.zeros(3)}, "no images; it has labels, x"),
    ({"labels": GOOD["labels"], "webp": BLOB}, "no images; it has labels, webp"),
    ({**GOOD, "images": np.array([[[{}]]], dtype=object)}, "never unpickled"),
    ({**GOOD, "labels": np.array([0, "a", None], dtype=object)}, "never unpickled"),
    ({**GOOD, "classes": np.array(["a", None, "c"], dtype=object)}, "never unpickled"),
    ({**GOOD, "images": np.zeros((3, 5), np.uint8)}, r"must have shape .* got \(3, 5\)"),
    ({**GOOD, "images": np.zeros((3, 5, 5, 4), np.uint8)}, "no axis of 1 or 3 channels"),
    ({**GOOD, "images": np.zeros((3, 3, 5, 3), np.uint8)}, "two axes that could be the channels"),
    ({**GOOD, "images": np.zeros((3, 5, 5), np.int64)}, "must be uint8.*got int64.*astype"),
    ({**GOOD, "images": np.zeros((3, 5, 5)) + 200.0}, "looks like 0..255"),
    ({**GOOD, "images": np.zeros((3, 5, 5)) - 1.0}, "looks normalised"),
    ({**GOOD, "images": np.full((3, 5, 5), np.nan)}, "NaN"),
    ({"images": np.zeros((0, 5, 5), np.uint8), "labels": np.zeros(0, int)}, "must not be empty"),
    ({**GOOD, "labels": np.array([0, 1])}, r"shape \(3,\), one per image; got \(2,\)"),
    ({**GOOD, "labels": np.array([[0], [1], [2]])}, r"got \(3, 1\)"),
    ({**GOOD, "labels": np.array([0.0, 1.0, 2.0])}, "must be integers.*float64"),
    ({**GOOD, "labels": np.array(["cat", "dog", "cat"])}, "must be integers"),
    ({**GOOD, "labels": np.array([0, -1, 2])}, "min -1"),
    ({**GOOD, "labels": np.array([0, 1, 10**8])}, r"in \[0, 65536\); got min 0, max 100000000"),
    ({**GOOD, "labels": np.array([0, 1, 2**63], np.uint64)}, "got min -9223372036854775808"),
    ({**GOOD, "labels": np.array([0, 1, 2], "m8[s]")}, "must be integers.*timedelta64"),
    ({**GOOD, "classes": np.array(["a", "b"])}, "max 2"),
    ({**GOOD, "classes": np.array([b"a", b"b", b"caf\xe9"])}, "classes in .* are no text"),
    ({**GOOD, "classes": np.array(["a", "b", "c"]).view(np.uint32).__add__(2**30).view("<U1")}, "are no text"),
    ({**GOOD, "classes": np.array(["a", "b", "\ud800"])}, r"class name '\\ud800' in .* is no text"),
    ({**GOOD, "classes": np.arange(70_000).astype(str)}, "classes in .* must be strings .*65,536 at most"),
    ({**ENCODED, "offsets": OFFSETS.astype("m8[s]")}, "offsets in .* must be integers"),
    ({**GOOD, "classes": np.array([0, 1, 2])}, "must be strings"),
    ({**ENCODED, "webp": BLOB.astype(np.int32)}, "webp in .* must be uint8"),
    ({**ENCODED, "offsets": OFFSETS.astype(float)}, "offsets in .* must be integers"),
    ({**ENCODED, "offsets": OFFSETS[:-1]}, "must rise from 0 to the"),
    ({**ENCODED, "offsets": OFFSETS[[0, 2, 1, 3]]}, "do not always rise"),
    ({**ENCODED, "offsets": OFFSETS[[0, 1, 3]]}, r"got \(3,\)"),
    ({**ENCODED, "webp": np.roll(BLOB, 7)}, "image 0 of .* is no image"),
]


@pytest.mark.parametrize(("stored", "problem"), BAD_ARRAYS)
def test_bad_npz_content_is_refused_by_name(stored, problem, tmp_path) -> None:
    np.savez(tmp_path / "bad.npz", **stored)
    with pytest.raises(InputError, match=problem) as caught:
        everything(load_data(tmp_path / "bad.npz", "all"))
    assert "bad.npz" in str(caught.value)


def write_npz(path: Path, packing: int = zipfile.ZIP_STORED, **members: bytes) -> None:
    """A file of these members, and of the good ones that are not among them."""
    with zipfile.ZipFile(path, "w", packing) as archive:
        for key, array in GOOD.items():
            if key not in members:
                file = io.BytesIO()
                np.save(file, array)
                archive.writestr(f"{key}.npy", file.getvalue())
        for key, content in members.items():
            archive.writestr(f"{key}.npy", content)


def npy(descr: str, shape: tuple[int, ...] | str, body: bytes = b"") -> bytes:
    """An array whose header claims anything."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"images": npy("|u1", (10**12, 5, 5))}, "images in .* claims shape .* and 0 bytes follow"),
        ({"images": npy("|u1", (2**40, 2**40, 2**40))}, "claims shape"),
        ({"images": npy("|u1", (-3, 5, -5), bytes(75))}, "claims shape"),
        ({"images": npy("|u1", (3, 5, 5), bytes(76))}, "75|76 bytes follow"),
        ({"classes": npy("<U536870911", (3,))}, "classes in .* of 2147483644 bytes each, and 0 bytes follow"),
        ({"classes": npy("|S0", (10**12,))}, "classes in .* of 0 bytes each"),
        ({"classes": npy("|V0", (10**12,))}, "classes in .* of 0 bytes each"),
        ({"labels": npy("|O", (3,), b"cos\nsystem\n")}, "never unpickled"),
        ({"labels": npy("<i8", "(" * 50)}, "cannot be read"),
        ({"labels": npy("<i8", "(3,)".rjust(20_000), bytes(24))}, "cannot be read"),
        ({"labels": b""}, "cannot be read"),
    ],
)
def test_an_array_that_claims_what_it_is_not_is_refused_before_memory_is_taken(members, problem, tmp_path) -> None:
    write_npz(tmp_path / "bad.npz", **members)
    with pytest.raises(InputError, match=problem) as caught:
        load_data(tmp_path / "bad.npz", "all")
    assert "bad.npz" in str(caught.value)


def test_an_archive_that_numpy_does_not_write_is_refused(tmp_path, monkeypatch) -> None:
    path = tmp_path / "bad.npz"
    write_npz(path, zipfile.ZIP_BZIP2)
    with pytest.raises(InputError, match="packed in another way than numpy packs"):
        load_data(path, "all")
    write_npz(path, zipfile.ZIP_DEFLATED, images=npy("|u1", (4096, 16, 16), bytes(2**20)), labels=npy("|u1", (4096,)))
    monkeypatch.setattr("zepad.data.arrays._MAX_UNPACKED", 2**20)  # a true one takes a gigabyte
    with pytest.raises(InputError, match="would unpack from .* to .* bytes"):
        load_data(path, "all")
    write_npz(path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("labels.npy", npy("<i8", (3,), bytes(24)))
    with pytest.raises(InputError, match="holds labels more than once"):
        load_data(path, "all")


def test_numbers_without_an_image_do_not_become_classes_without_a_word(tmp_path) -> None:
    np.savez(tmp_path / "gaps.npz", images=pixels(3, 5, 5), labels=[5, 9, 5])
    with pytest.warns(UserWarning, match=r"10 classes by its largest label, and no image of 8 of them \(0, 1"):
        assert len(load_data(tmp_path / "gaps.npz", "all").classes) == 10
    np.savez(tmp_path / "named.npz", images=pixels(3, 5, 5), labels=[0, 2, 0], classes=["a", "b", "c"])
    assert load_data(tmp_path / "named.npz", "all").classes == ["a", "b", "c"]


@given(st.data())
@laws
def test_a_damaged_npz_is_refused_or_read_as_it_was(folder, data) -> None:
    images, labels = pixels(4, 5, 5), np.array([0, 1, 0, 1])
    np.savez_compressed(folder / "whole.npz", images=images, labels=labels)
    content = bytearray((folder / "whole.npz").read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / "hurt.npz").write_bytes(content)
    try:
        read, read_labels = everything(load_data(folder / "hurt.npz", "all"))
    except InputError:
        return
    assert torch.equal(read, as_floats(images[..., None].repeat(3, 3)))
    assert read_labels == labels.tolist()


def test_a_file_that_is_no_npz_or_missing_is_refused(tmp_path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "folder.npz").mkdir()
    for name, problem in (("array", "no .npz file"), ("folder", "cannot be read"), ("none", "is missing")):
        with pytest.raises(InputError, match=problem):
            load_data(tmp_path / f"{name}.npz", "train")


# What all sources share


@pytest.fixture
def every_source(tmp_path, monkeypatch) -> dict[str, str]:
    for write in (*WRITERS.values(), write_gtsrb):
        write(tmp_path, monkeypatch)
    write_classes(tmp_path / "animals10", ANIMALS)
    write_classes(tmp_path / "imagenet20", WNIDS)
    write_classes(tmp_path / "own", ["a", "b"], count=5)
    np.savez(tmp_path / "own.npz", images=pixels(9, 6, 6), labels=[0, 1, 2] * 3)
    joined, offsets = join(pixels(9, 6, 6, 3))
    np.savez(tmp_path / "joined.npz", encoded=joined, offsets=offsets, labels=[0, 1, 2] * 3)
    monkeypatch.setenv("ZEPAD_DATA", str(tmp_path))
    return [*NAMES, f"folder:{tmp_path / 'own'}", f"npz:{tmp_path / 'own.npz'}", str(tmp_path / "joined.npz")]


def test_a_loader_yields_batches_of_every_source(every_source) -> None:
    for source in every_source:
        for split in ("train", "test"):
            data = load_data(source, split, limit=5)
            images, labels = next(iter(DataLoader(data, batch_size=5)))
            assert images.shape[:2] == (len(data), 3)
            assert images.dtype == torch.float32
            assert 0 <= images.min() <= images.max() <= 1
            assert torch.equal(labels, data.labels)
            assert labels.max() < len(data.classes)


def test_every_source_travels_to_worker_processes(every_source) -> None:
    for source in every_source:
        data = load_data(source, "test", limit=2)
        sent = pickle.dumps(data)
        for one, other in zip(everything(data)[0], everything(pickle.loads(sent))[0], strict=True):
            assert torch.equal(one, other)
        if source.startswith(("gtsrb", "animals10", "imagenet20", "folder:")):
            assert len(sent) < 20_000  # files stay where they are


def test_size_stretches_every_source_within_the_range_of_pixels(every_source) -> None:
    for source in every_source:
        for image, _ in load_data(source, "train", size=(5, 7), limit=2):
            assert image.shape == (3, 5, 7)
            assert 0 <= image.min() <= image.max() <= 1


def test_digits_are_those_of_the_function() -> None:
    data, reference = load_data("digits", "test", size=24), digits("test", size=24)
    assert torch.equal(everything(data)[0], reference.images)
    assert torch.equal(data.labels, reference.labels)


@pytest.fixture(scope="module")
def sixty(folder) -> Path:
    np.savez(folder / "sixty.npz", images=pixels(60, 4, 4), labels=np.arange(60) % 3)
    return folder / "sixty.npz"


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32))
@laws
def test_limit_takes_a_seeded_subset_and_a_smaller_one_is_part_of_it(sixty, first, second, seed) -> None:
    small, large = sorted((first, second))
    state = torch.get_rng_state()
    chosen = [set(load_data(sixty, "train", limit=limit, seed=seed).indices.tolist()) for limit in (small, large)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(each) for each in chosen] == [min(small, 48), min(large, 48)]
    assert chosen[0] <= chosen[1]
    assert load_data(sixty, "train", limit=small, seed=seed).indices.tolist() == sorted(chosen[0])
    assert chosen[1].isdisjoint(load_data(sixty, "test", limit=large, seed=seed + 1).indices.tolist())


def test_another_seed_takes_another_subset(sixty) -> None:
    assert len({tuple(load_data(sixty, "train", limit=20, seed=seed).indices.tolist()) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("cifar11", "train"), "one of digits, cifar10, .*got 'cifar11'"),
        (("", "train"), "got ''"),
        ((7, "train"), "a string or a Path"),
        (("folder:", "train"), "with a path"),
        (("digits", "val"), "split must be"),
        (("digits", "all"), "'all' is for a source without a split"),
    ],
)
def test_unknown_sources_and_splits_are_refused(arguments, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_data(*arguments)


@pytest.mark.parametrize(
    "setting",
    [
        {"limit": 0},
        {"limit": -1},
        {"limit": 1.5},
        {"limit": True},
        {"size": 0},
        {"size": (8, 0)},
        {"size": (8,)},
        {"size": 8.0},
        {"seed": "a"},
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        load_data("digits", "train", **setting)


def test_a_folder_given_without_its_prefix_is_recognised(tmp_path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"write 'folder:{tmp_path}'")):
        load_data(str(tmp_path), "train")
