"""The tables of a report, whatever format they are written in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..attackers import ThreatModel
from ..report import AttackResult, EvalReport, RobustRates
from ..statistics import Detection, Rate
from .table import Cell, Row, Table
from .wording import GROUPS, WORST, WORST_OF_ALL, budget, class_name, counted, counts, flatten, interval, percent


def rate_cell(rate: Rate) -> Cell:
    """Return a rate with interval and counts."""
    bounds = interval(rate.interval)
    return Cell(percent(rate.value), f"{bounds}; {counts(rate)}" if bounds else counts(rate))


def overview_table(report: EvalReport) -> Table:
    """Return benign accuracy, and the worst case of each threat model and of all attackers."""
    rows = [Row("No attack", (rate_cell(report.benign_accuracy),))]
    rows += [
        Row(
            f"Worst of {counted(len(report.group(group)), f'{group} attacker')} for each image",
            (rate_cell(report.worst[group].robust_accuracy),),
        )
        for group in report.groups
    ]
    if len(report.groups) > 1:
        rows.append(Row(WORST_OF_ALL, (rate_cell(report.worst["all"].robust_accuracy),), summary=True))
    return Table(caption="In short", columns=("under", "accuracy"), sections=(("", tuple(rows)),))


def group_table(report: EvalReport, threat_model: ThreatModel) -> Table:
    """Return what each attacker of one threat model achieves, and all of them together."""
    results = report.group(threat_model)
    rows = [Row(result.name, (Cell(budget(result.eps, result.norm)), *_rates(result.rates))) for result in results]
    budgets = dict.fromkeys(budget(result.eps, result.norm) for result in results)
    rows.append(Row(WORST, (Cell(", ".join(budgets)), *_rates(report.worst[threat_model])), summary=True))
    columns = "attacker", "eps", "robust accuracy", "fooling rate", "attack success rate"
    return Table(caption=GROUPS[threat_model], columns=columns, sections=(("", tuple(rows)),))


def _rates(rates: RobustRates) -> tuple[Cell, ...]:
    return (
        rate_cell(rates.robust_accuracy),
        rate_cell(rates.fooling_rate),
        rate_cell(rates.attack_success_rate),
    )


def branch_table(report: EvalReport) -> Table:
    """Return the accuracy of each branch alone, and of the model they form, with no attack and with each."""
    branches = tuple(report.benign_branches)

    def line(name: str, whole: Rate, parts: dict[str, Rate], *, summary: bool = False) -> Row:
        cells = (rate_cell(parts[branch]) if branch in parts else Cell("not measured") for branch in branches)
        return Row(name, (rate_cell(whole), *cells), summary)

    sections: list[tuple[str, tuple[Row, ...]]] = [
        ("", (line("No attack", report.benign_accuracy, report.benign_branches),))
    ]
    for group in report.groups:
        worst = report.worst[group]
        rows = [
            line(result.name, result.rates.robust_accuracy, result.rates.branches) for result in report.group(group)
        ]
        rows.append(line(WORST, worst.robust_accuracy, worst.branches, summary=True))
        sections.append((GROUPS[group], tuple(rows)))
    columns = "attacker", "fused", *(f"{branch} branch" for branch in branches)
    return Table(caption="Accuracy of each branch alone", columns=columns, sections=tuple(sections))


def detection_table(report: EvalReport) -> Table:
    """Return how well the detector tells the images of each attacker from benign ones."""
    columns = (
        "attacker",
        "AUROC",
        "AUROC, fooling images",
        "FPR at 95 % TPR",
        "accuracy at the threshold",
        "flagged",
        "evading",
    )
    sections = tuple(
        (GROUPS[group], tuple(_detection_row(result) for result in report.group(group))) for group in report.groups
    )
    return Table(caption="Detection of attacked images", columns=columns, sections=sections)


def _detection_row(result: AttackResult) -> Row:
    found = result.detection
    if found is None:
        return Row(result.name, (Cell("not measured"),) * 6)
    return Row(
        result.name,
        (
            Cell(f"{found.auroc:.3f}", "{:.3f} to {:.3f}".format(*found.auroc_interval)),
            _fooling_cell(found),
            Cell(percent(found.fpr_at_95_tpr)),
            Cell(percent(found.accuracy)),
            rate_cell(found.flagged),
            rate_cell(found.evading),
        ),
    )


def _fooling_cell(found: Detection) -> Cell:
    if found.auroc_fooling is None:
        return Cell("undefined", "no image fools")
    return Cell(f"{found.auroc_fooling:.3f}", f"of {found.fooling_images}")


def cost_table(report: EvalReport) -> Table:
    """Return time and passes of each attacker."""
    rows = tuple(
        Row(
            result.name,
            (
                Cell(f"{result.cost.seconds:.1f} s"),
                Cell(f"{result.cost.forwards:.4g}"),
                Cell(f"{result.cost.gradients:.4g}"),
            ),
        )
        for result in report.attacks
    )
    columns = "attacker", "time", "passes per image", "of these with gradients"
    return Table(caption="What crafting took", columns=columns, sections=(("", rows),))


def settings_table(result: AttackResult) -> Table:
    """Return every setting of one attacker."""
    return pairs_table(
        f"Settings of {result.name}", "setting", {"threat model": result.threat_model, **result.settings}
    )


def checks_table(report: EvalReport) -> Table:
    """Return every sanity check, passed or not."""
    rows = tuple(
        Row(check.name, (Cell("passed" if check.passed else "FAILED"), Cell(check.detail))) for check in report.checks
    )
    columns = "check", "result", "what was found"
    return Table(caption="Sanity checks of this evaluation", columns=columns, sections=(("", rows),))


def provenance_table(report: EvalReport) -> Table:
    """Return where the numbers come from."""
    facts: dict[str, Any] = {"model": report.model, "data": report.data, "images": report.images}
    if report.classes:
        names = ", ".join(class_name(report, label) for label in range(len(report.classes)))
        facts["classes"] = f"{len(report.classes)}: {names}"
    if report.threshold is not None:
        facts["threshold"] = report.threshold
    return pairs_table("Where these numbers come from", "what", {**facts, **report.provenance})


def pairs_table(caption: str, what: str, values: Mapping[str, Any]) -> Table:
    """Return names and values, nested ones by dotted names."""
    rows = tuple(Row(name, (Cell(value),)) for name, value in flatten(values).items())
    return Table(caption=caption, columns=(what, "value"), sections=(("", rows),))
