"""Base class of detectors, their inputs and fitted state, and the register that holds them."""

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
    """Inputs that a detector needs in addition to the branches' logits. Combine members with `|`.

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
    """Inputs of a detector. Those that it does not declare in `Detector.needs` are None.

    Attributes:
        logits: Logits of the branches `(B, N, K)`, hardened branches first, the benign branch last.
        hardened_features: Concatenated features of the hardened encoders `(N, D)`.
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
        hardened: Width `D` of the hardened encoders' concatenated features.
        reference: Width `V` of the undefended victim's features.
    """

    hardened: int
    reference: int


State = Mapping[str, Tensor]
"""Tensors that a detector was fitted to, by name."""


@dataclass(frozen=True, kw_only=True)
class Detector(Plugin, ABC):
    """Base class of detectors. A detector is a frozen dataclass whose fields are its settings, each with a default.

    A subclass must define `score` and be registered:

    >>> from dataclasses import dataclass
    >>> from zepad.detectors import Detector, register
    >>> @dataclass(frozen=True, kw_only=True)
    ... class LowConfidence(Detector):
    ...     def score(self, inputs, state):
    ...         return -inputs.logits.mean(dim=0).softmax(dim=-1).amax(dim=-1)
    >>> register("low-confidence", LowConfidence)

    A detector that is fitted on benign images also defines `fit` and `state_shapes`.

    Attributes:
        needs: Inputs that the detector needs in addition to the branches' logits.
        first_threshold: Threshold before `calibrate` sets one, or None if the detector has none.
    """

    needs: ClassVar[DetectorInput] = DetectorInput(0)
    first_threshold: ClassVar[float | None] = None

    @abstractmethod
    def score(self, inputs: DetectorInputs, state: State) -> Tensor:
        """Return how suspicious each image is, `(N,)`; larger is more suspicious.

        The score must be differentiable, so that adaptive attacks can take its gradient.

        Args:
            inputs: Logits of the branches and the inputs that `needs` declares.
            state: Tensors that `fit` returned; empty for a detector without a fit.
        """

    def fit(self, inputs: DetectorInputs) -> dict[str, Tensor]:  # noqa: ARG002 - for subclasses
        """Return the tensors that scoring needs, by name. The default needs none.

        Args:
            inputs: Inputs of benign images other than those on which the threshold is set.

        Raises:
            ValueError: If there are too few images.
        """
        return {}

    def state_shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:  # noqa: ARG002 - for subclasses
        """Return the shape of every tensor that `fit` returns, by name. A file is checked against it before it is read.

        Args:
            widths: Widths of the features in the detector's inputs.
        """
        return {}

    def guarantee(self) -> str:
        """Return what an attacker who knows of the detector can do, in a sentence for model card and report."""
        return "Detection is not robustness: an attacker who knows of the detector can evade it."

    @classmethod
    def is_fitted_on_images(cls) -> bool:
        """Return whether the detector must be fitted on benign images before it can score."""
        return cls.fit is not Detector.fit

    @classmethod
    def needs_reference(cls) -> bool:
        """Return whether the detector needs the reference, the undefended victim."""
        return bool(cls.needs & _OF_REFERENCE)

    @classmethod
    def extra_passes(cls) -> int:
        """Return the number of encoder passes that the detector adds to those of the branches."""
        return sum(need in cls.needs for need in (DetectorInput.REFERENCE, DetectorInput.BLURRED_REFERENCE))


class FittedDetector(nn.Module):
    """A detector together with its fitted state, which is held as buffers.

    Args:
        rule: Detector to hold.

    Attributes:
        rule: The detector.
    """

    def __init__(self, rule: Detector) -> None:
        super().__init__()
        self.rule = rule
        self._state_names: tuple[str, ...] = ()

    @property
    def is_fitted(self) -> bool:
        """Whether the detector can score: it has been fitted, or needs no fit."""
        return bool(self._state_names) or not self.rule.is_fitted_on_images()

    def fit(self, inputs: DetectorInputs) -> None:
        """Fit the detector.

        Args:
            inputs: Inputs of benign images other than those on which the threshold is set.

        Raises:
            ValueError: If there are too few images.
        """
        self._hold(self.rule.fit(inputs))

    def allocate(self, widths: Widths) -> None:
        """Allocate zeros for the fitted state, so that it can be loaded.

        Args:
            widths: Widths of the features in the detector's inputs.
        """
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
