"""A report as one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ...escaping import clean
from ..report import AttackResult, EvalReport
from ..statistics import Rate
from .charts import shares
from .wording import WORST_OF_ALL, checks_sentence, heading, percent, shorten

_COLOURS = {"benign": "#8fb89a", "attack": "#7fa9d6", "worst": "#c98a5e"}
_DASHES = ("-", "--", ":")


def overview_png(report: EvalReport) -> bytes:
    """Draw accuracies with intervals, confidences per branch and ROC curves.

    Confidences and curves are those of the attacker of each threat model that leaves the least accuracy.

    Args:
        report: Report to render.

    Returns:
        A PNG file.
    """
    # The object interface of matplotlib needs neither global state nor a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = _bars(report)
    strongest = [
        min(report.group(group), key=lambda result: result.rates.robust_accuracy.value) for group in report.groups
    ]
    above, below = 1.6 + 0.3 * len(bars), 3.2 if strongest else 0.0
    figure = Figure(figsize=(11, above + below), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subfigures(2, 1, height_ratios=(above, below)) if strongest else [figure]
    _draw_bars(panels[0].subplots(), report, bars)
    panels[0].suptitle(f"{_plain(heading(report), 90)}\n{checks_sentence(report)}", fontsize=11)
    if strongest:
        _draw_details(panels[1], report, strongest)
        handles, labels = panels[1].axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _bars(report: EvalReport) -> list[tuple[str, Rate, str]]:
    bars = [("No attack", report.benign_accuracy, "benign")]
    for group in report.groups:
        bars += [(result.name, result.rates.robust_accuracy, "attack") for result in report.group(group)]
        bars.append((f"Worst {group} for each image", report.worst[group].robust_accuracy, "worst"))
    if len(report.groups) > 1:
        bars.append((WORST_OF_ALL, report.worst["all"].robust_accuracy, "worst"))
    return bars


def _draw_bars(axis: Any, report: EvalReport, bars: Sequence[tuple[str, Rate, str]]) -> None:
    for position, (_, rate, kind) in enumerate(bars):
        if rate.total:
            low, high = rate.interval
            whisker = [[max(rate.value - low, 0)], [max(high - rate.value, 0)]]
            axis.barh(position, rate.value, 0.6, color=_COLOURS[kind], xerr=whisker, error_kw={"capsize": 3})
        axis.text(1.02, position, percent(rate.value), va="center", fontsize=9)
    if report.benign_accuracy.total:
        axis.axvline(report.benign_accuracy.value, color="#555b66", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(bars)), [_plain(name, 44) for name, _, _ in bars], fontsize=9)
    axis.set(xlim=(0, 1), xlabel=f"accuracy on {report.images} images, with 95 % intervals")
    axis.xaxis.set_major_formatter(_per_cent())
    axis.invert_yaxis()


def _draw_details(panel: Any, report: EvalReport, strongest: Sequence[AttackResult]) -> None:
    curves = [result for result in strongest if result.detection is not None]
    widths = [1.0] * len(report.confidences) + [1.5] * bool(curves)
    axes = panel.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for axis, branch in zip(axes, report.confidences, strict=False):
        _draw_confidences(axis, report, branch, strongest)
        axis.sharey(axes[0])
    axes[0].set_ylabel("share of images")
    if curves:
        _draw_curves(axes[-1], curves)


def _draw_confidences(axis: Any, report: EvalReport, branch: str, strongest: Sequence[AttackResult]) -> None:
    benign = report.confidences[branch]
    edges = [i / len(benign) for i in range(len(benign) + 1)]
    axis.stairs(shares(benign), edges, fill=True, color="#c3cbd6", label="benign images")
    for result, dash in zip(strongest, _DASHES, strict=False):
        values = shares(result.confidences[branch])
        axis.stairs(values, edges, linestyle=dash, linewidth=1.5, label=_plain(result.name, 40))
    axis.set(xlabel="confidence", xlim=(0, 1))
    axis.set_title(_plain(branch if branch == "fused" else f"{branch} branch", 24), fontsize=10)
    axis.yaxis.set_major_formatter(_per_cent())


def _draw_curves(axis: Any, curves: Sequence[AttackResult]) -> None:
    for result, dash in zip(curves, _DASHES, strict=False):
        if result.detection is not None:
            x, y = zip(*result.detection.curve, strict=True)
            axis.plot(x, y, dash, label=f"{result.detection.auroc:.3f}")
    axis.plot((0, 1), (0, 1), color="#888", linewidth=0.8)
    axis.set(xlabel="benign flagged", ylabel="attacked flagged", xlim=(0, 1), ylim=(0, 1.01))
    axis.set_title("detector", fontsize=10)
    axis.legend(fontsize=8, loc="lower right", title="AUROC", title_fontsize=8)
    axis.xaxis.set_major_formatter(_per_cent())
    axis.yaxis.set_major_formatter(_per_cent())


def _per_cent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, decimals=0, symbol=" %")


def _plain(text: str, length: int) -> str:
    """Return text that matplotlib draws as it is: no formula, and no letter that its font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    drawn = "".join(c if font.get_char_index(ord(c)) else "?" for c in shorten(clean(text), length))
    return drawn.replace("$", r"\$")
