"""One run of the training loop: which recipe, on what, and how it is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import PGD
from ..config import BenignConfig, HardenConfig
from ..digests import digest_tensor
from ..encoders import Encoder, probe
from ..inputs import Labeller, labelled_batches
from ..objectives import Inner, Rates, Recipe
from ..types import Loader
from .bank import StaticDAEs
from .callbacks import Callback, TrainingStage
from .rates import default_rate


@dataclass(frozen=True, kw_only=True)
class Run:
    """One branch's training.

    Attributes:
        name: Name of the run in progress bars, errors and checkpoints, such as `"harden victim"`.
        stage: Stage that the run is, for callbacks.
        branch: Name of the branch, for callbacks.
        index: Number that distinguishes the seeds of the runs of one model.
        recipe: Recipe, which defines the objective and the inner attack.
        config: Rates, length, seed and precision; a `HardenConfig` also holds budget and steps of the inner attack.
        channels: Number of channels of the images.
        features: Width of the encoder's output.
        lr: Peak learning rate of the encoder: that of the config, or else one that suits recipe and encoder.
        num_classes: Number of classes; None where no label is used.
        head: Head that the run starts with a copy of; None starts with a fresh `MLPHead`.
        labeller: Function that labels the images of a loader without labels; None where the loader has them.
        static: Adversarial examples of the public encoders; None where the recipe does without.
        checkpoint_dir: Folder where this run keeps its epochs; None keeps none.
        resume: Whether to go on from the newest epoch there.
        progress: Whether to show a progress bar.
        callbacks: Objects that are told of the training.
    """

    name: str
    stage: TrainingStage
    branch: str
    index: int
    recipe: Recipe
    config: HardenConfig | BenignConfig
    channels: int
    features: int
    lr: float
    num_classes: int | None
    head: nn.Module | None = None
    labeller: Labeller | None = None
    static: StaticDAEs | None = None
    checkpoint_dir: Path | None = None
    resume: bool = False
    progress: bool = True
    callbacks: Sequence[Callback] = ()

    @classmethod
    def on(cls, encoder: Encoder, *, recipe: Recipe, config: HardenConfig | BenignConfig, **settings: Any) -> Run:
        """Return the run that trains an encoder: channels and features are found with one dummy image.

        Args:
            encoder: The encoder; left as found.
            recipe: What is minimised.
            config: Settings; where they state no learning rate, recipe and encoder decide.
            **settings: All other fields.

        Raises:
            InputError: If no dummy image gets through the encoder.
        """
        channels, features = probe(encoder)
        lr = default_rate(encoder, usual=recipe.rates.lr) if config.lr is None else config.lr
        return cls(recipe=recipe, config=config, channels=channels, features=features, lr=lr, **settings)

    @property
    def rates(self) -> Rates:
        """The learning rates of the config, and those of the recipe where the config leaves them open."""
        return replace(resolved_rates(self.config, self.recipe), lr=self.lr)

    @property
    def attack(self) -> PGD | None:
        """The PGD of recipe and config, on cross-entropy; None where the recipe has no inner attack."""
        inner = self.recipe.inner
        if inner is None:
            return None
        eps, steps, step_size = inner.eps, resolved_steps(self.config, inner), None
        if isinstance(self.config, HardenConfig):
            eps, step_size = self.config.eps if eps is None else eps, self.config.step_size
        assert eps is not None, "a recipe for the benign branch states its radius"
        return PGD(eps=eps, steps=steps, step_size=step_size or 2 * eps / steps)

    def batches(self, loader: Loader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over checked images and labels on a device.

        Raises:
            InputError: If an image or label does not fit.
        """
        return labelled_batches(
            loader, device, channels=self.channels, num_classes=self.num_classes, labeller=self.labeller
        )

    def fingerprint(self, *, epochs: int, images: int | None) -> dict[str, Any]:
        """Return the settings that a run must agree on with the one whose checkpoint it resumes.

        Args:
            epochs: Number of passes in all.
            images: Number of images trained on, where known.
        """
        return {
            **resolved_settings(self.config, self.recipe),
            "lr": self.lr,
            **({} if self.static is None else {"static": self.static.digest}),
            "run": self.name,
            "objective": self.recipe.name,
            "trained": list(self.recipe.trained),
            "num_classes": self.num_classes,
            "head": None if self.head is None else {k: digest_tensor(v) for k, v in self.head.state_dict().items()},
            "total_epochs": epochs,
            "images": images,
        }


def resolved_rates(config: HardenConfig | BenignConfig, recipe: Recipe) -> Rates:
    """Return the learning rates of a config, and those of the recipe where the config leaves them open."""
    stated = {name: getattr(config, name) for name in asdict(recipe.rates)}
    return replace(recipe.rates, **{name: value for name, value in stated.items() if value is not None})


def resolved_steps(config: HardenConfig | BenignConfig, inner: Inner) -> int:
    """Return the number of steps of the inner attack: that of the config, or else the recipe's own."""
    stated = config.steps if isinstance(config, HardenConfig) else None
    return inner.steps if stated is None else stated


def resolved_settings(config: HardenConfig | BenignConfig, recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a config, JSON-ready, with the recipe's rates and steps where the config states none."""
    settings = {**config.to_dict(), **asdict(resolved_rates(config, recipe))}
    if isinstance(config, HardenConfig):
        settings["steps"] = None if recipe.inner is None else resolved_steps(config, recipe.inner)
    return settings
