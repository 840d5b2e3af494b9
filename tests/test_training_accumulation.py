"""Gradient accumulation: several small batches train as one large batch of the same images does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, ConfigError, HardenConfig
from zepad.modules import Branch
from zepad.objectives import Batch, ObjectiveOutput, Recipe
from zepad.training import Callback, TrainingStatus, harden_branch, train_benign


class Smooth(nn.Module):
    """An encoder without BatchNorm or dropout, whose gradients are nowhere zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def steepest(branch: Branch, batch: Batch) -> ObjectiveOutput:
    """The mean distance of features from what colours say, after a step towards more of it: without any chance."""
    targets = batch.images.mean((2, 3)) @ torch.ones(3, 4)
    moving = batch.images.detach().requires_grad_()
    (slope,) = torch.autograd.grad((branch.encoder(moving) - targets).square().sum(), moving)
    attacked = batch.images + 0.1 * slope / slope.flatten(1).norm(dim=1)[:, None, None, None]
    return ObjectiveOutput((branch.encoder(attacked) - targets).square().sum(1).mean())


RECIPE = Recipe(
    name="steepest",
    objective=steepest,
    inner=None,
    trained=("encoder",),
    choose_epoch=False,
    min_updates=12,
    min_epochs=1,
)


class Steps(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, float, float]] = []

    def on_step_end(self, status: TrainingStatus) -> None:
        self.seen.append((status.step, status.metrics["lr"], status.metrics["loss"]))


def run(images: Tensor, batch_size: int, accumulated: int, **settings: Any) -> tuple[dict[str, Tensor], list[Any]]:
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(images), batch_size=batch_size, shuffle=True)
    config = HardenConfig(gradient_accumulation_steps=accumulated, val_fraction=0, precision="fp32", **settings)
    steps = Steps()
    branch, _ = harden_branch(Smooth(), loader, config, objective=RECIPE, progress=False, callbacks=[steps])
    return branch.state_dict(), steps.seen


@settings(max_examples=10)
@given(
    count=st.integers(2, 14),
    size=st.integers(1, 5),
    accumulated=st.integers(1, 4),
    schedule=st.sampled_from(["cosine", "onecycle"]),
)
def test_small_batches_accumulated_equal_one_large_batch(
    count: int, size: int, accumulated: int, schedule: str
) -> None:
    images = toy_data(count, size=8)[0]
    weights, steps = run(images, size, accumulated, epochs=2, schedule=schedule)
    expected, expected_steps = run(images, size * accumulated, 1, epochs=2, schedule=schedule)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(steps, expected_steps, rtol=1e-4, atol=1e-5)
    assert [step for step, _, _ in steps] == list(range(1, 2 * math.ceil(count / (size * accumulated)) + 1))


def test_the_number_of_epochs_is_chosen_by_updates() -> None:
    images = toy_data(32, size=8)[0]
    assert len(run(images, 4, 4, epochs=None)[1]) == 12  # in six epochs; of 8 batches each, there would be two epochs


@pytest.mark.parametrize("stage", ["harden", "fit_benign"])
def test_resumed_in_the_middle_an_accumulating_run_equals_the_undisturbed_one(stage: str, tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(*toy_data(60)), batch_size=8, shuffle=True)  # 54 images: seven batches, four groups

    def train(**kept: Any) -> dict[str, Tensor]:
        torch.manual_seed(1)
        if stage == "harden":
            config = HardenConfig(epochs=3, steps=1, gradient_accumulation_steps=2)
            return harden_branch(TinyEncoder(), data, config, progress=False, **kept)[0].state_dict()
        benign = BenignConfig(epochs=3, gradient_accumulation_steps=2)
        return train_benign(TinyEncoder(), data, benign, progress=False, **kept)[0].state_dict()

    undisturbed = train(checkpoint_dir=tmp_path)
    (newest,) = tmp_path.rglob("epoch-0002.pt")
    newest.unlink()
    steps = Steps()
    resumed = train(checkpoint_dir=tmp_path, resume=True, callbacks=[steps])
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())
    assert [step for step, _, _ in steps.seen] == [9, 10, 11, 12]


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "4"])
def test_a_number_of_batches_that_is_none_is_refused(value: Any) -> None:
    for config in (HardenConfig, BenignConfig):
        with pytest.raises(ConfigError, match="gradient_accumulation_steps must be an integer of at least 1; got "):
            config(gradient_accumulation_steps=value)


def test_a_config_of_before_accumulation_loads() -> None:
    before = HardenConfig(epochs=3).to_dict()
    del before["gradient_accumulation_steps"]
    assert HardenConfig.from_dict(before) == HardenConfig(epochs=3)
