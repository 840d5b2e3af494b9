"""What an evaluation found, as values that survive a JSON round trip."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from ..arguments import checked
from ..errors import CheckpointError
from ..history import is_history
from ..schema import STRICT, parse_json, read_bounded
from .attackers import THREAT_MODELS, ThreatModel
from .statistics import LARGEST_COUNT, Detection, Rate, WrittenRate

FORMAT = 3
_LARGEST_FILE = 1 << 29  # largest size of a report in bytes, most of which are pictures


def _from_base64(written: Any) -> bytes:
    if not isinstance(written, str):
        raise ValueError("a picture is text in base64")
    return base64.b64decode(written, validate=True)


_Picture = Annotated[bytes, BeforeValidator(_from_base64)]
"""A PNG file, which JSON holds as base64."""


@dataclass(frozen=True, kw_only=True)
class RobustRates:
    """What is left of a model under one attack, or under the worst of several for each image.

    Attributes:
        robust_accuracy: Share of all images that are classified right after the attack.
        fooling_rate: Share of all images whose prediction the attack changed, right or wrong.
        attack_success_rate: Share of the images right before the attack that are wrong after it.
        branches: Robust accuracy of each branch alone under the same attacked images; empty for a plain classifier.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    robust_accuracy: WrittenRate
    fooling_rate: WrittenRate
    attack_success_rate: WrittenRate
    branches: dict[str, WrittenRate]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What crafting the attacked images took.

    Attributes:
        seconds: Wall-clock time in seconds.
        forwards: Number of images passed through the target, divided by the number of images attacked.
        gradients: Number of those that were passed with gradients recorded, divided in the same way.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    seconds: float
    forwards: float
    gradients: float


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """The result of one attacker.

    Attributes:
        name: Name of the attacker.
        threat_model: Threat model, which says what the attacker knows.
        eps: Radius of the ball in [0, 1] pixel units.
        norm: Norm of the ball.
        settings: Every setting of the attack, JSON-ready.
        rates: Robust accuracy, fooling rate and attack success rate.
        detection: Quality of the model's detection score; None where the model has no detector.
        cost: Time and passes.
        confidences: Histograms of the attacked images by branch and under `"fused"`: counts of the largest softmax
            probability in 20 equal bins of [0, 1].
        scores: Histogram of the detection scores of the attacked images, in the bins of `EvalReport.scores`; empty
            without a detector.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    name: str
    threat_model: ThreatModel
    eps: float
    norm: str
    settings: dict[str, Any]
    rates: RobustRates
    detection: Detection | None
    cost: Cost
    confidences: dict[str, tuple[int, ...]]
    scores: tuple[int, ...] = ()

    @property
    def remaining(self) -> bool:
        """Whether the attacker attacked only what those before it had left, so that its rates include theirs."""
        return self.settings.get("remaining") is True


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one sanity check of the evaluation itself.

    Attributes:
        name: Name of the check.
        passed: Whether nothing suspicious was found.
        detail: The numbers, and what they mean when the check failed.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image before and after an attack. Pictures are PNG files.

    Attributes:
        attacker: Name of the attacker.
        index: Index of the image in the data.
        label: True class.
        before: Predicted class of the benign image.
        after: Predicted class of the attacked image.
        flagged: Whether the detector flags the attacked image; None where there is no detector.
        benign: The image before the attack.
        attacked: The image after the attack.
        perturbation: The difference, scaled so that the budget spans grey plus and minus one half.
        baseline: Classes that the baseline predicts before and after the same attacker; None where that is unknown.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    attacker: str
    index: int
    label: int
    before: int
    after: int
    flagged: bool | None
    benign: _Picture
    attacked: _Picture
    perturbation: _Picture
    baseline: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """Everything one evaluation found. Rates are in [0, 1]; tables show per cent.

    Attributes:
        model: Name of the model.
        data: Name of the data.
        images: Number of images evaluated.
        classes: Names of the classes in the order of the logits; empty where unknown.
        benign_accuracy: Accuracy on the images as they are.
        benign_branches: Accuracy of each branch alone on the images as they are; empty for a plain classifier.
        false_positive_rate: Share of benign images flagged at the threshold; None without a detector.
        threshold: Detection threshold; None without a detector.
        attacks: One result per attacker, in the order given.
        worst: Rates by threat model, and under `"all"`: an image counts as robust only if it survives every attacker.
        checks: Results of the sanity checks.
        confidences: Histograms of the benign images by branch and under `"fused"`, as in `AttackResult.confidences`.
        samples: A few images per attacker.
        provenance: Versions, seed, digests, device and time.
        scores: Histogram of the detection scores of the benign images, in equal bins; empty without a detector.
        score_range: Lower edge of the first and upper edge of the last of these bins, which also count what lies
            beyond; None without a detector.
        baseline: The report on an undefended model that this one is compared with; None where there is none.
        training: Records of `zepad.history.TrainingHistory`, the learning curves; empty where the model has none.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    model: str
    data: str
    images: int
    classes: tuple[str, ...]
    benign_accuracy: WrittenRate
    benign_branches: dict[str, WrittenRate]
    false_positive_rate: WrittenRate | None
    threshold: float | None
    attacks: tuple[AttackResult, ...]
    worst: dict[str, RobustRates]
    checks: tuple[Check, ...]
    confidences: dict[str, tuple[int, ...]]
    samples: tuple[Sample, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    scores: tuple[int, ...] = ()
    score_range: tuple[float, float] | None = None
    baseline: EvalReport | None = None
    training: tuple[dict[str, Any], ...] = ()

    @property
    def warnings(self) -> tuple[Check, ...]:
        """The sanity checks that failed."""
        return tuple(check for check in self.checks if not check.passed)

    def group(self, threat_model: str) -> tuple[AttackResult, ...]:
        """Return the results of the attackers of one threat model."""
        return tuple(result for result in self.attacks if result.threat_model == threat_model)

    @property
    def groups(self) -> tuple[ThreatModel, ...]:
        """The threat models that have an attacker, from the least to the most knowing."""
        return tuple(threat_model for threat_model in THREAT_MODELS if self.group(threat_model))

    def summary(self) -> dict[str, Any]:
        """Return what a model card must say, JSON-ready: the worst case of each threat model beside benign accuracy.

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
        """Return the report as JSON: rates as hits, total, value and interval; pictures as base64.

        Raises:
            ValueError: If a number is not finite.
        """
        return json.dumps({"format": FORMAT, **_encode(self)}, indent=1, allow_nan=False)

    @classmethod
    @checked
    def from_json(cls, text: str) -> EvalReport:
        """Return the report that `to_json` wrote, of this format or an earlier one.

        Raises:
            CheckpointError: If the text is no report, or a field is missing, unknown or of another type.
        """
        return _decode(text, origin="the evaluation report")

    @classmethod
    @checked
    def load(cls, path: str | Path) -> EvalReport:
        """Read a report.json.

        Args:
            path: The file, or the folder that holds it.

        Raises:
            CheckpointError: If there is no such file, or it is no report.
        """
        file = Path(path)
        file = file / "report.json" if file.is_dir() else file
        return _decode(read_bounded(file, _LARGEST_FILE), origin=str(file))


def _triple(rate: Rate) -> list[float]:
    return [round(value, 4) for value in (rate.value, *rate.interval)]


def _encode(value: Any) -> Any:
    """Return a part of a report as JSON-ready values."""
    if isinstance(value, Rate):
        low, high = value.interval
        counted = value.total > 0
        return {
            "hits": value.hits,
            "total": value.total,
            "value": value.value if counted else None,
            "interval": [low, high] if counted else None,
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_encode(key): _encode(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, str):
        # A lone surrogate, as in a file name that is not UTF-8, could be written as JSON but not be read again.
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Sequence):
        return [_encode(item) for item in value]
    return value


def _decode(text: str | bytes, *, origin: str) -> EvalReport:
    try:
        values = json.loads(text if isinstance(text, str) else text.decode())
        written = values.pop("format")
        if written == 1:
            values = _upgrade_1(values)
        if written in (1, 2):
            values = _upgrade_2(values)
        elif written != FORMAT:
            raise ValueError(f"format {written!r} is unknown")
        current = json.dumps(_encode(values), allow_nan=False)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{origin} is no evaluation report of format 1 to {FORMAT}: {error!r}. "
            "Pass a report.json that zepad.evaluation.save_report wrote."
        ) from error
    report = parse_json(EvalReport, current, origin=origin)
    problem = _contradiction(report)
    if problem:
        raise CheckpointError(f"{origin} is damaged: {problem}. Save or download it again.")
    return report


def _contradiction(report: EvalReport) -> str | None:
    """Say what in a report does not fit the rest of it, if anything: whoever shows a report looks it up."""
    names = [result.name for result in report.attacks]
    if len(set(names)) < len(names):
        return "two attackers share a name"
    lacking = [group for group in (*report.groups, *(("all",) if names else ())) if group not in report.worst]
    if lacking:
        return f"worst lacks {', '.join(lacking)}"
    bins = {branch: len(counts) for branch, counts in report.confidences.items()}
    for confidences in (report.confidences, *(result.confidences for result in report.attacks)):
        if {branch: len(counts) for branch, counts in confidences.items()} != bins or 0 in bins.values():
            return "histograms of confidences differ in their branches or bins"
        if not all(0 <= count <= LARGEST_COUNT for counts in confidences.values() for count in counts):
            return f"a histogram counts what is no number of images, from 0 to {LARGEST_COUNT}"
    scored = (report.scores, *(result.scores for result in report.attacks))
    if {len(counts) for counts in scored} != {len(report.scores)} or bool(report.scores) != bool(report.score_range):
        return "histograms of detection scores differ in their bins"
    if not all(0 <= count <= LARGEST_COUNT for counts in scored for count in counts):
        return f"a histogram counts what is no number of images, from 0 to {LARGEST_COUNT}"
    if report.baseline is not None and report.baseline.baseline is not None:
        return "its baseline has a baseline"
    if not is_history(report.training):
        return "its learning curves are none"
    return None if report.baseline is None else _contradiction(report.baseline)


def _upgrade_1(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a report of format 1 as those of format 2, which renamed two fields of each attack."""
    names = {"knowledge": "threat_model", "outcome": "rates"}
    attacks = [{names.get(key, key): value for key, value in attack.items()} for attack in values["attacks"]]
    return {**values, "attacks": attacks}


def _upgrade_2(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a report of format 2 as those of format 3, which added scores, a baseline and curves."""
    attacks = [{**attack, "scores": []} for attack in values["attacks"]]
    samples = [{**sample, "baseline": None} for sample in values["samples"]]
    added: dict[str, Any] = {"scores": [], "score_range": None, "baseline": None, "training": []}
    return {**values, "attacks": attacks, "samples": samples, **added}
