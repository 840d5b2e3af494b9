"""A defense behind the interface of transformers' pipelines; that library is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from .arguments import check_device, checked
from .config import require
from .data.given import Given
from .ensemble import BranchEnsemble
from .model import ZePAD

Answers = list[dict[str, Any]]
"""The likeliest classes of one image, as dicts of label, score and flagged."""


class ImageClassificationPipeline:
    """A defense that answers as the image classification pipeline of transformers does, and says what looks attacked.

    Args:
        model: A fitted defense.

    Attributes:
        model: The defense.

    Examples:
        >>> import torch
        >>> branch = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
        >>> classify = ImageClassificationPipeline(BranchEnsemble({"one": branch, "other": branch}, threshold=0.1))
        >>> [sorted(answer) for answer in classify(torch.rand(3, 2, 2), top_k=2)]
        [['flagged', 'label', 'score'], ['flagged', 'label', 'score']]
    """

    @checked
    def __init__(self, model: BranchEnsemble) -> None:
        self.model = model

    def __call__(self, images: Given, *, top_k: int | None = 5) -> Answers | list[Answers]:
        """Return the likeliest classes of one image or of several, the likeliest first.

        Args:
            images: Images as `ZePAD.predict` takes them.
            top_k: Number of classes at most; None returns all.

        Returns:
            For one image a list of `{"label", "score", "flagged"}`: the name of a class (its number as text where the
            model has no names), its probability in [0, 1], and whether the image looks attacked, which is the same for
            all classes, and None while the detector has no threshold. For several images a list of such lists.

        Raises:
            StageError: If the model is not fitted.
            ConfigError: If `top_k` is no positive integer.
            InputError: If an image cannot be read or does not fit.
        """
        require(top_k is None or (type(top_k) is int and top_k >= 1), "top_k", top_k, "a positive integer, or None")
        report = self.model.inspect(images)
        classes = report.class_probabilities.shape[1]
        found = report.class_probabilities.topk(min(top_k or classes, classes), dim=1)
        flags = [None] * len(report.labels) if report.flagged is None else report.flagged.tolist()
        answers = [
            [
                {"label": report.name(label), "score": score, "flagged": flagged}
                for label, score in zip(labels, scores, strict=True)
            ]
            for labels, scores, flagged in zip(found.indices.tolist(), found.values.tolist(), flags, strict=True)
        ]
        return answers[0] if report.single else answers


@checked
def pipeline(
    task: Literal["image-classification"],
    model: BranchEnsemble | str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ImageClassificationPipeline:
    """Return a pipeline for a task, as `transformers.pipeline` does.

    Args:
        task: The task; there is one.
        model: A fitted defense, or the folder or Hub id of a saved one.
        device: Device to put the model on; None leaves it where it is.
        dtype: Precision of the encoders of a saved model, as in `ZePAD.from_pretrained`.
        revision: Branch, tag or commit on the Hub.
        token: Access token of the Hub.

    Raises:
        ConfigError: If there is no such task, or `dtype` is given with a model that is loaded already.
        CheckpointError: If a saved model is missing, damaged or does not fit.
        HubError: If the Hub cannot deliver.
    """
    del task
    if isinstance(model, (str, Path)):
        model = ZePAD.from_pretrained(model, device=device, dtype=dtype, revision=revision, token=token)
    else:
        require(dtype is None, "dtype", dtype, "None for a model that is loaded already")
        if device is not None:
            check_device(device)
            model.to(device)
    return ImageClassificationPipeline(model)
