"""Several models side by side, measured on the same data under the same attackers."""

from __future__ import annotations

from collections.abc import Sequence

from ...arguments import checked
from ...escaping import clean, escape_markdown
from ..attackers import ThreatModel
from ..comparable import check_comparable
from ..report import AttackResult, EvalReport
from .content import pairs_table, rate_cell
from .markdown import warning_block
from .table import Cell, Row, Table, markdown_table
from .templating import render
from .wording import GROUPS, WORST, WORST_OF_ALL, budget, checks_sentence, counted, explanation, title

INTERVALS = "Ranges are 95 % Wilson intervals. A difference within them may be chance."


@checked
def comparison_markdown(reports: Sequence[EvalReport]) -> str:
    """Return models side by side as GitHub's Markdown.

    Args:
        reports: Reports on models evaluated on the same data under the same attackers; a white box may attack more of
            an ensemble than of a plain classifier.

    Returns:
        One table with a column per model: accuracy with no attack, under each attacker, and the worst case per image.

    Raises:
        InputError: If there is no report, two models share a name, or data, attackers on public encoders or budgets of
            attackers on the model itself differ; the error says which.
    """
    check_comparable(reports)
    blocks = [f"# {escape_markdown(_heading(reports))}", INTERVALS]
    blocks += [f"**{escape_markdown(report.model)}**\n\n{warning_block(report)}" for report in reports]
    blocks += [markdown_table(comparison_table(reports)), "\n".join(f"* {said}" for said in _explanations(reports))]
    blocks.append(markdown_table(_provenance(reports)))
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


@checked
def comparison_html(reports: Sequence[EvalReport]) -> str:
    """Return models side by side as one self-contained HTML page.

    Args:
        reports: Reports on models evaluated on the same data under the same attackers.

    Raises:
        InputError: If there is no report, two models share a name, or data, attackers on public encoders or budgets of
            attackers on the model itself differ; the error says which.
    """
    check_comparable(reports)
    return render(
        "comparison.html",
        title=_heading(reports),
        warnings=[(report, f"{report.model}: {checks_sentence(report)}") for report in reports],
        intervals=INTERVALS,
        table=comparison_table(reports),
        explanations=_explanations(reports),
        provenance=_provenance(reports),
    )


@checked
def comparison_table(reports: Sequence[EvalReport]) -> Table:
    """Return accuracy by attacker (rows) and model (columns), with the worst case of each threat model and of all."""
    first = reports[0]
    by_name = [{result.name: result for result in report.attacks} for report in reports]
    sections: list[tuple[str, tuple[Row, ...]]] = [
        ("", (Row("No attack", tuple(rate_cell(report.benign_accuracy) for report in reports)),))
    ]
    for group in _groups(reports):
        # A white box attacks what there is: an ensemble has branches and a detector to aim at, a classifier has not.
        shown = {result.name: result for report in reports for result in report.group(group)}
        rows = [
            Row(
                f"{title(result)} (eps {budget(result.eps, result.norm)})",
                tuple(_robust_cell(results.get(result.name)) for results in by_name),
            )
            for result in shown.values()
        ]
        rows.append(_worst_row(WORST, reports, group))
        sections.append((GROUPS[group], tuple(rows)))
    if len(_groups(reports)) > 1:
        sections.append(("All attackers", (_worst_row(WORST_OF_ALL, reports, "all"),)))
    columns = "attacker", *(report.model for report in reports)
    caption = f"Accuracy on {first.data}, {counted(first.images, 'image')}"
    return Table(caption=caption, columns=columns, sections=tuple(sections))


def _robust_cell(result: AttackResult | None) -> Cell:
    return Cell("not run") if result is None else rate_cell(result.rates.robust_accuracy)


def _worst_row(title: str, reports: Sequence[EvalReport], group: str) -> Row:
    worst = (report.worst.get(group) for report in reports)
    cells = tuple(Cell("not run") if rates is None else rate_cell(rates.robust_accuracy) for rates in worst)
    return Row(title, cells, summary=True)


def _groups(reports: Sequence[EvalReport]) -> list[ThreatModel]:
    """Return the threat models under which at least one of the models was attacked, the least knowing first."""
    return [group for group in GROUPS if any(group in report.groups for report in reports)]


def _heading(reports: Sequence[EvalReport]) -> str:
    return clean(f"Robustness on {reports[0].data}: {', '.join(report.model for report in reports)}")


def _explanations(reports: Sequence[EvalReport]) -> list[str]:
    return [f"{GROUPS[group]}: {explanation(reports, group)}" for group in _groups(reports)]


def _provenance(reports: Sequence[EvalReport]) -> Table:
    facts: dict[str, str] = {}
    for report in reports:
        facts |= {f"{report.model}: {key}": value for key, value in report.provenance.items()}
    return pairs_table("Where these numbers come from", "what", facts)
