"""The device and the processes of training, by Accelerate."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from torch.utils.data import DataLoader

from ..arguments import check_device
from ..errors import ConfigError, InputError, StageError
from ..types import Loader


def make_accelerator(seed: int, **tracking: Any) -> Accelerator:
    """Return an Accelerator that splits every batch of the loader over the processes.

    The number of updates and the batch of each update are then the same for any number of processes.

    Args:
        seed: Seed of the order in which images are drawn.
        **tracking: `log_with` and `project_dir`, as Accelerate takes them.
    """
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    # Accelerate joins processes without a GPU only if it is told to use the CPU.
    handlers = [DistributedDataParallelKwargs(static_graph=True)]
    accelerator = Accelerator(cpu=not accelerated, kwargs_handlers=handlers, **tracking)
    accelerator.dataloader_config = DataLoaderConfiguration(
        split_batches=accelerator.num_processes > 1, use_seedable_sampler=True, data_seed=seed
    )
    return accelerator


def training_device() -> torch.device:
    """Return the device that training uses."""
    device: torch.device = make_accelerator(0).device
    return device


def use_device(name: str) -> torch.device:
    """Have all training of this process use one device.

    Args:
        name: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, or whatever else torch calls a device.

    Returns:
        The device.

    Raises:
        ConfigError: If this machine has no such device.
        StageError: If something has been trained on another device before.
    """
    check_device(name)
    if name == "meta":
        raise ConfigError("device must be one that computes; got 'meta', which has no numbers. Pass \"cpu\".")
    os.environ["ACCELERATE_TORCH_DEVICE"] = name  # where Accelerate looks when it starts
    wanted, used = torch.device(name), training_device()
    if (wanted.type, wanted.index or 0) != (used.type, used.index or 0):
        raise StageError(f"this process has trained on {used} before, and cannot on {name}. Start another process.")
    return used


def prepare_loader(accelerator: Accelerator, loader: Loader) -> Loader:
    """Shard a DataLoader over the processes; any other iterable is read as it is by a single process.

    Args:
        accelerator: Accelerator of the run.
        loader: The user's loader, or a part of it.

    Raises:
        InputError: If several processes are asked to share something that is no DataLoader or splits unevenly.
    """
    if isinstance(loader, DataLoader):
        size, processes = loader.batch_size, accelerator.num_processes
        if processes > 1 and (size is None or size % processes):
            raise InputError(
                f"a batch must split evenly over {processes} processes; got batch_size={size}. "
                f"Choose a multiple of {processes}."
            )
        prepared: Loader = accelerator.prepare_data_loader(loader)
        return prepared
    if accelerator.num_processes > 1:
        raise InputError(
            f"training on {accelerator.num_processes} processes needs a torch DataLoader, which can be split between "
            f"them; got {type(loader).__name__}."
        )
    return loader
