"""What an encoder must hold to, found out once with dummy images before a defense is built on it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..errors import InputError, ZePADError
from ..finite import faulty_weight
from ..seeding import seeded
from .encoder import Encoder, accepted

_REPEATED, _ALONE = 1e-3, 1e-2  # differences, relative to the largest feature, that rounding may make


def check_contract(encoder: Encoder) -> tuple[int, int]:
    """Refuse an encoder that a defense would silently go wrong with.

    The weights must be there, on one device, and finite. In evaluation mode, the features of an image must be finite,
    the same at each call and whatever other images are in the batch, and they must have a gradient, which attacks
    follow. A call must not change the encoder.

    Args:
        encoder: The encoder, which is not changed. A copy of it sees seven dummy images and one gradient.

    Returns:
        The number of input channels and the number of features.

    Raises:
        InputError: If no dummy image gets through, the output is no feature tensor, or the encoder does not hold to
            the above.
    """
    name = type(encoder.backbone).__name__
    _check_weights(name, encoder)
    with seeded(0):  # an encoder that draws random numbers leaves the caller's generators as they were
        grey, width = accepted(encoder)
        if width < 1:
            raise InputError(f"{name} returns no features: the width of its output is zero. Return one or more.")
        _check_features(name, encoder, torch.rand(grey.shape).to(grey))
    return grey.shape[1], width


def _check_weights(name: str, encoder: Encoder) -> None:
    tensors = [*encoder.parameters(), *encoder.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise InputError(
            f"{name} is on the meta device, which has no weights. Load its weights first: to_empty(device=...), then "
            "load_state_dict(...)."
        )
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise InputError(f"{name} lies on several devices, {', '.join(devices)}. Move it to one with .to(device).")
    fault = faulty_weight(encoder.backbone)
    if fault:
        raise InputError(f"the weights of {name} are damaged: {fault}. Load them again.")


def _check_features(name: str, encoder: Encoder, images: Tensor) -> None:
    own = copy.deepcopy(encoder).eval()
    features, gradient = _differentiate(name, own, images)
    if not bool(features.isfinite().all()):
        raise InputError(f"{name} gives features that are NaN or infinite for images in [0, 1]. Check its weights.")
    again = _call(name, own, images, "twice in evaluation mode")
    alone = _call(name, own, images[:1], "one image after two")
    before = encoder.state_dict()
    changed = [key for key, value in own.state_dict().items() if not torch.equal(value, before[key])]
    if changed:
        raise InputError(
            f"{name} changes its own state when it is called in evaluation mode: "
            f"{', '.join(key.removeprefix('backbone.') for key in changed[:3])}. Change it in training mode alone "
            "(if self.training), and let eval() reach every BatchNorm."
        )
    allowed = features.abs().max()
    if (again - features).abs().max() > _REPEATED * allowed:
        raise InputError(
            f"{name} gives other features for the same images at each call in evaluation mode. Remove what is random "
            "or counts calls, and let eval() reach every dropout: F.dropout(x, p, self.training)."
        )
    if (alone - features[:1]).abs().max() > _ALONE * allowed:
        raise InputError(
            f"{name} gives an image other features alone than beside another image: in evaluation mode it must not "
            "normalise over the batch. Let BatchNorm track and use running statistics."
        )
    if not gradient.any() and not torch.equal(features[0], features[1]):
        raise InputError(
            f"{name} has features whose gradient is zero everywhere, as after rounding. Attacks follow the gradient, "
            "and hardening would train on none. Use an operation with a gradient, or pass one straight through."
        )


def _differentiate(name: str, encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features of images, and the gradient of a random projection of them."""
    moving = images.clone().requires_grad_()
    remedy = "Attacks follow it: remove no_grad, inference_mode, detach and numpy from its forward."
    try:
        with torch.enable_grad():
            features = encoder(moving)
            (gradient,) = torch.autograd.grad((features * torch.rand_like(features)).sum(), moving)
    except ZePADError:
        raise
    except Exception as error:
        raise InputError(
            f"{name} gives features without a gradient to the images ({_first_line(error)}). {remedy}"
        ) from error
    return features.detach(), gradient


def _call(name: str, encoder: Encoder, images: Tensor, how: str) -> Tensor:
    try:
        with torch.no_grad():
            features: Tensor = encoder(images)
    except ZePADError:
        raise
    except Exception as error:
        raise InputError(
            f"{name} could not be called for {how} ({_first_line(error)}). It must take batches of any size."
        ) from error
    return features


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
