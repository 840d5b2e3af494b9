"""`evaluate`: one model, some data, several attackers, one report."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._version import __version__
from ..config import is_integer, require
from ..digests import digest_tensor
from ..errors import EvaluationWarning, InputError
from ..functional import attack_success_count, correct_count, fooling_count
from ..functional.precision import accurate
from ..inputs import check_images, check_labels, check_reiterable, split_batch
from ..modules import evaluating
from ..seeding import derive_seed
from ..types import Branched, ImageModel, Loader
from .attackers import Attacker
from .identity import digest, weights_digest
from .report import AttackResult, Cost, EvalReport, RobustRates, Sample
from .sanity import check_model, check_results
from .state import State
from .statistics import Rate, detection

BINS = 20  # of the confidence histograms
_TOLERANCE = 1e-5  # by which rounding may carry an attacked image out of the ball


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What a model says of some images: predictions, confidences and scores, one row per branch, the fused one last."""

    predictions: Tensor  # (B + 1, N)
    confidences: Tensor  # (B + 1, N)
    scores: Tensor | None  # (N,)
    classes: int = 0  # K; not kept on disk

    @property
    def fused(self) -> Tensor:
        return self.predictions[-1]

    @classmethod
    def join(cls, parts: Sequence[_Seen]) -> _Seen:
        scores = [part.scores for part in parts if part.scores is not None]
        return cls(
            predictions=torch.cat([part.predictions for part in parts], dim=1),
            confidences=torch.cat([part.confidences for part in parts], dim=1),
            scores=torch.cat(scores) if scores else None,
        )

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> _Seen:
        return cls(predictions=tensors["predictions"], confidences=tensors["confidences"], scores=tensors.get("scores"))

    def tensors(self) -> dict[str, Tensor]:
        named = {"predictions": self.predictions, "confidences": self.confidences}
        return named if self.scores is None else {**named, "scores": self.scores}


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

    Every attacker attacks every image. Any map from images to logits can be evaluated; a `ZePAD` or an `Ensemble` is
    scored branch by branch too, and its detector is measured. The model is left as found and evaluated in evaluation
    mode, on the device it is on.

    Args:
        model: Images `(N, C, H, W)` in [0, 1] to logits `(N, K)`.
        loader: Yields `(images, labels)`, the same in the same order each time: do not shuffle.
        attackers: Who attacks, knowing what.
        name: Of the model, shown in the report.
        data: Name of the data, shown in the report.
        folder: Keeps every attacked image and decision as it comes, so that an interrupted evaluation can go on.
        resume: Go on from `folder`; what was evaluated must be the same.
        sanity: Check the evaluation itself (`zepad.evaluation.check_model`); a failed check is a warning.
        samples: Images per attacker shown in the report: the first of the data, not chosen.
        seed: Of the attacks and the bootstrap.
        progress: Show a progress bar.

    Returns:
        The report; `report.save(folder)` writes it as HTML, Markdown, JSON and PNG.

    Raises:
        InputError: If a batch does not fit, the loader is empty or changes its order, two attackers share a name, no
            image is classified right even before an attack, an attack leaves its own ball, or a logit is NaN.
        ConfigError: If a setting is out of range, or `resume` lacks its folder.
        CheckpointError: If the evaluation in `folder` was another.

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
    check_reiterable(loader)
    names = [attacker.name for attacker in attackers]
    repeated = sorted({shown for shown in names if names.count(shown) > 1})
    if repeated:
        raise InputError(f"every attacker needs a name of its own; got {', '.join(repeated)} more than once.")
    require(is_integer(samples) and samples >= 0, "samples", samples, "an integer of zero or more")
    require(is_integer(seed) and seed >= 0, "seed", seed, "an integer of zero or more")
    require(not resume or folder is not None, "folder", folder, "the one to resume from")
    start = time.perf_counter()
    with evaluating(model), _random_state_kept(model):
        bench = _Bench(model, loader, seed)
        if not int((bench.benign.fused == bench.labels).sum()):
            raise InputError(
                f"none of the {len(bench.labels)} images is classified right, so no attack can be measured. "
                "Check the labels, and that the model is the one trained for them."
            )
        fingerprint = bench.fingerprint(attackers)
        state = None if folder is None else State.open(Path(folder), fingerprint, resume=resume)
        runs = bench.run(attackers, state, samples, progress)
        checks = list(check_model(model, *bench.probe(), eps=_largest_eps(attackers), seed=seed)) if sanity else []
    results = tuple(bench.result(attacker, run) for attacker, run in zip(attackers, runs, strict=True))
    report = EvalReport(
        model=name,
        data=data,
        images=len(bench.labels),
        classes=bench.classes,
        benign_accuracy=Rate.of(correct_count(bench.benign.fused, bench.labels)),
        benign_branches=bench.branch_rates(bench.benign.predictions == bench.labels),
        false_positive_rate=bench.false_positives(),
        threshold=bench.threshold,
        attacks=results,
        worst=bench.worst(attackers, runs),
        checks=(*checks, *(check_results(results) if sanity else ())),
        confidences=bench.histograms(bench.benign),
        samples=tuple(sample for run in runs for sample in run.samples),
        provenance={
            **fingerprint,
            "zepad": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "device": str(bench.device or "cpu"),
            "threads": torch.get_num_threads(),
            "seconds": round(time.perf_counter() - start, 1),
        },
    )
    for check in report.warnings:
        warnings.warn(f"{name}: {check.name}: {check.detail}", EvaluationWarning, stacklevel=2)
    return report


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Everything one attacker did."""

    seen: _Seen
    cost: Cost
    samples: tuple[Sample, ...]


class _Bench:
    """The model and the data, and what the model says before any attack."""

    def __init__(self, model: ImageModel, loader: Loader, seed: int) -> None:
        self.model, self.loader, self.seed = model, loader, seed
        self.branched = model if isinstance(model, Branched) else None
        self.threshold = self.branched.threshold if self.branched else None
        self.names: tuple[str, ...] = self.branched.branch_names if self.branched else ()
        self.device = _device(model)
        self.classes = _class_names(loader, model)
        self.digests: list[str] = []
        seen, labels = [], []
        for images, targets in self._batches():
            self.digests.append(digest_tensor(images) + digest_tensor(targets))
            seen.append(self.see(images))
            check_labels(targets, count=len(images), num_classes=seen[-1].classes)
            labels.append(targets.cpu())
        if not seen:
            raise InputError("the loader is empty: it yielded no batch. Pass at least one labelled image.")
        self.benign, self.labels = _Seen.join(seen), torch.cat(labels)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            images, labels = split_batch(batch)
            checked = check_images(images)
            targets = check_labels(labels, count=len(checked))
            yield checked.to(self.device), targets.to(self.device)

    def see(self, images: Tensor) -> _Seen:
        """Ask the model once, without gradients."""
        with torch.no_grad():
            if self.branched is None:
                rows = self.model(images)[None]
            else:
                branches = self.branched.branch_logits(images)
                rows = torch.cat([branches, self.branched.fuse(branches)[None]])
        if rows.ndim != 3 or rows.shape[1] != len(images):
            raise InputError(
                f"the model must map images to logits of shape ({len(images)}, K); got {tuple(rows.shape[1:])}. "
                "Evaluate a classifier: put a head on a bare encoder."
            )
        rows = accurate(rows)
        confidences = rows.softmax(dim=-1).amax(dim=-1).float()
        if bool(confidences.isnan().any()):
            raise InputError("the model's logits hold NaN or infinity, so its decisions mean nothing. Mend the model.")
        predictions = rows.argmax(dim=-1)  # a softmax would round close logits to a tie
        scores = None
        if self.branched is not None and self.threshold is not None:
            with torch.no_grad():
                scores = self.branched.score(images).float().cpu()
        return _Seen(
            predictions=predictions.cpu(), confidences=confidences.cpu(), scores=scores, classes=rows.shape[-1]
        )

    def fingerprint(self, attackers: Sequence[Attacker]) -> dict[str, Any]:
        """What an evaluation must agree in to be resumed."""
        described = [(a.name, a.threat_model, a.settings) for a in attackers]
        return {
            "model_digest": _model_digest(self.model, self.benign),
            "weights_digest": weights_digest(self.model) if isinstance(self.model, nn.Module) else None,
            "threshold": self.threshold,
            "data_digest": hashlib.sha256("".join(self.digests).encode()).hexdigest(),
            "attackers_digest": digest(described),
            "batches": len(self.digests),
            "seed": self.seed,
        }

    def run(self, attackers: Sequence[Attacker], state: State | None, samples: int, progress: bool) -> list[_Run]:
        """Attack batch by batch, so that no more than one batch is in memory."""
        seen: list[list[_Seen]] = [[] for _ in attackers]
        costs: list[list[Cost]] = [[] for _ in attackers]
        shown: list[list[Sample]] = [[] for _ in attackers]
        position = 0
        total = len(self.digests) * len(attackers)
        with tqdm(total=total, desc="evaluate", unit="batch", disable=not progress) as bar:
            for index, (images, labels) in enumerate(self._batches()):
                if index >= len(self.digests) or digest_tensor(images) + digest_tensor(labels) != self.digests[index]:
                    raise InputError(_CHANGED)
                for i, attacker in enumerate(attackers):
                    bar.set_postfix_str(attacker.name)
                    attacked, observed, cost = self._attack(attacker, i, index, images, labels, state)
                    wanted = samples - len(shown[i])
                    shown[i] += self._samples(attacker, position, images, attacked, labels, observed, wanted)
                    seen[i].append(observed)
                    costs[i].append(cost)
                    bar.update()
                position += len(labels)
        if position != len(self.labels):
            raise InputError(_CHANGED)
        return [
            _Run(seen=_Seen.join(parts), cost=_total(paid), samples=tuple(pictures))
            for parts, paid, pictures in zip(seen, costs, shown, strict=True)
        ]

    def _attack(
        self, attacker: Attacker, number: int, batch: int, images: Tensor, labels: Tensor, state: State | None
    ) -> tuple[Tensor, _Seen, Cost]:
        kept = None if state is None else state.read(number, batch)
        if kept is not None:
            tensors, cost = kept
            attacked = tensors.pop("images").to(images.device)
            return attacked, _Seen.of(tensors), cost
        name_seed = int.from_bytes(hashlib.sha256(attacker.name.encode()).digest()[:4], "big")
        seed = derive_seed(self.seed, name_seed, batch)
        generator = torch.Generator(images.device).manual_seed(seed)
        target = attacker.target(self.model)
        start = time.perf_counter()
        with _counting(target) as counts:
            attacked = attacker.attack(target, images.clone(), labels.clone(), generator=generator)
        seconds = time.perf_counter() - start
        _check_budget_kept(attacker, images, attacked)
        cost = Cost(seconds=seconds, forwards=float(counts["forwards"]), gradients=float(counts["gradients"]))
        observed = self.see(attacked)
        if state is not None:
            state.write(number, batch, {"images": attacked, **observed.tensors()}, cost)
        return attacked, observed, cost

    def _samples(
        self,
        attacker: Attacker,
        position: int,
        images: Tensor,
        attacked: Tensor,
        labels: Tensor,
        seen: _Seen,
        count: int,
    ) -> Iterator[Sample]:
        flagged = None if seen.scores is None or self.threshold is None else seen.scores > self.threshold
        scale = attacker.attack.eps if attacker.attack.norm == "linf" else 1.0
        for i in range(min(count, len(images))):
            yield Sample(
                attacker=attacker.name,
                index=position + i,
                label=int(labels[i]),
                before=int(self.benign.fused[position + i]),
                after=int(seen.fused[i]),
                flagged=None if flagged is None else bool(flagged[i]),
                benign=_png(images[i]),
                attacked=_png(attacked[i]),
                perturbation=_png(0.5 + (attacked[i] - images[i]) / (2 * scale)),
            )

    def result(self, attacker: Attacker, run: _Run) -> AttackResult:
        """Turn what one attacker did into its row."""
        measured = None
        if self.benign.scores is not None and run.seen.scores is not None and self.threshold is not None:
            measured = detection(
                benign=self.benign.scores,
                attacked=run.seen.scores,
                fooled=(self.benign.fused == self.labels) & (run.seen.fused != self.labels),
                threshold=self.threshold,
                seed=self.seed,
            )
        count = len(self.labels)
        cost = dataclasses.replace(
            run.cost,
            seconds=round(run.cost.seconds, 3),
            forwards=run.cost.forwards / count,
            gradients=run.cost.gradients / count,
        )
        return AttackResult(
            name=attacker.name,
            threat_model=attacker.threat_model,
            eps=attacker.attack.eps,
            norm=attacker.attack.norm,
            settings=attacker.settings,
            rates=RobustRates(
                robust_accuracy=Rate.of(correct_count(run.seen.fused, self.labels)),
                fooling_rate=Rate.of(fooling_count(adversarial=run.seen.fused, benign=self.benign.fused)),
                attack_success_rate=Rate.of(
                    attack_success_count(adversarial=run.seen.fused, benign=self.benign.fused, labels=self.labels)
                ),
                branches=self.branch_rates(run.seen.predictions == self.labels),
            ),
            detection=measured,
            cost=cost,
            confidences=self.histograms(run.seen),
        )

    def worst(self, attackers: Sequence[Attacker], runs: Sequence[_Run]) -> dict[str, RobustRates]:
        """An image survives a group of attackers if it survives each of them."""
        members: dict[str, list[_Run]] = {}
        for attacker, run in zip(attackers, runs, strict=True):
            members.setdefault(attacker.threat_model, []).append(run)
        if members:
            members["all"] = list(runs)
        right = self.benign.fused == self.labels
        worst = {}
        for group, chosen in members.items():
            survives = torch.stack([run.seen.predictions == self.labels for run in chosen]).all(dim=0)
            fooled = torch.stack([run.seen.fused != self.benign.fused for run in chosen]).any(dim=0)
            worst[group] = RobustRates(
                robust_accuracy=_rate(survives[-1]),
                fooling_rate=_rate(fooled),
                attack_success_rate=Rate(int((right & ~survives[-1]).sum()), int(right.sum())),
                branches=self.branch_rates(survives),
            )
        return worst

    def branch_rates(self, hits: Tensor) -> dict[str, Rate]:
        """Rates of the rows `(B + 1, N)` that belong to a branch."""
        return {name: _rate(row) for name, row in zip(self.names, hits[:-1], strict=True)}

    def false_positives(self) -> Rate | None:
        """Benign images flagged at the threshold."""
        if self.benign.scores is None or self.threshold is None:
            return None
        return _rate(self.benign.scores > self.threshold)

    def histograms(self, seen: _Seen) -> dict[str, tuple[int, ...]]:
        """Counts of confidence in equal bins of [0, 1], by branch and fused."""
        counts = (row.float().histc(BINS, 0, 1).int().tolist() for row in seen.confidences)
        return {name: tuple(row) for name, row in zip((*self.names, "fused"), counts, strict=True)}

    def probe(self) -> tuple[Tensor, Tensor]:
        """The first images that are classified right, for the sanity checks."""
        found: list[tuple[Tensor, Tensor]] = []
        position = 0
        for images, labels in self._batches():
            right = self.benign.fused[position : position + len(labels)].to(labels.device) == labels
            position += len(labels)
            found.append((images[right], labels[right]))
            if sum(len(targets) for _, targets in found) >= PROBE_IMAGES:
                break
        images, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        return images[:PROBE_IMAGES], labels[:PROBE_IMAGES]


PROBE_IMAGES = 64
_CHANGED = (
    "the loader yielded other images, or the same in another order, the second time. "
    "Set shuffle=False and use no random transforms."
)


def _rate(hits: Tensor) -> Rate:
    return Rate(int(hits.sum()), hits.numel())


def _total(costs: Sequence[Cost]) -> Cost:
    return Cost(
        seconds=sum(cost.seconds for cost in costs),
        forwards=sum(cost.forwards for cost in costs),
        gradients=sum(cost.gradients for cost in costs),
    )


def _largest_eps(attackers: Sequence[Attacker]) -> float:
    """The budget of the sanity checks: the largest L-infinity one that was evaluated, else the paper's."""
    return max((a.attack.eps for a in attackers if a.attack.norm == "linf"), default=10 / 255)


def _class_names(loader: Loader, model: Any) -> tuple[str, ...]:
    dataset: Any = getattr(loader, "dataset", None)
    while hasattr(dataset, "dataset"):  # subsets hold the data set they were taken from
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None) or getattr(model, "class_names", None) or ()
    return tuple(str(name) for name in names)


def _model_digest(model: ImageModel, benign: _Seen) -> str:
    """Identify a model by its weights and settings and by what it predicts; a function also by its confidences."""
    said = benign.predictions if isinstance(model, nn.Module) else benign.tensors()
    return digest([model, said])


def _device(model: ImageModel) -> torch.device | None:
    return next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None


@contextmanager
def _random_state_kept(model: ImageModel) -> Iterator[None]:
    """Put the global random state back: a loader draws from it whenever it is iterated, and a random model too."""
    device = _device(model)
    with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
        yield


@contextmanager
def _counting(target: Any) -> Iterator[dict[str, int]]:
    """Count the images that pass through a module, or through several; a plain callable cannot be counted."""
    counts = {"forwards": 0, "gradients": 0}

    def count(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            counts["forwards"] += len(args[0])
            counts["gradients"] += len(args[0]) if args[0].requires_grad else 0

    modules = target if isinstance(target, (tuple, list)) else (target,)
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, nn.Module):
                stack.enter_context(module.register_forward_pre_hook(count))
        yield counts


def _check_budget_kept(attacker: Attacker, images: Tensor, attacked: Tensor) -> None:
    """Refuse an attack that leaves its ball: its numbers would be another budget's."""
    if attacked.shape != images.shape or not torch.isfinite(attacked).all():
        raise InputError(f"{attacker.name} returned no finite images of shape {tuple(images.shape)}.")
    eps, norm = attacker.attack.eps, attacker.attack.norm
    delta = (attacked.double() - images.double()).flatten(1)
    rounding = torch.finfo(images.dtype).eps / 2 * (1 if norm == "linf" else delta.shape[1] ** 0.5)
    if norm == "patch":
        used = (attacked != images).any(dim=1).flatten(1).float().mean(dim=1)
    else:
        used = torch.linalg.vector_norm(delta, ord=torch.inf if norm == "linf" else 2, dim=1)
    low, high = (float(bound) for bound in attacked.aminmax())
    if float(used.max()) > eps + _TOLERANCE + rounding or low < -_TOLERANCE or high > 1 + _TOLERANCE:
        raise InputError(
            f"{attacker.name} left its ball: {norm} distance {float(used.max()):.4g} of {eps:.4g}, "
            f"pixels in [{low:.4g}, {high:.4g}]. Project its result, or state the budget it uses."
        )


def _png(image: Tensor) -> bytes:
    from PIL import Image

    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
