"""The stages of a defense as functions over modules: hardening, benign training, heads; one loop on Accelerate."""

from .accelerator import autocast, training_device
from .benign import train_benign
from .checkpoints import prepare_folder
from .copies import check_state
from .hardening import Hardened, harden, harden_branch
from .heads import fit_heads
from .loaders import class_names, count_classes, num_images

__all__ = [
    "Hardened",
    "autocast",
    "check_state",
    "class_names",
    "count_classes",
    "fit_heads",
    "harden",
    "harden_branch",
    "num_images",
    "prepare_folder",
    "train_benign",
    "training_device",
]
