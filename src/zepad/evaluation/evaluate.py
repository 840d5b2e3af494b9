"""`evaluate`: one model, some data, several attackers, one report."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import checked
from ..config import is_integer, require
from ..errors import CheckpointError, EvaluationWarning, InputError
from ..inputs import check_reiterable
from ..modes import evaluating, is_bf16
from ..progress import stage
from ..types import ImageModel, Loader
from .attackers import Attacker
from .batches import class_names, repeated_batches
from .cost import total_cost
from .crafting import Broken, attack_batch, batch_seed, check_budget_kept
from .predictions import Benign, Predictions, device_of, predict_benign, random_state_kept, right_images
from .report import Check, Cost, EvalReport, Sample
from .results import (
    Run,
    attack_result,
    benign_accuracy,
    benign_branches,
    confidence_histograms,
    false_positive_rate,
    score_histogram,
    score_range,
    worst_cases,
)
from .resuming import check_resumable, fingerprint_of
from .samples import draw_samples
from .sanity import check_model, check_results
from .state import Fingerprint, Part, State

_PROBE_IMAGES = 64  # images of the sanity checks
_PAPER_EPS = 10 / 255


@checked
def evaluate(
    model: ImageModel,
    loader: Loader,
    attackers: Sequence[Attacker],
    *,
    name: str = "model",
    data: str = "data",
    folder: str | Path | None = None,
    resume: bool = False,
    sanity: bool = True,
    samples: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> EvalReport:
    """Measure what a classifier withstands.

    Every attacker attacks every image, unless it is one that goes on with those that others left
    (`Attacker.remaining`). Any map from images to logits can be evaluated. A `ZePAD` or a `BranchEnsemble`
    is scored branch by branch too, and its detector is measured. The model is left as found and evaluated in evaluation
    mode, on the device it is on.

    Args:
        model: Images `(N, C, H, W)` in [0, 1] to logits `(N, K)`.
        loader: Yields `(images, labels)`, the same in the same order each time: do not shuffle.
        attackers: The attacks to run, each with its target and its threat model.
        name: Name of the model, shown in the report.
        data: Name of the data, shown in the report.
        folder: Folder that keeps every attacked image and decision as it comes, so that an interrupted evaluation can
            go on.
        resume: Go on from `folder`; model, data, attackers, seed and version of the library must be the same.
        sanity: Check the evaluation itself (`zepad.evaluation.check_model`); a failed check is a warning.
        samples: Number of images per attacker shown in the report: the first ones of the data.
        seed: Seed of the attacks and the bootstrap.
        progress: Show a progress bar.

    Returns:
        The report; `zepad.evaluation.save_report(report, folder)` writes it as HTML, Markdown, JSON and PNG.

    Raises:
        InputError: If a batch does not fit, the loader is empty or changes its order, two attackers share a name, no
            image is classified right even before an attack, an attack leaves its own ball, or a logit is NaN.
        ConfigError: If a setting is out of range, or `resume` lacks its folder.
        CheckpointError: If `folder` holds the evaluation of another model, data, attackers or seed, which is found
            before the model is run; or a file there is damaged or of another evaluation.

    Warns:
        EvaluationWarning: For each sanity check that failed.

    Examples:
        >>> import torch
        >>> from zepad.attacks import PGD
        >>> from zepad.evaluation import Attacker, evaluate
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> images = torch.rand(8, 3, 2, 2)
        >>> pgd = Attacker(name="PGD-3", threat_model="white-box", attack=PGD(eps=8 / 255, steps=3))
        >>> loader = [(images, model(images).argmax(1))]
        >>> report = evaluate(model, loader, [pgd], sanity=False, progress=False)
        >>> report.benign_accuracy.value
        1.0

    References:
        Carlini et al., On Evaluating Adversarial Robustness, arXiv 1902.06705; Croce and Hein, Reliable Evaluation of
        Adversarial Robustness, ICML 2020, arXiv 2003.01690.
    """
    _check_arguments(loader, attackers, folder, resume=resume, samples=samples, seed=seed)
    start = time.perf_counter()
    with evaluating(model), random_state_kept(model):
        if folder is not None:
            check_resumable(Path(folder), model, loader, attackers, seed=seed, resume=resume)
        benign = predict_benign(model, loader)
        count = len(benign.labels)
        fingerprint = fingerprint_of(model, benign.digests, count, attackers, seed=seed, benign=benign)
        state = None if folder is None else State.open(Path(folder), fingerprint, resume=resume)
        runs = _run(model, loader, benign, attackers, state, samples=samples, seed=seed, progress=progress)
        checks: list[Check] = []
        if sanity:
            images, labels = right_images(model, loader, benign, limit=_PROBE_IMAGES)
            checks += check_model(model, images, labels, eps=_largest_eps(attackers), seed=seed)
    ends = score_range(benign, runs)
    kept = sum(run.kept_seconds for run in runs)  # what an interrupted evaluation paid is part of the time
    results = [
        attack_result(benign, attacker, run, seed=seed, score_range=ends)
        for attacker, run in zip(attackers, runs, strict=True)
    ]
    if sanity:
        checks += check_results(results)
    report = EvalReport(
        model=name,
        data=data,
        images=len(benign.labels),
        classes=class_names(loader, model),
        benign_accuracy=benign_accuracy(benign),
        benign_branches=benign_branches(benign),
        false_positive_rate=false_positive_rate(benign),
        threshold=benign.threshold,
        attacks=tuple(results),
        worst=worst_cases(benign, attackers, runs),
        checks=tuple(checks),
        confidences=confidence_histograms(benign, benign.predictions),
        samples=tuple(sample for run in runs for sample in run.samples),
        provenance=_provenance(model, attackers, fingerprint, seconds=time.perf_counter() - start + kept),
        scores=score_histogram(benign.predictions, ends),
        score_range=ends,
        training=_learning_curves(model),
    )
    for check in report.warnings:
        warnings.warn(f"{name}: {check.name}: {check.detail}", EvaluationWarning, stacklevel=3)
    return report


def _learning_curves(model: ImageModel) -> tuple[dict[str, Any], ...]:
    """Return the records of the model's training; none where it has none, or what it has was not written by zepad."""
    try:
        return tuple(dict(record) for record in getattr(model, "history", ()))
    except CheckpointError:
        return ()


def _check_arguments(
    loader: Loader, attackers: Sequence[Attacker], folder: str | Path | None, *, resume: bool, samples: int, seed: int
) -> None:
    check_reiterable(loader)
    names = [attacker.name for attacker in attackers]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"every attacker needs a name of its own; got {', '.join(repeated)} more than once.")
    require(is_integer(samples) and samples >= 0, "samples", samples, "an integer of zero or more")
    require(is_integer(seed) and seed >= 0, "seed", seed, "an integer of zero or more")
    require(not resume or folder is not None, "folder", folder, "the one to resume from")


def _run(
    model: ImageModel,
    loader: Loader,
    benign: Benign,
    attackers: Sequence[Attacker],
    state: State | None,
    *,
    samples: int,
    seed: int,
    progress: bool,
) -> list[Run]:
    """Let every attacker attack every batch, batch by batch, so that no more than one batch is in memory."""
    predictions: list[list[Predictions]] = [[] for _ in attackers]
    costs: list[list[Cost]] = [[] for _ in attackers]
    kept: list[float] = [0.0 for _ in attackers]
    shown: list[list[Sample]] = [[] for _ in attackers]
    position = 0
    total = len(benign.digests) * len(attackers)
    with stage("attackers", total=total, shown=progress) as bar:
        for batch, (images, labels) in enumerate(repeated_batches(loader, device_of(model), benign.digests)):
            broken = Broken()
            for i, attacker in enumerate(attackers):
                bar.rename(f"attacker {i + 1} of {len(attackers)}: {attacker.name}")
                attacked, predicted, cost, was_kept = _attack(
                    attacker, i, model, benign, batch, images, labels, broken, state, seed
                )
                broken.add(attacker, attacked, predicted, labels)
                predictions[i].append(predicted)
                costs[i].append(cost)
                kept[i] += cost.seconds if was_kept else 0.0
                wanted = samples - len(shown[i])
                shown[i] += draw_samples(attacker, benign, predicted, images, attacked, position=position, count=wanted)
                bar.advance()
            position += len(labels)
    return [
        Run(predictions=Predictions.join(parts), cost=total_cost(paid), samples=tuple(drawn), kept_seconds=seconds)
        for parts, paid, drawn, seconds in zip(predictions, costs, shown, kept, strict=True)
    ]


def _attack(
    attacker: Attacker,
    number: int,
    model: ImageModel,
    benign: Benign,
    batch: int,
    images: Tensor,
    labels: Tensor,
    broken: Broken,
    state: State | None,
    seed: int,
) -> tuple[Tensor, Predictions, Cost, bool]:
    """Attack one batch and ask the model, or take both from what an interrupted evaluation kept; say which."""
    part = Part(attacker=attacker.name, number=number, batch=batch, images=images, digest=benign.digests[batch])
    kept = None if state is None else _kept(state, part, attacker, benign)
    if kept is not None:
        return *kept, True
    attacking = batch_seed(seed, attacker, batch)
    attacked, predicted, cost = attack_batch(attacker, model, images, labels, broken, seed=attacking)
    if state is not None:
        state.write(part, {"images": attacked, **predicted.tensors()}, cost)
    return attacked, predicted, cost, False


def _kept(state: State, part: Part, attacker: Attacker, benign: Benign) -> tuple[Tensor, Predictions, Cost] | None:
    """Return what an interrupted evaluation kept of one attacker on one batch, held to the budget once more."""
    kept = state.read(part, benign.predictions.tensors())
    if kept is None:
        return None
    tensors, cost = kept
    attacked = tensors.pop("images").to(part.images.device)
    try:
        check_budget_kept(attacker, part.images, attacked)
        return attacked, Predictions.from_tensors(tensors), cost
    except InputError as error:
        raise state.damaged(part, str(error)) from error


def _provenance(
    model: ImageModel, attackers: Sequence[Attacker], fingerprint: Fingerprint, *, seconds: float
) -> dict[str, Any]:
    device = torch.device(device_of(model) or "cpu")
    return {
        "model_digest": fingerprint.model_digest,
        "weights_digest": fingerprint.weights_digest,
        "threshold": fingerprint.threshold,
        "data_digest": fingerprint.data_digest,
        "attackers_digest": fingerprint.attackers_digest,
        "batches": fingerprint.batches,
        "seed": fingerprint.seed,
        "zepad": fingerprint.library_version,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": str(device),
        "attacks_in_bfloat16": sum(is_bf16(device, attacker.precision) for attacker in attackers),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
    }


def _largest_eps(attackers: Sequence[Attacker]) -> float:
    """Return the budget of the sanity checks: the largest L-infinity one that was evaluated, else the paper's."""
    return max((attacker.attack.eps for attacker in attackers if attacker.attack.norm == "linf"), default=_PAPER_EPS)
