"""An ensemble whose branches have the roles of the method, with an exchangeable fusion rule and detector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from . import detectors as known_detectors
from . import fusion as fusion_rules
from .arguments import checked
from .calibration import calibrate, choose_abstention, choose_recall
from .config import HardenConfig, check_budget
from .data.given import Given
from .detectors import Detector, FittedDetector
from .encoders import Encoder
from .ensemble import BranchEnsemble
from .errors import ConfigError, InputError, StageError
from .evaluation import EvalReport, weights_digest
from .fusion import FusionRule
from .modes import evaluating
from .modules import Branch
from .provenance import recorded, without
from .types import MEMORY, REFERENCE, ROLES, Loader

_Self = TypeVar("_Self", bound="RoleEnsemble")


class RoleEnsemble(BranchEnsemble):
    """An ensemble of encoders by role, whose fusion rule and detector can be exchanged and calibrated.

    The encoders always stay in evaluation mode.

    Args:
        encoders: Encoders by role; some may be missing if a model was loaded in part.
        fusion: Fusion rule, or the name of a registered one.
        detector: Detector, or the name of a registered one.
    """

    def __init__(self, encoders: Mapping[str, Encoder], *, fusion: FusionRule | str, detector: Detector | str) -> None:
        branches: dict[str, nn.Module] = {role: Branch(encoders[role]) for role in ROLES if role in encoders}
        reference, memory = (Branch(encoders[role]) if role in encoders else None for role in (REFERENCE, MEMORY))
        super().__init__(branches, fusion=fusion, detector=detector, reference=reference, memory=memory)
        self.threshold = self.detector.rule.first_threshold
        self._remembers = memory is not None  # a model that was loaded in part has lost it
        self.num_classes: int | None = None
        self.provenance: dict[str, Any] = {}

    @property
    def encoders(self) -> nn.ModuleDict:
        """Encoders by role: victim, auxiliary, benign, and reference and memory if there are any. A read-only view."""
        return _View({role: branch.encoder for role, branch in self._parts().items()})

    @property
    def heads(self) -> nn.ModuleDict:
        """Heads by role; empty before any are fitted. A read-only view."""
        return _View({role: branch.head for role, branch in self._parts().items() if branch.has_head})

    @checked
    def encoder(self, name: str) -> Encoder:
        """Return one encoder with its preprocessing: images `(N, C, H, W)` in [0, 1] to features `(N, D)`.

        The encoder is not a copy. It is frozen and in evaluation mode: copy it before you modify it.

        Args:
            name: Role of the encoder.

        Raises:
            ConfigError: If the model has no such encoder.
        """
        return cast(Encoder, self._part(name).encoder)

    @checked
    def branch(self, name: str) -> Branch:
        """Return one encoder with its head: images `(N, C, H, W)` in [0, 1] to logits `(N, K)`.

        Args:
            name: Role of the encoder.

        Raises:
            ConfigError: If the model has no such encoder.
            StageError: If the encoder has no head yet.
        """
        branch = self._part(name)
        if not branch.has_head:
            self._require_whole(f"branch({name!r})")
            raise StageError(f"the {name} branch has no head yet. Call {self._next_call()} first.")
        return branch

    def train(self: _Self, mode: bool = True) -> _Self:
        """Set the mode of the heads. The encoders stay in evaluation mode, so their BatchNorm statistics are fixed."""
        super().train(mode)
        for encoder in self.encoders.values():
            encoder.eval()
        return self

    @checked
    def configure(
        self: _Self, *, fusion: FusionRule | str | None = None, detector: Detector | str | None = None
    ) -> _Self:
        """Set the fusion rule or the detector. Nothing is trained; encoders and heads stay as they are.

        Args:
            fusion: A fusion rule or its name; None keeps the present one.
            detector: A detector or its name; None keeps the present one. A new detector has no threshold until
                `calibrate` sets one, unless it defines a first threshold.

        Returns:
            The model itself. Records of calibration and evaluation are removed from its provenance.

        Raises:
            ConfigError: If there is no such rule or detector, or the detector needs the undefended victim and the model
                was built without it.
        """
        rule = self.fusion if fusion is None else resolve_rule(fusion)
        scores = None if detector is None else resolve_detector(detector)
        if scores is not None and scores.needs_reference() and self.reference is None:
            raise ConfigError(
                f'the detector "{scores.name}" needs the undefended victim, which this model was built without. '
                f'Build it with from_encoders(..., detector="{scores.name}").'
            )
        self.fusion = rule
        if scores is not None:
            self._renew_detector(scores)
        self.provenance = without(self.provenance, "calibration")
        return self

    @checked
    def calibrate(
        self: _Self,
        loader: Given,
        *,
        fpr: float = 0.05,
        benign_floor: float | None = None,
        fit_loader: Given | None = None,
        eps: float | None = None,
    ) -> _Self:
        """Choose the settings of the fusion rule, fit the detector and set its threshold on validation images.

        No encoder may have been trained on these images, not even in its public pre-training: on its own training
        images, an encoder behaves differently than on new ones.

        * If the loader yields labels and the rule has settings to choose, the most robust ones that keep the benign
          accuracy are chosen (`FusionRule.calibrate`). Without labels they stay as they are.
        * The benign branch of preset `"private"`, and the memory of the other presets, abstains on one per cent of
          these images (`abstain_above`). A memory that is no better than its branch always abstains.
        * The threshold is set so that a benign image is flagged with probability at most `fpr`. A detector that must be
          fitted is fitted on `fit_loader`, or else on every second image, and the threshold is set on the others.

        Args:
            loader: Benign images as `predict` takes them, with labels or without.
            fpr: Tolerated false positive rate in (0, 1). The bound holds on average over calibration sets, for
                images exchangeable with these.
            benign_floor: Benign accuracy in [0, 1] that the fusion must keep, with a standard error to spare on these
                images. None asks for that of the undefended victim where the model keeps it, and for that of the benign
                branch where there is no victim, or where the branch is more than five points better.
            fit_loader: Other benign images for fitting the detector, such as the training images. The threshold is then
                set on all images of `loader`.
            eps: L-infinity budget, in [0, 1] pixel units, of the attack by which `"mixed"` estimates robustness; None
                takes the budget of the hardening.

        Returns:
            The model itself.

        Raises:
            StageError: If the model is not fitted.
            ConfigError: If `benign_floor` or `eps` is out of range.
            InputError: If images or labels do not fit, `fpr` is out of range, or there are too few images for it.

        Warns:
            CalibrationWarning: If no settings reach the floor; the most accurate ones are used then. The message names
                the required accuracy, whose it is, and the accuracy reached. What a lower `benign_floor` of one's own
                costs is logged; both are recorded in `provenance["calibration"]["fusion"]`.
        """
        channels = self._check("calibrate")
        before, batches = self.abstain_above, self._given(loader, channels).batches
        with evaluating(self), self._restoring(before):
            if before is not None and not isinstance(batches, Iterator):  # which could be read only once
                self.abstain_above = self._abstention(self.branch("benign"), self.memory, batches)
            found = calibrate(
                self.detector_inputs,
                batches,
                branch_logits=self.branch_logits,
                fit_loader=None if fit_loader is None else self._given(fit_loader, channels).batches,
                fusion=self.fusion,
                detector=self.detector.rule,
                fpr=fpr,
                benign_floor=benign_floor,
                eps=self._budget(eps),
                channels=channels,
                num_classes=self.num_classes,
                device=self.device,
                reference=self.reference,
            )
        self.fusion = found.fusion
        self.detector, self.threshold = found.detector.train(self.training), found.threshold
        self.provenance = recorded(
            self.provenance, "calibration", {**found.record, "abstain_above": self.abstain_above}
        )
        return self

    @checked
    def attach(self: _Self, report: EvalReport) -> _Self:
        """Record the summary of an evaluation of this model, which its config and its model card then include.

        Training, new heads, `configure` and `calibrate` remove it again.

        Args:
            report: Report of an evaluation of this model as it is now.

        Returns:
            The model itself.

        Raises:
            InputError: If the report is on other weights, another rule or detector, or another threshold.
        """
        if report.provenance.get("weights_digest") != weights_digest(self) or report.threshold != self.threshold:
            raise InputError(
                f"the report on {report.model!r} is of another model: weights or threshold differ. Evaluate this one."
            )
        self.provenance = recorded(self.provenance, "evaluation", report.summary())
        return self

    def _abstention(self, benign: Branch, memory: Branch | None, images: Loader | Tensor) -> float | None:
        """Return the restoration gap above which the memory or this benign encoder should abstain; None for never."""
        if memory is not None:
            return choose_recall(benign, memory, images, device=self.device)
        return choose_abstention(self.encoder("auxiliary"), benign.encoder, images, device=self.device)

    @contextmanager
    def _restoring(self, abstain_above: float | None) -> Iterator[None]:
        """Set back what was changed if the block raises an error."""
        try:
            yield
        except BaseException:
            self.abstain_above = abstain_above
            raise

    def _budget(self, eps: float | None) -> float:
        if eps is None:
            eps = self.provenance.get("harden", {}).get("config", {}).get("eps", HardenConfig().eps)
        check_budget(eps)
        return eps

    def _next_call(self) -> str:
        """Return the call that fits the heads of the branches, for error messages."""
        return "fit_heads(loader)"

    def _require_whole(self, call: str) -> None:
        # Plain attributes, since forward passes here and is compiled.
        whole = len(self.branches) == len(ROLES) and (self.memory is not None or not self._remembers)
        if not whole or (self.reference is None and self.detector.rule.needs_reference()):
            raise StageError(
                f"{call} needs all encoders, and this model was loaded with {', '.join(self.encoders)} alone. "
                "Load it without branches=..."
            )

    def _renew_detector(self, rule: Detector) -> None:
        self.detector, self.threshold = FittedDetector(rule).train(self.training), rule.first_threshold

    def _parts(self) -> dict[str, Branch]:
        parts = {role: cast(Branch, branch) for role, branch in self.branches.items()}
        others = {REFERENCE: self.reference, MEMORY: self.memory}
        return parts | {role: branch for role, branch in others.items() if branch is not None}

    def _part(self, role: str) -> Branch:
        parts = self._parts()
        if role not in parts:
            raise ConfigError(f"there is no encoder {role!r}; this model has {', '.join(parts)}.")
        return parts[role]

    def _place(self, role: str, branch: Branch) -> None:
        if role == REFERENCE:
            self.reference = branch
        elif role == MEMORY:
            self.memory = branch
        else:
            self.branches[role] = branch


def resolve_rule(given: FusionRule | str) -> FusionRule:
    """Return a fusion rule that fuses the branches of a `ZePAD`.

    Args:
        given: A fusion rule or its name.

    Raises:
        ConfigError: If there is no such rule, or it is for another number of branches.
    """
    rule = fusion_rules.resolve(given, argument="fusion")
    rule.check_branches(len(ROLES))
    return rule


def resolve_detector(given: Detector | str) -> Detector:
    """Return a detector.

    Args:
        given: A detector or its name.

    Raises:
        ConfigError: If there is no such detector.
    """
    return known_detectors.resolve(given, argument="detector")


class _View(nn.ModuleDict):
    """A read-only mapping of modules by role. An assignment would not reach the model, so it raises an error."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.training = any(module.training for module in modules.values())
        for role, module in modules.items():
            self.add_module(role, module)

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._refuse()

    def __delitem__(self, key: str) -> None:
        self._refuse()

    def clear(self) -> None:
        """Raise an error, because the view is read-only.

        Raises:
            ConfigError: Always.
        """
        self._refuse()

    def _refuse(self) -> None:
        raise ConfigError("encoders and heads are views. Change a part of the model with model.branch(role).head = ...")
