"""What hardening says at its end of what it reached on images that it held out."""

from __future__ import annotations

import copy
import json
import logging
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import HardenConfig
from zepad.encoders import Encoder
from zepad.encoders.sources.registry import wrap_module
from zepad.errors import HardeningWarning
from zepad.evaluation import accuracy
from zepad.modules import Branch
from zepad.objectives import Batch, ObjectiveOutput, fare
from zepad.training import hardening
from zepad.training.hardening import Hardened
from zepad.training.loaders import hold_out
from zepad.zero_shot import ZeroShotHead

SHORT = HardenConfig(epochs=2, steps=1, precision="fp32")


def forget(branch: Branch, batch: Batch) -> ObjectiveOutput:
    """Make the branch wrong on purpose."""
    return ObjectiveOutput(-nn.functional.cross_entropy(branch(batch.adversarial), batch.labels))


def loader_of(count: int, noise: float = 0.0) -> DataLoader:
    images, labels = toy_data(count)
    images = (images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    return DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)


@pytest.fixture
def encoder() -> Encoder:
    return wrap_module(TinyEncoder())


def run(encoder: Encoder, loader: object, config: HardenConfig = SHORT, **settings: object) -> Hardened:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HardeningWarning)
        return hardening.harden({"victim": encoder}, loader, config, progress=False, **settings)


def naive_probe(encoder: Encoder, train: DataLoader, held_out: DataLoader) -> float:
    """Return the accuracy of scikit-learn's own pipeline on the features."""

    def rows(loader: DataLoader) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            pairs = [(encoder(images), labels) for images, labels in loader]
        return tuple(torch.cat(part).numpy() for part in zip(*pairs, strict=True))

    features, labels = rows(train)
    strength = 0.5 / (1e-3 * len(labels))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-6, max_iter=1000))
    return float(probe.fit(features, labels).score(*rows(held_out)))


def test_the_outcome_is_that_of_the_branch_and_of_a_probe_on_the_public_encoder(encoder: Encoder) -> None:
    loader = loader_of(300, noise=0.6)
    hardened = run(encoder, loader)
    train, held_out = hold_out(loader, SHORT.val_fraction, SHORT.seed)
    outcome, history = hardened.record["outcome"]["victim"], hardened.record["history"]["victim"]
    assert outcome["images"] == 30
    assert outcome["benign_accuracy"] == accuracy(hardened.branches["victim"], held_out).rate
    assert outcome["adversarial_accuracy"] == max(epoch["val_adversarial_accuracy"] for epoch in history)
    expected = naive_probe(encoder.eval(), train, held_out)
    assert outcome["public_accuracy"] == pytest.approx(expected)
    assert 0.4 < expected < 1  # or the comparison would show nothing
    json.dumps(hardened.record)


def test_measuring_the_outcome_changes_no_weight_and_no_random_state(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copy.deepcopy(encoder.state_dict())

    def trained() -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(4)
        hardened = hardening.harden(
            {"victim": encoder, "auxiliary": encoder}, loader_of(96), SHORT, num_classes=3, progress=False
        )
        states = [branch.state_dict() for branch in hardened.branches.values()]
        return {f"{i}.{key}": value for i, state in enumerate(states) for key, value in state.items()}, torch.rand(4)

    told, random = trained()
    monkeypatch.setattr(hardening, "tell_outcome", lambda *_: None)
    silent, silent_random = trained()
    assert told.keys() == silent.keys()
    assert all(torch.equal(told[key], silent[key]) for key in told)
    assert torch.equal(random, silent_random)
    assert all(torch.equal(encoder.state_dict()[key], value) for key, value in before.items())


def test_one_line_for_each_encoder_is_logged(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="zepad"):
        outcome = run(encoder, loader_of(100)).record["outcome"]["victim"]
    (line,) = caplog.messages
    benign, adversarial, public = (f"{outcome[f'{name}_accuracy']:.1%}" for name in ("benign", "adversarial", "public"))
    assert line == (
        f"harden victim: benign accuracy {benign}, {adversarial} under its own attack on 10 held-out images; "
        f"the public encoder has {public}."
    )


@pytest.mark.parametrize(
    ("objective", "count", "warned"), [(forget, 600, True), (forget, 300, False), (None, 600, False)]
)
def test_a_branch_far_below_its_public_encoder_is_warned_of(
    encoder: Encoder, objective: object, count: int, warned: bool
) -> None:
    config = HardenConfig(epochs=2 if objective else 20, steps=1, lr=1e-2, head_lr=1e-2, eps=2 / 255)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hardened = hardening.harden({"victim": encoder}, loader_of(count), config, objective=objective, progress=False)
    outcome = hardened.record["outcome"]["victim"]
    messages = [str(warning.message) for warning in caught if warning.category is HardeningWarning]
    assert outcome["images"] == count // 10
    assert (outcome["benign_accuracy"] < outcome["public_accuracy"] - 0.1) == (objective is forget)
    assert len(messages) == warned
    for message in messages:
        assert f"benign accuracy of {outcome['benign_accuracy']:.1%} on 60 held-out images" in message
        assert f"the public encoder has {outcome['public_accuracy']:.1%}. Train for more epochs, raise lr" in message


def test_nothing_is_said_where_nothing_is_held_out_or_labelled(encoder: Encoder) -> None:
    images, labels = toy_data(48)
    assert run(encoder, list(zip(images.split(16), labels.split(16), strict=True))).record["outcome"] == {
        "victim": None
    }
    unlabelled = DataLoader(images, batch_size=16)
    assert run(encoder, unlabelled, objective=fare()).record["outcome"] == {"victim": None}


def test_training_images_of_one_class_leave_the_public_encoder_out(encoder: Encoder) -> None:
    images, labels = toy_data(48)
    alike = DataLoader(TensorDataset(images, torch.zeros_like(labels)), batch_size=16)
    outcome = run(encoder, alike, num_classes=3).record["outcome"]["victim"]
    assert outcome["public_accuracy"] is None
    assert outcome["images"] == 5


def test_a_given_head_stands_for_the_probe(encoder: Encoder) -> None:
    head = ZeroShotHead(nn.functional.normalize(torch.randn(3, 8), dim=1))
    loader = loader_of(200)
    outcome = run(encoder, loader, zero_shot={"victim": head}).record["outcome"]["victim"]
    held_out = hold_out(loader, SHORT.val_fraction, SHORT.seed)[1]
    assert outcome["public_accuracy"] == accuracy(Branch(encoder, head).eval(), held_out).rate
