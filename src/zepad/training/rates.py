"""The learning rate that suits an encoder, for a config that states none."""

from __future__ import annotations

from torch import nn

_LAYER_NORM_RATE = 1e-4


def default_rate(encoder: nn.Module, *, usual: float = 2e-3) -> float:
    """Return the peak learning rate of Adam for fine-tuning an encoder, as measured in docs/recipe.md.

    Args:
        encoder: Any module.
        usual: Rate of the recipe, measured on encoders with BatchNorm.

    Returns:
        At most 1e-4 for an encoder whose normalisation layers are all `LayerNorm` (or `RMSNorm`), such as a ViT, which
        2e-3 destroys; `usual` for all others, such as a ResNet.

    Examples:
        >>> default_rate(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LayerNorm(8)))
        0.002
        >>> default_rate(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
        0.0001
    """
    norms = [part for part in encoder.modules() if _is_norm(part)]
    only_layer_norm = bool(norms) and all(_is_layer_norm(part) for part in norms)
    return min(usual, _LAYER_NORM_RATE) if only_layer_norm else usual


def _is_norm(module: nn.Module) -> bool:
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LocalResponseNorm)  # the first: batch and instance norm
    return isinstance(module, kinds) or _is_layer_norm(module)


def _is_layer_norm(module: nn.Module) -> bool:
    # RMSNorm has many implementations: the class of torch is younger than the oldest torch supported.
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
