"""A few images per attacker, as a report shows them."""

from __future__ import annotations

import io
from collections.abc import Iterator

import torch
from torch import Tensor

from .attackers import Attacker
from .predictions import Benign, Predictions
from .report import Sample


def draw_samples(
    attacker: Attacker,
    benign: Benign,
    predictions: Predictions,
    images: Tensor,
    attacked: Tensor,
    *,
    position: int,
    count: int,
) -> Iterator[Sample]:
    """Yield the first images of a batch before and after an attack.

    Args:
        attacker: Attacker that made the images.
        benign: Predictions for all images before the attack.
        predictions: Predictions for the attacked batch.
        images: The batch before the attack, `(N, C, H, W)`.
        attacked: The batch after the attack, `(N, C, H, W)`.
        position: Index of the first image of the batch in the data.
        count: Number of samples at most.
    """
    flagged = None
    if predictions.scores is not None and benign.threshold is not None:
        flagged = predictions.scores > benign.threshold
    scale = attacker.attack.eps if attacker.attack.norm == "linf" else 1.0
    for i in range(min(count, len(images))):
        yield Sample(
            attacker=attacker.name,
            index=position + i,
            label=int(benign.labels[position + i]),
            before=int(benign.predictions.fused[position + i]),
            after=int(predictions.fused[i]),
            flagged=None if flagged is None else bool(flagged[i]),
            benign=encode_png(images[i]),
            attacked=encode_png(attacked[i]),
            perturbation=encode_png(0.5 + (attacked[i] - images[i]) / (2 * scale)),
        )


def encode_png(image: Tensor) -> bytes:
    """Return an image `(C, H, W)` in [0, 1] as a PNG file; values beyond the range are clamped."""
    from PIL import Image

    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
