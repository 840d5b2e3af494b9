"""Universal perturbation, one perturbation for all images."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..._version import __version__
from ...arguments import check_fields, checked
from ...config import check_budget, require
from ...errors import CheckpointError, ConfigError, InputError
from ...files import write_bytes, writing
from ...functional.projection import BALLS
from ...schema import STRICT, parse_json
from ...sealed import read_sealed, seal

FORMAT = 2  # since 2 the digest covers every byte of the file

_LARGEST_FILE = 1 << 28  # largest size of a perturbation in bytes
_KIND = "universal perturbation"
_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class UniversalPerturbation:
    """One perturbation for all images, the form of most downstream-agnostic attacks.

    Attributes:
        delta: Perturbation `(1, C, H, W)`, floating point. It is added to the images and lies inside the ball; for a
            patch it holds the pixels of the patch in [0, 1] and is zero elsewhere.
        eps: Radius of the ball in [0, 1] pixel units; for a patch the share of the pixels that it covers.
        norm: Norm of the ball, `"linf"` or `"l2"`, or `"patch"`.
        mask: Mask `(1, 1, H, W)` of a patch, one where pixels are replaced and zero elsewhere; None for other norms.
        provenance: Record of how the perturbation was crafted, in JSON values: attack, settings, number of images,
            encoders, library version.

    Examples:
        >>> import torch
        >>> perturbation = UniversalPerturbation(delta=torch.full((1, 3, 2, 2), 0.25), eps=0.25)
        >>> perturbation.apply(torch.full((1, 3, 2, 2), 0.5)).max()
        tensor(0.7500)
    """

    delta: Tensor
    eps: float
    norm: str = "linf"
    mask: Tensor | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If the budget is out of range or the norm is unknown.
            InputError: If a tensor has a wrong shape or wrong values, or exceeds the budget.
        """
        check_fields(self)
        norms = [*sorted(BALLS), "patch"]
        require(self.norm in norms, "norm", self.norm, f"one of {norms}")
        check_budget(self.eps, "l2" if self.norm == "l2" else "linf")
        delta = self.delta
        if not isinstance(delta, Tensor) or not delta.is_floating_point() or delta.ndim != 4 or len(delta) != 1:
            got = f"{delta.dtype} of shape {tuple(delta.shape)}" if isinstance(delta, Tensor) else type(delta).__name__
            raise InputError(f"delta must be a floating-point tensor of shape (1, C, H, W); got {got}.")
        if not delta.numel() or not torch.isfinite(delta).all():
            raise InputError("delta must be finite and not empty.")
        if self.norm == "patch":
            self._check_patch()
        elif self.mask is not None:
            raise InputError(f'mask belongs to norm "patch"; norm is {self.norm!r}. Leave it out.')
        elif (BALLS[self.norm].project(delta, self.eps) - delta).abs().max() > _TOLERANCE:
            raise InputError(
                f"delta lies outside the {self.norm} ball of radius {self.eps:g}: its largest entry is "
                f"{delta.abs().max():g}. Project it, or state the budget it was made for."
            )

    def _check_patch(self) -> None:
        mask, shape = self.mask, (1, 1, *self.delta.shape[2:])
        if mask is None or mask.shape != shape or not ((mask == 0) | (mask == 1)).all():
            raise InputError(f"a patch needs a mask of zeros and ones of shape {shape}.")
        covered = float(mask.float().mean())
        if abs(covered - self.eps) > _TOLERANCE:
            raise InputError(f"eps of a patch is the share it covers, {covered:g} by its mask; got {self.eps:g}.")
        low, high = (value.item() for value in self.delta.aminmax())
        if low < -_TOLERANCE or high > 1 + _TOLERANCE or (self.delta * (mask == 0)).any():
            raise InputError("delta of a patch must hold pixels in [0, 1] where the mask is one, and zero elsewhere.")

    def apply(self, images: Tensor) -> Tensor:
        """Apply the perturbation to images.

        Args:
            images: Images `(N, C, H, W)` in [0, 1] of the size for which the perturbation was crafted.

        Returns:
            `images + delta` clamped to [0, 1], or the images with the patch on them, in the dtype of the images.

        Raises:
            InputError: If the size of the images differs.
        """
        if images.shape[1:] != self.delta.shape[1:]:
            raise InputError(
                f"the perturbation was made for images of shape {tuple(self.delta.shape[1:])}; got "
                f"{tuple(images.shape[1:])}. Resize the images or fit the attack at their size."
            )
        delta = self.delta.to(images.device, images.dtype)
        if self.mask is not None:
            return torch.where(self.mask.to(images.device) == 1, delta, images)
        return (images + delta).clamp(0, 1)

    @checked
    def save(self, path: Path | str) -> None:
        """Write the perturbation to one safetensors file. An existing file is replaced atomically.

        Args:
            path: Path of the file, whose folder must exist.

        Raises:
            CheckpointError: If the file cannot be written, or the provenance is no plain JSON.
        """
        path = Path(path)
        tensors = {"delta": self.delta} if self.mask is None else {"delta": self.delta, "mask": self.mask}
        record = {
            "format": FORMAT,
            "kind": _KIND,
            "library_version": __version__,
            "eps": self.eps,
            "norm": self.norm,
            "provenance": self.provenance,
        }
        try:
            content = seal(tensors, record)
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: the provenance is no plain JSON: {error}.") from error
        with writing(path, CheckpointError):
            write_bytes(path, content)

    @classmethod
    @checked
    def load(cls, path: Path | str) -> UniversalPerturbation:
        """Read a perturbation that was written by `save`.

        Args:
            path: Path of the file.

        Returns:
            Perturbation on the CPU.

        Raises:
            CheckpointError: If the file is missing, damaged, of another kind or of a newer version, or its content is
                no perturbation inside its budget.
        """
        path = Path(path)
        content = read_sealed(path, limit=_LARGEST_FILE)
        tensors, record = content.tensors, _read_record(path, content.record)
        expected = {"delta", "mask"} if record.norm == "patch" else {"delta"}
        if set(tensors) != expected:
            raise CheckpointError(f"{path} must hold the tensors {sorted(expected)}; it holds {sorted(tensors)}.")
        whole = _digest(tensors) == record.sha256 if record.format == 1 else content.is_sealed_by(record.sha256)
        if not whole:
            raise CheckpointError(f"{path} is damaged: its content is not what was saved. Save it again.")
        try:
            return cls(**tensors, eps=record.eps, norm=record.norm, provenance=record.provenance)
        except (ConfigError, InputError) as error:
            raise CheckpointError(f"{path} holds no valid perturbation: {error}") from error


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What the file of a perturbation says of itself."""

    __pydantic_config__: ClassVar[Any] = STRICT

    format: int
    kind: str
    library_version: str
    eps: float
    norm: str
    provenance: dict[str, Any]
    sha256: str


def _read_record(path: Path, text: str) -> _Record:
    try:
        values = json.loads(text)
        version = values["format"] if values["kind"] == _KIND else None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} was not written by UniversalPerturbation.save.") from error
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{path}: format must be a positive integer; got {version!r}.")
    if version > FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, written by zepad {values.get('library_version')}; this is zepad "
            f"{__version__}, which reads formats up to {FORMAT}. Upgrade with: pip install -U zepad."
        )
    return parse_json(_Record, text, origin=str(path))


def _digest(tensors: dict[str, Tensor]) -> str:
    """Return the digest of format 1, which covers the tensors alone."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
