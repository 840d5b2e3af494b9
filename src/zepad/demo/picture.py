"""The demo's picture: what an attack does to an image, to each classifier, and to each branch's confidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import replacing
from ..model import ZePAD
from ..types import ROLES

_TITLES = {"universal": "universal DAE", "per_image": "per-image DAE"}


def draw(
    path: Path,
    defense: ZePAD,
    undefended: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacked: dict[str, Tensor],
    eps: float,
) -> None:
    """Write a PNG: one image per attack with its magnified perturbation above, confidences per branch below.

    Args:
        path: Path of the PNG file.
        defense: A fitted model.
        undefended: The undefended classifier, images `(N, 3, H, W)` in [0, 1] to logits `(N, K)`.
        images: Test images `(N, 3, H, W)` in [0, 1].
        labels: Labels of the test images, int64 `(N,)`.
        attacked: The test images under each attack, by name.
        eps: L-infinity budget in [0, 1] pixel units; perturbations are drawn from black (-eps) to white (+eps).
    """
    # The object interface of matplotlib needs neither global state nor a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subfigures(2, 1, height_ratios=(1.55, 1))
    above, below = panels
    rows: Any = above.subplots(len(attacked), 4, width_ratios=(1, 1, 1, 1.9))
    for which, (row, (name, batch)) in enumerate(zip(rows, attacked.items(), strict=True)):
        _draw_example(row, name, which, defense, undefended, images, labels, batch, eps)
    above.suptitle("Crafted on the public victim encoder alone, without a label", fontsize=11)
    below.suptitle("Confidence (largest probability) of each ZePAD branch on the test images", fontsize=11)
    series = {"benign": images, **attacked}
    with torch.no_grad():
        confidences = {name: defense.branch_logits(batch).softmax(-1).amax(-1) for name, batch in series.items()}
    axes: Any = below.subplots(1, len(ROLES), sharey=True)
    for axis, (index, role) in zip(axes, enumerate(ROLES), strict=True):
        for name, values in confidences.items():
            axis.hist(
                values[index].numpy(),
                bins=20,
                range=(0, 1),
                histtype="step",
                linewidth=1.6,
                label=_TITLES.get(name, "benign images"),
            )
        axis.set(title=f"{role} branch", xlabel="confidence", yscale="log")
    below.axes[0].set_ylabel("images")
    below.axes[0].legend(fontsize=8, loc="upper left")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130)


def _draw_example(
    row: Any,
    name: str,
    which: int,
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
    chosen = int(fooled[which % len(fooled)]) if len(fooled) else which
    image, adversarial = images[chosen], attacked[chosen]
    perturbation = ((adversarial - image) / eps + 1) / 2
    shown = (
        (image, "clean image"),
        (perturbation, f"perturbation, ±{eps * 255:.0f}/255 as black/white"),
        (adversarial, f"under the {_TITLES[name]}"),
    )
    for axis, (picture, title) in zip(row, shown, strict=False):
        axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=8)
        axis.set_axis_off()
    report = defense.inspect(adversarial[None])
    lines = [
        f"true class   {int(labels[chosen])}",
        f"undefended   {int(before[chosen])} -> {int(after[chosen])}",
        f"ZePAD        {report.name(int(report.labels[0]))}  ({report.probabilities[0]:.0%})",
        "",
        *(
            f"  {role:<10} {report.name(int(report.branch_labels[b, 0]))}  p {report.branch_probabilities[b, 0]:.2f}"
            + ("" if report.weights is None else f"  weight {report.weights[b, 0]:.2f}")
            for b, role in enumerate(report.names)
        ),
        "",
    ]
    if report.scores is not None and report.flagged is not None:
        verdict = "flagged" if report.flagged[0] else "not flagged"
        lines.append(f"detection score {report.scores[0]:+.2f} ({verdict} at {report.threshold:.2f})")
    row[-1].text(0, 0.5, "\n".join(lines), family="monospace", fontsize=8.5, va="center", transform=row[-1].transAxes)
    row[-1].set_axis_off()
