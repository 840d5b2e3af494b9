"""The parts a defense is built of: heads, branches, fusion and detector, thin modules over `zepad.functional`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .config import DetectorConfig, FusionConfig, is_number, require
from .errors import StageError
from .functional import Evidence


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Put a module in evaluation mode for a while and restore every submodule's own flag, also after an error.

    Args:
        model: An `nn.Module`; any other callable has no mode and is left alone.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True  # each flag by itself: train() would recurse and wake frozen parts


class MLPHead(nn.Sequential):
    """The classifier of a branch: Linear-ReLU-Dropout(0.2)-Linear-ReLU-Linear, features `(N, D)` to logits `(N, K)`.

    Args:
        features: Width `D` of the features and of the hidden layers.
        classes: Number `K` of classes.

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), implementation details.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(
            nn.Linear(features, features),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(features, features),
            nn.ReLU(),
            nn.Linear(features, classes),
        )


class Branch(nn.Module):
    """An encoder and its head: images `(N, C, H, W)` to logits `(N, K)`."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of this branch alone."""
        logits: Tensor = self.head(self.encoder(images))
        return logits


class Fusion(nn.Module):
    """`zepad.functional.fuse_logits` with its setting held, `(B, N, K)` to `(N, K)`.

    Args:
        config: Rule and parameters; the paper's by default.

    Examples:
        >>> import torch
        >>> Fusion()(torch.zeros(3, 2, 5)).shape
        torch.Size([2, 5])
    """

    def __init__(self, config: FusionConfig | None = None) -> None:
        super().__init__()
        self.config = config or FusionConfig()

    @property
    def parameters_in_use(self) -> dict[str, Any]:
        """The parameters that the rule has, by name."""
        return {name: getattr(self.config, name) for name in functional.rule_parameters(self.config.rule)}

    def forward(self, logits: Tensor) -> Tensor:
        """Return the fused logits."""
        return functional.fuse_logits(logits, rule=self.config.rule, **self.parameters_in_use)

    def weights(self, logits: Tensor) -> Tensor | None:
        """Return the weight of each branch for each image, `(B, N)`; None for a rule that averages no logits."""
        if not functional.averages(self.config.rule):
            return None
        return functional.fusion_weights(logits, rule=self.config.rule, **self.parameters_in_use)

    def summary(self) -> str:
        """Return rule and parameters as a person reads them, such as `"bounded (vote 0.5)"`."""
        settings = ", ".join(
            f"{name.replace('_', ' ')} {' '.join(f'{number:.4g}' for number in value) or 'one for all'}"
            for name, given in self.parameters_in_use.items()
            for value in [given if isinstance(given, tuple) else (given,)]
        )
        return f"{self.config.rule} ({settings})" if settings else self.config.rule

    def extra_repr(self) -> str:
        """Show rule and parameters."""
        settings = {"rule": self.config.rule, **self.parameters_in_use}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())


class Detector(nn.Module):
    """Scores how suspicious an image is, by what `zepad.functional.Evidence` says of it.

    | name | score | fitted on benign images | needs the undefended victim |
    |---|---|---|---|
    | `"gap"` | `detection_score`, the paper's | no | no |
    | `"disagreement"` | `disagreement_score` | no | no |
    | `"sentinel"` | `sentinel_score` | no | yes |
    | `"features"` | `feature_score` | yes | yes |
    | `"combined"` | the largest of the four, each in benign standard deviations from its benign mean | yes | yes |

    Args:
        config: Which; the paper's by default.
    """

    def __init__(self, config: DetectorConfig | None = None) -> None:
        super().__init__()
        self.config = config or DetectorConfig()
        for name in self.state_shapes(0, 0):
            self.register_buffer(name, None)

    def state_shapes(self, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        """Return what fitting finds, by name and shape; nothing for a detector that is not fitted.

        Args:
            inputs: Width of `Evidence.features`.
            outputs: Width of the undefended victim's features.
        """
        if not self.config.fitted:
            return {}
        shapes = dict(
            zip(
                functional.FeatureModel._fields,
                ((inputs,), (inputs,), (outputs,), (inputs, outputs), (outputs,)),
                strict=True,
            )
        )
        return {**shapes, "centre": (4,), "spread": (4,)} if self.config.name == "combined" else shapes

    @property
    def is_fitted(self) -> bool:
        """Whether it can score."""
        return all(getattr(self, name) is not None for name in self.state_shapes(0, 0))

    def allocate(self, inputs: int, outputs: int) -> None:
        """Make room for the state of a fitted detector, to be loaded. Arguments as in `state_shapes`."""
        for name, shape in self.state_shapes(inputs, outputs).items():
            self.register_buffer(name, torch.zeros(shape))

    def fit(self, evidence: Evidence) -> None:
        """Fit what there is to fit, on benign images that the threshold is *not* set on.

        Raises:
            ValueError: If there are too few images.
        """
        if not self.config.fitted:
            return
        features, undefended = _kept(evidence)
        for name, tensor in functional.fit_features(features, undefended)._asdict().items():
            self.register_buffer(name, tensor)
        if self.config.name == "combined":
            parts = self._parts(evidence)
            self.register_buffer("centre", parts.mean(dim=1))
            self.register_buffer("spread", parts.std(dim=1).clamp_min(1e-6))

    def forward(self, evidence: Evidence) -> Tensor:
        """Return the score of each image `(N,)`. Differentiable."""
        if not self.is_fitted:
            raise StageError(f'the detector "{self.config.name}" is not fitted. Call calibrate(benign_loader) first.')
        match self.config.name:
            case "gap":
                return functional.detection_score(evidence.logits)
            case "disagreement":
                return functional.disagreement_score(evidence.logits)
            case "sentinel":
                return _sentinel(evidence)
            case "features":
                return self._features(evidence)
            case "combined":
                assert isinstance(self.centre, Tensor)
                assert isinstance(self.spread, Tensor)
                return ((self._parts(evidence) - self.centre[:, None]) / self.spread[:, None]).amax(dim=0)

    def _features(self, evidence: Evidence) -> Tensor:
        features, undefended = _kept(evidence)
        model = functional.FeatureModel(*(getattr(self, name) for name in functional.FeatureModel._fields))
        return functional.feature_score(model, features=features, undefended=undefended)

    def _parts(self, evidence: Evidence) -> Tensor:
        # Logarithms, so that the scores of benign images have a spread worth the name.
        disagreement = functional.disagreement_score(evidence.logits).clamp_min(1e-7).log()
        sentinel = _sentinel(evidence).clamp_min(1e-7).log()
        gap = functional.detection_score(evidence.logits)
        return torch.stack([gap, disagreement, sentinel, self._features(evidence)])

    def extra_repr(self) -> str:
        """Show the name."""
        return repr(self.config.name)


def _sentinel(evidence: Evidence) -> Tensor:
    assert evidence.undefended is not None
    return functional.sentinel_score(evidence.logits, undefended=evidence.undefended)


def _kept(evidence: Evidence) -> tuple[Tensor, Tensor]:
    assert evidence.features is not None
    assert evidence.undefended_features is not None
    return evidence.features, evidence.undefended_features


class Ensemble(nn.Module):
    """Branches and a fusion, without the stages of a `ZePAD`: what it is compared with.

    Args:
        branches: Images to logits `(N, K)`, by name; a benign branch comes last.
        fusion: How they are weighed; the paper's rule by default.
        threshold: Of the detection score, for which the last branch is the benign one; None is no detector.

    Raises:
        ConfigError: If there is no branch, or a threshold without two of them or that is no finite number.

    Examples:
        >>> import torch
        >>> branch = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
        >>> Ensemble({"one": branch, "other": branch})(torch.rand(2, 3, 2, 2)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self, branches: Mapping[str, nn.Module], *, fusion: FusionConfig | None = None, threshold: float | None = None
    ) -> None:
        super().__init__()
        require(len(branches) >= 1, "branches", list(branches), "one or more")
        require(threshold is None or is_number(threshold), "threshold", threshold, "a finite number, or None")
        require(threshold is None or len(branches) >= 2, "threshold", threshold, "None for a single branch")
        self.branches = nn.ModuleDict(branches)
        self.fusion = Fusion(fusion)
        self.threshold = threshold

    @property
    def branch_names(self) -> tuple[str, ...]:
        """One name per branch, in the order of `branch_logits`."""
        return tuple(self.branches)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides beside the weights, JSON-ready."""
        return {"fusion": self.fusion.config.to_dict()}

    def branch_logits(self, images: Tensor) -> Tensor:
        """Return the logits of every branch `(B, N, K)`. Differentiable."""
        return torch.stack([branch(images) for branch in self.branches.values()])

    def fuse(self, logits: Tensor) -> Tensor:
        """Return the fused logits `(N, K)` of stacked ones `(B, N, K)`."""
        fused: Tensor = self.fusion(logits)
        return fused

    def score(self, images: Tensor) -> Tensor:
        """Return the confidence gap of each image `(N,)`. Differentiable."""
        return functional.detection_score(self.branch_logits(images))

    def forward(self, images: Tensor) -> Tensor:
        """Return the fused logits `(N, K)`."""
        return self.fuse(self.branch_logits(images))
