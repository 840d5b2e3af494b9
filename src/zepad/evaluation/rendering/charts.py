"""Small drawings as SVG text. They add no fact: what they show stands beside them in words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ...escaping import escape_html
from ..statistics import Rate

_WIDTH, _HEIGHT = 160.0, 90.0
_SIDE = 150.0
_PAD = 14.0


def bar_svg(rate: Rate, *, kind: str) -> str:
    """Return a bar from 0 to 100 % across the width it is given, its 95 % interval as a whisker.

    Args:
        rate: The rate that the bar shows.
        kind: Class of the bar: `"undefended"` or `"defended"`.
    """
    parts = ['<rect class="track" width="100%" height="20"/>']
    if rate.total:
        low, high = rate.interval
        parts += [
            f'<rect class="{kind}" y="3" width="{_share(rate.value)}" height="14"/>',
            _line("whisker", (_share(low), "10"), (_share(high), "10")),
            *(_line("whisker", (_share(end), "6"), (_share(end), "14")) for end in (low, high)),
        ]
    return f'<svg class="bar" width="100%" height="20" aria-hidden="true">{"".join(parts)}</svg>'


def histogram_svg(
    benign: Sequence[int],
    attacked: Sequence[int],
    *,
    top: float,
    label: str,
    name: str = "confidence",
    ends: tuple[float, float] = (0.0, 1.0),
    threshold: float | None = None,
) -> str:
    """Return two histograms: benign images as an area, attacked images as a line.

    Args:
        benign: Counts of benign images in equal bins.
        attacked: Counts of attacked images in the same bins.
        top: Share of images at the upper edge, so that neighbouring drawings can be compared.
        label: Description of the drawing in words.
        name: Name of the quantity that is counted.
        ends: Values at the left and right edge.
        threshold: Value marked by a dashed line; None for none.
    """
    area, line = _steps(shares(benign), top), _steps(shares(attacked), top)
    floor = _HEIGHT - _PAD
    body = (
        f'<line class="axis" x1="0" y1="{floor:g}" x2="{_WIDTH:g}" y2="{floor:g}"/>'
        f'<path class="area" d="M0 {floor:g}L{area}L{_WIDTH:g} {floor:g}Z"/><path class="line" d="M{line}"/>'
        + _tick(0, _HEIGHT - 3, f"{ends[0]:.3g}", "start")
        + _tick(_WIDTH / 2, _HEIGHT - 3, name, "middle")
        + _tick(_WIDTH, _HEIGHT - 3, f"{ends[1]:.3g}", "end")
    )
    if threshold is not None:
        x = f"{_WIDTH * (threshold - ends[0]) / (ends[1] - ends[0]):.4g}"
        body += _line("threshold", (x, "0"), (x, f"{floor:g}"))
    return _drawing(_WIDTH, _HEIGHT, label, body)


def roc_svg(curve: Sequence[tuple[float, float]], *, threshold: tuple[float, float] | None, label: str) -> str:
    """Return an ROC curve, with the diagonal of chance and a ring where the fixed threshold stands.

    Args:
        curve: Points as (false positive rate, true positive rate).
        threshold: The point of the fixed threshold; None for no ring.
        label: Description of the drawing in words.
    """
    points = "L".join(f"{_PAD + x * _SIDE:.4g} {(1 - y) * _SIDE:.4g}" for x, y in curve)
    ring = ""
    if threshold is not None:
        x, y = threshold
        ring = f'<circle class="ring" cx="{_PAD + x * _SIDE:.4g}" cy="{(1 - y) * _SIDE:.4g}" r="5"/>'
    body = (
        f'<rect class="frame" x="{_PAD:g}" width="{_SIDE:g}" height="{_SIDE:g}"/>'
        f'<line class="chance" x1="{_PAD:g}" y1="{_SIDE:g}" x2="{_PAD + _SIDE:g}" y2="0"/>'
        f'<path class="line" d="M{points}"/>{ring}'
        + _tick(_PAD + _SIDE / 2, _SIDE + 11, "benign flagged", "middle")
        + f'<text class="tick" transform="translate(10 {_SIDE / 2:g}) rotate(-90)" text-anchor="middle">'
        "attacked flagged</text>"
    )
    return _drawing(_SIDE + _PAD + 7, _SIDE + _PAD, label, body, above=7)  # the ring may stand in a corner


def shares(counts: Sequence[int]) -> list[float]:
    """Return counts as shares of their sum, zeros where nothing was counted."""
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def mean_of_bins(counts: Sequence[int]) -> float:
    """Return the mean of values in [0, 1] known by equal bins alone; `nan` where nothing was counted."""
    total = sum(counts)
    return sum((i + 0.5) / len(counts) * count for i, count in enumerate(counts)) / total if total else float("nan")


def _steps(heights: Sequence[float], top: float) -> str:
    floor = _HEIGHT - _PAD
    levels = [f"{floor - (floor - 4) * min(height / top, 1):.4g}" for height in heights]
    edges = [f"{_WIDTH * i / len(heights):.4g}" for i in range(len(heights) + 1)]
    return "L".join(f"{left} {y}L{right} {y}" for (left, right), y in zip(pairwise(edges), levels, strict=True))


def _drawing(width: float, height: float, label: str, body: str, *, above: float = 0) -> str:
    box = f"0 {-above:g} {width:g} {height + above:g}"
    opening = f'<svg viewBox="{box}" role="img" aria-label="{escape_html(label)}">'
    return f"{opening}{body}</svg>"


def _tick(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>'


def _line(kind: str, start: tuple[str, str], end: tuple[str, str]) -> str:
    return f'<line class="{kind}" x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}"/>'


def _share(value: float) -> str:
    return f"{100 * value:.2f}%"
