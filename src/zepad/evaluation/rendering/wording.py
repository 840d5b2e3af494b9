"""Numbers and sentences that are the same in every format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...escaping import clean
from ..attackers import ThreatModel
from ..report import AttackResult, EvalReport, Sample
from ..statistics import Rate

GROUPS: dict[ThreatModel, str] = {
    "semi-black-box": "Semi-black-box attackers",
    "semi-black-box+": "Semi-black-box+ attackers",
    "replica": "Replica attackers",
    "published": "Published attackers",
    "white-box": "White-box attackers",
}

SHORT: dict[ThreatModel, str] = {
    "semi-black-box": "Semi-black box",
    "semi-black-box+": "Semi-black box, both encoders",
    "replica": "Replica",
    "published": "Published encoders",
    "white-box": "White box",
}

KNOWS: dict[ThreatModel, str] = {
    "semi-black-box": "knows the public victim encoder",
    "semi-black-box+": "knows both public encoders",
    "replica": "repeats the hardening on other images",
    "published": "has the hardened encoders",
    "white-box": "knows everything",
}

UNDEFENDED, DEFENDED = "undefended", "defended"

NO_ATTACK = "No attack"

_CLASSIC = {"universal": "Universal", "per_image": "One image at a time", "white_box": "White box"}

EXPLANATIONS: dict[ThreatModel, str] = {
    "semi-black-box": "The attacker knows the public victim encoder the model is built on, and nothing else of it.",
    "semi-black-box+": "The attacker knows both public encoders, and nothing that was trained on them.",
    "replica": "The attacker knows the public encoders and zepad, and attacks copies hardened on images of his own.",
    "published": "The attacker has the hardened encoders, as the Hub publishes them, but no head and no benign branch.",
    "white-box": "The attacker knows everything: all weights, how the branches are fused, and the detector.",
}

REMAINING = "The remaining images are those that survived the attackers before; the rates count all of these together."

TERMS = {
    "Robust accuracy": "images classified right after the attack, of all images.",
    "Fooling rate": "images whose prediction the attack changed, right or wrong, of all images.",
    "Attack success rate": "images right before and wrong after the attack, of those right before.",
    "Worst for each image": "an image counts as robust only if it survives every attacker of the group.",
}

DETECTION_TERMS = {
    "AUROC": "probability that an attacked image scores above a benign one; 0.5 is chance.",
    "AUROC, fooling images": "the same, with only those images that were right before the attack and wrong after it.",
    "FPR at 95 % TPR": "benign images flagged where 95 % of the attacked ones are flagged.",
    "Evading": "images right before the attack, wrong after it, and not flagged: what the attacker is after.",
}

WORST = "Worst of these for each image"
WORST_OF_ALL = "Worst of all attackers for each image"

INTERVALS = "Ranges are 95 % intervals: Wilson for rates, bootstrap for AUROC."

_NAMED = 2  # strongest attackers of each threat model in the verdict; all are in the tables
_NAME = 60  # letters of a name in the verdict; tables have all
_NORMS = {"linf": "L∞", "l2": "L2", "patch": "of the pixels"}


def title(result: AttackResult) -> str:
    """Return the name of an attacker, and whether it attacked only what those before it had left."""
    return f"{result.name} (remaining images)" if result.remaining else result.name


def explanation(reports: Sequence[EvalReport], threat_model: ThreatModel) -> str:
    """Return what the attackers of a threat model know, and what the remaining images of some of them are."""
    if not any(result.remaining for report in reports for result in report.group(threat_model)):
        return EXPLANATIONS[threat_model]
    return f"{EXPLANATIONS[threat_model]} {REMAINING}"


def attack_title(key: str, attack: str = "") -> str:
    """Return what a person reads for one of the three attacks that a first look at a defense needs.

    Args:
        key: The attack's name in JSON: `"universal"`, `"per_image"` or `"white_box"`.
        attack: Name of the algorithm, added in parentheses.

    Examples:
        >>> attack_title("per_image", "feature PGD-20")
        'One image at a time (feature PGD-20)'
    """
    return f"{_CLASSIC[key]} ({attack})" if attack else _CLASSIC[key]


def shorten(text: str, length: int) -> str:
    """Return the text cut to a length, with an ellipsis where something is missing."""
    return text if len(text) <= length else text[: length - 1] + "…"


def percent(value: float) -> str:
    """Return a share in [0, 1] as per cent, a word where it is not a number."""
    return "undefined" if math.isnan(value) else f"{100 * value:.1f} %"


def interval(bounds: tuple[float, float]) -> str:
    """Return the ends of an interval of shares as per cent; empty where they are not numbers."""
    low, high = bounds
    return "" if math.isnan(low) else f"{100 * low:.1f} to {100 * high:.1f}"


def counts(rate: Rate) -> str:
    """Return hits and total."""
    return f"{rate.hits}/{rate.total}"


def rate_in_words(rate: Rate) -> str:
    """Return per cent and interval, for a sentence."""
    return f"{percent(rate.value)} {_bounds(rate)}".rstrip()


def budget(eps: float, norm: str) -> str:
    """Return a budget as it is written in the field: in 255ths for whole 255ths of the L-infinity norm.

    Examples:
        >>> budget(8 / 255, "linf"), budget(0.03, "linf"), budget(0.5, "l2"), budget(0.05, "patch")
        ('8/255 L∞', '0.03 L∞', '0.5 L2', '0.05 of the pixels')
    """
    steps = eps * 255
    whole = norm == "linf" and round(steps) >= 1 and math.isclose(steps, round(steps), rel_tol=1e-6)
    return f"{round(steps)}/255 {_NORMS[norm]}" if whole else f"{eps:.4g} {_NORMS.get(norm, norm)}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def class_name(report: EvalReport, label: int) -> str:
    """Return the name of a class, its number where there is none."""
    return report.classes[label] if 0 <= label < len(report.classes) else f"class {label}"


def heading(report: EvalReport) -> str:
    """Return the title of a report."""
    return f"Robustness of {report.model} on {report.data}"


def verdict(report: EvalReport) -> str:
    """Return the one sentence to quote: benign accuracy and the worst case of each threat model, with its attackers."""
    clauses = [f"{number} {told}" if number else told for number, told in verdict_clauses(report)]
    return f"{verdict_subject(report)} {'; '.join(clauses)}."


def verdict_subject(report: EvalReport) -> str:
    """Return the beginning of the verdict: model, number of images, data, and the budget if attackers have but one."""
    model, data = (shorten(clean(name), _NAME) for name in (report.model, report.data))
    at = "" if _is_mixed(report) or not report.attacks else f", attacked at eps {_budgets(report.attacks)}"
    return f"{model} on {counted(report.images, 'image')} of {data}{at}:"


def verdict_clauses(report: EvalReport) -> list[tuple[str, str]]:
    """Return the numbers of the verdict, each with what it says.

    Threat models without attackers are named as not measured, so that their absence cannot pass for strength.
    """
    bare = report.baseline
    beside = "" if bare is None else _against(bare.benign_accuracy)
    clauses = [
        (percent(report.benign_accuracy.value), f"{_bounds(report.benign_accuracy, beside)}correct without an attack")
    ]
    missed = []
    own_budgets = _is_mixed(report)
    for group in GROUPS:
        attackers = report.group(group)
        if attackers:
            worst = report.worst[group].robust_accuracy
            beside = "" if bare is None or group not in bare.worst else _against(bare.worst[group].robust_accuracy)
            who = _who(attackers, group, budgets=_budgets(attackers) if own_budgets else "")
            clauses.append((percent(worst.value), f"{_bounds(worst, beside)}under {who}"))
        elif _is_missed(report, group):
            missed.append(f"{group} attacker ({KNOWS[group]})")
    if missed:
        clauses.append(("", f"not measured under any {listed(missed, 'or')}"))
    return clauses


def listed(words: Sequence[str], last: str = "and") -> str:
    """Return words as a sentence lists them.

    Examples:
        >>> listed(["one", "two", "three"])
        'one, two and three'
    """
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _against(rate: Rate) -> str:
    return f", against {percent(rate.value)} undefended,"


def _is_mixed(report: EvalReport) -> bool:
    """Return whether attackers have different budgets, so that each threat model must name its own."""
    return len({(result.eps, result.norm) for result in report.attacks}) > 1


def _is_missed(report: EvalReport, threat_model: ThreatModel) -> bool:
    """Return whether the verdict must say that there is no attacker of a threat model."""
    if threat_model in ("replica", "published"):  # a plain classifier has no hardening to repeat or to publish
        return bool(report.benign_branches)
    return threat_model != "semi-black-box+"


def _bounds(rate: Rate, beside: str = "") -> str:
    said = f"({interval(rate.interval)}){beside} " if rate.total else beside.removeprefix(",")
    return said.lstrip()


def _who(attackers: Sequence[AttackResult], threat_model: ThreatModel, *, budgets: str) -> str:
    first = sorted(attackers, key=_strength)[:_NAMED]
    names = listed([shorten(clean(result.name), _NAME) for result in first])
    named = f"the strongest are {names}" if len(first) < len(attackers) else names
    at = f"; eps {budgets}" if budgets else ""
    if len(attackers) == 1:
        return f"one {threat_model} attacker ({named}{at})"
    return f"the worst of {len(attackers)} {threat_model} attackers for each image ({named}{at})"


def _budgets(attackers: Sequence[AttackResult]) -> str:
    return " and ".join(dict.fromkeys(budget(result.eps, result.norm) for result in attackers))


def _strength(result: AttackResult) -> tuple[bool, float]:
    """Return what sorts the strongest attacker first; the rates of one that went on with the rest are not its own."""
    value = result.rates.robust_accuracy.value
    return result.remaining, math.inf if math.isnan(value) else value


def strongest_of(attackers: Sequence[AttackResult]) -> AttackResult:
    """Return the strongest of several attackers."""
    return min(attackers, key=_strength)


def strongest(report: EvalReport) -> list[AttackResult]:
    """Return the attacker of each threat model that leaves the least accuracy."""
    return [strongest_of(report.group(group)) for group in report.groups]


def sample_verdict(report: EvalReport, sample: Sample) -> str:
    """Return in words what the model, and the undefended one beside it, made of an image before and after an attack."""
    flags = {None: "", True: "; flagged by the detector", False: "; not flagged by the detector"}

    def seen(label: int) -> str:
        return f"{class_name(report, label)} ({'right' if label == sample.label else 'wrong'})"

    said = (
        f"Truth: {class_name(report, sample.label)}. Without the attack: {seen(sample.before)}. "
        f"Under the attack: {seen(sample.after)}{flags[sample.flagged]}."
    )
    if sample.baseline is None:
        return said
    before, after = sample.baseline
    return f"{said} Undefended: {seen(before)}, under the attack {seen(after)}."


def threshold_sentence(threshold: float, false_positive_rate: Rate | None) -> str:
    """Return what the detector's threshold costs on benign images."""
    said = f"An image is flagged where its score exceeds {threshold:.4g}."
    if false_positive_rate is None:
        return said
    return f"{said} That flags {rate_in_words(false_positive_rate)} of the benign images."


def checks_sentence(report: EvalReport) -> str:
    """Return how the sanity checks went; that none was run is said too."""
    if not report.checks:
        return "The sanity checks, which look for masked gradients, were left out of this evaluation."
    if report.warnings:
        return (
            f"{len(report.warnings)} of {counted(len(report.checks), 'sanity check')} failed: "
            "the numbers below may overstate robustness."
        )
    return f"All {len(report.checks)} sanity checks of this evaluation passed."


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as dotted names and exact values."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat
