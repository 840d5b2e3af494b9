"""Every benchmark runs at a small size on the data inside the package, and rejects files that it does not expect."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import runpy
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tiny import TinyEncoder
from zepad.data import ImageDataset

FOLDER = Path(__file__).parents[2] / "benchmarks"

# The actions of one script, one after the other, on the digits at the smallest size.
RUNS = {
    "recipe": ["recipe.py --images 64 --test-images 16 --set epochs=1"],
    "hardening": ["hardening.py --images 100 --updates 3 --only default"],
    "benign_default": ["benign_default.py --images 64 --test-images 16"],
    "benign_forms": ["benign_forms.py --seeds 1 --epochs 1"],
    "rates": [
        "rates.py --seeds 1 --images 64 --test-images 16 --epochs 1 --pretraining-epochs 1 --steps 1 --only resnet"
    ],
    "attack_agreement": ["attack_agreement.py --images 64 --test-images 8 --epochs 1 --steps 2 --queries 5"],
    "pretrain_cifar": ["pretrain_cifar.py --data digits --images 64 --epochs 1 --out encoders"],
    "public_defense": ["public_defense.py --setting tiny --epochs 1 --methods restoration --universal SSP --out runs"],
    "ladder": [
        "ladder.py --setting tiny --epochs 1 --models published PGD-AT --votes 0 --universal SSP --out runs",
        "ladder.py --setting tiny --epochs 1 --models 'private without PGD' --attackers public --universal --out runs",
    ],
    "transfer": ["transfer.py --setting tiny --epochs 1 --models private --out runs"],
    "harden_once": [
        "harden_once.py --source tiny --tasks tiny tiny16 --epochs 1 --universal SSP --out runs",
        "harden_once.py --source tiny --tasks tiny --table --out runs",
    ],
    "gpu": ["gpu.py --small --device cpu --epochs 1 --models private --out runs"],
    "evaluation_time": [
        "evaluation_time.py --setting tiny --epochs 1 --steps 2 --queries 5 --universal SSP --out runs",
    ],
    "training_time": ["training_time.py --setting tiny --epochs 1"],
    "public_encoders": ["public_encoders.py"],
    "checks": ["checks.py --runs 1"],
    "baselines": [
        "baselines.py train --setting tiny --out runs --models undefended ZePAD",
        "baselines.py evaluate --setting tiny --universal SSP --models ZePAD --out runs",
        "baselines.py table --setting tiny --out runs",
    ],
    "fusion": [
        "fusion.py train craft attack --setting tiny --universal SSP --out runs --only rfdm",
        "fusion.py detect table --setting tiny --out runs --only features",
    ],
}


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, *arguments: str) -> str:
    """Run a script as `__main__` of this process, which has imported PyTorch already, and return what it prints."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        patch.syspath_prepend(str(FOLDER))
        for name in ("common", "ladder", "pretrain_cifar", "public_encoders"):
            patch.delitem(sys.modules, name, raising=False)
        capsys.readouterr()
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("default")  # a script prints its warnings
def test_a_benchmark_runs_on_the_packaged_data_without_a_mirror(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZEPAD_DATA", "no data")
    for command in RUNS[name]:
        printed = run(monkeypatch, capsys, *shlex.split(command))
    if name == "recipe":
        record = json.loads(printed)
        assert record["data"] == "digits"
        assert record["images"] == 64
        assert 0 <= record["adversarial_head"]["white_box"] <= record["adversarial_head"]["benign"] <= 1
    elif name == "training_time":
        record = json.loads(printed)
        assert record["images"] == 64
        assert record["epochs"] == {"restoration, the default": 1, "the paper's objective": 1}
    elif name == "gpu":
        assert "| private |" in Path("runs/results.md").read_text()
    elif name not in ("hardening", "benign_default", "pretrain_cifar"):
        assert "|---|" in printed


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "public_encoders")


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_public_encoders_have_the_published_size_and_64_features(public: ModuleType) -> None:
    millions = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85}  # of the whole classifier, as its author states them
    for entry in public.PUBLIC_ENCODERS.values():
        model = public.CifarResNet(entry.depth).eval()
        classifier = 64 * 10 + 10
        assert round((sum(p.numel() for p in model.parameters()) + classifier) / 1e6, 2) == millions[entry.depth]
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 64)
        convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        assert len(convolutions) + 1 == entry.depth  # the classifier is the last layer


def test_a_shortcut_keeps_every_second_pixel_and_adds_empty_channels(public: ModuleType) -> None:
    block = public.Block(16, 32, 2).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # the residual is zero
    x = torch.rand(1, 16, 8, 8)
    expected = torch.zeros(1, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), expected)


def test_the_public_encoders_compute_what_their_author_writes(public: ModuleType) -> None:
    model = public.CifarResNet(20)
    model(torch.rand(8, 3, 32, 32))  # statistics of batch normalisation that are not the initial ones
    model.eval()
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    x = model.bn1(model.conv1(images)).relu()
    for block in (*model.layer1, *model.layer2, *model.layer3):
        residual = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
        new = residual.shape[1] - x.shape[1]
        shortcut = x[:, :, :: x.shape[2] // residual.shape[2], :: x.shape[3] // residual.shape[3]]
        x = (residual + torch.nn.functional.pad(shortcut, (0, 0, 0, 0, new // 2, new - new // 2))).relu()
    expected = x.mean((2, 3))
    found = model(images)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(features.square().sum(), images)[0] for features in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_encoders_without_labels_lie_beside_their_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    victim, auxiliary = load(monkeypatch, "common").load_encoders("resnet20")
    images = torch.rand(2, 3, 32, 32)
    assert victim(images).shape == auxiliary(images).shape == (2, 64)
    assert not torch.allclose(victim(images), auxiliary(images), atol=0.1)
    for method in ("barlow-twins", "simclr"):
        recipe = json.loads((FOLDER / "encoders" / f"resnet20-{method}.json").read_text())
        assert (recipe["method"], recipe["images"]) == (method, 50_000)
        assert 50 < recipe["linear probe, % of test images"] < 100


def test_a_pre_training_that_was_cut_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(monkeypatch, "pretrain_cifar")
    monkeypatch.setitem(module.ARCHITECTURES, "tiny", lambda: (TinyEncoder(), 8))
    recipe = module.PretrainingRecipe(
        method="simclr", encoder="tiny", data="noise", images=24, epochs=3, batch_size=8, hidden=8
    )
    images = torch.rand(24, 3, 8, 8)
    uncut = module.pretrain(recipe, images, tmp_path / "uncut.pt").state_dict()

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", cut)  # after the first epoch, before its state is written
        with pytest.raises(KeyboardInterrupt):
            module.pretrain(recipe, images, tmp_path / "cut.pt")
    saved = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *a: (saved(*a), patch.setattr("builtins.print", cut)))
        with pytest.raises(KeyboardInterrupt):
            module.pretrain(recipe, images, tmp_path / "cut.pt")
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["epoch"] == 1
    resumed = module.pretrain(recipe, images, tmp_path / "cut.pt").state_dict()
    assert all(torch.equal(uncut[key], resumed[key]) for key in uncut)
    with pytest.raises(SystemExit, match="was begun with another recipe"):
        module.pretrain(replace(recipe, epochs=4), images, tmp_path / "cut.pt")


def test_the_published_checkpoint_and_the_mirror_give_the_same_encoder(
    public: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {
        **public.CifarResNet(20).state_dict(),
        "linear.weight": torch.rand(10, 64),
        "linear.bias": torch.rand(10),
    }
    published, mirror = tmp_path / "resnet20.th", tmp_path / "mirror" / "encoders" / "resnet20.safetensors"
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in weights.items()}}, published)
    mirror.parent.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, mirror)
    entry = public.PublicEncoder(
        depth=20, url=published.as_uri(), sha256=public.digest(published), mirror=mirror.name,
        mirror_sha256=public.digest(mirror), test_error=0.0,
    )  # fmt: skip
    monkeypatch.setitem(public.PUBLIC_ENCODERS, "tiny", entry)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))

    downloaded, mirrored = public.load_public("tiny"), public.load_public("tiny", tmp_path / "mirror")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(downloaded(images), mirrored(images))
    assert not downloaded.training

    kept = tmp_path / "cache" / "checkpoints" / "resnet20.th"
    kept.write_bytes(b"damaged")  # a damaged copy is fetched again
    assert torch.equal(public.load_public("tiny")(images), mirrored(images))
    assert public.digest(kept) == entry.sha256


def test_another_file_than_the_recorded_one_is_never_opened(public: ModuleType, tmp_path: Path) -> None:
    other = tmp_path / "other.th"
    other.write_bytes(b"not the published file")
    wrong = hashlib.sha256(b"the published file").hexdigest()
    with pytest.raises(ValueError, match="not the file that was expected"):
        public.fetch(other.as_uri(), wrong, tmp_path / "cache")
    assert not (tmp_path / "cache" / "other.th").exists()
    with pytest.raises(ValueError, match="expected"):
        public.check_digest(other, wrong)


def test_images_come_back_in_the_recorded_order(monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, "public_encoders")
    common = load(monkeypatch, "common")
    images = torch.randint(256, (20, 3, 8, 8)) / 255
    data = ImageDataset(images, torch.arange(20), [str(label) for label in range(20)])
    wanted = torch.randperm(20)[:12]
    order = common.order_by_digest(data, [common.short_digest(images[index]) for index in wanted])
    assert torch.equal(order[:12], wanted)
    assert sorted(order.tolist()) == list(range(20))
    with pytest.raises(ValueError, match="1 of 1 recorded images"):
        common.order_by_digest(data, [-1])


def recorded_entry(recorded: ModuleType, values: Sequence[float], seeds: Sequence[int], **changes: Any) -> Any:
    score = recorded.score(values)
    attacked = {"six": recorded.Attacked(worst=score, attackers={"UAP": score})}
    known = {"model": "m", "data": "d", "encoders": "e", "eps": "8/255", "protocol": "p", "images": {"benign": 5}}
    known |= {"seeds": list(seeds), "command": str(seeds), "note": "", "benign": score, "attacked": attacked}
    return recorded.Entry(**{**known, **changes})


@given(st.lists(st.floats(0, 100), min_size=2, max_size=6), st.data())
def test_seeds_that_are_recorded_one_after_the_other_are_those_recorded_at_once(
    values: list[float], data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        recorded = load(patch, "recorded")
    cut, seeds = data.draw(st.integers(1, len(values) - 1)), range(len(values))
    parts = [recorded_entry(recorded, values[part], seeds[part]) for part in (slice(cut), slice(cut, None))]
    parts = data.draw(st.permutations(parts))
    found, whole = recorded.joined(*parts), recorded_entry(recorded, values, seeds)
    assert found.seeds == whole.seeds
    for one, other in (
        (found.benign, whole.benign),
        (found.attacked["six"].worst, whole.attacked["six"].worst),
        (found.attacked["six"].attackers["UAP"], whole.attacked["six"].attackers["UAP"]),
    ):
        assert one.mean == pytest.approx(other.mean, abs=0.011)  # what is recorded has two decimals
        assert one.deviation == pytest.approx(other.deviation, abs=0.03)


@pytest.mark.parametrize("changes", [{"seeds": [0]}, {"model": "another"}, {"eps": "4/255"}, {"attacked": {}}])
def test_what_was_measured_in_another_way_is_not_joined(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = load(monkeypatch, "recorded")
    with pytest.raises(ValueError, match="cannot be joined"):
        recorded.joined(
            recorded_entry(recorded, [1.0], [0]), recorded_entry(recorded, [1.0], **{"seeds": [1]} | changes)
        )
