"""Whether the numbers of several reports belong beside one another, and a report beside that of an undefended model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from ..arguments import checked
from ..errors import InputError
from .attackers import ThreatModel
from .report import AttackResult, EvalReport, Sample

_OWN: tuple[ThreatModel, ...] = ("replica", "published", "white-box")
"""Threat models whose attackers aim at the model itself; a plain classifier has neither replica nor publication."""


@checked
def with_baseline(report: EvalReport, baseline: EvalReport) -> EvalReport:
    """Return a report beside that of an undefended model, which every chart and table of it then shows too.

    Args:
        report: Report on the defense.
        baseline: Report on the undefended model, on the same data under the same attackers; a white box attacks the
            undefended model itself.

    Raises:
        InputError: If the models share a name, or data, attackers on public encoders or budgets of attackers on the
            model itself differ; the error says which.

    Examples:
        >>> import torch
        >>> from zepad.attacks import PGD
        >>> from zepad.evaluation import Attacker, evaluate, with_baseline
        >>> images = torch.rand(8, 3, 2, 2)
        >>> undefended = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> defended = torch.nn.Sequential(torch.nn.AvgPool2d(2), undefended[0], torch.nn.Linear(3, 2))
        >>> pgd = Attacker(name="PGD-3", threat_model="white-box", attack=PGD(eps=8 / 255, steps=3))
        >>> loader = [(images, undefended(images).argmax(1)), (images, defended(images).argmax(1))]
        >>> reports = [
        ...     evaluate(model, loader, [pgd], name=name, sanity=False, progress=False)
        ...     for name, model in (("defended", defended), ("undefended", undefended))
        ... ]
        >>> with_baseline(*reports).baseline.benign_accuracy.value >= 0.5
        True
    """
    check_comparable([report, baseline])
    answers = {(sample.attacker, sample.index): (sample.before, sample.after) for sample in baseline.samples}
    own = {result.name for result in report.attacks if result.threat_model in _OWN}

    def answered(sample: Sample) -> Sample:
        known = None if sample.attacker in own else answers.get((sample.attacker, sample.index))
        return replace(sample, baseline=known)

    return replace(
        report,
        samples=tuple(map(answered, report.samples)),
        baseline=replace(baseline, samples=(), baseline=None),
    )


def check_comparable(reports: Sequence[EvalReport]) -> None:
    """Refuse reports whose numbers do not belong in one table.

    Raises:
        InputError: If there is no report, two models share a name, or data, attackers on public encoders or budgets of
            attackers on the model itself differ; the error says which.
    """
    if not reports:
        raise InputError("a comparison needs at least one report; got none.")
    names = [report.model for report in reports]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"every model needs a name of its own; got {', '.join(repeated)} more than once.")
    first = reports[0]
    for report in reports:
        if "data_digest" not in report.provenance:
            raise InputError(
                f'{report.model} does not say what data it was evaluated on: provenance["data_digest"] is missing. '
                "Compare reports that zepad.evaluation.evaluate made."
            )
        if report.provenance["data_digest"] != first.provenance["data_digest"]:
            raise InputError(
                f"{first.model} and {report.model} were evaluated on different data ({first.data}, number "
                f"of images {first.images}; {report.data}, number of images {report.images}). "
                "Evaluate both on the same images in the same order."
            )
        differing = _differing_attackers(first, report)
        if differing:
            raise InputError(
                f"{first.model} and {report.model} were attacked differently: {'; '.join(differing)}. "
                "Evaluate both under the same attackers."
            )


def _differing_attackers(first: EvalReport, second: EvalReport) -> list[str]:
    """Say what differs between attackers who know the same of every model, and between the budgets of all others."""
    for group in _OWN:
        budgets = [sorted({(r.norm, r.eps) for r in report.group(group)}) for report in (first, second)]
        if budgets[0] != budgets[1] and (group == "white-box" or all(budgets)):
            return [f"{group} budgets {budgets[0]} and {budgets[1]}"]
    ours, theirs = (
        {result.name: _identity(result) for result in report.attacks if result.threat_model not in _OWN}
        for report in (first, second)
    )
    only = [
        f"only {report.model} under {name}"
        for report, mine, other in ((first, ours, theirs), (second, theirs, ours))
        for name in mine
        if name not in other
    ]
    return only + [
        f"{name} has another {' and '.join(_differing_keys(mine, theirs[name]))}"
        for name, mine in ours.items()
        if name in theirs and theirs[name] != mine
    ]


def _differing_keys(mine: dict[str, str], theirs: dict[str, str]) -> list[str]:
    return sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))


def _identity(result: AttackResult) -> dict[str, str]:
    settings = {f"settings.{key}": value for key, value in result.settings.items()}
    facts = {"threat model": result.threat_model, "eps": result.eps, "norm": result.norm, **settings}
    return {key: json.dumps(value, sort_keys=True, default=str) for key, value in facts.items()}
