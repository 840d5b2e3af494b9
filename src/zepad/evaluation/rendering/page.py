"""A report as one web page that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from ..report import AttackResult, EvalReport
from ..statistics import Rate
from .charts import histogram_svg, mean_of_bins, roc_svg, shares
from .content import (
    branch_table,
    checks_table,
    cost_table,
    detection_table,
    group_table,
    overview_table,
    provenance_table,
    settings_table,
)
from .table import Table
from .templating import macros, render
from .wording import (
    DETECTION_TERMS,
    EXPLANATIONS,
    GROUPS,
    INTERVALS,
    TERMS,
    WORST,
    WORST_OF_ALL,
    checks_sentence,
    heading,
    sample_verdict,
    threshold_sentence,
    verdict_clauses,
    verdict_subject,
)

_PAGE_BYTES = 2_910_000  # a page stays under 3 MB: samples fill the space that is left


@dataclass(frozen=True)
class Panel:
    """A small drawing and what it shows.

    Attributes:
        drawing: SVG.
        title: Its title, plain text.
        told: Its numbers in words, plain text.
    """

    drawing: str
    title: str
    told: str


def html_page(report: EvalReport) -> str:
    """Return the report as one self-contained HTML page.

    Args:
        report: Report to render. Names and settings in it are escaped.

    Returns:
        The page: under 3 MB, readable on a phone, in the dark and in print. Sample pictures beyond that size are left
        out, the first ones of every attacker last, and the page says so.
    """
    values = _values(report)
    bare = render("report.html", **values, figures={}, left_out=0)
    figures = _within(report, _PAGE_BYTES - len(bare.encode()))
    left_out = len(report.samples) - sum(map(len, figures.values()))
    return render("report.html", **values, figures=figures, left_out=left_out)


def _values(report: EvalReport) -> dict[str, Any]:
    """Return what the template shows, sample pictures excepted."""
    return {
        "report": report,
        "title": heading(report),
        "subject": verdict_subject(report),
        "clauses": verdict_clauses(report),
        "checks_said": checks_sentence(report),
        "sections": _sections(report),
        "groups": GROUPS,
        "intervals": INTERVALS,
        "terms": TERMS,
        "detection_terms": DETECTION_TERMS,
        "overview": overview_table(report),
        "bar_groups": _bar_groups(report),
        "group_tables": [(GROUPS[group], EXPLANATIONS[group], group_table(report, group)) for group in report.groups],
        "branches": branch_table(report),
        "histogram_groups": _histogram_groups(report),
        "threshold_said": _threshold_said(report),
        "detection": detection_table(report),
        "curves": list(_curves(report)),
        "cost": cost_table(report),
        "checks": checks_table(report),
        "setting_tables": _setting_tables(report),
    }


def _sections(report: EvalReport) -> dict[str, str]:
    """Return the titles of the sections that have something to show, by the name of their template."""
    titles = {
        "accuracy": ("Accuracy", True),
        "attackers": ("Attackers", True),
        "branches": ("Branches", bool(report.benign_branches)),
        "confidence": ("Confidence", bool(report.attacks)),
        "detector": ("Detector", True),
        "samples": ("Samples", bool(report.samples)),
        "cost": ("Cost", bool(report.attacks)),
        "checks": ("Sanity checks", bool(report.checks)),
        "settings": ("Settings and provenance", True),
    }
    return {key: title for key, (title, shown) in titles.items() if shown}


def _bar_groups(report: EvalReport) -> list[tuple[str, list[tuple[str, Rate, str]]]]:
    """Return the bars of each threat model as name, rate and kind."""
    groups = [("Without an attack", [("No attack", report.benign_accuracy, "benign")])]
    for group in report.groups:
        bars = [(result.name, result.rates.robust_accuracy, "attack") for result in report.group(group)]
        groups.append((GROUPS[group], [*bars, (WORST, report.worst[group].robust_accuracy, "worst")]))
    if len(report.groups) > 1:
        groups.append(("All attackers", [(WORST_OF_ALL, report.worst["all"].robust_accuracy, "worst")]))
    return groups


def _histogram_groups(report: EvalReport) -> list[tuple[str, list[tuple[str, list[Panel]]]]]:
    every = chain.from_iterable(h.values() for h in (report.confidences, *(r.confidences for r in report.attacks)))
    top = max(chain([0.0], *map(shares, every))) or 1.0
    return [
        (GROUPS[group], [(result.name, _histograms(report, result, top)) for result in report.group(group)])
        for group in report.groups
    ]


def _histograms(report: EvalReport, result: AttackResult, top: float) -> list[Panel]:
    panels = []
    for branch, benign in report.confidences.items():
        attacked = result.confidences[branch]
        title = branch if branch == "fused" else f"{branch} branch"
        means = (mean_of_bins(counts) for counts in (benign, attacked))
        change = "mean {} benign, {} attacked".format(*("undefined" if m != m else f"{m:.2f}" for m in means))
        label = f"Confidence of the {title} under {result.name}: {change}"
        panels.append(Panel(histogram_svg(benign, attacked, top=top, label=label), title, change))
    return panels


def _threshold_said(report: EvalReport) -> str:
    return "" if report.threshold is None else threshold_sentence(report.threshold, report.false_positive_rate)


def _curves(report: EvalReport) -> Iterator[Panel]:
    """Yield the ROC curve of the detector under each attacker."""
    for result in report.attacks:
        found, false = result.detection, report.false_positive_rate
        if found is not None:
            ring = None if false is None else (false.value, found.flagged.value)
            told = f"AUROC {found.auroc:.3f}"
            label = f"ROC curve of the detector under {result.name}: {told}"
            yield Panel(roc_svg(found.curve, threshold=ring, label=label), result.name, told)


def _within(report: EvalReport, room: int) -> dict[str, list[str]]:
    """Return the samples of each attacker that fit: the first of every attacker before the second of any."""
    by_attacker = ([s for s in report.samples if s.attacker == result.name] for result in report.attacks)
    figures: dict[str, list[str]] = {}
    for sample in chain.from_iterable(zip_longest(*by_attacker)):
        if sample is not None:
            figure = macros().sample_figure(sample, sample_verdict(report, sample))
            room -= len(figure.encode())
            if room < 0:
                break
            figures.setdefault(sample.attacker, []).append(figure)
    return figures


def _setting_tables(report: EvalReport) -> list[tuple[str, Table]]:
    tables = [(f"Settings of {result.name}", settings_table(result)) for result in report.attacks]
    return [*tables, ("Where these numbers come from", provenance_table(report))]
