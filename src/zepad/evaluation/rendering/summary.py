"""A report in ten lines, for the end of a command."""

from __future__ import annotations

from ...escaping import clean
from ..attackers import ThreatModel
from ..report import EvalReport, RobustRates
from .wording import budget, checks_sentence, counted, heading, percent, shorten, strongest_of

_NAME = 40  # letters of the name of an attacker
_HEADING = 100  # letters of the first line
_FIRST = len("semi-black-box+")  # letters of the longest threat model


def summary(report: EvalReport) -> str:
    """Return what an evaluation found in ten lines at most, as plain text.

    They say what is left without an attack, against each group of attackers and against all of them, how the strongest
    attacker of each group is called, what the detector does, and how the sanity checks went. Where the report has an
    undefended model beside, its rates stand in brackets.

    Args:
        report: Report to sum up.

    Returns:
        Lines without control characters: a name in a report cannot add a line.
    """
    lines = [f"{shorten(clean(heading(report)), _HEADING)}, {counted(report.images, 'image')}"]
    bare = report.baseline
    beside = None if bare is None else bare.benign_accuracy.value
    lines.append(_line("no attack", percent(report.benign_accuracy.value), f"classified right{_undefended(beside)}"))
    lines += [_group(report, group) for group in report.groups]
    if report.attacks:
        told = f"survive each of {counted(len(report.attacks), 'attacker')}"
        beside = None if bare is None or not bare.attacks else _robust(bare.worst["all"])
        lines.append(_line("all together", percent(_robust(report.worst["all"])), f"{told}{_undefended(beside)}"))
    if report.threshold is not None:
        lines.append(_detector(report))
    return "\n".join([*lines, checks_sentence(report)])


def _line(first: str, number: str, told: str) -> str:
    return f"{first:<{_FIRST}}  {number:>9}  {told}"


def _group(report: EvalReport, group: ThreatModel) -> str:
    attackers = report.group(group)
    strongest = strongest_of(attackers)
    name = shorten(clean(strongest.name), _NAME)
    own = f"{name} ({percent(_robust(strongest.rates))})" if len(attackers) > 1 else name
    told = f"of {len(attackers)} attackers the strongest is {own}" if len(attackers) > 1 else f"under {own}"
    budgets = " and ".join(dict.fromkeys(budget(result.eps, result.norm) for result in attackers))
    bare = None if report.baseline is None else report.baseline.worst.get(group)
    told += f", eps {shorten(budgets, _NAME)}{_undefended(None if bare is None else _robust(bare))}"
    return _line(group, percent(_robust(report.worst[group])), told)


def _undefended(value: float | None) -> str:
    return "" if value is None else f" (undefended: {percent(value)})"


def _robust(rates: RobustRates) -> float:
    return rates.robust_accuracy.value


def _detector(report: EvalReport) -> str:
    flagged = "" if report.false_positive_rate is None else percent(report.false_positive_rate.value)
    found = [(result.detection.auroc, result) for result in report.attacks if result.detection is not None]
    told = "of the benign images are flagged"
    if found:
        auroc, hardest = min(found, key=lambda pair: pair[0])
        told += f"; AUROC {auroc:.2f} under {shorten(clean(hardest.name), _NAME)}, the hardest to detect"
    return _line("detector", flagged, told)
