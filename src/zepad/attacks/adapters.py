"""Adapters of a model to the attacks of ART and Foolbox."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..config import require
from ..errors import ConfigError
from ..modes import evaluating
from ..types import ImageModel


class _Guest(nn.Module):
    """Wrapper of a model that keeps its training flags, device and parameter gradients out of reach.

    ART and Foolbox set modes, move modules and accumulate gradients in parameters. The wrapper has no submodule and no
    parameter, and calls the model in evaluation mode with gradients of the images alone.
    """

    def __init__(self, model: ImageModel) -> None:
        super().__init__()
        self._hidden = (model,)  # a tuple hides a module from its parent
        tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        self.device = tensors[0].device if tensors else None
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        (model,) = self._hidden
        with evaluating(model), _without_parameter_gradients(model):
            return model(images.to(self.device)).to(images.device)


@contextmanager
def _without_parameter_gradients(model: ImageModel) -> Iterator[None]:
    parameters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_()


@checked
def art_classifier(model: ImageModel, *, num_classes: int, image_shape: tuple[int, int, int]) -> Any:
    """Return a classifier of the Adversarial Robustness Toolbox (ART), for any of its evasion attacks.

    Pixels lie in [0, 1], the loss is the cross-entropy, and ART works on NumPy arrays. The model is not copied and
    keeps its device, modes, parameters and gradients. ART sees none of them, so attacks that need access to layers are
    not supported. A plain function is called on the CPU.

    Args:
        model: Map from images to logits `(N, K)`.
        num_classes: Number `K` of classes, at least 2.
        image_shape: Shape `(C, H, W)` of the images.

    Returns:
        An `art.estimators.classification.PyTorchClassifier`.

    Raises:
        ConfigError: If ART is not installed, or an argument is out of range.

    References:
        https://github.com/Trusted-AI/adversarial-robustness-toolbox
    """
    try:
        from art.estimators.classification import PyTorchClassifier
    except ImportError as error:
        raise ConfigError(
            "the Adversarial Robustness Toolbox is not installed. Install it with: pip install 'zepad[art]'."
        ) from error
    require(num_classes >= 2, "num_classes", num_classes, "at least 2")
    guest = _Guest(model)
    return PyTorchClassifier(
        model=guest,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(image_shape),
        nb_classes=num_classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if guest.device is not None and guest.device.type == "cuda" else "cpu",
    )


@checked
def foolbox_model(model: ImageModel) -> Any:
    """Return a Foolbox model with bounds [0, 1], for any attack of Foolbox.

    The model is not copied and keeps its device, modes, parameters and gradients. Images are expected on the device of
    the model, or on the CPU for a plain function.

    Args:
        model: Map from images to logits `(N, K)`.

    Returns:
        A `foolbox.PyTorchModel`.

    Raises:
        ConfigError: If Foolbox is not installed.

    References:
        https://github.com/bethgelab/foolbox
    """
    try:
        from foolbox.models.pytorch import PyTorchModel
    except ImportError as error:
        raise ConfigError("Foolbox is not installed. Install it with: pip install 'zepad[foolbox]'.") from error
    guest = _Guest(model)
    return PyTorchModel(guest, bounds=(0, 1), device=guest.device or torch.device("cpu"))
