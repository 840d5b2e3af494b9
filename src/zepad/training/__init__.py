"""The stages of a defense as functions over modules: hardening, benign training, heads; one loop on Accelerate."""

from .accelerator import training_device, use_device
from .benign import train_benign
from .callbacks import Callback, StopTraining, TrainingStatus
from .hardening import harden, harden_branch
from .heads import fit_heads
from .loaders import class_names, count_classes, num_images, split
from .tracking import Tracker

__all__ = [
    "Callback",
    "StopTraining",
    "Tracker",
    "TrainingStatus",
    "class_names",
    "count_classes",
    "fit_heads",
    "harden",
    "harden_branch",
    "num_images",
    "split",
    "train_benign",
    "training_device",
    "use_device",
]
