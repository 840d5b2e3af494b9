"""How static DAEs reach the training loop: from a bank, aligned with the images, or crafted batch by batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...config import BenignConfig, HardenConfig
from ...objectives import DAEMixture
from ...types import Loader
from ..accelerator import make_accelerator
from .bank import DAEBank
from .crafting import Crafter, digest_json, level
from .reading import Images, align

Read = Callable[[Iterable[Any]], Iterator[tuple[Tensor, Tensor]]]
"""A map from what a loader yields to checked images `(N, C, H, W)` and labels `(N,)` on the training device."""


class StaticDAEs(Protocol):
    """A source of static DAEs for the training loop."""

    @property
    def digest(self) -> str:
        """The SHA-256 of all that the DAEs depend on, for a run that resumes."""

    def prepare(self, loader: Loader) -> Loader:
        """Return the loader to iterate in place of the user's training loader."""

    def batches(
        self, loader: Iterable[Any], read: Read, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Iterate over images, labels and static DAEs of the same images.

        Args:
            loader: The prepared loader.
            read: Function that checks a batch and moves it to the device.
            generator: Random number generator on the device.
        """


class Banked:
    """Static DAEs from a bank of the training images.

    Args:
        bank: The bank of the data set behind the training loader.
    """

    def __init__(self, bank: DAEBank) -> None:
        self.bank = bank

    @property
    def digest(self) -> str:
        """The digest of the bank."""
        return self.bank.digest

    def prepare(self, loader: Loader) -> Loader:
        """Return a loader that yields the residuals with the batches."""
        assert isinstance(loader, DataLoader)
        assert len(loader.dataset) == len(self.bank), "the bank is of another data set"  # type: ignore[arg-type]
        return align(loader, self.bank)

    def batches(
        self,
        loader: Iterable[Any],
        read: Read,
        generator: torch.Generator,  # noqa: ARG002 - nothing is drawn here
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Iterate over images, labels, and images with their residuals."""
        for batch, residual in loader:
            for images, labels in read([batch]):
                yield images, labels, (images + residual.to(images.device)).clamp(0, 1)


class Streamed:
    """Static DAEs crafted for each batch, by an attack that is drawn for the batch.

    Args:
        crafter: Public encoders and attacks.
    """

    def __init__(self, crafter: Crafter) -> None:
        self.crafter = crafter

    @property
    def digest(self) -> str:
        """The digest of encoders and attacks."""
        return digest_json(self.crafter.describe())

    def prepare(self, loader: Loader) -> Loader:
        """Return the loader as it is."""
        return loader

    def batches(
        self, loader: Iterable[Any], read: Read, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Iterate over images, labels and DAEs crafted on the fly."""
        for images, labels in read(loader):
            drawn = torch.randint(len(self.crafter.members), (), generator=generator, device=generator.device)
            member = int(drawn)
            residual = self.crafter.craft(member, images, generator).float()
            yield images, labels, (images + residual * level(self.crafter.members[member].attack.eps)).clamp(0, 1)


@contextmanager
def static_daes(
    mixture: DAEMixture | None,
    public: Mapping[str, nn.Module],
    loader: Loader,
    config: HardenConfig | BenignConfig,
    *,
    eps: float | None,
    folder: str | Path | None,
    progress: bool,
) -> Iterator[StaticDAEs | None]:
    """Yield the static DAEs of a training loader: a bank where its images stay the same, else a stream.

    Args:
        mixture: Attacks on the public encoders; None yields None.
        public: Public encoders by name; they are copied, never modified.
        loader: Training loader, without the images that are held out.
        config: Settings of the training, of which seed and precision count here.
        eps: Radius of the adversarial examples where the mixture states none, in [0, 1] pixel units; None where there
            is no other.
        folder: Folder of banks; None uses a temporary one, which is deleted at the end.
        progress: Whether to show a progress bar.

    Raises:
        ConfigError: If the mixture needs public encoders or a radius that there are not.
        InputError: If an image does not fit, or the folder cannot be written.
    """
    if mixture is None:
        yield None
        return
    members = mixture.members(tuple(public), eps)
    seed = config.seed
    accelerator = make_accelerator(seed)
    crafter = Crafter({**public, **mixture.further}, members, config.precision, accelerator.device)
    images = Images.behind(loader)
    if images is None:
        yield Streamed(crafter)
        return
    with ExitStack() as stack:
        if folder is None:
            temporary = tempfile.TemporaryDirectory(prefix="zepad-daes-", ignore_cleanup_errors=True)
            folder = _from_main(stack.enter_context(temporary))
        with accelerator.main_process_first():  # the others find the finished bank
            bank = DAEBank.build(
                crafter,
                images,
                Path(folder),
                per_image=mixture.per_image,
                seed=seed,
                progress=progress and accelerator.is_main_process,
            )
        yield Banked(bank)
        accelerator.wait_for_everyone()


def _from_main(value: str) -> str:
    values = [value]
    broadcast_object_list(values)
    return values[0]
