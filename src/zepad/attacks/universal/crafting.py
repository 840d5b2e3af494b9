"""What universal attacks share: the attacker's images pass after pass, the ascent, and the record of the making."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..._version import __version__
from ...config import check_budget, require
from ...encoders import Encoder
from ...errors import InputError
from ...functional.precision import accurate
from ...functional.projection import project_linf, random_linf, steepest_linf
from ...inputs import check_images, check_labels, check_reiterable, num_batches
from ...modes import evaluating
from ...seeding import seeded
from ...types import ImageModel, Loader
from ..layers import capture_layers, find_layer

Encoders: TypeAlias = ImageModel | Sequence[ImageModel]
"""One encoder, or several that are attacked at once."""

_BATCH = 256  # a tensor of images is read in batches of this size, the size of the published recipes


@dataclass(frozen=True, kw_only=True)
class _UniversalAttack:
    """The settings every attack has: how often it passes over the images, and its seed."""

    epochs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        whole = isinstance(self.epochs, int) and not isinstance(self.epochs, bool) and self.epochs >= 1
        require(self.epochs is None or whole, "epochs", self.epochs, "at least 1, or None")
        seeded = isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed < 2**63
        require(seeded, "seed", self.seed, "an integer of zero or more")

    def _provenance(self, encoders: Sequence[ImageModel], images: AttackerImages, **more: Any) -> dict[str, Any]:
        """JSON values alone, so that a saved perturbation reads back the same."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            "attack": type(self).__name__,
            **{name: list(v) if isinstance(v, tuple) else v for name, v in settings.items() if name != "head"},
            "images": images.count,
            "encoders": [_describe(encoder) for encoder in encoders],
            "zepad": __version__,
            **more,
        }


@dataclass(frozen=True, kw_only=True)
class _SignAttack(_UniversalAttack):
    """The settings of attacks by sign steps inside an L-infinity ball."""

    eps: float
    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.eps)
        positive = self.step_size is None or (math.isfinite(self.step_size) and self.step_size > 0)
        require(positive, "step_size", self.step_size, "positive, or None")


def _describe(encoder: ImageModel) -> str:
    if isinstance(encoder, Encoder):
        return f"{type(encoder.backbone).__name__} ({encoder.spec})"
    return getattr(encoder, "__name__", type(encoder).__name__)


class AttackerImages:
    """The images an attacker has: checked batches of one size, on the device of the encoders.

    Attributes:
        count: Images in one pass; known after the first.
        updates: Batches in one pass; known before the first where the loader has a length.
    """

    def __init__(self, images: Tensor | Loader, encoders: Sequence[ImageModel]) -> None:
        if isinstance(images, Tensor):
            check_images(images)
        else:
            check_reiterable(images)
        self._images = images
        self._shape: torch.Size | None = None
        parameters = (p for encoder in encoders if isinstance(encoder, nn.Module) for p in encoder.parameters())
        reference = next(parameters, None)
        self._device = None if reference is None else reference.device
        self.count = 0
        self.updates = math.ceil(len(images) / _BATCH) if isinstance(images, Tensor) else num_batches(images)

    def one_pass(self) -> Iterator[Tensor]:
        """Yield every batch once.

        Raises:
            InputError: If an image does not fit or differs in size, or there is none.
        """
        for images, _ in self._batches():
            yield images

    def one_labelled_pass(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every batch once with its labels.

        Raises:
            InputError: As `one_pass`, and if a batch has no labels, saying what to do.
        """
        for images, labels in self._batches():
            if labels is None:
                raise InputError(
                    "this attack needs logits, and the images carry no labels to fit a linear probe on. Pass a loader "
                    "of (images, labels), or state the head that maps features to logits: head=..., which is "
                    "head=torch.nn.Identity() for a classifier."
                )
            yield images, check_labels(labels, count=len(images)).to(images.device)

    def passes(
        self, epochs: int | None, *, least_epochs: int, least_updates: int, name: str, progress: bool
    ) -> Iterator[Tensor]:
        """Yield the batches of as many whole passes as asked for, or as it takes to reach both least numbers."""
        with tqdm(desc=name, unit="update", disable=not progress) as bar:
            done = 0
            # Asked anew before every pass, because a loader without a length tells it only by its first pass.
            while done < (
                wanted := epochs or max(least_epochs, math.ceil(least_updates / (self.updates or torch.inf)))
            ):
                bar.total = wanted * self.updates if self.updates else None
                seen = 0
                for batch in self.one_pass():
                    yield batch
                    seen += 1
                    bar.update()
                self.updates = seen
                done += 1

    def _batches(self) -> Iterator[tuple[Tensor, object]]:
        count = 0
        for batch in self._raw():
            labelled = isinstance(batch, (tuple, list)) and len(batch) >= 2
            first = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
            images = check_images(first).to(self._device or first.device)
            self._shape = self._shape or images.shape[1:]
            if images.shape[1:] != self._shape:
                raise InputError(
                    f"a universal perturbation needs images of one size; got {tuple(self._shape)} and "
                    f"{tuple(images.shape[1:])}. Resize them in the loader."
                )
            count += len(images)
            yield images, batch[1] if labelled else None
        if not count:
            raise InputError("the loader is empty: it yielded no batch. Pass at least one image.")
        self.count = count

    def _raw(self) -> Iterable[Any]:
        return self._images.split(_BATCH) if isinstance(self._images, Tensor) else self._images


def as_encoders(encoder: Encoders) -> tuple[ImageModel, ...]:
    """Return the encoders as a tuple.

    Raises:
        InputError: If there is none or one cannot be called.
    """
    encoders = tuple(encoder) if isinstance(encoder, Sequence) else (encoder,)
    wrong = [type(one).__name__ for one in encoders if not callable(one)]
    if wrong or not encoders:
        got = ", ".join(wrong) or "an empty sequence"
        raise InputError(f"an attack needs an encoder, images to features, or a sequence of encoders; got {got}.")
    return encoders


@contextmanager
def crafting(models: Iterable[object], seed: int) -> Iterator[None]:
    """Put the models in evaluation mode and seed every generator for a while; give everything back as it was."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        stack.enter_context(seeded(seed))
        yield


@contextmanager
def capture_all(
    encoders: Sequence[ImageModel], layers: Sequence[str]
) -> Iterator[Callable[[Tensor], list[list[Tensor]]]]:
    """`capture_layers` on several encoders: a function from images to the layers' outputs, per encoder."""
    with ExitStack() as stack:
        readers = [stack.enter_context(capture_layers(encoder, layers)) for encoder in encoders]
        yield lambda images: [[accurate(output) for output in read(images)] for read in readers]


def layers_used(encoders: Sequence[ImageModel], layers: Sequence[str]) -> list[list[str]]:
    """Return the full names of the layers, per encoder."""
    return [[find_layer(encoder, layer) for layer in layers] for encoder in encoders]


def joint_features(encoders: Sequence[ImageModel], images: Tensor) -> Tensor:
    """Return the outputs of all encoders side by side, `(N, D1 + D2 + ...)`."""
    return torch.cat([encoder(images) for encoder in encoders], dim=1)


def perturbed(images: Tensor, delta: Tensor) -> Tensor:
    """Return `images + delta` in the images' precision, clamped to [0, 1]."""
    return (images + delta.to(images.dtype)).clamp(0, 1)


Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Maps clean and attacked images of a batch to a scalar that the attack raises."""


def ascend(
    loss: Loss, batches: Iterable[Tensor], *, eps: float, step_size: float, seed: int, momentum: float = 0.0
) -> Tensor:
    """Raise a loss over batches of images by sign steps on one perturbation.

    Args:
        loss: What is raised.
        batches: One step is taken on each.
        eps: Radius of the L-infinity ball.
        step_size: Length of a step.
        seed: Of the start, uniform in the ball.
        momentum: Share of the last direction that is kept; gradients are added at unit L1 norm.

    Returns:
        The perturbation `(1, C, H, W)`, detached; float32 for images in half precision.
    """
    delta = velocity = torch.empty(0)
    for images in batches:
        if not delta.numel():
            generator = torch.Generator(images.device).manual_seed(seed)
            delta = random_linf(accurate(images[:1]), eps, generator)
            velocity = torch.zeros_like(delta)
        with torch.enable_grad():
            delta = delta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(images, perturbed(images, delta)), delta)
        velocity = momentum * velocity + gradient / gradient.abs().sum().clamp_min(torch.finfo(delta.dtype).tiny)
        delta = project_linf(delta.detach() + step_size * steepest_linf(velocity), eps)
    return delta
