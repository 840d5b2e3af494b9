"""The tables of a report, whatever format they are written in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..attackers import ThreatModel
from ..report import AttackResult, EvalReport, RobustRates
from ..statistics import Detection, Rate
from .table import Cell, Row, Table
from .wording import (
    DEFENDED,
    GROUPS,
    KNOWS,
    NO_ATTACK,
    SHORT,
    UNDEFENDED,
    WORST,
    WORST_OF_ALL,
    budget,
    class_name,
    counts,
    flatten,
    interval,
    percent,
    title,
)


@dataclass(frozen=True)
class Beside:
    """One line of a chart: the accuracy of the model, and that of the undefended one beside it.

    Attributes:
        name: Name of the attacker, or of several.
        told: What else is to be known of them, set smaller.
        rate: Accuracy of the model.
        undefended: Accuracy of the undefended model; None where it is not known.
        compared: Whether there is an undefended model at all.
        summary: Whether the line sums up those above it.
    """

    name: str
    told: str
    rate: Rate
    undefended: Rate | None
    compared: bool
    summary: bool = False

    @property
    def bars(self) -> list[tuple[str, Rate]]:
        """The bars to draw, the undefended model first, each with what it shows: nothing to tell apart is not named."""
        bare = [] if self.undefended is None else [(UNDEFENDED, self.undefended)]
        return [*bare, (DEFENDED if self.compared else "", self.rate)]


def overview_lines(report: EvalReport) -> list[Beside]:
    """Return benign accuracy, and the worst case of each threat model and of all attackers."""
    bare, beside = report.baseline, report.baseline is not None
    lines = [Beside(NO_ATTACK, "", report.benign_accuracy, None if bare is None else bare.benign_accuracy, beside)]
    for group in report.groups:
        count = len(report.group(group))
        told = f"{KNOWS[group]}; {'one attacker' if count == 1 else f'worst of {count} attackers'}"
        worst = report.worst[group].robust_accuracy
        lines.append(Beside(SHORT[group], told, worst, _bare_worst(report, group), beside))
    if len(report.groups) > 1:
        worst = report.worst["all"].robust_accuracy
        lines.append(Beside(WORST_OF_ALL, "", worst, _bare_worst(report, "all"), beside, summary=True))
    return lines


def group_lines(report: EvalReport, threat_model: ThreatModel) -> list[Beside]:
    """Return the accuracy under each attacker of one threat model, and under the worst of them for each image."""
    beside = report.baseline is not None
    lines = [
        Beside(title(result), "", result.rates.robust_accuracy, bare_rate(report, result.name), beside)
        for result in report.group(threat_model)
    ]
    worst = report.worst[threat_model].robust_accuracy
    return [*lines, Beside(WORST, "", worst, _bare_worst(report, threat_model), beside, summary=True)]


def bare_rate(report: EvalReport, attacker: str) -> Rate | None:
    """Return the undefended model's accuracy under an attacker; None where it is not known."""
    attacks = () if report.baseline is None else report.baseline.attacks
    return next((result.rates.robust_accuracy for result in attacks if result.name == attacker), None)


def _bare_worst(report: EvalReport, group: str) -> Rate | None:
    worst = {} if report.baseline is None else report.baseline.worst
    return worst[group].robust_accuracy if group in worst else None


def _bare_cells(report: EvalReport, rate: Rate | None) -> tuple[Cell, ...]:
    """Return the column of the undefended model, where there is one."""
    if report.baseline is None:
        return ()
    return (Cell("not run") if rate is None else rate_cell(rate),)


def _bare_columns(report: EvalReport) -> tuple[str, ...]:
    return () if report.baseline is None else (UNDEFENDED,)


def rate_cell(rate: Rate) -> Cell:
    """Return a rate with interval and counts."""
    bounds = interval(rate.interval)
    return Cell(percent(rate.value), f"{bounds}; {counts(rate)}" if bounds else counts(rate))


def overview_table(report: EvalReport) -> Table:
    """Return benign accuracy, and the worst case of each threat model and of all attackers."""
    rows = tuple(
        Row(
            f"{line.name} ({line.told})" if line.told else line.name,
            (rate_cell(line.rate), *_bare_cells(report, line.undefended)),
            line.summary,
        )
        for line in overview_lines(report)
    )
    return Table(caption="In short", columns=("under", "accuracy", *_bare_columns(report)), sections=(("", rows),))


def group_table(report: EvalReport, threat_model: ThreatModel) -> Table:
    """Return what each attacker of one threat model achieves, and all of them together."""
    results = report.group(threat_model)
    rows = [
        Row(
            title(result),
            (
                Cell(budget(result.eps, result.norm)),
                *_rates(result.rates),
                *_bare_cells(report, bare_rate(report, result.name)),
            ),
        )
        for result in results
    ]
    budgets = ", ".join(dict.fromkeys(budget(result.eps, result.norm) for result in results))
    worst = (*_rates(report.worst[threat_model]), *_bare_cells(report, _bare_worst(report, threat_model)))
    rows.append(Row(WORST, (Cell(budgets), *worst), summary=True))
    columns = "attacker", "eps", "robust accuracy", "fooling rate", "attack success rate", *_bare_columns(report)
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

    bare = report.baseline

    def line(name: str, whole: Rate, parts: dict[str, Rate], beside: Rate | None, *, summary: bool = False) -> Row:
        cells = (rate_cell(parts[branch]) if branch in parts else Cell("not measured") for branch in branches)
        return Row(name, (rate_cell(whole), *cells, *_bare_cells(report, beside)), summary)

    benign = None if bare is None else bare.benign_accuracy
    sections: list[tuple[str, tuple[Row, ...]]] = [
        ("", (line(NO_ATTACK, report.benign_accuracy, report.benign_branches, benign),))
    ]
    for group in report.groups:
        worst = report.worst[group]
        rows = [
            line(title(result), result.rates.robust_accuracy, result.rates.branches, bare_rate(report, result.name))
            for result in report.group(group)
        ]
        beside = _bare_worst(report, group)
        rows.append(line(WORST, worst.robust_accuracy, worst.branches, beside, summary=True))
        sections.append((GROUPS[group], tuple(rows)))
    columns = "attacker", "fused", *(f"{branch} branch" for branch in branches), *_bare_columns(report)
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
        return Row(title(result), (Cell("not measured"),) * 6)
    return Row(
        title(result),
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
    """Return time and passes of each attacker, what else took time, and the sum."""
    rows = [
        Row(
            title(result),
            (
                Cell(f"{result.cost.seconds:.1f} s"),
                Cell(f"{result.cost.forwards:.4g}"),
                Cell(f"{result.cost.gradients:.4g}"),
            ),
        )
        for result in report.attacks
    ]
    crafting, whole = sum(result.cost.seconds for result in report.attacks), report.provenance.get("seconds")
    if isinstance(whole, (int, float)) and whole >= crafting:
        rows.append(_time_row("Everything else: asking the model, sanity checks", whole - crafting))
        rows.append(_time_row("The whole evaluation", whole, summary=True))
    else:  # a report of an earlier version counts no time that an interrupted evaluation had spent
        rows.append(_time_row("All attackers together", crafting, summary=True))
    columns = "attacker", "time", "passes per image", "of these with gradients"
    return Table(caption="What the evaluation took", columns=columns, sections=(("", tuple(rows)),))


def _time_row(name: str, seconds: float, *, summary: bool = False) -> Row:
    return Row(name, (Cell(f"{seconds:.1f} s"), Cell(""), Cell("")), summary)


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
    if report.baseline is not None:
        facts["undefended model"] = report.baseline.model
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
