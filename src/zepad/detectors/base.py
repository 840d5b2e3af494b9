"""What every detector is: settings, a score, the inputs it needs, and how it is fitted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Flag, auto
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import StageError
from ..plugins import Plugin, Register


class DetectorInput(Flag):
    """What a detector needs beside the branches' logits. Combine members with `|`.

    Attributes:
        HARDENED_FEATURES: Features of the hardened encoders. They cost no further encoder pass.
        REFERENCE: Logits and features of the reference, the undefended victim. They cost one encoder pass.
        BLURRED_REFERENCE: Features of the reference on blurred images. They cost one encoder pass.
    """

    HARDENED_FEATURES = auto()
    REFERENCE = auto()
    BLURRED_REFERENCE = auto()


_OF_REFERENCE = DetectorInput.REFERENCE | DetectorInput.BLURRED_REFERENCE


class DetectorInputs(NamedTuple):
    """What a detector looks at. Whatever it does not declare in `Detector.needs` is None.

    Attributes:
        logits: Logits of the branches `(B, N, K)`, hardened branches first, the benign branch last.
        hardened_features: Features of the hardened encoders, joined `(N, D)`.
        reference_logits: Logits of the undefended victim with a head of its own `(N, K)`.
        reference_features: Features of the undefended victim `(N, V)`.
        blurred_features: Features of the undefended victim on the blurred images `(N, V)`.
    """

    logits: Tensor
    hardened_features: Tensor | None = None
    reference_logits: Tensor | None = None
    reference_features: Tensor | None = None
    blurred_features: Tensor | None = None


class Widths(NamedTuple):
    """Widths of the features that a detector may be fitted to.

    Attributes:
        hardened: Width `D` of the hardened encoders' joined features.
        reference: Width `V` of the undefended victim's features.
    """

    hardened: int
    reference: int


State = Mapping[str, Tensor]
"""What fitting a detector finds, by name."""


@dataclass(frozen=True, kw_only=True)
class Detector(Plugin, ABC):
    """Base of all detectors. A detector is a frozen dataclass: its fields are its settings, with a default each.

    A detector of one's own needs `score` and a line of registration:

    >>> from dataclasses import dataclass
    >>> from zepad.detectors import Detector, register
    >>> @dataclass(frozen=True, kw_only=True)
    ... class LowConfidence(Detector):
    ...     def score(self, inputs, state):
    ...         return -inputs.logits.mean(dim=0).softmax(dim=-1).amax(dim=-1)
    >>> register("low-confidence", LowConfidence)

    One that is fitted on benign images also defines `fit` and `state_shapes`.

    Attributes:
        needs: What it looks at beside the branches' logits.
        first_threshold: Threshold before `calibrate` sets one; None where there is none.
    """

    needs: ClassVar[DetectorInput] = DetectorInput(0)
    first_threshold: ClassVar[float | None] = None

    @abstractmethod
    def score(self, inputs: DetectorInputs, state: State) -> Tensor:
        """Return how suspicious each image is, `(N,)`; larger is more suspicious.

        The score must be differentiable, so that an attacker who knows the detector can be played.

        Args:
            inputs: What `needs` declares, and the branches' logits.
            state: What `fit` returned; empty for a detector without a fit.
        """

    def fit(self, inputs: DetectorInputs) -> dict[str, Tensor]:  # noqa: ARG002 - for subclasses
        """Return the state that scoring needs, found on benign images on which the threshold is *not* set.

        Raises:
            ValueError: If there are too few images.
        """
        return {}

    def state_shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:  # noqa: ARG002 - for subclasses
        """Return name and shape of every tensor that `fit` returns, so that a file can be checked before it is read."""
        return {}

    def guarantee(self) -> str:
        """Return what the detector is worth against an attacker who knows of it, for card and report."""
        return "Detection is not robustness: an attacker who knows of the detector can evade it."

    @classmethod
    def is_fitted_on_images(cls) -> bool:
        """Return whether the detector has to be fitted on benign images before it can score."""
        return cls.fit is not Detector.fit

    @classmethod
    def needs_reference(cls) -> bool:
        """Return whether the undefended victim must be kept."""
        return bool(cls.needs & _OF_REFERENCE)

    @classmethod
    def extra_passes(cls) -> int:
        """Return the number of encoder passes that the detector adds to those of the branches."""
        return sum(need in cls.needs for need in (DetectorInput.REFERENCE, DetectorInput.BLURRED_REFERENCE))


class FittedDetector(nn.Module):
    """A detector together with what it was fitted to, as buffers.

    Args:
        rule: The detector.
    """

    def __init__(self, rule: Detector) -> None:
        super().__init__()
        self.rule = rule
        self._state_names: tuple[str, ...] = ()

    @property
    def is_fitted(self) -> bool:
        """Whether it can score."""
        return bool(self._state_names) or not self.rule.is_fitted_on_images()

    def fit(self, inputs: DetectorInputs) -> None:
        """Fit the detector on benign images on which the threshold is *not* set.

        Raises:
            ValueError: If there are too few images.
        """
        self._hold(self.rule.fit(inputs))

    def allocate(self, widths: Widths) -> None:
        """Make room for the state of a fitted detector, which is then loaded."""
        self._hold({name: torch.zeros(shape) for name, shape in self.rule.state_shapes(widths).items()})

    def forward(self, inputs: DetectorInputs) -> Tensor:
        """Return the score of each image `(N,)`. Differentiable.

        Raises:
            StageError: If the detector is not fitted.
        """
        if not self.is_fitted:
            raise StageError(f'the detector "{self.rule.name}" is not fitted. Call calibrate(benign_loader) first.')
        return self.rule.score(inputs, {name: self.get_buffer(name) for name in self._state_names})

    def _hold(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in state.items():
            self.register_buffer(name, tensor)
        self._state_names = tuple(state)

    def extra_repr(self) -> str:
        """Show the detector's name and settings."""
        return self.rule.summary()


DETECTORS: Register[Detector] = Register("detector", Detector, home="zepad.detectors")  # type: ignore[type-abstract]
