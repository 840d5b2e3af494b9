"""An exported graph agrees with the defense, and a failed export leaves no file behind."""

from __future__ import annotations

import copy
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zepad
from tiny import TinyEncoder, toy_data
from zepad import CheckpointError, ConfigError, InputError, StageError, ZePAD
from zepad.encoders import Encoder, Preprocessing
from zepad.functional import detection_score
from zepad.modules import MLPHead
from zepad.persistence.export import export_model
from zepad.types import ROLES

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZE = (16, 16)
BATCHES = (1, 2, 7)
OUTPUTS = ["logits", "probabilities", "weights", "detection_score"]
SUFFIXES = (".onnx", ".pt2")


def varied(count: int, size: tuple[int, int] = SIZE) -> Tensor:
    """Images that differ in class and brightness."""
    images = toy_data(count, size=max(size))[0][..., : size[0], : size[1]]
    return images * torch.linspace(1, 0.3, count)[:, None, None, None]


def with_encoders(defense: ZePAD, *encoders: nn.Module, size: tuple[int, int] = SIZE) -> ZePAD:
    """Give a fitted defense other encoders, and heads that decide: two models that say little agree too easily."""
    for role, encoder in zip(ROLES, encoders, strict=True):
        encoder = encoder if isinstance(encoder, Encoder) else Encoder(encoder)
        with torch.no_grad():
            features = encoder.eval()(varied(24, size))
            head = MLPHead(features.shape[1], 3)
            logits = head(features)
            head[-1].weight.mul_((1 / logits.std(dim=0))[:, None])
            head[-1].bias.copy_((head[-1].bias - logits.mean(dim=0)) / logits.std(dim=0))
        branch = defense.branch(role)
        branch.encoder, branch.head = encoder, head
    return defense.requires_grad_(False).eval()


def with_sizes(defense: ZePAD, *sizes: tuple[int, int] | None) -> ZePAD:
    for role, size in zip(ROLES, sizes, strict=True):
        defense.encoder(role).preprocessing = Preprocessing(size=size)
    return defense


def answers(path: Path, images: Tensor) -> dict[str, Tensor]:
    """What the exported file says."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"images": images.numpy()})), strict=True))


def assert_says_the_same(path: Path, defense: ZePAD, size: tuple[int, int] = SIZE) -> None:
    for count in BATCHES:
        images = varied(count, size)
        said = answers(path, images)
        with torch.no_grad():
            branches = defense.branch_logits(images)
            expected = {
                "logits": defense(images),
                "probabilities": defense.predict_proba(images),
                "weights": defense.fusion.weights(branches).T,
                "detection_score": detection_score(branches),
            }
        assert list(said) == OUTPUTS
        for name, value in expected.items():
            torch.testing.assert_close(said[name], value, rtol=0, atol=1e-4)
    assert expected["logits"].std(dim=0).min() > 0.1
    assert expected["weights"].std(dim=0).min() > 0.01


@pytest.fixture(scope="module")
def named(_fitted: ZePAD) -> ZePAD:
    """A defense with class names and a threshold that need care. For reading only."""
    defense = copy.deepcopy(_fitted)
    defense.class_names, defense.threshold = ("röd", 'gr"ün', "蓝"), 0.123456789012345678
    return defense


@pytest.fixture(scope="module")
def exported(named: ZePAD, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files that `named` was exported to, by suffix."""
    folder = tmp_path_factory.mktemp("exported")
    return {suffix: export_model(named, folder / f"defense{suffix}", image_size=SIZE) for suffix in SUFFIXES}


# parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_file_says_what_the_defense_says(fitted: ZePAD, suffix: str, tmp_path: Path) -> None:
    defense = with_encoders(
        fitted,
        Encoder(TinyEncoder(), preprocessing=Preprocessing.imagenet(size=(11, 21), interpolation="bilinear")),
        Encoder(TinyEncoder(), preprocessing=Preprocessing.imagenet(size=(23, 9), interpolation="bicubic")),
        TinyEncoder(),
    )
    path = export_model(defense, tmp_path / f"defense{suffix}", image_size=SIZE)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert_says_the_same(path, defense)


@pytest.mark.slow
def test_public_architectures_can_be_exported(fitted: ZePAD, tmp_path: Path) -> None:
    import timm
    from torchvision.models import resnet18

    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
    inception = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    defense = with_encoders(
        fitted,
        Encoder(resnet18(num_classes=16), preprocessing=Preprocessing.imagenet(size=(40, 32))),
        Encoder(vit, preprocessing=Preprocessing(**inception, size=(32, 32), interpolation="bicubic")),
        Encoder(timm.create_model("test_resnet", num_classes=0), preprocessing=Preprocessing.imagenet()),
        size=(48, 36),
    )
    path = export_model(defense, tmp_path / "defense.onnx", image_size=(48, 36))
    assert_says_the_same(path, defense, size=(48, 36))


class Resizes(nn.Module):
    """One image to many sizes in both antialiased ways."""

    def __init__(self) -> None:
        super().__init__()
        # No width of 1: ONNX Runtime 1.31 gets antialiasing wrong there, and no encoder looks at such images.
        sizes = [(1, 64), (2, 31), (7, 29), (20, 20), (29, 7), (31, 2), (64, 3)]
        self.encoders = nn.ModuleList(
            Encoder(nn.Flatten(), preprocessing=Preprocessing(size=size, interpolation=mode))
            for size in sizes
            for mode in ("bilinear", "bicubic")
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([encoder(images) for encoder in self.encoders], dim=1)


def test_the_antialiased_resize_of_the_runtime_is_ours(tmp_path: Path) -> None:
    images = torch.rand(2, 1, 29, 20).round()  # black and white: the steepest edges there are
    resizes = Resizes().eval()
    program = torch.onnx.export(resizes, (images,), input_names=["images"], dynamo=True, verbose=False)
    program.save(tmp_path / "resizes.onnx")
    (resized,) = answers(tmp_path / "resizes.onnx", images).values()
    torch.testing.assert_close(resized, resizes(images), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_pt2_runs_without_this_library_and_to_the_last_bit(
    named: ZePAD, exported: dict[str, Path], tmp_path: Path
) -> None:
    images = toy_data(5)[0]
    shutil.copy(exported[".pt2"], tmp_path)
    torch.save(images, tmp_path / "images.pt")
    code = """
import sys, torch
torch.set_num_threads(1)
torch.save(torch.export.load("defense.pt2").module()(torch.load("images.pt")), "said.pt")
sys.exit("zepad" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "said.pt")["logits"], named(images))


@pytest.mark.slow
def test_large_weights_lie_beside_the_graph_and_move_with_it(
    fitted: ZePAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 100)
    export_model(fitted, tmp_path / "here" / "defense.onnx", image_size=SIZE)
    (tmp_path / "here").rename(tmp_path / "there")
    images, path = varied(5), tmp_path / "there" / "defense.onnx"
    for data in ("defense.onnx.data", "defense.2.onnx.data", "defense.onnx.data"):
        # A second export leaves the weights of the first until its own graph is there: neither graph is ever without.
        assert {file.name for file in path.parent.iterdir()} == {"defense.onnx", data}
        torch.testing.assert_close(answers(path, images)["logits"], fitted(images), rtol=0, atol=1e-4)
        export_model(fitted, path, image_size=SIZE)


# what travels along ---------------------------------------------------------------------------------------------


def test_names_and_threshold_travel_along(named: ZePAD, exported: dict[str, Path]) -> None:
    session = ort.InferenceSession(exported[".onnx"], providers=["CPUExecutionProvider"])
    files = {"zepad.json": ""}
    torch.export.load(exported[".pt2"], extra_files=files)
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata == json.loads(files["zepad.json"])
    assert (metadata["library"], metadata["version"]) == ("zepad", zepad.__version__)
    assert json.loads(metadata["class_names"]) == list(named.class_names)
    assert json.loads(metadata["threshold"]) == named.threshold


def test_inputs_and_outputs_are_named_and_the_batch_is_open(exported: dict[str, Path]) -> None:
    session = ort.InferenceSession(exported[".onnx"])
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("images", "tensor(float)", ["batch", 3, *SIZE])
    ]
    shapes = {output.name: output.shape for output in session.get_outputs()}
    assert shapes == {
        "logits": ["batch", 3],
        "probabilities": ["batch", 3],
        "weights": ["batch", 3],
        "detection_score": ["batch"],
    }


@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=pytest.mark.slow), ".pt2"])
def test_the_defense_is_left_as_it_was_and_nothing_is_said(
    fitted: ZePAD, suffix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fitted.train()
    fitted.heads["victim"].requires_grad_(False)
    fitted.heads["benign"].eval()

    def state() -> list[Any]:
        return [
            [part.training for part in fitted.modules()],
            [parameter.requires_grad for parameter in fitted.parameters()],
            {name: tensor.tolist() for name, tensor in fitted.state_dict().items()},
        ]

    before = state()
    path = export_model(fitted, tmp_path / f"defense{suffix}", image_size=SIZE)
    assert state() == before
    assert capfd.readouterr() == ("", "")
    images = toy_data(4)[0]
    said = [answers(path, images)["probabilities"] for _ in range(2)]
    assert torch.equal(*said)  # no dropout got in
    torch.testing.assert_close(said[0], fitted.predict_proba(images), rtol=0, atol=1e-4)


# sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [pytest.param(((10, 12), (10, 12), (10, 12)), marks=pytest.mark.slow), (None, (10, 12), None)]
)
def test_the_encoders_size_is_the_default(fitted: ZePAD, sizes: Any, tmp_path: Path) -> None:
    path = export_model(with_sizes(fitted, *sizes), tmp_path / "defense.pt2")
    assert answers(path, torch.rand(3, 3, 10, 12))["logits"].shape == (3, 3)
    with pytest.raises(Exception, match="10"):
        answers(path, torch.rand(3, 3, 12, 12))


@pytest.mark.parametrize(
    ("sizes", "got"),
    [((None, None, None), "got none"), (((10, 12), (9, 12), None), "got 9x12 and 10x12")],
    ids=["none", "two"],
)
def test_no_size_or_two_ask_for_one(fitted: ZePAD, sizes: Any, got: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{got}\. .*image_size=\(height, width\)"):
        export_model(with_sizes(fitted, *sizes), tmp_path / "defense.pt2")


@pytest.mark.parametrize("size", [16, (16,), (16, 16, 3), (16, 0), (16.0, 16.0), (True, True), "ab"])
def test_a_size_that_is_none_is_refused(fitted: ZePAD, size: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"image_size must be a pair of positive integers \(height, width\)"):
        export_model(fitted, tmp_path / "defense.pt2", image_size=size)


# refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["defense", "defense.pt", "defense.onnx.gz", "defense.ONNX"])
def test_other_suffixes_are_refused_with_the_known(fitted: ZePAD, name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"must end in \.onnx or \.pt2; got '.*{name}'"):
        export_model(fitted, tmp_path / name, image_size=SIZE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", pytest.param("onnxscript", marks=pytest.mark.slow)])
def test_a_missing_package_names_the_extra(
    fitted: ZePAD, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package}.*pip install 'zepad\[onnx\]'"):
        export_model(fitted, tmp_path / "defense.onnx", image_size=SIZE)
    files = {"zepad.json": ""}
    torch.export.load(export_model(fitted, tmp_path / "defense.pt2", image_size=SIZE), extra_files=files)
    assert json.loads(json.loads(files["zepad.json"])["class_names"]) is None  # a .pt2 needs neither package


def test_a_defense_that_is_not_fitted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"Call harden\(loader\)"):
        export_model(ZePAD.from_encoders(TinyEncoder(), TinyEncoder()), tmp_path / "defense.pt2", image_size=SIZE)


def test_images_that_do_not_fit_are_told_apart(fitted: ZePAD, tmp_path: Path) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    defense = with_encoders(fitted, flat, TinyEncoder(), TinyEncoder(), size=(32, 32))
    with pytest.raises(InputError, match=r"do not take images of shape \(2, 3, 16, 16\): .*another image_size"):
        export_model(defense, tmp_path / "defense.pt2", image_size=SIZE)


class Branching(TinyEncoder):
    """Decides in Python from a pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Singular(TinyEncoder):
    """Uses an operation that ONNX lacks."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.linalg.svdvals(x).sum(dim=(1, 2))[:, None]


@pytest.mark.parametrize(
    ("encoder", "suffix", "message"),
    [
        (Branching, ".pt2", r"cannot be written as a graph .*[Dd]ata-dependent"),
        # PyTorch 2.7 refuses it a step earlier than later versions.
        (
            Singular,
            ".onnx",
            r"cannot be expressed in ONNX: .*svd.* Export a \.pt2 instead|cannot be written as a graph",
        ),
    ],
)
def test_an_encoder_that_is_no_graph_is_refused(
    fitted: ZePAD, encoder: type[nn.Module], suffix: str, message: str, tmp_path: Path
) -> None:
    defense = with_encoders(fitted, encoder(), TinyEncoder(), TinyEncoder())
    with pytest.raises(InputError, match=message):
        export_model(defense, tmp_path / f"defense{suffix}", image_size=SIZE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupted"])
def test_a_failed_export_leaves_the_older_file_and_nothing_else(
    fitted: ZePAD, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, older = tmp_path / "defense.pt2", b"an older file"
    path.write_bytes(older)

    def half(program: object, target: io.BytesIO, **arguments: object) -> None:
        target.write(b"half")
        raise failure

    monkeypatch.setattr(torch.export, "save", half)
    with pytest.raises((CheckpointError, KeyboardInterrupt), match=r"defense\.pt2 cannot be written: disk full|^$"):
        export_model(fitted, path, image_size=SIZE)
    assert path.read_bytes() == older
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_refused(fitted: ZePAD, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written: .*Choose a writable path"):
        export_model(fitted, tmp_path / "file" / "defense.pt2", image_size=SIZE)


# one encoder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_encoder_is_exported_with_its_preprocessing(fitted: ZePAD, suffix: str, tmp_path: Path) -> None:
    branch = fitted.branch("victim")
    sized = Preprocessing.imagenet(size=(11, 21), interpolation="bicubic")
    branch.encoder = encoder = Encoder(branch.encoder.backbone, preprocessing=sized).eval()
    path = fitted.export(tmp_path / f"victim{suffix}", encoder="victim", image_size=SIZE)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    for count in BATCHES:
        images = varied(count)
        said = answers(path, images)
        assert list(said) == ["features"]
        with torch.no_grad():
            torch.testing.assert_close(said["features"], encoder(images), rtol=0, atol=1e-5)


def test_an_encoder_is_exported_before_the_model_is_fitted(tmp_path: Path) -> None:
    built = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), preprocess=Preprocessing(size=SIZE))
    graph = torch.export.load(built.export(tmp_path / "auxiliary.pt2", encoder="auxiliary")).module()
    images = varied(3)
    assert torch.equal(graph(images)["features"], built.encoder("auxiliary")(images))
    with pytest.raises(StageError):
        built.export(tmp_path / "defense.pt2")


def test_weights_of_an_encoder_fit_its_own_library(fitted: ZePAD, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    fitted.branch("victim").encoder = Encoder(TinyEncoder(), preprocessing=Preprocessing.imagenet(size=SIZE)).eval()
    path = fitted.export(tmp_path / "deep" / "victim.safetensors", encoder="victim")
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    preprocessing = Preprocessing.from_dict(json.loads(facts["preprocessing"]))
    backbone = TinyEncoder()
    backbone.load_state_dict(load_file(path))
    images = varied(4, (20, 24))
    rebuilt = Encoder(backbone, preprocessing=preprocessing).eval()
    assert torch.equal(rebuilt(images), fitted.encoder("victim")(images))
    assert (facts["library"], facts["version"], facts["spec"]) == ("zepad", zepad.__version__, "custom")


def test_a_wrong_export_of_an_encoder_is_refused(fitted: ZePAD, tmp_path: Path) -> None:
    for arguments, message in (
        ({"encoder": "teacher"}, "this model has victim"),
        ({"encoder": "victim", "image_size": SIZE}, "image_size must be None for a file of weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            fitted.export(tmp_path / "x.safetensors", **arguments)
    with pytest.raises(ConfigError, match=r"must end in .onnx or .pt2; got"):
        fitted.export(tmp_path / "x.safetensors")  # weights alone are no defense
    with pytest.raises(ConfigError, match="of the encoders' own there must be one, got none"):
        fitted.export(tmp_path / "x.pt2", encoder="victim")
    assert list(tmp_path.iterdir()) == []
