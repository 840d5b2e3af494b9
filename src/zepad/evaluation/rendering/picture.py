"""A report as one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from ...escaping import clean
from ..report import AttackResult, EvalReport
from ..statistics import Rate
from .charts import shares
from .content import Beside, group_lines, overview_lines
from .wording import DEFENDED, UNDEFENDED, checks_sentence, heading, percent, shorten, strongest

_COLOURS = {UNDEFENDED: "#d79a72", DEFENDED: "#5b93cf"}
_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
_ROOM = 1.08  # of the largest value, so that no peak touches the frame


def overview_png(report: EvalReport) -> bytes:
    """Draw accuracies with intervals, the undefended model's beside them, then detection scores and confidences.

    Scores, curves and confidences are those of the attacker of each threat model that leaves the least accuracy.

    Args:
        report: Report to render.

    Returns:
        A PNG file.
    """
    # The object interface of matplotlib needs neither global state nor a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines, chosen = accuracy_lines(report), strongest(report)
    bars = sum(len(line.bars) for line in lines)
    above, below = 1.6 + 0.08 * len(lines) + 0.21 * bars, 3.2 if chosen else 0.0
    figure = Figure(figsize=(11, above + below), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subfigures(2, 1, height_ratios=(above, below)) if chosen else [figure]
    draw_lines(panels[0].subplots(), lines, images=report.images)
    panels[0].suptitle(f"{drawable(heading(report), 90)}\n{checks_sentence(report)}", fontsize=11)
    if chosen:
        _draw_details(panels[1], report, chosen)
        handles, labels = panels[1].axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def accuracy_lines(report: EvalReport) -> list[Beside]:
    """Return the lines of the chart: no attack, every attacker, and the worst of each threat model and of all."""
    first, *worst = overview_lines(report)
    lines = [first]
    for group in report.groups:
        summary = worst.pop(0)
        alone = len(report.group(group)) == 1
        lines += [line for line in group_lines(report, group) if not line.summary]
        lines += [] if alone else [replace(summary, name=f"Worst of these: {summary.name}", summary=True)]
    return lines + worst


def draw_lines(axis: Any, lines: Sequence[Beside], *, images: int) -> None:
    """Draw one bar for each accuracy, each with its interval and number; the undefended model's above the defense's.

    Args:
        axis: Axes of matplotlib.
        lines: Names and accuracies, from the top.
        images: Number of images that were classified.
    """
    ticks: list[float] = []
    position = 0.0
    for line in lines:
        start = position
        for shown, rate in line.bars:
            _draw_bar(axis, position, rate, shown)
            position += 1
        ticks.append((start + position - 1) / 2)
        position += 0.5
    axis.set_yticks(ticks, [drawable(line.name, 48) for line in lines], fontsize=9)
    for tick, line in zip(axis.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if line.summary else "normal")
    axis.set(xlim=(0, 1), ylim=(position - 0.5, -1), xlabel=f"accuracy on {images} images, with 95 % intervals")
    axis.xaxis.set_major_formatter(_per_cent())


def _draw_bar(axis: Any, position: float, rate: Rate, shown: str) -> None:
    if rate.total:
        low, high = rate.interval
        whisker = [[max(rate.value - low, 0)], [max(high - rate.value, 0)]]
        colour = _COLOURS[shown or DEFENDED]
        axis.barh(position, rate.value, 0.9, color=colour, xerr=whisker, error_kw={"capsize": 2, "elinewidth": 1})
    axis.text(1.015, position, f"{percent(rate.value)} {shown}".rstrip(), va="center", fontsize=8)


def _draw_details(panel: Any, report: EvalReport, chosen: Sequence[AttackResult]) -> None:
    curves = [result for result in chosen if result.detection is not None]
    bare = None if report.baseline is None else report.baseline
    known = {} if bare is None else {result.name: result for result in bare.attacks}
    count = 1 + bool(report.scores) + bool(curves) + (bare is not None)
    axes = iter(panel.subplots(1, count, squeeze=False)[0])
    if report.score_range is not None and report.scores:
        shown = [(result, result.scores) for result in chosen]
        axis = next(axes)
        draw_histograms(axis, report.scores, shown, report.score_range, "detection score")
        if report.threshold is not None:
            axis.axvline(report.threshold, color="#9a3412", linestyle="--", linewidth=1)
            axis.annotate(
                "threshold", (report.threshold, 1), xycoords=("data", "axes fraction"), fontsize=7,
                xytext=(2, -8), textcoords="offset points", color="#9a3412",
            )  # fmt: skip
        axis.set_title("how suspicious", fontsize=10)
    fused = [(result, result.confidences["fused"]) for result in chosen]
    axis = next(axes)
    draw_histograms(axis, report.confidences["fused"], fused, (0, 1), "confidence")
    axis.set_title("confidence" if bare is None else f"confidence, {DEFENDED}", fontsize=10)
    if bare is not None:
        found = [(result, known[result.name].confidences["fused"]) for result in chosen if result.name in known]
        axis = next(axes)
        draw_histograms(axis, bare.confidences["fused"], found, (0, 1), "confidence")
        axis.set_title(f"confidence, {UNDEFENDED}", fontsize=10)
    if curves:
        _draw_curves(next(axes), chosen)


def draw_histograms(
    axis: Any,
    benign: Sequence[int],
    attacked: Sequence[tuple[AttackResult, Sequence[int]]],
    ends: tuple[float, float],
    name: str,
) -> None:
    """Draw the histogram of benign images as an area, and those of attacked images as lines, all within the frame.

    Args:
        axis: Axes of matplotlib.
        benign: Counts of benign images in equal bins.
        attacked: Attackers, each with counts of its images in the same bins.
        ends: Values at the left and right edge.
        name: Name of the quantity that is counted.
    """
    low, high = ends
    edges = [low + (high - low) * i / len(benign) for i in range(len(benign) + 1)]
    axis.stairs(shares(benign), edges, fill=True, color="#c3cbd6", label="benign images")
    for (result, counts), dash in zip(attacked, _DASHES, strict=False):
        axis.stairs(shares(counts), edges, linestyle=dash, linewidth=1.5, label=drawable(result.name, 40))
    top = max(chain([0.0], shares(benign), *(shares(counts) for _, counts in attacked))) or 1.0
    axis.set(xlabel=name, xlim=(low, high), ylim=(0, _ROOM * top), ylabel="share of images")
    axis.yaxis.set_major_formatter(_per_cent())


def _draw_curves(axis: Any, chosen: Sequence[AttackResult]) -> None:
    for result, dash in zip(chosen, _DASHES, strict=False):
        if result.detection is not None:
            x, y = zip(*result.detection.curve, strict=True)
            axis.plot(x, y, linestyle=dash, label=f"{result.detection.auroc:.3f}", clip_on=False)
    axis.plot((0, 1), (0, 1), color="#888", linewidth=0.8)
    axis.set(xlabel="benign flagged", ylabel="attacked flagged", xlim=(0, 1), ylim=(0, 1))
    axis.set_title("detector", fontsize=10)
    axis.legend(fontsize=8, loc="lower right", title="AUROC", title_fontsize=8)
    axis.xaxis.set_major_formatter(_per_cent())
    axis.yaxis.set_major_formatter(_per_cent())


def _per_cent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, decimals=0, symbol=" %")


def drawable(text: str, length: int) -> str:
    """Return text that matplotlib draws as it is: no formula, and no letter that its font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    drawn = "".join(c if font.get_char_index(ord(c)) else "?" for c in shorten(clean(text), length))
    return drawn.replace("$", r"\$")
