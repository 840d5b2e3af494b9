"""A universal perturbation as a value and as a file."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from zepad._version import __version__
from zepad.attacks import UniversalPerturbation
from zepad.errors import CheckpointError, ConfigError, InputError
from zepad.sealed import read_sealed, seal

EPS = 10 / 255


def noise(shape=(1, 3, 5, 7), eps=EPS, **changes):
    return UniversalPerturbation(
        **{"delta": eps * (torch.rand(shape) * 2 - 1), "eps": eps, "provenance": {"attack": "noise", "n": 3}, **changes}
    )


def patch(height=5, width=8, side=2):
    mask = torch.zeros(1, 1, height, width)
    mask[..., -side:, -side:] = 1
    return UniversalPerturbation(
        delta=torch.rand(1, 3, height, width) * mask, eps=side * side / (height * width), norm="patch", mask=mask
    )


def test_a_patch_replaces_the_pixels_it_covers_and_no_other():
    perturbation, images = patch(), torch.rand(4, 3, 5, 8)
    attacked = perturbation.apply(images)
    assert torch.equal(attacked[..., -2:, -2:], perturbation.delta[..., -2:, -2:].expand(4, -1, -1, -1))
    assert torch.equal(attacked[..., :-2, :], images[..., :-2, :])
    assert torch.equal(attacked[..., :-2], images[..., :-2])


def test_an_l2_budget_bounds_the_length():
    delta = torch.full((1, 1, 2, 2), 1.0)
    assert UniversalPerturbation(delta=delta, eps=2, norm="l2").eps == 2
    with pytest.raises(InputError, match=r"outside the l2 ball of radius 1\.9"):
        UniversalPerturbation(delta=delta, eps=1.9, norm="l2")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"eps": 10}, ConfigError, r"looks like 0\.\.255 units"),
        ({"eps": 0}, ConfigError, "eps must be a positive number"),
        ({"norm": "l1"}, ConfigError, r"norm must be one of \['l2', 'linf', 'patch'\]; got 'l1'"),
        ({"delta": torch.full((1, 3, 4, 4), 2 * EPS)}, InputError, "outside the linf ball of radius 0.0392"),
        ({"delta": torch.full((1, 3, 4, 4), EPS + 1e-5)}, InputError, "outside the linf ball"),
        ({"delta": torch.zeros(3, 4, 4)}, InputError, r"shape \(1, C, H, W\); got torch.float32 of shape \(3, 4, 4\)"),
        ({"delta": torch.zeros(2, 3, 4, 4)}, InputError, r"got torch.float32 of shape \(2, 3, 4, 4\)"),
        ({"delta": torch.zeros(1, 3, 4, 4).long()}, InputError, "got torch.int64"),
        ({"delta": [[0.0]]}, InputError, "got the list"),
        ({"delta": torch.full((1, 3, 4, 4), torch.nan)}, InputError, "finite and not empty"),
        ({"delta": torch.zeros(1, 3, 0, 4)}, InputError, "finite and not empty"),
        ({"mask": torch.ones(1, 1, 5, 7)}, InputError, 'mask belongs to norm "patch"'),
    ],
)
def test_what_is_no_perturbation_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        noise(**changes)


def test_what_is_no_patch_is_refused():
    good = patch()
    for mask in (None, good.mask[0], good.mask * 0.5, good.mask.expand(-1, 3, -1, -1)):
        with pytest.raises(InputError, match=r"needs a mask of zeros and ones of shape \(1, 1, 5, 8\)"):
            UniversalPerturbation(delta=good.delta, eps=0.1, norm="patch", mask=mask)
    with pytest.raises(InputError, match=r"the share it covers, 0\.1 by its mask; got 0\.2"):
        UniversalPerturbation(delta=good.delta, eps=0.2, norm="patch", mask=good.mask)
    for delta in (good.delta - good.mask * 1.5, good.delta + good.mask, good.delta + 0.01 * (1 - good.mask)):
        with pytest.raises(InputError, match="pixels in .0, 1. where the mask is one, and zero elsewhere"):
            UniversalPerturbation(delta=delta, eps=0.1, norm="patch", mask=good.mask)


@pytest.mark.parametrize("make", [noise, patch, lambda: noise(eps=2.5, norm="l2", delta=torch.zeros(1, 1, 2, 2))])
def test_what_is_saved_is_loaded(tmp_path, make):
    made = make()
    made.save(tmp_path / "one.safetensors")
    read = UniversalPerturbation.load(str(tmp_path / "one.safetensors"))
    assert torch.equal(read.delta, made.delta)
    assert (read.eps, read.norm, read.provenance) == (made.eps, made.norm, made.provenance)
    assert (made.mask is None and read.mask is None) or torch.equal(read.mask, made.mask)
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision_survives(tmp_path, dtype):
    made = noise(delta=torch.full((1, 1, 2, 3), EPS).to(dtype))
    made.save(tmp_path / "one")
    assert torch.equal(UniversalPerturbation.load(tmp_path / "one").delta, made.delta)


def test_a_loaded_perturbation_does_not_depend_on_its_file(tmp_path):
    path = tmp_path / "one"
    noise().save(path)
    read = UniversalPerturbation.load(path)
    before = read.delta.clone()
    with path.open("r+b") as file:
        file.truncate(8)
    assert torch.equal(read.delta, before)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "one.safetensors"
    noise().save(path)
    return path


def test_a_failed_save_keeps_the_older_file(saved):
    before = saved.read_bytes()
    for provenance in ({"x": torch.zeros(1)}, {"x": float("nan")}):
        with pytest.raises(CheckpointError, match="the provenance is no plain JSON"):
            noise(provenance=provenance).save(saved)
    assert saved.read_bytes() == before


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written: No such file or directory. Choose a writable"):
        noise().save(tmp_path / "nowhere" / "one")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="one cannot be read: No such file or directory"):
        UniversalPerturbation.load(tmp_path / "one")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        UniversalPerturbation.load(tmp_path)


def nested(depth):
    values = {}
    for _ in range(depth):
        values = {"x": values}
    return values


def rewrite(path, *, record=None, tensors=None):
    """Change the file's record or tensors as someone does who knows how it is sealed."""
    content = read_sealed(path, limit=1 << 20)
    values = json.loads(content.record)
    seen = values.pop("sha256")
    changed = {**values, **(record or {})}
    path.write_bytes(seal(content.tensors if tensors is None else tensors, changed))
    assert record or tensors or json.loads(read_sealed(path, limit=1 << 20).record)["sha256"] == seen


def test_rewriting_nothing_changes_nothing(saved):
    """Else the faults below would prove nothing."""
    rewrite(saved)
    UniversalPerturbation.load(saved)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"format": 3}, rf"has format 3, written by zepad {__version__}; .* Upgrade with: pip install -U zepad"),
        ({"format": 0}, "format must be a positive integer; got 0"),
        ({"format": "1"}, "format must be a positive integer; got '1'"),
        ({"format": True}, "got True"),
        ({"kind": "something else"}, "got None"),
        ({"more": 1}, "is damaged: more: "),
        ({"eps": 10}, r"holds no valid perturbation: eps must lie in .* looks like 0\.\.255 units"),
        ({"eps": EPS / 2}, "holds no valid perturbation: delta lies outside"),
        ({"eps": "x"}, "is damaged: eps: "),
        ({"eps": None}, "is damaged: eps: "),
        ({"eps": 10**400}, "is damaged"),
        ({"norm": "l1"}, "holds no valid perturbation: norm must be one of"),
        ({"norm": ["linf"]}, "is damaged: norm: "),
        ({"norm": "patch"}, r"must hold the tensors \['delta', 'mask'\]; it holds \['delta'\]"),
        ({"provenance": [1]}, "is damaged: provenance: "),
        ({"provenance": {"attack": "\ud800"}}, "is damaged"),
        ({"provenance": nested(500)}, "is damaged"),
    ],
)
def test_a_changed_record_is_refused(saved, record, message):
    rewrite(saved, record=record)
    with pytest.raises(CheckpointError, match=message):
        UniversalPerturbation.load(saved)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.zeros(1, 3, 5, 7)}, r"must hold the tensors \['delta'\]; it holds \['other'\]"),
        ({"delta": torch.zeros(1, 3, 5, 7), "more": torch.zeros(1)}, r"it holds \['delta', 'more'\]"),
        ({"delta": torch.zeros(3, 5, 7)}, "holds no valid perturbation: delta must be"),
    ],
)
def test_changed_tensors_are_refused(saved, tensors, message):
    rewrite(saved, tensors=tensors)
    with pytest.raises(CheckpointError, match=message):
        UniversalPerturbation.load(saved)


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_every_altered_byte_is_noticed(saved, step):
    """Also one that leaves a perturbation inside its budget, such as another digit of a larger eps."""
    content = saved.read_bytes()
    for position in range(0, len(content), step):
        for mask in (1, 0x29):
            altered = bytearray(content)
            altered[position] ^= mask
            saved.write_bytes(altered)
            with pytest.raises(CheckpointError, match=saved.name):
                UniversalPerturbation.load(saved)


def write_format_1(path, made, **changes):
    """What zepad 0.1 wrote, whose digest covers the tensors alone."""
    tensors = {"delta": made.delta} if made.mask is None else {"delta": made.delta, "mask": made.mask}
    digest = hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
    record = {"format": 1, "kind": "universal perturbation", "library_version": "0.1.0", "eps": made.eps}
    record |= {"norm": made.norm, "provenance": made.provenance, "sha256": digest} | changes
    save_file(tensors, path, {"zepad": json.dumps(record)})


@pytest.mark.parametrize("make", [noise, patch])
def test_format_1_is_read(tmp_path, make):
    made = make()
    write_format_1(tmp_path / "one", made)
    read = UniversalPerturbation.load(tmp_path / "one")
    assert torch.equal(read.delta, made.delta)
    assert (read.eps, read.norm, read.provenance) == (made.eps, made.norm, made.provenance)
    write_format_1(tmp_path / "one", made, sha256="0" * 64)
    with pytest.raises(CheckpointError, match="its content is not what was saved"):
        UniversalPerturbation.load(tmp_path / "one")


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "one")
    with pytest.raises(CheckpointError, match="one cannot be read: it is no regular file"):
        UniversalPerturbation.load(tmp_path / "one")


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "one"
    for content in (b"", b"short", b"PK\x03\x04" + bytes(100), b"\xff" * 200):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is no whole safetensors file"):
            UniversalPerturbation.load(path)
    for metadata in (None, {"format": "pt"}, {"zepad": "no JSON"}, {"zepad": "[]"}, {"zepad": "{}"}):
        save_file({"delta": torch.zeros(1, 3, 2, 2)}, path, metadata)
        with pytest.raises(CheckpointError, match=r"was not written by UniversalPerturbation\.save"):
            UniversalPerturbation.load(path)


def test_every_truncation_is_refused(saved):
    blob = saved.read_bytes()
    for length in range(0, len(blob), 37):
        saved.write_bytes(blob[:length])
        with pytest.raises(CheckpointError):
            UniversalPerturbation.load(saved)
