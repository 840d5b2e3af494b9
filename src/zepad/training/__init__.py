"""Training on Accelerate: one loop for hardening and benign fine-tuning, cached features for heads."""

from .benign import benign_recipe
from .checkpoints import checkpoint_folder, prepare_folder
from .harden import check_state, harden_branch, harden_recipe, hardening_method, plan_labels, run_method
from .heads import fit_heads
from .loaders import class_names, count_classes, images_in
from .loop import Recipe, Run, autocast, train_branch, training_device

__all__ = [
    "Recipe",
    "Run",
    "autocast",
    "benign_recipe",
    "check_state",
    "checkpoint_folder",
    "class_names",
    "count_classes",
    "fit_heads",
    "harden_branch",
    "harden_recipe",
    "hardening_method",
    "images_in",
    "plan_labels",
    "prepare_folder",
    "run_method",
    "train_branch",
    "training_device",
]
