"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from ...escaping import escape_markdown
from ..report import EvalReport
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
from .table import markdown_table
from .wording import (
    DETECTION_TERMS,
    GROUPS,
    INTERVALS,
    TERMS,
    checks_sentence,
    explanation,
    heading,
    threshold_sentence,
    verdict,
)


def markdown_tables(report: EvalReport) -> str:
    """Return the verdict, the warnings and every table as GitHub's Markdown.

    Args:
        report: Report to render.

    Returns:
        A page. Names are escaped: none of them is taken for markup.
    """
    blocks = [f"# {escape_markdown(heading(report))}", escape_markdown(verdict(report)), warning_block(report)]
    blocks += [markdown_table(overview_table(report)), INTERVALS]
    if report.attacks:
        blocks.append(_terms(TERMS))
    for group in report.groups:
        blocks += [
            f"## {GROUPS[group]}",
            escape_markdown(explanation([report], group)),
            markdown_table(group_table(report, group)),
        ]
    if report.benign_branches:
        blocks += ["## Branches", markdown_table(branch_table(report))]
    if report.threshold is not None:
        sentence = threshold_sentence(report.threshold, report.false_positive_rate)
        blocks += ["## Detector", escape_markdown(sentence)]
        if report.attacks:
            blocks += [_terms(DETECTION_TERMS), markdown_table(detection_table(report))]
    if report.attacks:
        blocks += ["## Cost", markdown_table(cost_table(report))]
    if report.checks:
        blocks += ["## Sanity checks", markdown_table(checks_table(report))]
    blocks += ["## Settings", *(markdown_table(settings_table(result)) for result in report.attacks)]
    blocks.append(markdown_table(provenance_table(report)))
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def _terms(terms: Mapping[str, str]) -> str:
    return "\n".join(f"* **{term}**: {said}" for term, said in terms.items())


def warning_block(report: EvalReport) -> str:
    """Return how the sanity checks went, as a quotation that stands out where one failed."""
    if not report.warnings:
        return checks_sentence(report)
    failed = "\n".join(f"> * {escape_markdown(f'{check.name}: {check.detail}')}" for check in report.warnings)
    return f"> **{checks_sentence(report)}**\n>\n{failed}"
