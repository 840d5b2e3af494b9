"""The demo: handwritten digits, two label-free encoders, one undefended classifier and one ZePAD."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from ..attacks import PGD, FeaturePGD, Transfer, UniversalFeatureAttack, WorstOf, margin, mean_logits
from ..config import BenignConfig, HardenConfig, HeadConfig
from ..data import LabelledImages, digits
from ..errors import CheckpointError, InputError
from ..evaluation import Attacker, EvalReport, evaluate
from ..model import ZePAD
from ..modules import Branch
from ..training import autocast, fit_heads, prepare_folder
from ..types import HARDENED_ROLES, Branched, ImageModel

EPS = 32 / 255  # of the attacks: large enough to break the undefended classifier
# The default recipe at its least number of epochs, because digits are easy. Like the paper's, its budget is below the
# attack's.
HARDENING = HardenConfig(eps=25 / 255, epochs=10)
VICTIM, AUXILIARY = "zepad:digits-barlow-twins", "zepad:digits-simclr"
_BATCH = 128
_ATTACKS = ("universal", "per_image", "white_box")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Accuracies of one classifier, in [0, 1].

    Attributes:
        benign_accuracy: On the test images as they are.
        robust_accuracy: By attack: universal, per_image, white_box.
    """

    benign_accuracy: float
    robust_accuracy: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Everything the demo measured.

    Attributes:
        undefended: The victim encoder with a head, as it was downloaded.
        zepad: The defense.
        hardened_branches: Each hardened branch alone; its white-box attack is aimed at this branch, within the budget
            of the hardening.
        detection_auroc: Of the confidence gap, by attack.
        eps: Budget of the attacks, in [0, 1] pixel units.
        hardening_eps: Budget of the hardening, and of the white-box attack on a hardened branch alone.
        test_images: Number of images behind each accuracy.
        seed: Of the run.
        reload_equal: Whether the saved model predicts the same after loading.
        seconds: Wall-clock time.
    """

    undefended: Scores
    zepad: Scores
    hardened_branches: dict[str, Scores]
    detection_auroc: dict[str, float]
    eps: float
    hardening_eps: float
    test_images: int
    seed: int
    reload_equal: bool
    seconds: float

    def to_json(self) -> str:
        """Return one JSON object on one line."""
        return json.dumps(asdict(self))


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    hardening: HardenConfig = HARDENING,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Run the whole story and leave `picture.png`, `result.json`, `report/` and `model/` in a folder.

    Args:
        out: Created if need be; proved writable before anything is computed.
        seed: Of heads, attacks and training.
        hardening: The recipe; its seed is replaced.
        progress: Show training bars.
        say: Called with one line per step.

    Raises:
        InputError: If the folder cannot be written.
        CheckpointError: If the saved model does not predict the same after loading.
    """
    start = time.perf_counter()
    prepare_folder(out, resume=True)
    train, test = digits("train"), digits("test")
    images, labels = test.images, test.labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loader = DataLoader(train, batch_size=_BATCH, shuffle=True)

        say(f"1/5  two public encoders ({VICTIM}, {AUXILIARY}) and an undefended classifier on the first")
        defense = ZePAD.from_encoders(VICTIM, AUXILIARY)
        public = copy.deepcopy(defense.encoder("victim"))
        head = fit_heads({"victim": public}, loader, HeadConfig(seed=seed), channels=3, num_classes=10, progress=False)
        undefended = Branch(public, head["victim"]).eval()

        say(f"2/5  two attacks on the public victim encoder alone, no label, no head, eps {EPS * 255:.0f}/255")
        universal = UniversalFeatureAttack(eps=EPS, seed=seed).fit(public, loader, progress=False)
        per_image = FeaturePGD(eps=EPS, steps=20, step_size=EPS / 8)
        attacked = {
            "universal": universal.apply(images),
            "per_image": per_image(public, images, generator=torch.Generator().manual_seed(seed)),
        }

        say(f"3/5  hardening both encoders on {len(train)} images, then the benign branch and the heads")
        defense.harden(loader, replace(hardening, seed=seed), progress=progress)
        defense.fit_benign(loader, BenignConfig(seed=seed), head_config=HeadConfig(seed=seed), progress=progress)

        say(f"4/5  scoring {len(test)} test images, white-box attacks on the whole ensemble included")
        shared = [
            Attacker(name=name, knowledge="semi-black-box", attack=_Crafted(eps=EPS, attacked=batch))
            for name, batch in attacked.items()
        ]
        models: dict[str, nn.Module] = {"undefended": undefended, "zepad": defense}
        reports = {
            name: _evaluate(name, model, test, [*shared, _white_box(EPS)], seed) for name, model in models.items()
        }
        own_budget = {
            role: _evaluate(role, defense.branch(role).eval(), test, [_white_box(hardening.eps)], seed)
            for role in HARDENED_ROLES
        }

        say(f"5/5  writing {out}")
        saved = out / "model"
        defense.attach(reports["zepad"]).save_pretrained(saved)
        reports["zepad"].save(out / "report")
        same = torch.equal(ZePAD.from_pretrained(saved).predict_proba(images), defense.predict_proba(images))
        if not same:
            raise CheckpointError(f"the model in {saved} does not predict the same after loading.")
        from .picture import draw  # matplotlib is slow to import

        draw(out / "picture.png", defense, undefended, images, labels, attacked, EPS)
    result = DemoResult(
        undefended=_scores(reports["undefended"]),
        zepad=_scores(reports["zepad"]),
        hardened_branches={role: _branch_scores(role, reports["zepad"], own) for role, own in own_budget.items()},
        detection_auroc={
            row.name: row.detection.auroc for row in reports["zepad"].group("semi-black-box") if row.detection
        },
        eps=EPS,
        hardening_eps=hardening.eps,
        test_images=len(test),
        seed=seed,
        reload_equal=same,
        seconds=round(time.perf_counter() - start, 1),
    )
    try:
        (out / "result.json").write_text(result.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}. Choose a writable folder.") from error
    return result


def format_table(result: DemoResult) -> str:
    """Return the result as the table a person reads."""
    rows: list[tuple[str, float, float]] = [
        ("benign accuracy", result.undefended.benign_accuracy, result.zepad.benign_accuracy)
    ]
    titles = {
        "universal": "robust, universal DAE (semi-black-box)",
        "per_image": "robust, per-image DAE (semi-black-box)",
        "white_box": "robust, white-box PGD-20 (knows everything)",
    }
    rows += [
        (titles[name], result.undefended.robust_accuracy[name], result.zepad.robust_accuracy[name]) for name in _ATTACKS
    ]
    branches = result.hardened_branches
    best = max(branches, key=lambda role: branches[role].robust_accuracy["white_box"])
    lines = [
        f"{result.test_images} test images of handwritten digits, "
        f"L-infinity eps {result.eps * 255:.0f}/255, seed {result.seed}",
        "",
        f"{'per cent':<46} {'undefended':>10} {'ZePAD':>8}",
        *(f"{title:<46} {before:>10.1%} {after:>8.1%}" for title, before, after in rows),
        "",
        f"best hardened branch alone ({best}): benign {branches[best].benign_accuracy:.1%}, "
        f"white-box PGD-20 at {result.hardening_eps * 255:.0f}/255 {branches[best].robust_accuracy['white_box']:.1%}",
        "detection AUROC of the confidence gap: "
        + ", ".join(f"{name.replace('_', '-')} {value:.2f}" for name, value in result.detection_auroc.items()),
    ]
    return "\n".join(lines)


class _Fast(nn.Module):
    """A model in half precision where that is faster: good enough to craft on, not to score with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with autocast(images.device, "auto"):
            logits: Tensor = self.model(images)
        return logits


@dataclass(frozen=True, kw_only=True, eq=False)
class _Crafted:
    """Attacked images that were crafted before, on the public encoder: no model has a say in them."""

    eps: float
    attacked: Tensor
    norm: str = "linf"

    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        del model, images, targets, generator
        return self.attacked


@dataclass(frozen=True, kw_only=True)
class _BothWhiteBoxes:
    """PGD on cross-entropy through the model, then on the margin of its branches' mean logits for what is left.

    RFDM's weights hide gradients that the mean of the logits shows.
    """

    eps: float
    steps: int = 20
    norm: str = "linf"

    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        assert isinstance(model, nn.Module)
        surrogate = mean_logits(model.branch_logits) if isinstance(model, Branched) else model
        pgd = PGD(eps=self.eps, steps=self.steps, step_size=self.eps / 8)
        second = Transfer(attack=replace(pgd, objective=margin), surrogate=_Fast(surrogate))
        return WorstOf(attacks=(pgd, second))(_Fast(model), images, targets, generator=generator)


def _white_box(eps: float) -> Attacker:
    return Attacker(name="white_box", knowledge="white-box", attack=_BothWhiteBoxes(eps=eps))


def _evaluate(name: str, model: nn.Module, data: LabelledImages, attackers: list[Attacker], seed: int) -> EvalReport:
    loader = DataLoader(data, batch_size=len(data))
    # The sanity checks cost more than the demo has time for; `zepad evaluate` makes them.
    return evaluate(model, loader, attackers, name=name, data="digits (test)", seed=seed, sanity=False, progress=False)


def _scores(report: EvalReport) -> Scores:
    return Scores(
        benign_accuracy=report.benign_accuracy.value,
        robust_accuracy={row.name: row.outcome.robust_accuracy.value for row in report.attacks},
    )


def _branch_scores(role: str, ensemble: EvalReport, own: EvalReport) -> Scores:
    """A hardened branch under the attacks on the public encoder, and under a white box aimed at the branch itself."""
    shared = {row.name: row.outcome.branches[role].value for row in ensemble.group("semi-black-box")}
    return Scores(benign_accuracy=own.benign_accuracy.value, robust_accuracy={**shared, **_scores(own).robust_accuracy})
