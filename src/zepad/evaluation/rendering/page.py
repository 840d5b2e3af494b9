"""A report as one web page that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from ...history import TrainingHistory
from ..report import AttackResult, EvalReport
from .charts import histogram_svg, mean_of_bins, roc_svg, shares
from .content import (
    branch_table,
    checks_table,
    cost_table,
    detection_table,
    group_lines,
    group_table,
    overview_lines,
    provenance_table,
    settings_table,
)
from .table import Table
from .templating import macros, render
from .wording import (
    DETECTION_TERMS,
    GROUPS,
    INTERVALS,
    SHORT,
    TERMS,
    UNDEFENDED,
    checks_sentence,
    explanation,
    heading,
    percent,
    sample_verdict,
    shorten,
    strongest,
    threshold_sentence,
    verdict_clauses,
    verdict_subject,
)

_NAME = 40  # letters of an attacker's name below a drawing; tables have all
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
        "overview": overview_lines(report),
        "attackers": [
            (GROUPS[group], explanation([report], group), group_lines(report, group), group_table(report, group))
            for group in report.groups
        ],
        "first": [result.name for result in strongest(report)],
        "branches": branch_table(report),
        "histogram_groups": _histogram_groups(report),
        "threshold_said": _threshold_said(report),
        "score_panels": _score_panels(report),
        "detection": detection_table(report),
        "curves": list(_curves(report)),
        "cost": cost_table(report),
        "checks": checks_table(report),
        "learning_curves": TrainingHistory(report.training).png() if report.training else b"",
        "setting_tables": _setting_tables(report),
    }


def _sections(report: EvalReport) -> list[tuple[str, str, bool]]:
    """Return the sections that have something to show: name of the template, title, and whether it is folded."""
    sections = (
        ("accuracy", "In short", False, True),
        ("samples", "Examples", False, bool(report.samples)),
        ("detector", "Detector", False, True),
        ("attackers", "Every attacker", True, True),
        ("branches", "Branches", True, bool(report.benign_branches)),
        ("confidence", "Confidence", True, bool(report.attacks)),
        ("cost", "Cost", True, bool(report.attacks)),
        ("training", "Training", True, bool(report.training)),
        ("checks", "Sanity checks", True, bool(report.checks)),
        ("settings", "Settings and provenance", True, True),
    )
    return [(key, title, folded) for key, title, folded, shown in sections if shown]


def _histogram_groups(report: EvalReport) -> list[tuple[str, list[tuple[str, list[Panel]]]]]:
    every = [histograms for result in report.attacks for _, *histograms in _confidences(report, result)]
    top = max(chain([0.0], *map(shares, chain.from_iterable(every)))) or 1.0
    return [
        (GROUPS[group], [(result.name, _histograms(report, result, top)) for result in report.group(group)])
        for group in report.groups
    ]


def _confidences(report: EvalReport, result: AttackResult) -> Iterator[tuple[str, Sequence[int], Sequence[int]]]:
    """Yield benign and attacked confidences of the undefended model, where they are known, and of each branch."""
    bare = report.baseline
    attacks = () if bare is None else bare.attacks
    for other in attacks:
        if bare is not None and other.name == result.name:
            yield UNDEFENDED, bare.confidences["fused"], other.confidences["fused"]
    for branch, benign in report.confidences.items():
        yield branch if branch == "fused" else f"{branch} branch", benign, result.confidences[branch]


def _histograms(report: EvalReport, result: AttackResult, top: float) -> list[Panel]:
    panels = []
    for title, benign, attacked in _confidences(report, result):
        means = (mean_of_bins(counts) for counts in (benign, attacked))
        change = "mean {} benign, {} attacked".format(*("undefined" if m != m else f"{m:.2f}" for m in means))
        label = f"Confidence of the {title} under {result.name}: {change}"
        panels.append(Panel(histogram_svg(benign, attacked, top=top, label=label), title, change))
    return panels


def _score_panels(report: EvalReport) -> list[Panel]:
    """Return the detection scores of benign images beside those of the strongest attacker of each threat model."""
    if report.score_range is None:
        return []
    chosen = strongest(report)
    top = max(chain([0.0], *(shares(counts) for counts in (report.scores, *(r.scores for r in chosen))))) or 1.0
    panels = []
    for result in chosen:
        caught = "" if result.detection is None else f": {percent(result.detection.flagged.value)} flagged"
        told = f"{shorten(result.name, _NAME)}{caught}"
        drawing = histogram_svg(
            report.scores,
            result.scores,
            top=top,
            label=f"Detection score of benign images and under {told}",
            name="detection score",
            ends=report.score_range,
            threshold=report.threshold,
        )
        panels.append(Panel(drawing, SHORT[result.threat_model], told))
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
