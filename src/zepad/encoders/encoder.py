"""The wrapper that turns any backbone into a map from raw images in [0, 1] to feature vectors."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..errors import ConfigError, InputError
from .preprocessing import Preprocessing
from .spec import POOLINGS, EncoderSpec, Pooling

_PROBE_SIZES = (32, 64, 224)  # tried in turn if a backbone states no input size


class Encoder(nn.Module):
    """A backbone together with its preprocessing: images `(N, C, H, W)` in [0, 1] to features `(N, D)`.

    Resize and normalisation live inside, so that everything outside, attacks included, sees raw pixels. The backbone
    gets a tensor of its own, so that it may work in place.
    Output maps `(N, D, 1, 1)` and `(N, D, H, W)` are averaged over space. Token sequences `(N, T, D)` need an
    explicit `pooling`, because nothing in them tells which token stands for the image.

    Args:
        backbone: Any module that maps images to a feature tensor. It is not copied, and a classifier in it is kept
            (`ZePAD.from_encoders` removes the classifier of a bare timm or torchvision model, and warns of one here).
        preprocessing: Resize and normalisation that the backbone expects. The default is that of `spec`, and without
            one the images are passed on as they are.
        pooling: How token sequences become one vector: `"class_token"` takes the first token, `"mean"` averages all.
            The default is that of `spec`.
        spec: Where the backbone comes from, so that it can be rebuilt without the caller.
        origin: Hub id of the pre-trained weights if it is known; a model card names it as the base model.

    Attributes:
        spec: Source, name and arguments of the backbone, and the preprocessing and pooling in use.

    Examples:
        >>> import torch
        >>> encoder = Encoder(torch.nn.Conv2d(3, 8, 3), preprocessing=Preprocessing.imagenet())
        >>> encoder(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 8])
    """

    mean: Tensor | None
    std: Tensor | None

    @checked
    def __init__(
        self,
        backbone: nn.Module,
        *,
        preprocessing: Preprocessing | None = None,
        pooling: Pooling | None = None,
        spec: EncoderSpec | None = None,
        origin: str = "",
    ) -> None:
        super().__init__()
        if pooling not in (None, *POOLINGS):
            raise ConfigError(f'pooling must be "class_token", "mean" or None; got {pooling!r}.')
        self.backbone = backbone
        spec = spec or EncoderSpec(source="custom")
        self.preprocessing = preprocessing or spec.preprocessing or Preprocessing()
        self.pooling = pooling or spec.pooling
        self.spec = replace(spec, preprocessing=self.preprocessing, pooling=self.pooling, weights="")
        self.origin = origin
        reference = next(backbone.parameters(), None)
        device = None if reference is None else reference.device
        for name in ("mean", "std"):
            values = getattr(self.preprocessing, name)
            # The buffers are not persistent because config.json is the one place that stores preprocessing.
            buffer = None if values is None else torch.tensor(values, device=device).view(1, -1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return features `(N, D)` of images `(N, C, H, W)` in [0, 1].

        Raises:
            InputError: If the backbone's output is not a feature tensor.
        """
        # len() would put the batch size of the example into an exported graph; shape[0] does not.
        return self._pool(self.backbone(self._prepare(images)), images.shape[0])

    def _prepare(self, images: Tensor) -> Tensor:
        images = self.preprocessing.resize(images)
        # Images are converted to the precision of the backbone.
        # The dtypes are a list, because PyTorch 2.6 cannot compile next() with a default.
        dtypes = [p.dtype for p in self.backbone.parameters() if p.is_floating_point()]
        dtype = dtypes[0] if dtypes else images.dtype
        if self.mean is None or self.std is None:
            # A backbone may work in place on what it is given. The images belong to the caller and the other branches.
            return images.to(dtype, copy=True)
        return (images.to(dtype) - self.mean.to(dtype)) / self.std.to(dtype)

    def _pool(self, output: object, count: int) -> Tensor:
        if not isinstance(output, Tensor):
            raise InputError(
                f"an encoder must return one feature tensor; {type(self.backbone).__name__} returned "
                f"{type(output).__name__}. Wrap it in a module that picks the tensor out."
            )
        if not output.is_floating_point() or output.ndim not in (2, 3, 4) or output.shape[0] != count:
            raise InputError(
                f"an encoder must map {count} images to floating-point features of shape ({count}, D), "
                f"({count}, D, H, W) or ({count}, T, D); {type(self.backbone).__name__} returned {output.dtype} of "
                f"shape {tuple(output.shape)}."
            )
        if output.ndim == 4:
            return output.mean(dim=(2, 3))
        if output.ndim == 3:
            if self.pooling is None:
                raise InputError(
                    f"{type(self.backbone).__name__} returns tokens of shape {tuple(output.shape)}; say which stand "
                    'for the image: Encoder(backbone, pooling="class_token") for the first, pooling="mean" for their '
                    "average."
                )
            return output[:, 0] if self.pooling == "class_token" else output.mean(dim=1)
        return output

    def extra_repr(self) -> str:
        """Show the spec, the pooling and the preprocessing."""
        return f"spec={str(self.spec)!r}, pooling={self.pooling!r}, {self.preprocessing}"


@checked
def probe(encoder: Encoder) -> tuple[int, int]:
    """Find the number of input channels and features of an encoder with dummy images.

    Args:
        encoder: The encoder. Its weights, buffers and training flags are left as they are.

    Returns:
        The number of input channels and the number of features.

    Raises:
        InputError: If no dummy image gets through, or the output is no feature tensor.
    """
    images, width = accepted(encoder)
    return images.shape[1], width


def accepted(encoder: Encoder) -> tuple[Tensor, int]:
    """Find dummy images that an encoder takes.

    Args:
        encoder: The encoder. Its weights, buffers and training flags are left as they are.

    Returns:
        Two grey images, on the device and in the precision of the encoder, and the number of features.

    Raises:
        InputError: If no dummy image gets through, or the output is no feature tensor.
    """
    sizes = [encoder.preprocessing.size] if encoder.preprocessing.size else [(side, side) for side in _PROBE_SIZES]
    mean = encoder.preprocessing.mean
    channel_counts = (3, 1) if mean is None else (len(mean),)
    reference = next(encoder.parameters(), torch.zeros(()))
    copied = copy.deepcopy(encoder).eval()  # a forward pass may change buffers
    failure: Exception | None = None
    for channels in channel_counts:
        for size in sizes:
            image = torch.full((2, channels, *size), 0.5, dtype=reference.dtype, device=reference.device)
            try:
                with torch.no_grad():
                    features = copied(image)
            except InputError:
                raise
            except Exception as error:
                failure = failure or error
            else:
                return image, features.shape[1]
    tried = ", ".join(f"{h}x{w}" for h, w in sizes)
    raise InputError(
        f"{type(encoder.backbone).__name__} took no image of {tried} with {' or '.join(map(str, channel_counts))} "
        f"channels in {reference.dtype}: {type(failure).__name__}: {failure}. State its input size: "
        "preprocess=Preprocessing(size=(height, width))."
    ) from failure
