"""Settings as frozen values with a JSON round trip. Budgets are in [0, 1] pixel units, written `8 / 255`."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, TypeVar

from .arguments import checked
from .errors import ConfigError
from .schema import STRICT
from .types import Precision

Schedule = Literal["cosine", "exponential", "onecycle"]

_Config = TypeVar("_Config", bound="_JSONConfig")


def require(condition: bool, name: str, got: object, expected: str) -> None:
    """Raise a `ConfigError` that says what was got and what was expected, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{name} must be {expected}; got {got!r}.")


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a setting is a finite number; True and False are not."""
    # A comparison needs no conversion, which fails for very large integers, and is false for NaN.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a setting is an `int`; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_hub_id(value: object) -> TypeGuard[str]:
    """Return whether a value can be a repository id on the Hugging Face Hub: `"user/name"`, or the older `"name"`."""
    return isinstance(value, str) and bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", value, re.ASCII))


def check_classes(num_classes: int | None) -> None:
    """Refuse a number of classes below two; None leaves it open.

    Raises:
        ConfigError: If there are fewer.
    """
    enough = num_classes is None or num_classes >= 2
    require(enough, "num_classes", num_classes, "at least 2, or None to count them")


def check_budget(eps: float, norm: str = "linf") -> None:
    """Refuse a budget that is not a positive number in [0, 1] pixel units.

    Args:
        eps: Radius of the norm ball. For `"linf"` a radius above 1 can only be a budget in 0..255 units.
        norm: Name of the norm, such as `"linf"`.

    Raises:
        ConfigError: If the value is out of range; for a value in 0..255 units the message suggests the division.
    """
    require(is_number(eps) and eps > 0, "eps", eps, "a positive number in [0, 1] pixel units")
    if norm == "linf" and eps > 1:
        raise ConfigError(
            f"eps must lie in (0, 1] for images in [0, 1]; got {eps!r}, which looks like 0..255 units. "
            f"Write {eps:g} / 255."
        )


@dataclass(frozen=True, kw_only=True)
class _JSONConfig:
    __pydantic_config__ = STRICT

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    @checked
    def from_dict(cls: type[_Config], values: dict[str, Any]) -> _Config:
        """Rebuild the settings, refusing unknown names.

        Raises:
            ConfigError: If a name is unknown or a value out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ConfigError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(names))}.")
        return cls(**values)


def _check_fitting(config: _TrainingConfig | HeadConfig) -> None:
    """Check what every config that trains something has."""
    epochs, precision = config.epochs, config.precision
    require(epochs is None or (is_integer(epochs) and epochs >= 1), "epochs", epochs, "at least 1, or None")
    require(is_integer(config.seed) and config.seed >= 0, "seed", config.seed, "an integer of zero or more")
    require(precision in ("auto", "fp32", "bf16"), "precision", precision, '"auto", "fp32" or "bf16"')


def _check_rate(name: str, value: object) -> None:
    require(is_number(value) and value > 0, name, value, "a positive number")


def _check_decay(value: object) -> None:
    require(is_number(value) and value >= 0, "weight_decay", value, "zero or more")


@dataclass(frozen=True, kw_only=True)
class _TrainingConfig(_JSONConfig):
    epochs: int | None = None
    lr: float | None = None
    head_lr: float | None = None
    weight_decay: float | None = None
    schedule: Schedule | None = None
    val_fraction: float = 0.1
    gradient_accumulation_steps: int = 1
    seed: int = 0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        _check_fitting(self)
        for name in ("lr", "head_lr"):
            if getattr(self, name) is not None:
                _check_rate(name, getattr(self, name))
        if self.weight_decay is not None:
            _check_decay(self.weight_decay)
        schedules = (None, "cosine", "exponential", "onecycle")
        require(self.schedule in schedules, "schedule", self.schedule, '"cosine", "exponential", "onecycle" or None')
        fraction = self.val_fraction
        require(is_number(fraction) and 0 <= fraction < 1, "val_fraction", fraction, "in [0, 1)")
        steps = self.gradient_accumulation_steps
        require(is_integer(steps) and steps >= 1, "gradient_accumulation_steps", steps, "an integer of at least 1")


@dataclass(frozen=True, kw_only=True)
class HardenConfig(_TrainingConfig):
    """Settings of the adversarial fine-tuning of victim and auxiliary (multi-pattern adversarial enhancement, MPAE).

    The defaults are those that measured best on small data (docs/recipe.md); `HardenConfig.paper()` holds the paper's.

    Attributes:
        epochs: Number of passes over the loader. None takes as many as the recipe asks for: 900 updates and at least
            10 passes for most.
        lr: Peak learning rate of the encoder (Adam). None takes the recipe's own, 2e-3 for most, but at most 1e-4
            for an encoder that normalises by LayerNorm alone, such as a ViT.
        head_lr: Peak learning rate of the head that is trained along. None takes the recipe's own, 2e-3 for most.
        weight_decay: L2 penalty inside Adam. None takes the recipe's own, 8e-4 as in the paper for most.
        schedule: Course of the learning rates: `"cosine"` decays to zero over the whole run, `"exponential"` by 0.96
            per epoch, `"onecycle"` rises for the first 30 % of the run and then decays to zero. None takes the
            recipe's own, `"cosine"` for most.
        val_fraction: Share of the loader's data set that is held out for choosing the epoch when no `val_loader` is
            given, in [0, 1).
        gradient_accumulation_steps: Number of batches whose gradients are summed up for one update, weighted by their
            images. Four batches of 64 images then train as one of 256 does, in the memory of one of 64. BatchNorm
            still sees single batches.
        seed: Seed of order, attacks, heads and dropout.
        precision: Precision of the forward passes: `"fp32"`, `"bf16"`, or `"auto"` for bfloat16 where the hardware
            computes in it and float32 elsewhere.
        eps: L-infinity radius of the training attack in [0, 1] pixel units.
        step_size: Length of one step of the training attack in [0, 1] pixel units; None takes twice the radius of this
            attack, divided by its steps.
        steps: Number of steps of the training attack. None takes the recipe's own: two for `restoration()`, and with it
            the default preset, and 5 for most. A recipe that attacks no encoder in training needs none.
        structure_weight: Weight of the structure loss `L_f`, taken per row so that it means the same at any batch size.
    """

    eps: float = 8 / 255
    step_size: float | None = None
    steps: int | None = None
    structure_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        super().__post_init__()
        check_budget(self.eps)
        step_size, weight = self.step_size, self.structure_weight
        require(
            step_size is None or (is_number(step_size) and 0 < step_size <= 1),
            "step_size",
            step_size,
            "in (0, 1], written 2 / 255",
        )
        steps = self.steps
        require(
            steps is None or (is_integer(steps) and steps >= 1), "steps", steps, "an integer of at least 1, or None"
        )
        require(is_number(weight) and weight >= 0, "structure_weight", weight, "zero or more")

    @classmethod
    def paper(cls, **changes: Any) -> HardenConfig:
        """Return the settings of the paper, which assume 20 epochs of about 200 updates with batches of 256.

        Encoder rate 1e-4, head rate 5e-3, weight decay 8e-4, rates times 0.96 per epoch, PGD of 10 steps with
        eps 0.03 and step 0.007, lambda 20. The paper sums `L_f` over a batch of 256 where this library takes the mean
        per row, hence the weight 20 * 256.

        Args:
            **changes: Fields that differ from those of the paper.
        """
        values: dict[str, Any] = {
            "epochs": 20,
            "lr": 1e-4,
            "head_lr": 5e-3,
            "weight_decay": 8e-4,
            "schedule": "exponential",
            "eps": 0.03,
            "step_size": 0.007,
            "steps": 10,
            "structure_weight": 20.0 * 256,
        }
        return cls(**{**values, **changes})


@dataclass(frozen=True, kw_only=True)
class BenignConfig(_TrainingConfig):
    """Settings of the training of the benign encoder on clean images (benign memory preservation, BMP).

    Attributes:
        epochs: Number of passes over the loader. None takes as many as 100 updates need, at least 10: clean images are
            learnt faster than attacked ones.
        lr: Peak learning rate of the encoder (Adam). None takes 2e-3, and 1e-4 for an encoder that normalises by
            LayerNorm alone, such as a ViT.
        head_lr: Peak learning rate of the head. None takes 2e-3.
        weight_decay: L2 penalty inside Adam. None takes 8e-4.
        schedule: Course of the learning rates: `"cosine"` decays to zero over the whole run, `"exponential"` by 0.96
            per epoch, `"onecycle"` rises for the first 30 % of the run and then decays to zero. None takes `"cosine"`.
        val_fraction: Share of the loader's data set that is held out for choosing the epoch when no `val_loader` is
            given, in [0, 1).
        gradient_accumulation_steps: Number of batches whose gradients are summed up for one update, weighted by their
            images. Four batches of 64 images then train as one of 256 does, in the memory of one of 64. BatchNorm
            still sees single batches.
        seed: Seed of order, heads and dropout.
        precision: Precision of the forward passes: `"fp32"`, `"bf16"`, or `"auto"` for bfloat16 where the hardware
            computes in it and float32 elsewhere.
        freeze_encoder: Whether the benign encoder stays as it is and its head alone is trained, as in the paper's
            example. None trains both forms and keeps the one that is more accurate on the held-out images: the frozen
            one on a tie, the fine-tuned one where nothing can be held out. With an objective beside it, such as
            that of a preset, the encoder that is worth fine-tuning is then trained by this objective instead.
    """

    freeze_encoder: bool | None = False

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        super().__post_init__()
        freeze = self.freeze_encoder
        require(freeze is None or isinstance(freeze, bool), "freeze_encoder", freeze, "True, False or None")


@dataclass(frozen=True, kw_only=True)
class HeadConfig(_JSONConfig):
    """Settings of the fitting of heads on frozen features.

    Attributes:
        epochs: Number of passes over the cached features. None takes as many as 200 updates need, at least 20.
        head_lr: Peak learning rate (Adam, cosine decay); 5e-3 as in the paper.
        weight_decay: L2 penalty inside Adam.
        batch_size: Number of features per update.
        cache_bytes: Number of bytes of features that are kept in memory; more are kept in a memory-mapped temporary
            file.
        seed: Seed of order, initial heads and dropout.
        precision: Precision of the encoders while features are computed: `"fp32"`, `"bf16"` or `"auto"`.
    """

    epochs: int | None = None
    head_lr: float = 5e-3
    weight_decay: float = 8e-4
    batch_size: int = 128
    cache_bytes: int = 2**31
    seed: int = 0
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        _check_fitting(self)
        _check_rate("head_lr", self.head_lr)
        _check_decay(self.weight_decay)
        for name, least in (("batch_size", 1), ("cache_bytes", 0)):
            value = getattr(self, name)
            require(is_integer(value) and value >= least, name, value, f"an integer of at least {least}")
