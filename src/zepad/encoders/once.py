"""One pass in place of several where an encoder is given the same images again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .encoder import Encoder


@contextmanager
def passing_once(model: object) -> Iterator[None]:
    """Let every encoder of a module give the features again that it made of the very tensor it is given once more.

    Logits and detection score of an ensemble come from the same features. Whoever asks for both, each by its own
    method, which a subclass may override, pays for one pass through every encoder. Do not differentiate inside: what
    two answers share can be differentiated once only.

    Args:
        model: An `nn.Module`. One that was compiled, and any other callable, is left alone.
    """
    parts = list(model.modules()) if isinstance(model, nn.Module) else []
    compiled = any(part._compiled_call_impl is not None for part in parts)  # it would fall into pieces
    encoders = [] if compiled else [part for part in parts if isinstance(part, Encoder)]
    found = [encoder.__dict__.get("forward") for encoder in encoders]
    for encoder in encoders:
        encoder.forward = _Last(encoder.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for encoder, before in zip(encoders, found, strict=True):
            if before is None:
                del encoder.forward
            else:
                encoder.forward = before  # type: ignore[method-assign]


class _Last:
    """A pass through an encoder that remembers its last answer, as long as nobody writes to it or to the images."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self._forward = forward
        self._given: Tensor | None = None
        self._features = torch.empty(0)
        self._state: tuple[object, ...] = ()

    def __call__(self, images: Tensor) -> Tensor:
        if images is self._given and self._state == _state(images, self._features):
            return self._features
        features = self._forward(images)
        if not (images.is_inference() or features.is_inference()):  # such tensors do not say when they are written to
            self._given, self._features, self._state = images, features, _state(images, features)
        return features


def _state(images: Tensor, features: Tensor) -> tuple[object, ...]:
    return images._version, features._version, images.requires_grad, torch.is_grad_enabled()
