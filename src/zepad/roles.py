"""An ensemble whose branches play the roles of the method: victim, auxiliary, benign, and sometimes reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, cast

from torch import nn

from .detectors import Detector, FittedDetector
from .encoders import Encoder
from .ensemble import BranchEnsemble
from .errors import ConfigError, StageError
from .fusion import FusionRule
from .modules import Branch
from .types import ENCODER_ROLES, REFERENCE, ROLES

_Self = TypeVar("_Self", bound="RoleEnsemble")


class RoleEnsemble(BranchEnsemble):
    """Encoders by role, each with its head once there is one. Encoders stay in evaluation mode.

    Args:
        encoders: Encoders by role; some may be missing where a model is loaded in part.
        fusion: Fusion rule, or the name of a registered one.
        detector: Detector, or the name of a registered one.
    """

    def __init__(self, encoders: Mapping[str, Encoder], *, fusion: FusionRule | str, detector: Detector | str) -> None:
        branches: dict[str, nn.Module] = {role: Branch(encoders[role]) for role in ROLES if role in encoders}
        reference = Branch(encoders[REFERENCE]) if REFERENCE in encoders else None
        super().__init__(branches, fusion=fusion, detector=detector, reference=reference)
        self.threshold = self.detector.rule.first_threshold

    @property
    def encoders(self) -> nn.ModuleDict:
        """Encoders by role: victim, auxiliary, benign, for some detectors reference. A view that refuses changes."""
        return _View({role: branch.encoder for role, branch in self._parts().items()})

    @property
    def heads(self) -> nn.ModuleDict:
        """Heads by role, once there are any. A view that refuses changes."""
        return _View({role: branch.head for role, branch in self._parts().items() if branch.has_head})

    def encoder(self, name: str) -> Encoder:
        """Return one encoder, preprocessing included, as a plain drop-in module: raw images to features `(N, D)`.

        It is the model's own, frozen, in evaluation mode: copy it before you change it.

        Raises:
            ConfigError: If there is no such encoder.
        """
        return cast(Encoder, self._part(name).encoder)

    def branch(self, name: str) -> Branch:
        """Return one encoder with its head: raw images to the logits `(N, K)` of this branch alone.

        Raises:
            ConfigError: If there is no such encoder.
            StageError: If it has no head yet.
        """
        branch = self._part(name)
        if not branch.has_head:
            self._require_whole(f"branch({name!r})")
            raise StageError(f"the {name} branch has no head yet. Call {self._next_call()} first.")
        return branch

    def train(self: _Self, mode: bool = True) -> _Self:
        """Set the mode of the heads; the encoders stay in evaluation mode, so their BatchNorm statistics never move."""
        super().train(mode)
        for encoder in self.encoders.values():
            encoder.eval()
        return self

    def _next_call(self) -> str:
        """Return the call that gives the branches their heads."""
        return "fit_heads(loader)"

    def _require_whole(self, call: str) -> None:
        if not set(self.encoders) >= set(ENCODER_ROLES if self.detector.rule.needs_reference() else ROLES):
            raise StageError(
                f"{call} needs all encoders, and this model was loaded with {', '.join(self.encoders)} alone. Load it "
                "without branches=..."
            )

    def _renew_detector(self, rule: Detector) -> None:
        self.detector, self.threshold = FittedDetector(rule).train(self.training), rule.first_threshold

    def _parts(self) -> dict[str, Branch]:
        parts = {role: cast(Branch, branch) for role, branch in self.branches.items()}
        return parts if self.reference is None else {**parts, REFERENCE: self.reference}

    def _part(self, role: str) -> Branch:
        parts = self._parts()
        if role not in parts:
            raise ConfigError(f"there is no encoder {role!r}; this model has {', '.join(parts)}.")
        return parts[role]

    def _place(self, role: str, branch: Branch) -> None:
        if role == REFERENCE:
            self.reference = branch
        else:
            self.branches[role] = branch


class _View(nn.ModuleDict):
    """Modules by role, to be read. What is assigned here would be lost, so it is refused."""

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
        """Refuse to change the model.

        Raises:
            ConfigError: Always.
        """
        self._refuse()

    def _refuse(self) -> None:
        raise ConfigError("encoders and heads are views. Change a part of the model with model.branch(role).head = ...")
