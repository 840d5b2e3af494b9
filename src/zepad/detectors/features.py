"""The recommended detector, which compares the undefended victim's features with a prediction from other features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..functional.precision import accurate
from .base import Detector, DetectorInput, DetectorInputs, State, Widths

_RIDGE = 0.1  # per image, on standardised inputs
_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class FeaturePrediction(Detector):
    """Flag images whose features in the undefended victim differ from a prediction.

    A linear map predicts these features from those of the hardened encoders and from those of the victim on the blurred
    image. It is fitted on benign images. The score is `feature_score`, which measures the prediction error. The
    detector flags attacks that were crafted on the public victim, whether or not they change a decision.
    """

    needs: ClassVar[DetectorInput] = (
        DetectorInput.HARDENED_FEATURES | DetectorInput.REFERENCE | DetectorInput.BLURRED_REFERENCE
    )

    def score(self, inputs: DetectorInputs, state: State) -> Tensor:
        """Return the logarithm of the mean squared prediction error, `(N,)`."""
        features, reference = _sides(inputs)
        model = FeatureModel(**{name: state[name] for name in FeatureModel._fields})
        return feature_score(model, features=features, undefended=reference)

    def fit(self, inputs: DetectorInputs) -> dict[str, Tensor]:
        """Return the tensors of the linear map.

        Raises:
            ValueError: If there are fewer than ten images.
        """
        return fit_features(*_sides(inputs))._asdict()

    def state_shapes(self, widths: Widths) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the linear map's tensors."""
        inputs, outputs = widths.hardened + widths.reference, widths.reference
        shapes = ((inputs,), (inputs,), (outputs,), (inputs, outputs), (outputs,))
        return dict(zip(FeatureModel._fields, shapes, strict=True))


def _sides(inputs: DetectorInputs) -> tuple[Tensor, Tensor]:
    """Return the features that predict and the features that are predicted."""
    assert inputs.hardened_features is not None
    assert inputs.blurred_features is not None
    assert inputs.reference_features is not None
    return torch.cat([inputs.hardened_features, inputs.blurred_features], dim=1), inputs.reference_features


class FeatureModel(NamedTuple):
    """A linear map that predicts the undefended victim's features from other features, and its errors.

    Attributes:
        input_mean: Mean of the input features `(D,)`.
        input_scale: Standard deviation of the input features `(D,)`.
        output_mean: Mean of the undefended victim's features `(V,)`.
        weight: Linear map `(D, V)` from standardised inputs to centred outputs.
        residual_scale: Standard deviation of the prediction error `(V,)`.
    """

    input_mean: Tensor
    input_scale: Tensor
    output_mean: Tensor
    weight: Tensor
    residual_scale: Tensor


def fit_features(features: Tensor, undefended: Tensor) -> FeatureModel:
    """Fit a ridge regression that predicts the undefended victim's features of benign images from other features.

    Args:
        features: Concatenated features of the hardened encoders and of the undefended victim on blurred images,
            `(N, D)`.
        undefended: Features of the undefended victim on the images, `(N, V)`.

    Returns:
        The linear map in the dtype of `features`, at least float32.

    Raises:
        ValueError: If there are fewer than ten images, or the numbers of images differ.

    References:
        Hoerl, Kennard, Ridge Regression, Technometrics 1970.
    """
    if len(features) != len(undefended) or len(features) < 10:
        raise ValueError(
            "fitting the detector needs at least 10 images, with one row of features each; "
            f"got {len(features)} and {len(undefended)}."
        )
    inputs, outputs = accurate(features).double(), accurate(undefended).double()
    input_mean, output_mean = inputs.mean(dim=0), outputs.mean(dim=0)
    # A constant feature carries no information; without the clamp, division by its deviation would amplify rounding.
    input_scale = inputs.std(dim=0).clamp_min(_FLOOR)
    x, y = (inputs - input_mean) / input_scale, outputs - output_mean
    penalty = _RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ y)
    spread = (y - x @ weight).square().mean(dim=0).sqrt()
    residual_scale = spread.clamp_min(_FLOOR + 1e-3 * float(spread.mean()))
    found = (input_mean, input_scale, output_mean, weight, residual_scale)
    # Tensors read from a file are contiguous, and another memory layout would give differently rounded scores.
    return FeatureModel(*(tensor.to(accurate(features).dtype).contiguous() for tensor in found))


def feature_score(model: FeatureModel, *, features: Tensor, undefended: Tensor) -> Tensor:
    """Return the prediction error of the undefended victim's features for each image.

    The score is the logarithm of the mean squared error in units of the error on benign images. An attack on the public
    victim moves these features, whether or not a decision changes, while the features of the hardened encoders and
    those of the victim on the blurred image move little.

    Args:
        model: Linear map that `fit_features` returned.
        features: Concatenated features of the hardened encoders and of the undefended victim on blurred images,
            `(N, D)`.
        undefended: Features of the undefended victim on the images, `(N, V)`.

    Returns:
        Scores `(N,)` in the dtype of `features`, around zero for benign images; larger is more suspicious.
    """
    given = accurate(features)
    input_mean, input_scale, output_mean, weight, residual_scale = (part.to(given.dtype) for part in model)
    x = (given - input_mean) / input_scale
    missed = (accurate(undefended).to(given.dtype) - output_mean - x @ weight) / residual_scale
    return missed.square().mean(dim=-1).clamp_min(_FLOOR).log().to(features.dtype)
