"""A report as one web page that needs nothing else: no script, no font, no request."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.resources import files
from itertools import chain, zip_longest

from ..report import AttackResult, EvalReport, Sample
from ..statistics import Rate
from .charts import bar_svg, histogram_svg, mean_of_bins, roc_svg, shares
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
from .table import escape_html, html_table
from .wording import (
    DETECTION_TERMS,
    EXPLANATIONS,
    GROUPS,
    INTERVALS,
    TERMS,
    WORST,
    WORST_OF_ALL,
    budget,
    checks_sentence,
    counted,
    heading,
    interval,
    percent,
    sample_verdict,
    threshold_sentence,
    verdict_clauses,
    verdict_subject,
)

_PAGE_BYTES = 2_900_000  # a page stays under 3 MB: samples get what the rest leaves


def html_page(report: EvalReport) -> str:
    """Return the report as one self-contained HTML page.

    Args:
        report: What was found. Names and settings in it are escaped.

    Returns:
        The page: under 3 MB, readable on a phone, in the dark and in print. Sample pictures beyond that size are left
        out, the first ones of every attacker last, and the page says so.
    """
    sections = {
        "accuracy": ("Accuracy", _accuracy(report)),
        "attackers": ("Attackers", _attackers(report)),
        "branches": ("Branches", _branches(report)),
        "confidence": ("Confidence", _confidence(report)),
        "detector": ("Detector", _detector(report)),
        "samples": ("Samples", ""),
        "cost": ("Cost", html_table(cost_table(report)) if report.attacks else ""),
        "checks": ("Sanity checks", html_table(checks_table(report)) if report.checks else ""),
        "settings": ("Settings and provenance", _settings(report)),
    }
    room = _PAGE_BYTES - sum(len(body.encode()) for _, body in sections.values())
    sections["samples"] = "Samples", _samples(report, room)
    shown = [(key, title, body) for key, (title, body) in sections.items() if body]
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in shown)
    body = (
        f"<header>\n<h1>{escape_html(heading(report))}</h1>\n"
        f'<p class="verdict">{_verdict(report)}</p>\n{warning_box(report)}</header>\n'
        f'<nav aria-label="Sections">\n<ul>{links}</ul>\n</nav>\n<main>\n'
        + "".join(f'<section id="{key}">\n<h2>{title}</h2>\n{inner}</section>\n' for key, title, inner in shown)
        + "</main>\n"
    )
    return document(heading(report), body)


def document(title: str, body: str) -> str:
    """Return a page around a body that is HTML already.

    Args:
        title: Plain text.
        body: HTML of header and main.
    """
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape_html(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n{body}'
        "<footer>\n<p>Written by zepad. Nothing on this page is loaded from elsewhere.</p>\n</footer>\n"
        "</body>\n</html>\n"
    )


def warning_box(report: EvalReport, *, about: str = "") -> str:
    """Return how the sanity checks went: a box where one failed, or none was run.

    Args:
        report: What was found.
        about: Name of the model, where several share a page.
    """
    said = escape_html((f"{about}: " if about else "") + checks_sentence(report))
    if report.checks and not report.warnings:
        return f'<p class="passed">{said}</p>\n'
    listed = "".join(
        f"<li><strong>{escape_html(check.name)}</strong>: {escape_html(check.detail)}</li>\n"
        for check in report.warnings
    )
    held = f"<ul>\n{listed}</ul>\n" if listed else ""
    return f'<div class="warning">\n<p><strong>Warning.</strong> {said}</p>\n{held}</div>\n'


def _verdict(report: EvalReport) -> str:
    clauses = (
        f"<strong>{escape_html(number)}</strong> {escape_html(told)}" if number else escape_html(told)
        for number, told in verdict_clauses(report)
    )
    return f"{escape_html(verdict_subject(report))} {'; '.join(clauses)}."


def _accuracy(report: EvalReport) -> str:
    benign = report.benign_accuracy
    blocks = [("Without an attack", [_bar("No attack", benign, benign, "benign")])]
    for threat_model in report.groups:
        bars = [
            _bar(result.name, result.rates.robust_accuracy, benign, "attack") for result in report.group(threat_model)
        ]
        bars.append(_bar(WORST, report.worst[threat_model].robust_accuracy, benign, "worst"))
        blocks.append((GROUPS[threat_model], bars))
    if len(report.groups) > 1:
        blocks.append(("All attackers", [_bar(WORST_OF_ALL, report.worst["all"].robust_accuracy, benign, "worst")]))
    drawn = "".join(f'<h4>{title}</h4>\n<ul class="bars">\n{"".join(bars)}</ul>\n' for title, bars in blocks)
    return (
        html_table(overview_table(report))
        + f"<p>{INTERVALS}</p>\n<h3>Accuracy under each attacker</h3>\n"
        + "<p>Bars run from 0 to 100 %. The whisker at the end of a bar spans its 95 % interval; the dashed line marks "
        "the accuracy without an attack.</p>\n" + drawn
    )


def _bar(name: str, rate: Rate, benign: Rate, kind: str) -> str:
    bounds = interval(rate.interval)
    note = f" <small>{bounds}</small>" if bounds else ""
    return (
        f'<li class="{kind}-row"><span class="name">{escape_html(name)}</span>'
        f'<span class="value">{percent(rate.value)}{note}</span>'
        f"{bar_svg(rate, reference=benign.value, kind=kind)}</li>\n"
    )


def _attackers(report: EvalReport) -> str:
    if not report.attacks:
        return "<p>No attack was run: this report says nothing about robustness.</p>\n"
    return _terms(TERMS) + "".join(
        f"<h3>{GROUPS[threat_model]}</h3>\n<p>{EXPLANATIONS[threat_model]}</p>\n{html_table(group_table(report, threat_model))}"
        for threat_model in report.groups
    )


def _terms(terms: dict[str, str]) -> str:
    entries = "".join(f"<div><dt>{term}</dt><dd>{said}</dd></div>\n" for term, said in terms.items())
    return f"<dl>\n{entries}</dl>\n"


def _branches(report: EvalReport) -> str:
    if not report.benign_branches:
        return ""
    told = "<p>What each branch would say alone of the same images, beside the decision they are fused into.</p>\n"
    return told + html_table(branch_table(report))


def _confidence(report: EvalReport) -> str:
    if not report.attacks:
        return ""
    told = (
        "<p>How sure the model is: largest probability it gives, from 0 to 1, by share of images. "
        "The filled area is benign images, the line attacked ones; below each drawing is the mean of both. "
        "All drawings share one vertical scale.</p>\n"
    )
    every = chain.from_iterable(h.values() for h in (report.confidences, *(r.confidences for r in report.attacks)))
    top = max(chain([0.0], *map(shares, every))) or 1.0
    return told + "".join(
        f"<h3>{GROUPS[threat_model]}</h3>\n"
        + "".join(_histograms(report, result, top) for result in report.group(threat_model))
        for threat_model in report.groups
    )


def _histograms(report: EvalReport, result: AttackResult, top: float) -> str:
    panels = []
    for branch, benign in report.confidences.items():
        attacked = result.confidences[branch]
        title = branch if branch == "fused" else f"{branch} branch"
        means = (mean_of_bins(counts) for counts in (benign, attacked))
        change = "mean {} benign, {} attacked".format(*("undefined" if m != m else f"{m:.2f}" for m in means))
        label = f"Confidence of the {title} under {result.name}: {change}"
        panels.append(_panel(histogram_svg(benign, attacked, top=top, label=label), title, change))
    return f'<h4>{escape_html(result.name)}</h4>\n<div class="panels">\n{"".join(panels)}</div>\n'


def _panel(drawing: str, title: str, told: str) -> str:
    return (
        f'<figure class="panel">{drawing}<figcaption><strong>{escape_html(title)}</strong> {escape_html(told)}'
        "</figcaption></figure>\n"
    )


def _detector(report: EvalReport) -> str:
    if report.threshold is None:
        return "<p>This model has no detector.</p>\n"
    sentence = f"<p>{escape_html(threshold_sentence(report.threshold, report.false_positive_rate))}</p>\n"
    if not report.attacks:
        return sentence
    curves = "".join(_roc(report, result) for result in report.attacks)
    return (
        sentence
        + _terms(DETECTION_TERMS)
        + html_table(detection_table(report))
        + "<h3>ROC curve against each attacker</h3>\n<p>Attacked images flagged, over benign images flagged, as the "
        "threshold falls. The dashed diagonal is chance, the ring the fixed threshold.</p>\n"
        + f'<div class="panels">\n{curves}</div>\n'
    )


def _roc(report: EvalReport, result: AttackResult) -> str:
    found = result.detection
    if found is None:
        return ""
    ring = None if report.false_positive_rate is None else (report.false_positive_rate.value, found.flagged.value)
    told = f"AUROC {found.auroc:.3f}"
    drawing = roc_svg(found.curve, threshold=ring, label=f"ROC curve of the detector under {result.name}: {told}")
    return _panel(drawing, result.name, told)


def _samples(report: EvalReport, room: int) -> str:
    if not report.samples:
        return ""
    figures = _within(report, room)
    left_out = len(report.samples) - sum(map(len, figures.values()))
    told = "<p>The first images of the data, not chosen. Perturbations are magnified: grey is no change.</p>\n"
    if left_out:
        told += f"<p>{counted(left_out, 'more sample')} would not fit on this page; report.json has them.</p>\n"
    return told + "".join(
        f"<h3>{escape_html(result.name)}</h3>\n"
        f"<p>{GROUPS[result.threat_model].removesuffix('s')}, eps {budget(result.eps, result.norm)}.</p>\n"
        f'<div class="samples">\n{"".join(figures[result.name])}</div>\n'
        for result in report.attacks
        if figures.get(result.name)
    )


def _within(report: EvalReport, room: int) -> dict[str, list[str]]:
    """Return the samples of each attacker that fit: the first of every attacker before the second of any."""
    by_attacker = ([s for s in report.samples if s.attacker == result.name] for result in report.attacks)
    figures: dict[str, list[str]] = {}
    for sample in chain.from_iterable(zip_longest(*by_attacker)):
        if sample is not None:
            figure = _sample(report, sample)
            room -= len(figure.encode())
            if room < 0:
                break
            figures.setdefault(sample.attacker, []).append(figure)
    return figures


def _sample(report: EvalReport, sample: Sample) -> str:
    pictures = "".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}" '
        f'alt="{escape_html(f"{alt}, image {sample.index} under {sample.attacker}")}">'
        f"<figcaption>{title}</figcaption></figure>"
        for title, alt, png in (
            ("benign", "Benign image", sample.benign),
            ("perturbation", "Magnified perturbation", sample.perturbation),
            ("attacked", "Attacked image", sample.attacked),
        )
    )
    said = f"Image {sample.index}. {sample_verdict(report, sample)}"
    return (
        f'<figure class="sample"><div class="pictures">{pictures}</div>'
        f"<figcaption>{escape_html(said)}</figcaption></figure>\n"
    )


def _settings(report: EvalReport) -> str:
    parts: Sequence[tuple[str, str]] = [
        *((f"Settings of {result.name}", html_table(settings_table(result))) for result in report.attacks),
        ("Where these numbers come from", html_table(provenance_table(report))),
    ]
    return "".join(f"<details>\n<summary>{escape_html(title)}</summary>\n{held}</details>\n" for title, held in parts)
