"""A defense is a plain `nn.Module`: the tools of PyTorch and of its ecosystem work on it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, HardenConfig, HeadConfig, Preprocessing, StageError, ZePAD
from zepad.encoders import Encoder
from zepad.encoders.preprocessing import Interpolation
from zepad.types import ROLES

IMAGES, LABELS = toy_data(24)
TESTS = Path(__file__).parent


def resizing(defense: ZePAD, interpolation: Interpolation = "bilinear") -> ZePAD:
    """Give every encoder a resize and a normalisation; the heads do not mind for what is tested here."""
    preprocessing = Preprocessing.imagenet(size=(12, 20), interpolation=interpolation)
    for role in ROLES:
        defense.branch(role).encoder = Encoder(defense.encoder(role).backbone, preprocessing=preprocessing).eval()
    return defense


# compiling and tracing ------------------------------------------------------------------------------------------


# PyTorch cannot differentiate an antialiased bicubic resize in a graph for batches of any size (its issue 197622).
@pytest.mark.parametrize(
    ("interpolation", "dynamic"),
    [
        pytest.param(None, None, id="as they come", marks=pytest.mark.exhaustive),
        pytest.param("bilinear", None, id="bilinear", marks=pytest.mark.exhaustive),
        pytest.param("bicubic", False, id="bicubic", marks=pytest.mark.exhaustive),
    ],
)
def test_the_whole_forward_and_its_gradient_compile(
    fitted: ZePAD, interpolation: Interpolation | None, dynamic: bool | None
) -> None:
    defense = fitted if interpolation is None else resizing(fitted, interpolation)
    torch.compiler.reset()  # else the graphs of earlier tests count towards the limit of recompilations
    compiled = torch.compile(defense, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for count in (24, 7, 1):  # where it may be, the graph is dynamic from the second size on
        gradients = []
        outputs = []
        for model in (defense, compiled):
            images = IMAGES[:count].clone().requires_grad_()
            outputs.append(model(images))
            F.cross_entropy(outputs[-1], LABELS[:count]).backward()
            gradients.append(images.grad)
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_a_compiled_defense_still_decides(fitted: ZePAD) -> None:
    expected = fitted.predict_proba(IMAGES), fitted.detect(IMAGES)
    fitted.compile(backend="aot_eager")
    torch.testing.assert_close(fitted(IMAGES).softmax(dim=-1), expected[0])
    assert torch.equal(fitted.predict_proba(IMAGES), expected[0])
    assert torch.equal(fitted.detect(IMAGES), expected[1])


# copies and states ----------------------------------------------------------------------------------------------


def test_a_copy_is_equal_and_independent(fitted: ZePAD) -> None:
    expected = fitted(IMAGES)
    twin = copy.deepcopy(fitted)
    assert torch.equal(twin(IMAGES), expected)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert torch.equal(fitted(IMAGES), expected)


def test_a_state_dict_goes_into_a_model_built_alike(fitted: ZePAD, tmp_path: Path) -> None:
    torch.save(fitted.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(fitted)
    for module in other.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not torch.allclose(other(IMAGES), fitted(IMAGES))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(IMAGES), fitted(IMAGES))


def test_a_state_dict_with_heads_does_not_go_into_a_model_without(fitted: ZePAD) -> None:
    built = ZePAD.from_encoders(TinyEncoder(), TinyEncoder())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"branches\.victim\.head"):
        built.load_state_dict(fitted.state_dict())
    with pytest.raises(StageError, match="harden"):
        built(IMAGES)


def test_functional_calls_use_the_weights_they_are_given(fitted: ZePAD) -> None:
    other = copy.deepcopy(fitted)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    called = torch.func.functional_call(fitted, other.state_dict(), (IMAGES,))
    assert torch.equal(called, other(IMAGES))
    assert not torch.equal(called, fitted(IMAGES))


# precisions, layouts and devices --------------------------------------------------------------------------------


@pytest.mark.parametrize("prepare", [lambda defense: defense, resizing], ids=["as they come", "resizing"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_defense_in_another_precision_takes_images_of_any(fitted: ZePAD, dtype: torch.dtype, prepare) -> None:
    defense = prepare(fitted)
    expected = defense.predict_proba(IMAGES)
    defense.to(dtype)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-5}[dtype]
    for images in (IMAGES, IMAGES.to(dtype)):
        probabilities = defense.predict_proba(images)
        assert probabilities.dtype == dtype
        torch.testing.assert_close(probabilities.float(), expected, rtol=0, atol=tolerance)
        assert defense.detection_score(images).dtype == dtype


def test_autocast_changes_the_precision_alone(fitted: ZePAD) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        logits = fitted(IMAGES)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), fitted(IMAGES), rtol=0, atol=5e-2)


def test_channels_last_changes_nothing(fitted: ZePAD) -> None:
    expected = fitted(IMAGES)
    fitted.to(memory_format=torch.channels_last)
    torch.testing.assert_close(fitted(IMAGES.to(memory_format=torch.channels_last)), expected, rtol=0, atol=1e-5)


def test_channels_last_survives_training_and_is_saved(loader: DataLoader, tmp_path: Path) -> None:
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder()).to(memory_format=torch.channels_last)
    defense.harden(loader, HardenConfig(epochs=1, steps=1), progress=False)
    defense.fit_benign(loader, BenignConfig(epochs=1), head_config=HeadConfig(epochs=1), progress=False)
    weights = [p for p in defense.parameters() if p.ndim == 4 and min(p.shape[1:3]) > 1]  # else both formats are one
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    defense.save_pretrained(tmp_path)
    again = ZePAD.from_pretrained(tmp_path, victim=TinyEncoder(), auxiliary=TinyEncoder())
    torch.testing.assert_close(again(IMAGES), defense(IMAGES), rtol=0, atol=1e-5)


def test_a_defense_goes_to_the_meta_device_and_back(fitted: ZePAD) -> None:
    expected, state = fitted(IMAGES), copy.deepcopy(fitted.state_dict())
    fitted.to("meta")
    assert fitted.device == torch.device("meta")
    assert fitted(torch.empty(5, 3, 16, 16, device="meta")).shape == (5, 3)
    fitted.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(fitted(IMAGES), expected)


# the user's own training ----------------------------------------------------------------------------------------


def fine_tune(model: nn.Module, images: Tensor, labels: Tensor, steps: int = 3) -> list[float]:
    """Fit what can be trained with plain SGD and return the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def with_new_heads(defense: ZePAD) -> ZePAD:
    """Ready for the user's training: heads that know nothing and may learn."""
    torch.manual_seed(0)
    for layer in defense.heads.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    defense.heads.requires_grad_(True)
    return defense


def test_heads_learn_in_a_plain_loop_and_the_encoders_do_not_move(fitted: ZePAD) -> None:
    before = copy.deepcopy(fitted.encoders.state_dict())
    losses = fine_tune(with_new_heads(fitted).train(), IMAGES, LABELS, steps=100)
    assert sum(losses[-20:]) < sum(losses[:20]) / 1.5
    assert (fitted.predict(IMAGES) == LABELS).float().mean() > 0.9
    after = fitted.encoders.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_inside_another_module_the_encoders_stay_in_evaluation_mode(fitted: ZePAD) -> None:
    outer = nn.Sequential(fitted).train()
    assert fitted.heads.training
    assert not any(part.training for part in fitted.encoders.modules())
    assert outer(IMAGES).shape == (24, 3)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_on_one_process_changes_nothing(fitted: ZePAD, process_group: None) -> None:
    plain = with_new_heads(copy.deepcopy(fitted))
    wrapped = DistributedDataParallel(with_new_heads(fitted))
    assert fine_tune(wrapped, IMAGES, LABELS) == fine_tune(plain, IMAGES, LABELS)
    assert all(map(torch.equal, fitted.state_dict().values(), plain.state_dict().values()))


DDP_SCRIPT = """
import sys
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from test_compatibility import IMAGES, LABELS, TinyEncoder, ZePAD, fine_tune, with_new_heads

torch.distributed.init_process_group("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
defense = ZePAD.from_pretrained("model", victim=TinyEncoder(), auxiliary=TinyEncoder())
model = DistributedDataParallel(with_new_heads(defense))
fine_tune(model, IMAGES[rank::world], LABELS[rank::world])
torch.save((world, defense.state_dict()), f"state{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.exhaustive  # two more processes; what one process learns is compared in every run
def test_ddp_on_two_processes_learns_what_one_learns(fitted: ZePAD, tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(DDP_SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(launcher, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    start = copy.deepcopy(with_new_heads(fitted).state_dict())
    fine_tune(fitted, IMAGES, LABELS)  # the mean of the gradients of two halves is that of the whole
    moved = [not torch.equal(start[key], value) for key, value in fitted.state_dict().items()]
    assert sum(moved) == 18  # weights and biases of three heads of three layers
    for rank in range(2):
        world, state = torch.load(tmp_path / f"state{rank}.pt", weights_only=True)
        assert world == 2
        torch.testing.assert_close(state, dict(fitted.state_dict()), rtol=0, atol=1e-5)


# data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_labels", [True, False])
def test_loaders_with_workers_feed_a_defense(fitted: ZePAD, with_labels: bool) -> None:
    data: Dataset = TensorDataset(IMAGES, LABELS) if with_labels else TensorDataset(IMAGES)
    loader = DataLoader(data, batch_size=5, num_workers=2)
    assert torch.equal(fitted.predict(loader), fitted.predict(IMAGES))
    torch.testing.assert_close(fitted.detection_score(loader), fitted.detection_score(IMAGES))


# third parties' attacks -----------------------------------------------------------------------------------------

EPS = 64 / 255


def run_art(defense: ZePAD) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        defense, loss=nn.CrossEntropyLoss(), input_shape=(3, 16, 16), nb_classes=3, clip_values=(0.0, 1.0)
    )
    assert np.array_equal(classifier.predict(IMAGES.numpy()).argmax(axis=1), defense.predict(IMAGES).numpy())
    attack = ProjectedGradientDescent(classifier, eps=EPS, eps_step=EPS / 4, max_iter=8, verbose=False)
    return torch.from_numpy(attack.generate(IMAGES.numpy(), LABELS.numpy()))


def run_foolbox(defense: ZePAD) -> Tensor:
    from foolbox import PyTorchModel
    from foolbox.attacks import LinfPGD

    model = PyTorchModel(defense, bounds=(0, 1), device="cpu")
    (attacked,), _, _ = LinfPGD(steps=8)(model, IMAGES, LABELS, epsilons=[EPS])
    return attacked


# What these packages warn of when they are imported or used is theirs, not ours.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("attack", [run_art, run_foolbox])
def test_attack_tools_take_a_defense_as_it_is(fitted: ZePAD, attack) -> None:
    attacked = attack(fitted)
    assert (attacked - IMAGES).abs().max() <= EPS + 1e-6
    losses = [F.cross_entropy(fitted(images), LABELS, reduction="none") for images in (IMAGES, attacked)]
    assert (losses[1] > losses[0]).all()
