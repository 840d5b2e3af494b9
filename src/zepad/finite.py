"""Checks that numbers are numbers: weights that come in or go out, and what decisions are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import InputError


def check_finite(values: Tensor, what: str, *, first: int = 0) -> Tensor:
    """Return the values if those of every image are finite, so that no NaN is read as a class or as "not attacked".

    Args:
        values: One value or row of values for each image, `(N,)` or `(N, K)`.
        what: Name of the values, in the plural, for the message.
        first: Index of the first of these images among those of the caller.

    Raises:
        InputError: If a value is NaN or infinite.
    """
    fine = values.isfinite().flatten(1).all(dim=1) if values.ndim > 1 else values.isfinite()
    if bool(fine.all()):
        return values
    at = first + int((~fine).nonzero()[0])
    raise InputError(
        f"the {what} of {int((~fine).sum())} of {len(fine)} images are not finite, first at image {at}, so nothing is "
        "decided. The images are finite, so a weight is damaged or an encoder overflows: branch_logits(images) shows "
        "in which branch. Load its weights again, or compute in float32."
    )


def faulty_weight(module: nn.Module) -> str | None:
    """Return what is wrong with the first tensor of a module's state that cannot be right, or None.

    Parameters must be finite, buffers must hold no NaN (attention masks hold infinities), and running variances must
    not be negative.

    Args:
        module: The module, with all its weights at hand.
    """
    for key, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        if values.dtype.itemsize == 1:  # torch compares no number of eight bits
            values = values.float()
        if not values.numel():
            continue
        low, high = values.aminmax()  # both are NaN where one value is; no mask of all values is made
        parameter = isinstance(tensor, nn.Parameter)
        if low.isnan() or (parameter and not (low.isfinite() and high.isfinite())):
            wrong = ~values.isfinite() if parameter else values.isnan()
            return f"{key} holds {int(wrong.sum())} values of {values.numel()} that are NaN or infinite"
        if key.endswith("running_var") and low < 0:
            return f"{key} holds negative values, and no variance is negative"
    return None
