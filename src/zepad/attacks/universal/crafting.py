"""Parts that universal attacks share: passes over the attacker's images, the ascent, and the provenance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..._version import __version__
from ...arguments import check_fields
from ...config import check_budget, require
from ...encoders import Encoder
from ...errors import InputError
from ...functional.precision import accurate
from ...functional.projection import project_linf, random_linf, steepest_linf
from ...inputs import check_images, check_labels, check_reiterable, has_labels, images_of, num_batches, split_batch
from ...modes import autocast, evaluating
from ...progress import stage
from ...seeding import seeded
from ...types import ImageModel, Loader, Precision
from ..layers import capture_layers, find_layer

Encoders: TypeAlias = ImageModel | Sequence[ImageModel]
"""One encoder, or a sequence of encoders that are attacked at once."""

_BATCH = 256  # batch size in which a tensor of images is read, that of the published recipes


@dataclass(frozen=True, kw_only=True)
class _UniversalAttack:
    """Settings of every universal attack: the number of passes over the images, the seed and the precision."""

    epochs: int | None = None
    seed: int = 0
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.epochs is None or self.epochs >= 1, "epochs", self.epochs, "at least 1, or None")
        require(0 <= self.seed < 2**63, "seed", self.seed, "an integer of zero or more")

    def _provenance(self, encoders: Sequence[ImageModel], images: AttackerImages, **more: Any) -> dict[str, Any]:
        """Return the provenance in JSON values, so that it is unchanged by saving and loading."""
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
    """Settings of attacks by sign steps inside an L-infinity ball."""

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
    """Images of the attacker, read as checked batches of one image size on the device of the encoders.

    Attributes:
        device: Device of the encoders; None where they have no parameters, and images stay where they are.
        count: Number of images in one pass, known after the first pass.
        updates: Number of batches in one pass; None before the first pass if the loader has no length.
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
        self.device = None if reference is None else reference.device
        self.count = 0
        self.updates = math.ceil(len(images) / _BATCH) if isinstance(images, Tensor) else num_batches(images)

    def one_pass(self) -> Iterator[Tensor]:
        """Yield every batch once.

        Raises:
            InputError: If images are invalid or differ in size, or there are none.
        """
        for images, _ in self._batches():
            yield images

    def one_labelled_pass(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every batch once with its labels.

        Raises:
            InputError: If images are invalid or differ in size, there are none, or a batch has no labels.
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
        """Yield the batches of several whole passes.

        Args:
            epochs: Number of passes; None takes enough for both least numbers.
            least_epochs: Least number of passes where `epochs` is None.
            least_updates: Least number of batches where `epochs` is None.
            name: Name of the stage of the progress.
            progress: Whether to show a progress bar.
        """
        with stage(name, shown=progress) as bar:
            done = 0
            # Computed before every pass, because the length of some loaders is known only after the first pass.
            while done < (
                wanted := epochs or max(least_epochs, math.ceil(least_updates / (self.updates or torch.inf)))
            ):
                bar.total = wanted * self.updates if self.updates else None
                seen = 0
                for batch in self.one_pass():
                    yield batch
                    seen += 1
                    bar.advance()
                self.updates = seen
                done += 1

    def _batches(self) -> Iterator[tuple[Tensor, object]]:
        count = 0
        for batch in self._raw():
            labels = split_batch(batch)[1] if has_labels(batch) else None
            images = check_images(images_of(batch), source=self._images)
            images = images.to(self.device or images.device)
            self._shape = self._shape or images.shape[1:]
            if images.shape[1:] != self._shape:
                raise InputError(
                    f"a universal perturbation needs images of one size; got {tuple(self._shape)} and "
                    f"{tuple(images.shape[1:])}. Resize them in the loader."
                )
            count += len(images)
            yield images, labels
        if not count:
            raise InputError("the loader is empty: it yielded no batch. Pass at least one image.")
        self.count = count

    def _raw(self) -> Iterable[Any]:
        return self._images.split(_BATCH) if isinstance(self._images, Tensor) else self._images


def as_encoders(encoder: Encoders) -> tuple[ImageModel, ...]:
    """Return one or several encoders as a tuple.

    Raises:
        InputError: If there is no encoder.
    """
    encoders = tuple(encoder) if isinstance(encoder, Sequence) else (encoder,)
    if not encoders:
        raise InputError("an attack needs an encoder, images to features, or a list of encoders; got an empty list.")
    return encoders


@contextmanager
def crafting(attack: _UniversalAttack, models: Iterable[object], images: AttackerImages) -> Iterator[None]:
    """Put the models in evaluation mode, seed the global generators and set the precision, and restore all three after.

    Args:
        attack: Attack whose seed and precision hold inside the context.
        models: Encoders and head.
        images: Images of the attacker.
    """
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        stack.enter_context(seeded(attack.seed))
        # What is trained inside, such as a generator, changes with every update, so that nothing may be converted once.
        stack.enter_context(autocast(images.device or torch.device("cpu"), attack.precision, cached=False))
        yield


@contextmanager
def capture_all(
    encoders: Sequence[ImageModel], layers: Sequence[str]
) -> Iterator[Callable[[Tensor], list[list[Tensor]]]]:
    """Yield a function from images to the outputs of the layers of each encoder, by `capture_layers`."""
    with ExitStack() as stack:
        readers = [stack.enter_context(capture_layers(encoder, layers)) for encoder in encoders]
        yield lambda images: [[accurate(output) for output in read(images)] for read in readers]


def layers_used(encoders: Sequence[ImageModel], layers: Sequence[str]) -> list[list[str]]:
    """Return the full names of the layers of each encoder."""
    return [[find_layer(encoder, layer) for layer in layers] for encoder in encoders]


def joint_features(encoders: Sequence[ImageModel], images: Tensor) -> Tensor:
    """Return the concatenated features `(N, D1 + D2 + ...)` of all encoders."""
    return torch.cat([encoder(images) for encoder in encoders], dim=1)


def perturbed(images: Tensor, delta: Tensor) -> Tensor:
    """Return `images + delta` clamped to [0, 1], in the dtype of the images."""
    return (images + delta.to(images.dtype)).clamp(0, 1)


Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A map from the clean and attacked images of a batch to a scalar, which the attack maximises."""


def ascend(
    loss: Loss, batches: Iterable[Tensor], *, eps: float, step_size: float, seed: int, momentum: float = 0.0
) -> Tensor:
    """Maximise a loss over batches of images by sign steps on one perturbation.

    Args:
        loss: Loss to maximise.
        batches: Batches of images, on each of which one step is taken.
        eps: Radius of the L-infinity ball in [0, 1] pixel units.
        step_size: Length of one step in [0, 1] pixel units.
        seed: Seed of the random start, which is uniform in the ball.
        momentum: Decay of the accumulated gradient, to which gradients are added at unit L1 norm.

    Returns:
        Perturbation `(1, C, H, W)`, detached; float32 for images in half precision.
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
