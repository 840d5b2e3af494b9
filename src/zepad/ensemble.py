"""A defense without stages: branches, a fusion rule and a detector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import detectors as _detectors
from . import fusion as _fusion
from .arguments import checked
from .config import is_number, require
from .data.given import Batches, Given, as_batches
from .detectors import Detector, DetectorInput, DetectorInputs, FittedDetector
from .encoders import Encoder
from .errors import StageError
from .finite import check_finite
from .functional import mean_log_probabilities, restoration_gap, smoothed
from .fusion import FusionRule
from .inputs import image_batches
from .inspection import BranchReport, inspect_branches
from .modes import evaluating
from .modules import Branch
from .types import Loader

_CHUNK = 256  # number of images per forward pass


class BranchEnsemble(nn.Module):
    """An ensemble of branches with a fusion rule and a detector.

    Args:
        branches: Modules from images to logits `(N, K)` by name, hardened branches first, the benign branch last. For a
            detector that uses features, each must be a `Branch`.
        fusion: Fusion rule, or the name of a registered one; the paper's by default.
        detector: Detector, or the name of a registered one; the paper's by default.
        threshold: Threshold of the detection score; None flags nothing.
        reference: The undefended victim with a head, for a detector that needs it.
        memory: The benign encoder as it was before it was trained to resist adversarial examples, with a head. The
            benign branch then is the mean of the two, in probability.
        abstain_above: Restoration gap above which the memory abstains or, without a memory, the benign branch; None
            lets it always speak. It needs branches that are `Branch` objects. The gap is that between the features of
            the memory and of the benign branch or, without a memory, of the benign branch and of the last hardened one,
            which must be restored from the benign encoder, as the auxiliary of a `ZePAD` is.

    Attributes:
        branches: The branches by name.
        fusion: The fusion rule.
        detector: The detector with its fitted state.
        threshold: Threshold of the detection score, or None.
        reference: The undefended victim with a head, or None.
        memory: The benign encoder as it was public, with a head, or None.
        abstain_above: Largest restoration gap (`zepad.functional.restoration_gap`) at which the memory speaks or,
            without a memory, the benign branch; None lets it always speak.
        class_names: One name per class, or None if they are unknown.

    Raises:
        ConfigError: If there is no branch, the rule or detector is unknown, a threshold is not finite, or one is given
            with branches that it does not suit.

    Examples:
        >>> import torch
        >>> branch = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
        >>> BranchEnsemble({"one": branch, "other": branch})(torch.rand(2, 3, 2, 2)).shape
        torch.Size([2, 5])
    """

    @checked
    def __init__(
        self,
        branches: Mapping[str, nn.Module],
        *,
        fusion: FusionRule | str = "rfdm",
        detector: Detector | str = "gap",
        threshold: float | None = None,
        reference: Branch | None = None,
        memory: Branch | None = None,
        abstain_above: float | None = None,
    ) -> None:
        super().__init__()
        require(len(branches) >= 1, "branches", list(branches), "one or more")
        require(threshold is None or is_number(threshold), "threshold", threshold, "a finite number, or None")
        require(threshold is None or len(branches) >= 2, "threshold", threshold, "None for a single branch")
        known = abstain_above is None or (is_number(abstain_above) and abstain_above >= 0)
        require(known, "abstain_above", abstain_above, "a finite number of zero or more, or None")
        compared = len(branches) >= 2 and all(isinstance(branch, Branch) for branch in branches.values())
        require(abstain_above is None or compared, "abstain_above", abstain_above, "None without two Branch objects")
        require(memory is None or compared, "memory", memory, "None without Branch objects")
        self.branches = nn.ModuleDict(branches)
        self.reference = reference
        self.memory = memory
        self.fusion = _fusion.resolve(fusion, argument="fusion")
        self.detector = FittedDetector(_detectors.resolve(detector, argument="detector"))
        self.threshold = threshold
        self.abstain_above = abstain_above
        self.class_names: tuple[str, ...] | None = None

    @property
    def branch_names(self) -> tuple[str, ...]:
        """Names of the branches in the order of `branch_logits`."""
        return tuple(self.branches)

    @property
    def settings(self) -> dict[str, Any]:
        """Fusion rule and detector with their settings, and when the benign branch abstains, JSON-ready."""
        return {
            "fusion": asdict(self.fusion.record()),
            "detector": asdict(self.detector.rule.record()),
            "abstain_above": self.abstain_above,
        }

    def branch_logits(self, images: Tensor) -> Tensor:
        """Return the logits of every branch `(B, N, K)`. Differentiable.

        Where the benign branch abstains its logits are zero, so that it prefers no class under any fusion rule. With a
        memory its logits are the logarithm of the mean of both probabilities, in which a memory that abstains prefers
        no class.
        """
        return self._look(images, features=False).logits

    def restoration_gap(self, images: Tensor) -> Tensor:
        """Return how far the features of a public encoder are from those of the one made from it, `(N,)`.

        The public encoder is the memory or, without a memory, that of the benign branch, which the last hardened
        encoder is then compared with. It abstains where this exceeds `abstain_above`. Differentiable.
        """
        restored, public = self._compared()
        return restoration_gap(restored.encoder(_own(images, restored)), public.encoder(_own(images, public)))

    def fuse(self, logits: Tensor) -> Tensor:
        """Return the fused logits `(N, K)` of stacked branch logits `(B, N, K)`."""
        return self.fusion(logits)

    def detector_inputs(self, images: Tensor) -> DetectorInputs:
        """Return the detector's inputs, with one pass through every encoder that they need. Differentiable."""
        return self._detector_inputs(images)[0]

    def _detector_inputs(self, images: Tensor) -> tuple[DetectorInputs, Tensor | None]:
        """Return the detector's inputs, and which images a public encoder abstains on, bool `(N,)`."""
        needs = self.detector.rule.needs
        hardened_features = reference_logits = reference_features = blurred_features = None
        logits, features, silent = self._look(images, features=DetectorInput.HARDENED_FEATURES in needs)
        if DetectorInput.HARDENED_FEATURES in needs:
            # The benign branch is left out: attacks that transfer to it move its features along with the victim's.
            hardened_features = torch.cat(features[:-1], dim=1)
        if DetectorInput.REFERENCE in needs:
            assert self.reference is not None
            reference_features = self.reference.encoder(_own(images, self.reference))
            reference_logits = self.reference.head(reference_features)
        if DetectorInput.BLURRED_REFERENCE in needs:
            assert self.reference is not None
            blurred_features = self.reference.encoder(smoothed(images))
        found = DetectorInputs(
            logits=logits,
            hardened_features=hardened_features,
            reference_logits=reference_logits,
            reference_features=reference_features,
            blurred_features=blurred_features,
        )
        return found, silent

    def _look(self, images: Tensor, *, features: bool) -> _Look:
        if not features and self.abstain_above is None and self.memory is None:
            logits = torch.stack([branch(_own(images, branch)) for branch in self.branches.values()])
            return _Look(logits, features=[], silent=None)
        branches = [cast(Branch, branch) for branch in self.branches.values()]
        rows = [branch.encoder(_own(images, branch)) for branch in branches]
        *others, spoken = [branch.head(each) for branch, each in zip(branches, rows, strict=True)]
        silent = None
        if self.memory is not None:
            public = self.memory.encoder(_own(images, self.memory))
            silent = self._moved_far(rows[-1], public)
            recalled = _unless(silent, self.memory.head(public))
            spoken = mean_log_probabilities(torch.stack([spoken, recalled]))
        elif others:
            silent = self._moved_far(rows[-2], rows[-1])
            spoken = _unless(silent, spoken)
        return _Look(torch.stack([*others, spoken]), features=rows, silent=silent)

    def _moved_far(self, restored: Tensor, public: Tensor) -> Tensor | None:
        """Return where features of a public encoder are far from those of the restored one; None if all are heard."""
        return None if self.abstain_above is None else restoration_gap(restored, public) > self.abstain_above

    def _compared(self) -> tuple[Branch, Branch]:
        """Return the branches between whose features the restoration gap is, the public one last."""
        *_, last = branches = [cast(Branch, branch) for branch in self.branches.values()]
        return (branches[-2], last) if self.memory is None else (last, self.memory)

    def score(self, images: Tensor) -> Tensor:
        """Return the detection score of each image `(N,)`; larger is more suspicious. Differentiable.

        Raises:
            StageError: If the detector is not fitted.
        """
        scores: Tensor = self.detector(self.detector_inputs(images))
        return scores

    def forward(self, images: Tensor) -> Tensor:
        """Return fused logits `(N, K)` of images `(N, C, H, W)` in [0, 1]. Differentiable."""
        return self.fuse(self.branch_logits(images))

    def predict(self, images: Given) -> Tensor:
        """Return the class of each image, int64 `(N,)`; of one image int64 `()`.

        Args:
            images: One image, a list of images, a batch or a loader, with labels or without: PIL images, paths of image
                files, arrays `(H, W, C)` and tensors `(C, H, W)` or `(N, C, H, W)`, uint8 or in [0, 1]. A list may mix
                them, and sizes too where every encoder states its input size. docs/inputs.md has examples.

        Raises:
            StageError: If the model is not fitted.
            InputError: If an image cannot be read or does not fit, or fused logits are not finite.
        """
        return self._map("predict", "logits", images, self, lambda logits: logits.argmax(dim=-1))

    def predict_proba(self, images: Given) -> Tensor:
        """Return class probabilities `(N, K)`, the softmax of the fused logits; of one image `(K,)`.

        Args:
            images: Images as `predict` takes them.

        Raises:
            StageError: If the model is not fitted.
            InputError: If an image cannot be read or does not fit, or fused logits are not finite.
        """
        return self._map("predict_proba", "logits", images, self, lambda logits: logits.softmax(dim=-1))

    def detection_score(self, images: Given) -> Tensor:
        """Return how suspicious each image is `(N,)`, or one image `()`; larger is more suspicious.

        Args:
            images: Images as `predict` takes them.

        Raises:
            StageError: If the model is not fitted, or its detector is not.
            InputError: If an image cannot be read or does not fit, or a score is not finite.
        """
        return self._map("detection_score", "detection scores", images, self.score, lambda scores: scores)

    def detect(self, images: Given) -> Tensor:
        """Return whether the score of each image is above the threshold, bool `(N,)`; of one image bool `()`.

        Args:
            images: Images as `predict` takes them.

        Raises:
            StageError: If the model is not fitted, or its detector has no threshold yet.
            ConfigError: If the threshold was set to what is no finite number.
            InputError: If an image cannot be read or does not fit, or a score is not finite.
        """
        self._check("detect")
        threshold = self._finite_threshold()
        if threshold is None:
            raise StageError(
                f'the detector "{self.detector.rule.name}" has no threshold yet. Call calibrate(benign_loader) first.'
            )
        return self.detection_score(images) > threshold

    def inspect(self, images: Given) -> BranchReport:
        """Report the prediction and weight of every branch, the fused decision and the detection score of each image.

        Args:
            images: Images as `predict` takes them. The report on one image is that on a batch of one.

        Raises:
            StageError: If the model is not fitted.
            ConfigError: If the threshold was set to what is no finite number.
            InputError: If an image cannot be read or does not fit, or fused logits or a score are not finite.
        """
        channels = self._check("inspect")
        threshold = self._finite_threshold()
        batches, single = self._given(images, channels)
        logits: list[Tensor] = []
        scores: list[Tensor] = []
        silences: list[Tensor] = []
        with self._deciding():
            for chunk in self._chunks(batches, channels):
                inputs, silent = self._detector_inputs(chunk.to(self.device))
                logits.append(inputs.logits)
                silences.append(inputs.logits.new_zeros(len(chunk), dtype=torch.bool) if silent is None else silent)
                if self.detector.is_fitted:
                    scores.append(self.detector(inputs))
            return inspect_branches(
                torch.cat(logits, dim=1),
                self.fusion,
                names=self.branch_names,
                silent=torch.cat(silences),
                memory=self.memory is not None,
                scores=torch.cat(scores) if scores else None,
                threshold=threshold,
                class_names=self.class_names,
                single=single,
            )

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return device_of(self)

    def _check(self, call: str) -> int | None:
        """Return the number of channels that images must have, or None if it is unknown.

        Args:
            call: Name of the public method that was called. A subclass raises if its stage does not allow the call.
        """
        del call
        return None

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        with evaluating(self), torch.inference_mode():
            yield

    def _finite_threshold(self) -> float | None:
        require(
            self.threshold is None or is_number(self.threshold),
            "threshold",
            self.threshold,
            "a finite number, or None. Call calibrate(benign_loader) to set it",
        )
        return self.threshold

    def _map(
        self,
        call: str,
        what: str,
        images: Given,
        compute: Callable[[Tensor], Tensor],
        decide: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Compute `what` for all images, chunk by chunk, and decide on it where it is finite."""
        channels = self._check(call)
        results: list[Tensor] = []
        seen = 0
        batches, single = self._given(images, channels)
        with self._deciding():
            for chunk in self._chunks(batches, channels):
                values = check_finite(compute(chunk.to(self.device)), what, first=seen)
                results.append(decide(values).to(chunk.device))
                seen += len(chunk)
        answers = torch.cat(results)
        return answers[0] if single else answers

    def _given(self, images: Given, channels: int | None) -> Batches:
        """Return what a caller passed as batches."""
        stated = {part.preprocessing for part in self.modules() if isinstance(part, Encoder)}
        sized = bool(stated) and all(each.size is not None for each in stated)
        alike = len({(each.size, each.interpolation) for each in stated}) == 1
        resize = next(iter(stated)).resize if sized and alike else None
        return as_batches(images, channels=channels, mixed=sized, resize=resize)

    def _chunks(self, batches: Tensor | Loader, channels: int | None) -> Iterator[Tensor]:
        for batch in image_batches(batches, channels=channels):
            yield from batch.split(_CHUNK)


class _Look(NamedTuple):
    """What the branches make of images.

    Attributes:
        logits: Logits of every branch `(B, N, K)`.
        features: Features of every branch `(N, D)`, if they are asked for or compared.
        silent: Whether the memory or, without a memory, the benign branch abstains, bool `(N,)`; None for never.
    """

    logits: Tensor
    features: list[Tensor]
    silent: Tensor | None


def _unless(silent: Tensor | None, logits: Tensor) -> Tensor:
    """Return logits `(N, K)`, zero where their branch abstains, so that it prefers no class."""
    return logits if silent is None else logits.masked_fill(silent[:, None], 0)


def _own(images: Tensor, branch: nn.Module) -> Tensor:
    """Return images that a branch may work in place on. An `Encoder` itself gives its backbone a tensor of its own."""
    return images if isinstance(branch, Branch) and isinstance(branch.encoder, Encoder) else images.clone()


def device_of(*modules: nn.Module) -> torch.device:
    """Return the device of the first parameter, or the CPU for modules without parameters."""
    return next((weight.device for module in modules for weight in module.parameters()), torch.device("cpu"))
