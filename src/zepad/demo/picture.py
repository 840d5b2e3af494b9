"""The demo's picture: the numbers first, then what an attack does to an image and to who classifies it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation import EvalReport
from ..evaluation.rendering.picture import accuracy_lines, draw_lines
from ..files import replacing
from ..model import ZePAD

_RIGHT, _WRONG = "#17602f", "#a3200d"


def draw(
    path: Path,
    report: EvalReport,
    defense: ZePAD,
    undefended: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacked: Mapping[str, Tensor],
    eps: float,
) -> None:
    """Write a PNG: accuracies of both models above, one example for each attack on the public encoder below.

    Args:
        path: Path of the PNG file.
        report: Report on the defense, with that on the undefended classifier as its baseline.
        defense: A fitted model.
        undefended: The undefended classifier, images `(N, 3, H, W)` in [0, 1] to logits `(N, K)`.
        images: Test images `(N, 3, H, W)` in [0, 1].
        labels: Labels of the test images, int64 `(N,)`.
        attacked: The test images under each attack, by the attack's name.
        eps: L-infinity budget in [0, 1] pixel units; perturbations are drawn from black (-eps) to white (+eps).
    """
    # The object interface of matplotlib needs neither global state nor a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    numbers, example = 3.4, 2.5  # inches
    figure = Figure(figsize=(10, numbers + example * len(attacked)), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subfigures(1 + len(attacked), 1, height_ratios=(numbers, *[example] * len(attacked)))
    above, *below = panels
    draw_lines(above.subplots(), [line for line in accuracy_lines(report) if not line.summary], images=report.images)
    above.suptitle(f"What is left under attack: {report.data}, L-infinity budget {eps * 255:.0f}/255", fontsize=12)
    for place, (panel, (name, batch)) in enumerate(zip(below, attacked.items(), strict=True)):
        panel.suptitle(f"{name}: crafted on the public victim encoder alone, without a label", fontsize=10)
        row = panel.subplots(1, 5, width_ratios=(1, 1, 1, 0.95, 1.15))
        _draw_example(row, place, defense, undefended, images, labels, batch, eps)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130)


def _draw_example(
    row: Any,
    place: int,
    defense: ZePAD,
    undefended: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacked: Tensor,
    eps: float,
) -> None:
    with torch.no_grad():
        before, after = undefended(images).argmax(1), undefended(attacked).argmax(1)
    fooled = ((before == labels) & (after != labels)).nonzero().flatten()
    # Each row shows another image that fools the undefended classifier, or any image if none does.
    chosen = int(fooled[place % len(fooled)]) if len(fooled) else place
    image, adversarial, label = images[chosen], attacked[chosen], int(labels[chosen])
    pictures = (
        (image, "clean image"),
        (((adversarial - image) / eps + 1) / 2, "perturbation, magnified"),
        (adversarial, "attacked image"),
    )
    for axis, (picture, title) in zip(row, pictures, strict=False):
        axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=9)
    clean, report = defense.inspect(image[None]), defense.inspect(adversarial[None])
    noted = "" if report.flagged is None else "flagged as attacked" if report.flagged[0] else "not flagged"
    said = (
        ("undefended says", int(before[chosen]), int(after[chosen]), ""),
        ("ZePAD says", int(clean.labels[0]), int(report.labels[0]), noted),
    )
    for axis, (who, first, second, note) in zip(row[3:], said, strict=True):
        _draw_answer(axis, who, report.name(first), report.name(second), note, right=second == label)
    for axis in row:
        axis.set_axis_off()


def _draw_answer(axis: Any, who: str, before: str, after: str, note: str, *, right: bool) -> None:
    axis.set_title(who, fontsize=9)
    place: dict[str, Any] = {"ha": "center", "va": "center", "transform": axis.transAxes}
    colour, verdict = (_RIGHT, "right") if right else (_WRONG, "wrong")
    axis.text(0.5, 0.88, f"clean: {before}", fontsize=10, **place)
    axis.text(0.5, 0.7, "attacked:", fontsize=10, **place)
    axis.text(0.5, 0.45, after, fontsize=30, weight="bold", color=colour, **place)
    axis.text(0.5, 0.2, verdict, fontsize=10, color=colour, **place)
    axis.text(0.5, 0.06, note, fontsize=10, **place)
