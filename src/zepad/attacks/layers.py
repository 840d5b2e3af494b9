"""Intermediate layers of an encoder: find them by name or stage, and record their outputs.

A layer is given by the name of its module (`"layer1.0"`, with or without the names of the wrappers around it) or by its
stage: `"stem"`, `"stage1"` to `"stage4"`, from input to output.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import InputError

STAGES = ("stem", "stage1", "stage2", "stage3", "stage4")
"""Names of layers that exist for every architecture."""

_NUMBERED = re.compile(r"(layer|stage|block|s)_?\d+")  # layer1 to layer4 in torchvision and timm, s1 to s4 in RegNets
_CONTAINERS = ("stages", "blocks", "layers", "features")
_LISTED = 20  # number of module names in an error message


def stage_layers(model: object) -> dict[str, str]:
    """Return the name of the module at the end of each stage.

    Residual networks have their own stages. The blocks of a vision transformer, or the submodules with parameters of
    any other module, are split into four stages of equal length. The stem is the last submodule with parameters before
    the first stage, without its activation: the patch embedding of a vision transformer, the first BatchNorm of a
    residual network. Stages of a network with fewer than four parts share modules.

    Args:
        model: Module, with or without wrappers around it.

    Returns:
        Module name of each stage, named as in `model.named_modules()`.

    Raises:
        InputError: If the model is no module or has no submodule with parameters.

    Examples:
        >>> from torch import nn
        >>> stage_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))["stage4"]
        '2'
    """
    module = _module(model)
    parts, before = _numbered_parts(module) or _contained_parts(module) or _plain_parts(module)
    if not parts:
        raise InputError(
            f"{type(module).__name__} has no part with parameters to read features from. Wrap the network as a child "
            "of a module, or use an attack on the output."
        )
    ends = [parts[math.ceil(len(parts) * quarter / 4) - 1] for quarter in (1, 2, 3, 4)]
    return dict(zip(STAGES, (before or parts[0], *ends), strict=True))


def find_layer(model: object, layer: str) -> str:
    """Return the full name of a layer.

    Args:
        model: Module, with or without wrappers around it.
        layer: Name of a module, in the model or inside its wrappers, or a stage of `STAGES`.

    Returns:
        Full name of the layer, named as in `model.named_modules()`.

    Raises:
        InputError: If the model is no module or has no such layer. The message lists some existing layers.
    """
    module = _module(model)
    names = [name for name, _ in module.named_modules() if name]
    for prefix in _wrappers(module):
        if prefix + layer in names:
            return prefix + layer
    if layer in STAGES:
        return stage_layers(module)[layer]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    raise InputError(
        f"{type(module).__name__} has no layer {layer!r}. It has the stages {', '.join(STAGES)} and the modules "
        f"{', '.join(names[:_LISTED])}{more}."
    )


@contextmanager
def capture_layers(model: object, layers: Sequence[str]) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """Record the outputs of layers with forward hooks, which are removed at the end of the context.

    Args:
        model: Module, with or without wrappers around it.
        layers: Names of modules, or stages of `STAGES`.

    Yields:
        A function that runs the model on images and returns the differentiable output of each layer, in the order of
        `layers`. If a layer runs several times in one pass, its last output is returned.

    Raises:
        InputError: If a layer does not exist, or, from the function, if a layer did not run or returned no tensor.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> with capture_layers(model, ["stem"]) as read:
        ...     [activation] = read(torch.rand(2, 3, 5, 5))
        >>> activation.shape
        torch.Size([2, 8, 3, 3])
    """
    # Hooks work on any module. torchvision.models.feature_extraction traces the model with torch.fx, which fails on
    # encoders that check their outputs, as `Encoder` does, and on most models of transformers.
    module = _module(model)
    names = [find_layer(module, layer) for layer in layers]
    captured: dict[str, object] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, object], None]:
        def hook(_module: nn.Module, _inputs: Any, output: object) -> None:
            # The output is cloned, because an in-place activation may follow.
            captured[name] = output.clone() if isinstance(output, Tensor) else output

        return hook

    def read(images: Tensor) -> list[Tensor]:
        captured.clear()
        module(images)
        outputs: list[Tensor] = []
        for name in names:
            output = captured.get(name)
            if not isinstance(output, Tensor):
                got = f"returned {type(output).__name__}" if name in captured else "did not run"
                raise InputError(
                    f"layer {name} of {type(module).__name__} {got}; an attack needs its output tensor. Choose another."
                )
            outputs.append(output)
        captured.clear()
        return outputs

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise InputError(
            f"an attack on intermediate features needs a torch.nn.Module whose layers it can read; got "
            f"{type(model).__name__}. Pass the encoder itself, or use an attack on its output."
        )
    return model


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _parts_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module.named_children() if _has_parameters(child)]


def _wrappers(module: nn.Module) -> list[str]:
    """Return name prefixes of nested wrappers, down to the first module with more than one part with parameters."""
    prefixes, prefix = [""], ""
    parts = _parts_of(module)
    while len(parts) == 1:
        [(name, module)] = parts
        prefix += f"{name}."
        prefixes.append(prefix)
        parts = _parts_of(module)
    return prefixes


def _breadth_first(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules and their name prefixes by depth, because blocks have numbered parts of their own."""
    waiting = deque([("", module)])
    while waiting:
        prefix, parent = waiting.popleft()
        yield prefix, parent
        waiting.extend((f"{prefix}{name}.", child) for name, child in parent.named_children())


_Parts = tuple[list[str], str | None]  # names of the parts, and of the part before them


def _numbered_parts(module: nn.Module) -> _Parts | None:
    for prefix, parent in _breadth_first(module):
        parts = [f"{prefix}{name}" for name, _ in _parts_of(parent) if _NUMBERED.fullmatch(name)]
        if len(parts) > 1:
            return parts, _part_before(module, parts[0])
    return None


def _contained_parts(module: nn.Module) -> _Parts | None:
    for prefix, parent in _breadth_first(module):
        for name, child in parent.named_children():
            parts = [f"{prefix}{name}.{part}" for part, _ in _parts_of(child)]
            if name in _CONTAINERS and isinstance(child, (nn.Sequential, nn.ModuleList)) and len(parts) > 1:
                return parts, _part_before(module, f"{prefix}{name}")
    return None


def _plain_parts(module: nn.Module) -> _Parts:
    prefixes = _wrappers(module)
    innermost = module.get_submodule(prefixes[-1].rstrip("."))
    parts = [f"{prefixes[-1]}{name}" for name, _ in _parts_of(innermost)]
    return parts or [prefix.rstrip(".") for prefix in prefixes[1:]][-1:], None


def _part_before(module: nn.Module, name: str) -> str | None:
    """Return the last part with parameters before the named one, among its siblings or those of its parents."""
    path = name.split(".")
    for depth in reversed(range(len(path))):
        prefix = ".".join(path[:depth])
        siblings = [sibling for sibling, _ in _parts_of(module.get_submodule(prefix))]
        earlier = siblings[: siblings.index(path[depth])]
        if earlier:
            return f"{prefix}.{earlier[-1]}" if prefix else earlier[-1]
    return None
