"""The one training loop: every recipe, benign or adversarial, runs through it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import Schedule
from ..encoders import Encoder
from ..errors import InputError, TrainingError
from ..functional import Count, correct_count
from ..inputs import num_batches
from ..modes import autocast
from ..modules import Branch, MLPHead
from ..objectives import Batch, Objective, ObjectiveOutput
from ..objectives.augmentation import augment_pair
from ..objectives.base import public_features
from ..progress import Stage, stage
from ..seeding import derive_seed, seeded
from ..types import Loader
from .accelerator import make_accelerator, prepare_loader
from .callbacks import Reporter
from .checkpoints import newest
from .loaders import num_images
from .run import Run
from .state import TrainingState
from .validation import validate

_WARM_UP, _FIRST_RATE = 0.3, 1 / 25  # of the one-cycle schedule: share of the run, share of the peak


def starting_branch(encoder: Encoder, run: Run) -> Branch:
    """Return the encoder with the head that a run starts from: a copy of the given one, or a fresh `MLPHead`.

    Where the run has no classes, the head is the identity: features are all that its recipe looks at.
    """
    if run.head is not None:
        return Branch(encoder, copy.deepcopy(run.head))
    if run.num_classes is None:
        return Branch(encoder, nn.Identity())
    with seeded(derive_seed(run.config.seed, run.index)):
        return Branch(encoder, MLPHead(run.features, run.num_classes))


def train(branch: Branch, run: Run, loader: Loader, val_loader: Loader | None) -> list[dict[str, float]]:
    """Train the modules of a branch that the recipe names, in place, and leave it with the weights of the best epoch.

    The best epoch is the one with the highest validation accuracy, adversarial where there is an attack; without
    validation images, or for a recipe that chooses no epoch, it is the last.

    Args:
        branch: The branch, which comes back in evaluation mode with its encoder frozen.
        run: Settings of the run.
        loader: Loader that yields `(images, labels)` and can be iterated more than once.
        val_loader: Loader of the images that the epoch is chosen by; None keeps the last epoch.

    Returns:
        One record per epoch: the number of updates so far, learning rates, loss, adversarial and benign training
        accuracy, validation accuracies.

    Raises:
        InputError: If a batch does not fit or there is none.
        TrainingError: If the loss is not finite; the last checkpoint stays intact.
        CheckpointError: If the run to resume cannot be read or was another.
    """
    branch.requires_grad_(False)
    for name in run.recipe.trained:
        branch.get_submodule(name).requires_grad_(True)
    history = _Loop(branch, run, loader, val_loader).run_all()
    branch.encoder.requires_grad_(False)
    branch.head.requires_grad_(True)
    return history


def rate_factor(schedule: Schedule, *, epoch: int, progress: float) -> float:
    """Return the learning rate as a share of its peak.

    Args:
        schedule: `"cosine"` decays to zero over the run; `"exponential"` takes 0.96 per epoch; `"onecycle"` rises from
            1/25 for the first 30 % of the run and then decays to zero, both along half a cosine.
        epoch: Number of the epoch, from zero.
        progress: Share of the run that is done.

    References:
        Smith, Topin, Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates, 2018,
        arXiv 1708.07120 (one cycle).
    """
    if schedule == "exponential":
        return 0.96**epoch
    if schedule == "onecycle":
        return _one_cycle(min(progress, 1))
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def _one_cycle(progress: float) -> float:
    if progress < _WARM_UP:
        return _FIRST_RATE + (1 - _FIRST_RATE) * 0.5 * (1 - math.cos(math.pi * progress / _WARM_UP))
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))


@contextmanager
def _explaining_single_images(branch: Branch, images: Tensor) -> Iterator[None]:
    """Say what to do where BatchNorm fails on a batch of one image, most often the rest of a data set.

    Raises:
        InputError: In the place of torch's error.
    """
    try:
        yield
    except ValueError as error:
        if len(images) > 1 or not any(isinstance(m, _BatchNorm) and m.training for m in branch.modules()):
            raise
        raise InputError(
            "the loader yielded a batch of one image, on which BatchNorm cannot train. Pass drop_last=True to the "
            "DataLoader, or a batch_size that leaves no single image over."
        ) from error


class _ObjectiveModule(nn.Module):
    """Evaluates the objective inside one forward call, which is what DistributedDataParallel synchronises."""

    def __init__(self, branch: Branch, objective: Objective) -> None:
        super().__init__()
        self.branch = branch
        self.objective = objective

    def forward(self, *batch: Any) -> ObjectiveOutput:
        return self.objective(self.branch, Batch(*batch))


_Images = tuple[Tensor, Tensor, Tensor | None]
"""Images, labels and static adversarial examples of a batch."""


def _groups(batches: Iterator[_Images], size: int) -> Iterator[Iterator[_Images]]:
    """Iterate over groups of batches, each of which is read before the next; the last may be smaller."""
    for first in batches:
        yield chain((first,), islice(batches, size - 1))


class _Meter:
    """Mean loss and training accuracies of an epoch or an update so far."""

    def __init__(self) -> None:
        self.total_loss, self.seen = 0.0, 0
        self.adversarial, self.benign = Count(0, 0), Count(0, 0)

    @classmethod
    def of(cls, output: ObjectiveOutput, loss: float, labels: Tensor) -> _Meter:
        meter = cls()
        meter.total_loss, meter.seen = loss * len(labels), len(labels)
        if output.adversarial_logits is not None:
            meter.adversarial = correct_count(output.adversarial_logits.argmax(1), labels)
        if output.benign_logits is not None:
            meter.benign = correct_count(output.benign_logits.argmax(1), labels)
        return meter

    def add(self, other: _Meter) -> None:
        self.total_loss, self.seen = self.total_loss + other.total_loss, self.seen + other.seen
        self.adversarial, self.benign = self.adversarial + other.adversarial, self.benign + other.benign

    def postfix(self) -> dict[str, str]:
        rates = {"adversarial": self.adversarial, "clean": self.benign}
        shown = {name: f"{count.rate:.1%}" for name, count in rates.items() if count.total}
        return {"loss": f"{self.total_loss / self.seen:.3f}", **shown}

    def record(self) -> dict[str, float]:
        record = {"loss": self.total_loss / self.seen}
        if self.benign.total:
            record["benign_accuracy"] = self.benign.rate
        if self.adversarial.total:
            record["adversarial_accuracy"] = self.adversarial.rate
        return record


class _Loop:
    """The parts of one run, shared by the steps of the loop."""

    def __init__(self, branch: Branch, run: Run, loader: Loader, val_loader: Loader | None) -> None:
        self.run, self.recipe, self.config, self.attack = run, run.recipe, run.config, run.attack
        self.accelerator = make_accelerator(run.config.seed)
        self.device = self.accelerator.device
        self.branch = branch.to(self.device)
        inner = self.recipe.inner
        self.targets = None if inner is None else inner.targets(self.branch)  # before anything is trained or resumed
        self.public = public_features(self.branch) if self.recipe.needs_public_features else None
        self.static = run.static
        optimizer = self._optimizer()
        self.module: Any = self.accelerator.prepare_model(_ObjectiveModule(branch, self.recipe.objective))
        aligned = loader if self.static is None else self.static.prepare(loader)
        self.loader = prepare_loader(self.accelerator, aligned)
        chosen_by = val_loader if self.recipe.choose_epoch else None
        self.val_loader = None if chosen_by is None else prepare_loader(self.accelerator, chosen_by)
        self.state = TrainingState(branch=self.branch, optimizer=optimizer, batches=num_batches(self.loader))
        self.step = 0
        self.epochs = self.recipe.epochs(self.config.epochs, self._updates())
        self.fingerprint = run.fingerprint(epochs=self.epochs, images=num_images(loader))
        self.reporter = Reporter(run.callbacks, run.stage, run.branch, self.epochs, self.accelerator)

    def _optimizer(self) -> torch.optim.Optimizer:
        rates = self.run.rates
        parts = (("lr", self.branch.encoder, rates.lr), ("head_lr", self.branch.head, rates.head_lr))
        trained = [(name, [p for p in part.parameters() if p.requires_grad], peak) for name, part, peak in parts]
        groups = [
            {"name": name, "params": params, "peak": peak, "lr": peak} for name, params, peak in trained if params
        ]
        return torch.optim.Adam(groups, weight_decay=rates.weight_decay)

    def _updates(self) -> int | None:
        """Return the number of updates in an epoch, or None where it is not known yet."""
        batches = self.state.batches
        return None if batches is None else math.ceil(batches / self.config.gradient_accumulation_steps)

    def _rates(self) -> dict[str, float]:
        return {group["name"]: group["lr"] for group in self.state.optimizer.param_groups}

    def run_all(self) -> list[dict[str, float]]:
        folder, index = self.run.checkpoint_dir, self.run.index
        start = self.state.resume(folder, self.fingerprint) if self.run.resume and folder else 0
        self.step = int(self.state.history[-1]["step"]) if self.state.history else 0
        self.reporter.tell("on_stage_begin", self.step, {}, self.state.history)
        batches = self.state.batches
        total, done = (self.epochs * batches, start * batches) if batches else (None, 0)
        shown = self.run.progress and self.accelerator.is_main_process
        with stage(self.run.name, total=total, done=done, shown=shown) as bar:
            for epoch in range(start, self.epochs):
                if self.reporter.is_asked_to_stop() and self.state.history:
                    break
                seed = derive_seed(self.config.seed, index, epoch, self.accelerator.process_index)
                with seeded(seed):
                    record = self._train_epoch(epoch, seed, bar)
                    if self.val_loader is not None:
                        seed = derive_seed(self.config.seed, index)
                        record |= validate(self.branch, self.run, self.val_loader, self.accelerator, seed=seed)
                self.state.record(epoch, record)
                self._save(epoch)
                self.reporter.tell("on_epoch_end", self.step, record, self.state.history)
        self.state.install_best(self.accelerator.num_processes)
        if self.device.type != "cpu":  # on the CPU it would only collect garbage, which takes longer than a small epoch
            self.accelerator.free_memory()
        return self.state.history

    def _train_epoch(self, epoch: int, seed: int, bar: Stage) -> dict[str, float]:
        generator = torch.Generator(self.device).manual_seed(seed)
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)
        meter, batches, accumulated = _Meter(), 0, self.config.gradient_accumulation_steps
        for update, group in enumerate(_groups(self._batches(generator), accumulated)):
            self._set_rates(epoch, update)
            summed, full = _Meter(), 0
            for images, labels, static in group:
                self._train_mode()
                full = full or accumulated * len(labels)
                output, loss = self._backward(
                    images, labels, static, generator, epoch, batches, share=len(labels) / full
                )
                counted = _Meter.of(output, loss, labels)
                summed.add(counted)
                meter.add(counted)
                batches += 1
                bar.advance({**meter.postfix(), "epoch": f"{epoch + 1}/{self.epochs}"})
            self._step(full / summed.seen)
            self.reporter.tell("on_step_end", self.step, {**self._rates(), **summed.record()}, self.state.history)
        if not meter.seen:
            raise InputError("the loader is empty: it yielded no batch. Pass at least one labelled image.")
        if not all(bool(torch.isfinite(weight).all()) for weight in self.branch.parameters()):
            # It broke in the last step, which no later loss has shown.
            self._fail("a weight is not finite", epoch, batches - 1)
        self.state.batches = batches
        return {"step": self.step, **self._rates(), **meter.record()}

    def _batches(self, generator: torch.Generator) -> Iterator[_Images]:
        """Iterate over images, labels and static adversarial examples, augmented alike where the recipe asks for it."""
        read = partial(self.run.batches, device=self.device)
        augmentation = self.recipe.augmentation
        batches: Iterator[_Images]
        if self.static is None:
            batches = ((images, labels, None) for images, labels in read(self.loader))
        else:
            batches = iter(self.static.batches(self.loader, read, generator))
        for images, labels, static in batches:
            if augmentation is not None:
                images, static = augment_pair(augmentation, images, static, generator)
            yield images, labels, static

    def _backward(
        self,
        images: Tensor,
        labels: Tensor,
        static: Tensor | None,
        generator: torch.Generator,
        epoch: int,
        batch: int,
        *,
        share: float,
    ) -> tuple[ObjectiveOutput, float]:
        """Attack a batch and add its share of the gradients of an update."""
        attacked, targets = self._attack(images, labels, generator)
        public = self._public_features(images, labels)
        # A context of its own: in older torch autocast caches the weights that were cast without gradients, as for
        # the targets, and they would have none here.
        with autocast(self.device, self.config.precision), _explaining_single_images(self.branch, images):
            output: ObjectiveOutput = self.module(images, attacked, labels, targets, static, public)
        loss = output.loss.item()
        if not math.isfinite(loss):
            self._fail(f"the loss is {loss}", epoch, batch)
        if batch % self.config.gradient_accumulation_steps == 0:  # here, since an objective may leave gradients too
            self.state.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(output.loss * share)  # which is 1 where nothing is accumulated
        return output, loss

    def _step(self, scale: float) -> None:
        """Update the weights by the gradients of a group, which are too small where the group was not full."""
        if scale != 1:
            for group in self.state.optimizer.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        weight.grad.mul_(scale)
        self.state.optimizer.step()
        self.step += 1

    def _attack(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inner = self.recipe.inner
        if inner is None or self.attack is None or self.targets is None:
            return images, labels
        attack = replace(self.attack, loss_fn=inner.loss)
        with autocast(self.device, self.config.precision):
            targets = self.targets(self.branch, images, labels)
            return attack(inner.model(self.branch), images, targets, generator=generator), targets

    def _public_features(self, images: Tensor, labels: Tensor) -> Tensor | None:
        if self.public is None:
            return None
        with autocast(self.device, self.config.precision):
            return self.public(self.branch, images, labels)

    def _train_mode(self) -> None:
        self.branch.eval()
        for name in self.recipe.trained:
            self.branch.get_submodule(name).train()

    def _set_rates(self, epoch: int, update: int) -> None:
        updates = self._updates()
        # The length of some loaders is known only after the first pass; until then the rate stays as it begins.
        progress = (epoch + (update / updates if updates else 0)) / self.epochs
        factor = rate_factor(self.run.rates.schedule, epoch=epoch, progress=progress)
        for group in self.state.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def _save(self, epoch: int) -> None:
        if self.run.checkpoint_dir is None:
            return
        if self.accelerator.is_main_process:
            self.state.save(self.run.checkpoint_dir, epoch, self.fingerprint)
        self.accelerator.wait_for_everyone()

    def _fail(self, what: str, epoch: int, batch: int) -> None:
        last = newest(self.run.checkpoint_dir)
        kept = f"The last good checkpoint is {last}." if last else "No checkpoint was kept: pass checkpoint_dir."
        raise TrainingError(
            f"{self.run.name}: {what} at epoch {epoch + 1}, batch {batch + 1}. {kept} "
            f'Lower lr (now {self.run.rates.lr:g}), or set precision="fp32".'
        )
