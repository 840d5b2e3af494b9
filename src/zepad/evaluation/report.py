"""What an evaluation found, as values that survive a JSON round trip."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError
from .attackers import THREAT_MODELS, ThreatModel
from .statistics import Detection, Rate

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RobustRates:
    """What is left of a model under one attack, or under the worst of several for each image.

    Attributes:
        robust_accuracy: Images classified right after the attack, of all images.
        fooling_rate: Images whose prediction the attack changed, right or wrong, of all images.
        attack_success_rate: Images right before and wrong after, of those right before.
        branches: Robust accuracy of each branch alone under the same attacked images; empty for a plain classifier.
    """

    robust_accuracy: Rate
    fooling_rate: Rate
    attack_success_rate: Rate
    branches: dict[str, Rate]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What crafting took.

    Attributes:
        seconds: Wall clock.
        forwards: Images passed through the target, divided by the images attacked.
        gradients: Those of them passed with gradients recorded.
    """

    seconds: float
    forwards: float
    gradients: float


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """One attacker's row.

    Attributes:
        name: Of the attacker.
        threat_model: Group.
        eps: Budget in [0, 1] pixel units.
        norm: Of the ball.
        settings: Every setting of the attack.
        rates: Accuracies and rates.
        detection: Of the model's score, None where it has none.
        cost: Time and passes.
        confidences: By branch (and `"fused"`): the attacked images' counts of the largest softmax probability in 20
            equal bins of [0, 1].
    """

    name: str
    threat_model: ThreatModel
    eps: float
    norm: str
    settings: dict[str, Any]
    rates: RobustRates
    detection: Detection | None
    cost: Cost
    confidences: dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One sanity check: does the evaluation itself deserve trust?

    Attributes:
        name: What was checked.
        passed: Whether nothing suspicious was found.
        detail: The numbers, and what they mean when the check failed.
    """

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image before and after an attack. Pictures are PNG files.

    Attributes:
        attacker: Name of the attacker.
        index: Position of the image in the data.
        label: The truth.
        before: Prediction on the benign image.
        after: Prediction on the attacked image.
        flagged: Whether the detector flags the attacked image; None where there is no detector.
        benign: The image.
        attacked: The image after the attack.
        perturbation: The difference, scaled so that the budget spans grey plus and minus one half.
    """

    attacker: str
    index: int
    label: int
    before: int
    after: int
    flagged: bool | None
    benign: bytes
    attacked: bytes
    perturbation: bytes


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """Everything one evaluation found. Rates are in [0, 1]; tables show per cent.

    Attributes:
        model: Name of the model.
        data: Name of the data.
        images: How many were evaluated.
        classes: Names by class index; empty where unknown.
        benign_accuracy: On the images as they are.
        benign_branches: The same for each branch alone; empty for a plain classifier.
        false_positive_rate: Benign images flagged at the threshold; None without a detector.
        threshold: Of the detector; None without one.
        attacks: One result per attacker, in the order given.
        worst: By group of attackers, and `"all"`: an image counts as robust only if it survives every attacker in it.
        checks: Sanity checks.
        confidences: As in `AttackResult`, of the benign images.
        samples: A few images per attacker.
        provenance: Versions, seed, digests, device, time.
    """

    model: str
    data: str
    images: int
    classes: tuple[str, ...]
    benign_accuracy: Rate
    benign_branches: dict[str, Rate]
    false_positive_rate: Rate | None
    threshold: float | None
    attacks: tuple[AttackResult, ...]
    worst: dict[str, RobustRates]
    checks: tuple[Check, ...]
    confidences: dict[str, tuple[int, ...]]
    samples: tuple[Sample, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def warnings(self) -> tuple[Check, ...]:
        """The sanity checks that failed."""
        return tuple(check for check in self.checks if not check.passed)

    def group(self, threat_model: str) -> tuple[AttackResult, ...]:
        """Return the results of one group of attackers."""
        return tuple(result for result in self.attacks if result.threat_model == threat_model)

    @property
    def groups(self) -> tuple[ThreatModel, ...]:
        """The groups that have an attacker, from the least to the most knowing."""
        return tuple(threat_model for threat_model in THREAT_MODELS if self.group(threat_model))

    def summary(self) -> dict[str, Any]:
        """Return what a model card must say, JSON-ready: each group's worst case beside benign accuracy.

        Rates are `[value, lower, upper]` in [0, 1].
        """
        groups = {
            group: {
                "attackers": [result.name for result in self.group(group)],
                "budgets": sorted({f"{result.norm} {result.eps * 255:.4g}/255" for result in self.group(group)}),
                "robust_accuracy": _triple(self.worst[group].robust_accuracy),
            }
            for group in self.groups
        }
        detection = {result.name: result.detection.auroc for result in self.attacks if result.detection is not None}
        return {
            "data": self.data,
            "images": self.images,
            "seed": self.provenance.get("seed"),
            "benign_accuracy": _triple(self.benign_accuracy),
            "groups": groups,
            "detection_auroc": detection,
            "failed_checks": [check.name for check in self.warnings],
        }

    def to_json(self) -> str:
        """Return the report as JSON: rates as hits, total, value and interval; pictures as base64."""
        return json.dumps({"format": FORMAT, **_encode(self)}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> EvalReport:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: If the text is no report of this version.
        """
        try:
            values = json.loads(text)
            if values.pop("format") != FORMAT:
                raise ValueError("another format version")
            return _decode_report(values)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"this is no evaluation report of format {FORMAT}: {error}. Write it with EvalReport.save or to_json."
            ) from error

    def save(self, folder: str | Path) -> Path:
        """Write report.html, report.md, report.json and report.png.

        Args:
            folder: Created if need be.

        Returns:
            The path of report.html.

        Raises:
            InputError: If the folder cannot be written.
        """
        from .rendering import html_page, markdown_tables, overview_png  # matplotlib is slow to import

        out = Path(folder)
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "report.json").write_text(self.to_json() + "\n", encoding="utf-8")
            (out / "report.md").write_text(markdown_tables(self), encoding="utf-8")
            (out / "report.html").write_text(html_page(self), encoding="utf-8")
            (out / "report.png").write_bytes(overview_png(self))
        except OSError as error:
            raise InputError(f"{out} cannot be written: {error.strerror}. Choose a writable folder.") from error
        return out / "report.html"

    @classmethod
    def load(cls, path: str | Path) -> EvalReport:
        """Read a report.json, or the folder that holds it.

        Raises:
            CheckpointError: If there is none, or it is no report of this version.
        """
        file = Path(path)
        file = file / "report.json" if file.is_dir() else file
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}. Pass a report.json or its folder.") from error
        return cls.from_json(text)


def _triple(rate: Rate) -> list[float]:
    return [round(value, 4) for value in (rate.value, *rate.interval)]


def _encode(value: Any) -> Any:
    if isinstance(value, Rate):
        low, high = value.interval
        rate = None if value.total == 0 else value.value
        return {
            "hits": value.hits,
            "total": value.total,
            "value": rate,
            "interval": [low, high] if value.total else None,
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_encode(item) for item in value]
    return value


def _decode_rate(values: dict[str, Any]) -> Rate:
    return Rate(int(values["hits"]), int(values["total"]))


def _decode_rates(values: dict[str, Any]) -> dict[str, Rate]:
    return {name: _decode_rate(rate) for name, rate in values.items()}


def _decode_outcome(values: dict[str, Any]) -> RobustRates:
    rates = {name: _decode_rate(values[name]) for name in ("robust_accuracy", "fooling_rate", "attack_success_rate")}
    return RobustRates(**rates, branches=_decode_rates(values["branches"]))


def _decode_detection(values: dict[str, Any] | None) -> Detection | None:
    if values is None:
        return None
    rates = {name: _decode_rate(values[name]) for name in ("flagged", "evading")}
    low, high = values["auroc_interval"]
    curve = tuple((x, y) for x, y in values["curve"])
    return Detection(**{**values, **rates, "auroc_interval": (low, high), "curve": curve})


def _decode_histograms(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(counts) for name, counts in values.items()}


def _decode_attack(values: dict[str, Any]) -> AttackResult:
    return AttackResult(
        **{
            **values,
            "rates": _decode_outcome(values["rates"]),
            "detection": _decode_detection(values["detection"]),
            "cost": Cost(**values["cost"]),
            "confidences": _decode_histograms(values["confidences"]),
        }
    )


def _decode_sample(values: dict[str, Any]) -> Sample:
    pictures = {name: base64.b64decode(values[name], validate=True) for name in ("benign", "attacked", "perturbation")}
    return Sample(**{**values, **pictures})


def _decode_report(values: dict[str, Any]) -> EvalReport:
    positives = values["false_positive_rate"]
    return EvalReport(
        **{
            **values,
            "classes": tuple(values["classes"]),
            "benign_accuracy": _decode_rate(values["benign_accuracy"]),
            "benign_branches": _decode_rates(values["benign_branches"]),
            "false_positive_rate": None if positives is None else _decode_rate(positives),
            "attacks": tuple(_decode_attack(result) for result in values["attacks"]),
            "worst": {group: _decode_outcome(rates) for group, rates in values["worst"].items()},
            "checks": tuple(Check(**check) for check in values["checks"]),
            "confidences": _decode_histograms(values["confidences"]),
            "samples": tuple(_decode_sample(sample) for sample in values["samples"]),
        }
    )
