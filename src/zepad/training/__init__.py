"""Training on Accelerate: one loop for hardening and benign fine-tuning, cached features for heads."""

from .benign import benign_recipe
from .checkpoints import prepare_folder
from .harden import harden_recipe
from .heads import fit_heads
from .loaders import class_names, count_classes, images_in
from .loop import Recipe, Run, autocast, train_branch, training_device

__all__ = [
    "Recipe",
    "Run",
    "autocast",
    "benign_recipe",
    "class_names",
    "count_classes",
    "fit_heads",
    "harden_recipe",
    "images_in",
    "prepare_folder",
    "train_branch",
    "training_device",
]
