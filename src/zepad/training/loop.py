"""The one training loop: every objective, benign or adversarial, runs through it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..attacks import PGD
from ..config import Precision, _TrainingConfig
from ..digests import digest_tensor
from ..encoders import Encoder
from ..errors import CheckpointError, InputError, TrainingError
from ..functional import Count, correct_count
from ..inputs import batches_in, check_images, check_labels, check_reiterable, has_labels, images_of, split_batch
from ..modules import Branch, MLPHead
from ..objectives import CROSS_ENTROPY, Batch, Inner, Objective, Outcome
from ..seeding import derive_seed, seeded
from ..types import Loader
from .checkpoints import load_latest, newest, save_epoch
from .loaders import hold_out, images_in

Labeller = Callable[[Tensor], Tensor]
"""Images `(N, C, H, W)` to labels, int64 `(N,)`."""

UNLABELLED = -1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is minimised, against which attack, and for how long when the config leaves the length open.

    Attributes:
        objective: Maps a branch and a batch to a loss.
        name: Tells this objective with its settings from others, for resuming.
        attack: Budget and steps of the inner attack; None trains on clean images. Validation attacks with it as it is,
            training under the loss, model and targets of `inner`.
        inner: What the inner attack maximises.
        trained: Modules that are trained, as named in `branch.named_modules()`; all others stay as they are, BatchNorm
            statistics included, in evaluation mode.
        choose_epoch: False keeps the last epoch and validates nothing.
        min_updates: Updates that `epochs=None` provides for.
        min_epochs: Passes that `epochs=None` makes at least.
    """

    objective: Objective
    name: str
    attack: PGD | None
    inner: Inner = CROSS_ENTROPY
    trained: tuple[str, ...] = ("encoder", "head")
    choose_epoch: bool = True
    min_updates: int
    min_epochs: int

    def epochs(self, configured: int | None, batches: int | None) -> int:
        """Return the number of passes: as configured, else enough for `min_updates`, at least `min_epochs`.

        Rates and schedules are measured in updates, and a small data set has few of them in a pass.
        """
        if configured is not None:
            return configured
        return max(self.min_epochs, math.ceil(self.min_updates / batches) if batches else 0)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One branch's training: the recipe and where it is applied.

    Attributes:
        name: Of the run, in progress bars, errors and checkpoints, such as `"harden victim"`.
        index: Distinguishes the seeds of the runs of one model.
        recipe: What to minimise.
        config: Rates, length, seed and precision.
        features: Width of the encoder's output.
        channels: Of the images.
        num_classes: Bound of the labels; None where the loader has none and none are needed.
        head: Starts as a copy of this one instead of a fresh `MLPHead`.
        labeller: Labels images `(N, C, H, W)` whose loader does not.
        checkpoint_dir: Where this run keeps its epochs, or None.
        resume: Go on from the newest epoch there.
        progress: Show a progress bar.
    """

    name: str
    index: int
    recipe: Recipe
    config: _TrainingConfig
    features: int
    channels: int
    num_classes: int | None
    head: nn.Module | None = None
    labeller: Labeller | None = None
    checkpoint_dir: Path | None = None
    resume: bool = False
    progress: bool = True


class _Objective(nn.Module):
    """Evaluates the objective inside one forward call, which is what DistributedDataParallel synchronises."""

    def __init__(self, branch: Branch, objective: Objective) -> None:
        super().__init__()
        self.branch = branch
        self.objective = objective

    def forward(self, images: Tensor, adversarial: Tensor, labels: Tensor, targets: Tensor) -> Outcome:
        return self.objective(self.branch, Batch(images, adversarial, labels, targets))


def make_accelerator(seed: int) -> Accelerator:
    """Return an Accelerator that splits every batch of the loader over the processes.

    The number of updates and the batch of each update are then the same for any number of processes.
    """
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    # Told to use the CPU, Accelerate also joins processes that have nothing else; left alone it would not.
    accelerator = Accelerator(cpu=not accelerated, kwargs_handlers=[DistributedDataParallelKwargs(static_graph=True)])
    accelerator.dataloader_config = DataLoaderConfiguration(
        split_batches=accelerator.num_processes > 1, use_seedable_sampler=True, data_seed=seed
    )
    return accelerator


def training_device() -> torch.device:
    """Return the device that training uses."""
    device: torch.device = make_accelerator(0).device
    return device


def autocast(device: torch.device, precision: Precision) -> Any:
    """Return the autocast context of a precision; `"auto"` is bfloat16 where the hardware computes in it."""
    if precision == "fp32" or (precision == "auto" and not has_native_bf16(device)):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # since torch 2.10
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def prepare_loader(accelerator: Accelerator, loader: Loader) -> Loader:
    """Shard a DataLoader over the processes; any other iterable is read as it is by a single process.

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
            f"training on {accelerator.num_processes} processes needs a torch DataLoader, which can be "
            f"split between them; "
            f"got {type(loader).__name__}."
        )
    return loader


def labelled_batches(
    loader: Loader,
    device: torch.device,
    *,
    channels: int,
    num_classes: int | None,
    labeller: Labeller | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over checked batches on the device.

    Args:
        loader: Yields `(images, labels)`, or images alone where a `labeller` is given.
        device: Where batches go.
        channels: Of the images.
        num_classes: Bound of the labels, where known.
        labeller: Labels the images of a loader that does not.

    Raises:
        InputError: If an image or label does not fit.
    """
    for batch in loader:
        if labeller is not None and not has_labels(batch):
            images = check_images(images_of(batch), channels=channels).to(device)
            yield images, labeller(images)
            continue
        images, labels = split_batch(batch)
        checked = check_images(images, channels=channels)
        targets = check_labels(labels, count=len(checked), num_classes=num_classes)
        yield checked.to(device), targets.to(device)


def unlabelled(images: Tensor) -> Tensor:
    """Label images as what they are where no label is used: all `UNLABELLED`, of which a loss on labels would raise."""
    return torch.full((len(images),), UNLABELLED, device=images.device)


def train_branch(
    encoder: Encoder, run: Run, loader: Loader, val_loader: Loader | None
) -> tuple[Branch, list[dict[str, float]]]:
    """Train an encoder in place together with a fresh head, and leave both with the weights of the best epoch.

    The best epoch is the one with the highest validation accuracy, adversarial where there is an attack; without
    validation images it is the last.

    Args:
        encoder: Trained in place, so callers pass a copy. It comes back frozen and in evaluation mode.
        run: What to do.
        loader: Yields `(images, labels)`.
        val_loader: The same, for choosing the epoch; None splits `loader` where it can be split.

    Returns:
        The branch, and one record per epoch: loss, adversarial and benign training accuracy, validation accuracies.

    Raises:
        InputError: If a batch does not fit or there is none.
        TrainingError: If the loss is not finite; the last checkpoint stays intact.
        CheckpointError: If the run to resume cannot be read or was another.
    """
    check_reiterable(loader)
    if val_loader is None:
        loader, val_loader = hold_out(loader, run.config.val_fraction, run.config.seed)
    branch = Branch(encoder, _starting_head(run))
    return branch, train_parts(branch, run, loader, val_loader)


def _starting_head(run: Run) -> nn.Module:
    if run.head is not None:
        return copy.deepcopy(run.head)
    if run.num_classes is None:
        return nn.Identity()  # features are all that such a method looks at
    with seeded(derive_seed(run.config.seed, run.index)):
        return MLPHead(run.features, run.num_classes)


def train_parts(branch: Branch, run: Run, loader: Loader, val_loader: Loader | None) -> list[dict[str, float]]:
    """Train the modules of a branch that the recipe names, in place.

    Args:
        branch: Comes back in evaluation mode, its encoder frozen.
        run: What to do.
        loader: Yields `(images, labels)`.
        val_loader: The same, for choosing the epoch; None keeps the last.

    Returns:
        One record per epoch, as `train_branch`.

    Raises:
        InputError: As `train_branch`.
        TrainingError: As `train_branch`.
        CheckpointError: As `train_branch`.
    """
    branch.requires_grad_(False)
    for name in run.recipe.trained:
        branch.get_submodule(name).requires_grad_(True)
    history = _Training(branch, run, loader, val_loader).run_all()
    branch.encoder.requires_grad_(False)
    branch.head.requires_grad_(True)
    return history


class _Training:
    """The state of one run, so that the loop reads as what it does."""

    def __init__(self, branch: Branch, run: Run, loader: Loader, val_loader: Loader | None) -> None:
        self.spec = run
        self.accelerator = make_accelerator(run.config.seed)
        self.device = self.accelerator.device
        self.branch = branch.to(self.device)
        config, self.recipe = run.config, run.recipe
        groups = [
            {"params": [p for p in part.parameters() if p.requires_grad], "peak": peak}
            for part, peak in ((branch.encoder, config.lr), (branch.head, config.head_lr))
        ]
        groups = [{**group, "lr": group["peak"]} for group in groups if group["params"]]
        self.optimizer = torch.optim.Adam(groups, weight_decay=config.weight_decay)
        self.targets = self.recipe.inner.targets(self.branch)  # before anything is trained or resumed
        self.module: Any = self.accelerator.prepare_model(_Objective(branch, self.recipe.objective))
        self.loader = prepare_loader(self.accelerator, loader)
        chosen_by = val_loader if self.recipe.choose_epoch else None
        self.val_loader = None if chosen_by is None else prepare_loader(self.accelerator, chosen_by)
        self.batches = batches_in(self.loader)
        self.epochs = self.recipe.epochs(config.epochs, self.batches)
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None
        self.fingerprint = {
            **config.to_dict(),
            "run": run.name,
            "objective": self.recipe.name,
            "trained": list(self.recipe.trained),
            "num_classes": run.num_classes,
            # A run goes on under the same given head alone.
            "head": None if run.head is None else {k: digest_tensor(v) for k, v in run.head.state_dict().items()},
            "total_epochs": self.epochs,
            "images": images_in(loader),
        }

    def run_all(self) -> list[dict[str, float]]:
        start = self._resume() if self.spec.resume and self.spec.checkpoint_dir else 0
        bar = tqdm(
            total=self.epochs * self.batches if self.batches else None,
            initial=start * self.batches if self.batches else 0,
            desc=self.spec.name,
            unit="batch",
            disable=not (self.spec.progress and self.accelerator.is_main_process),
        )
        with bar:
            for epoch in range(start, self.epochs):
                seed = derive_seed(self.spec.config.seed, self.spec.index, epoch, self.accelerator.process_index)
                with seeded(seed):
                    record = self._train_epoch(epoch, seed, bar)
                    record.update(self._validate(seed=derive_seed(self.spec.config.seed, self.spec.index)))
                self.history.append(record)
                self._keep_best(epoch, record)
                self._save(epoch)
        self._install_best()
        self.accelerator.free_memory()
        return self.history

    def _train_epoch(self, epoch: int, seed: int, bar: Any) -> dict[str, float]:
        config = self.spec.config
        generator = torch.Generator(self.device).manual_seed(seed)
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)
        total_loss, seen = 0.0, 0
        adversarial, benign = Count(0, 0), Count(0, 0)
        batch_index = -1
        batches = self._batches(self.loader)
        for batch_index, (images, labels) in enumerate(batches):
            self._set_rates(epoch, batch_index)
            self._train_mode()
            attacked, targets = self._attack(images, labels, generator)
            # A context of its own: in older torch autocast caches the weights that were cast without gradients, as for
            # the targets, and they would have none here.
            with autocast(self.device, config.precision):
                outcome: Outcome = self.module(images, attacked, labels, targets)
            loss = outcome.loss.item()
            if not math.isfinite(loss):
                self._fail(f"the loss is {loss}", epoch, batch_index)
            self.optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(outcome.loss)
            self.optimizer.step()
            total_loss, seen = total_loss + loss * len(images), seen + len(images)
            if outcome.adversarial_logits is not None:
                adversarial += correct_count(outcome.adversarial_logits.argmax(1), labels)
            if outcome.benign_logits is not None:
                benign += correct_count(outcome.benign_logits.argmax(1), labels)
            rates = {"adversarial": adversarial, "clean": benign}
            bar.set_postfix(
                epoch=f"{epoch + 1}/{self.epochs}",
                loss=f"{total_loss / seen:.3f}",
                **{name: f"{count.rate:.1%}" for name, count in rates.items() if count.total},
            )
            bar.update()
        if not seen:
            raise InputError("the loader is empty: it yielded no batch. Pass at least one labelled image.")
        if not all(bool(torch.isfinite(weight).all()) for weight in self.branch.parameters()):
            self._fail("a weight is not finite", epoch, batch_index)  # the last step broke it; no loss has shown it yet
        self.batches = batch_index + 1
        record = {"loss": total_loss / seen}
        if benign.total:
            record["benign_accuracy"] = benign.rate
        if adversarial.total:
            record["adversarial_accuracy"] = adversarial.rate
        return record

    def _batches(self, loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
        spec = self.spec
        return labelled_batches(
            loader, self.device, channels=spec.channels, num_classes=spec.num_classes, labeller=spec.labeller
        )

    def _attack(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.recipe.attack is None:
            return images, labels
        inner = self.recipe.inner
        attack = replace(self.recipe.attack, loss_fn=inner.loss)
        with autocast(self.device, self.spec.config.precision):
            targets = self.targets(self.branch, images, labels)
            return attack(inner.model(self.branch), images, targets, generator=generator), targets

    def _train_mode(self) -> None:
        self.branch.eval()
        for name in self.recipe.trained:
            self.branch.get_submodule(name).train()

    def _set_rates(self, epoch: int, batch: int) -> None:
        if self.spec.config.schedule == "exponential":
            factor = 0.96**epoch
        else:
            # A loader of unknown length tells its length by ending once; until then the rate stays at its peak.
            done = (epoch + (batch / self.batches if self.batches else 0)) / self.epochs
            factor = 0.5 * (1 + math.cos(math.pi * min(done, 1)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def _validate(self, seed: int) -> dict[str, float]:
        if self.val_loader is None:
            return {}
        spec = self.spec
        generator = torch.Generator(self.device).manual_seed(seed)
        benign, adversarial = Count(0, 0), Count(0, 0)
        self.branch.eval()
        batches = self._batches(self.val_loader)
        for images, labels in batches:
            with autocast(self.device, spec.config.precision):
                benign += self._count(images, labels)
                if self.recipe.attack is not None:
                    adversarial += self._count(
                        self.recipe.attack(self.branch, images, labels, generator=generator), labels
                    )
        if not benign.total:
            raise InputError("val_loader is empty: it yielded no batch. Pass at least one labelled image, or None.")
        rates = {"val_benign_accuracy": benign.rate}
        if self.recipe.attack is not None:
            rates["val_adversarial_accuracy"] = adversarial.rate
        return rates

    def _count(self, images: Tensor, labels: Tensor) -> Count:
        with torch.no_grad():
            predictions = self.branch(images).argmax(1)
        gathered = self.accelerator.gather_for_metrics((predictions, labels))
        return correct_count(*gathered)

    def _keep_best(self, epoch: int, record: dict[str, float]) -> None:
        score = record.get("val_adversarial_accuracy", record.get("val_benign_accuracy"))
        # On a tie the later epoch wins: it has been trained longer.
        if score is not None and (self.best is None or score >= self.best["score"]):
            weights = {key: value.detach().cpu().clone() for key, value in self.branch.state_dict().items()}
            self.best = {"epoch": epoch, "score": score, "weights": weights}

    def _install_best(self) -> None:
        if self.best is not None:
            self.branch.load_state_dict(self.best["weights"])
        if self.accelerator.num_processes > 1:  # BatchNorm statistics are those of the main process everywhere
            self.branch.load_state_dict({k: broadcast(v) for k, v in self.branch.state_dict().items()})
        self.branch.eval()

    def _save(self, epoch: int) -> None:
        if self.spec.checkpoint_dir is None:
            return
        if self.accelerator.is_main_process:
            state = {
                "fingerprint": self.fingerprint,
                "epoch": epoch,
                "batches": self.batches,
                "weights": self.branch.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "history": self.history,
                "best": self.best,
            }
            save_epoch(self.spec.checkpoint_dir, epoch, state)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        assert self.spec.checkpoint_dir is not None
        state = load_latest(self.spec.checkpoint_dir, self.fingerprint)
        if state is None:
            return 0
        try:
            self.branch.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint in {self.spec.checkpoint_dir} is of another architecture: {error}"
            ) from error
        self.history, self.best, self.batches = state["history"], state["best"], state["batches"]
        return int(state["epoch"]) + 1

    def _fail(self, what: str, epoch: int, batch: int) -> None:
        last = newest(self.spec.checkpoint_dir)
        kept = f"The last good checkpoint is {last}." if last else "No checkpoint was kept: pass checkpoint_dir."
        raise TrainingError(
            f"{self.spec.name}: {what} at epoch {epoch + 1}, step {batch + 1}. {kept} "
            f'Lower lr (now {self.spec.config.lr:g}), or set precision="fp32".'
        )
