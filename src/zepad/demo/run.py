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
from torch.utils.data import DataLoader, random_split

from ..attacks import PGD, Attack, FeaturePGD, JointAPGD, Transfer, UniversalFeatureAttack, WorstOf, margin, mean_logits
from ..config import BenignConfig, HardenConfig
from ..data import LabelledImages, digits
from ..errors import CheckpointError, InputError
from ..evaluation import Attacker, EvalReport, evaluate, save_report, with_baseline
from ..evaluation.rendering.wording import attack_title
from ..files import write_text, writing
from ..model import ZePAD
from ..modes import autocast
from ..training.checkpoints import prepare_folder
from ..types import HARDENED_ROLES, REFERENCE, Branched, ImageModel

EPS = 32 / 255  # of the attacks: large enough to break the undefended classifier
# The default recipe at its least number of epochs, because digits are easy. Like the paper's, its budget is below the
# attack's.
HARDENING = HardenConfig(eps=25 / 255, epochs=10)
VICTIM, AUXILIARY = "zepad:digits-barlow-twins", "zepad:digits-simclr"
RECOMMENDED: tuple[str, str] = ("bounded", "features")
_BATCH = 128
_VALIDATION = 200  # number of training images that only calibrate the fusion and the detector
_TITLES = {
    key: attack_title(key, attack)
    for key, attack in (
        ("universal", "feature attack"),
        ("per_image", "feature PGD-20"),
        ("white_box", "PGD-20 and joint APGD-20"),
    )
}
"""What a person reads for each attack; the keys are those of result.json."""

_KEYS = {title: key for key, title in _TITLES.items()}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Accuracies of one classifier, in [0, 1].

    Attributes:
        benign_accuracy: Accuracy on the test images as they are.
        robust_accuracy: Accuracy under each attack: universal, per_image, white_box.
    """

    benign_accuracy: float
    robust_accuracy: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Everything the demo measured.

    Attributes:
        undefended: Scores of the victim encoder with a head, as it was downloaded.
        zepad: Scores of the defense with the paper's fusion, RFDM.
        recommended: Scores of the same branches under the fusion that this library recommends.
        hardened_branches: Scores of each hardened branch alone. Its white-box attack is aimed at this branch, within
            the budget of the hardening.
        detection_auroc: AUROC by detector, the paper's confidence gap and the recommended one, and by attack.
        false_positive_rate: Rate of benign test images that the recommended detector flags; 5 % were asked for.
        vote: Bound of the benign branch's vote that calibration chose for the recommended fusion.
        eps: L-infinity budget of the attacks, in [0, 1] pixel units.
        hardening_eps: Budget of the hardening, and of the white-box attack on a hardened branch alone.
        test_images: Number of test images that were scored.
        seed: Seed of the run.
        reload_equal: Whether the saved model predicts the same after loading.
        seconds: Wall-clock time in seconds.
    """

    undefended: Scores
    zepad: Scores
    recommended: Scores
    hardened_branches: dict[str, Scores]
    detection_auroc: dict[str, dict[str, float]]
    false_positive_rate: float
    vote: float
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
    benign: BenignConfig = BenignConfig(),
    limit: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Run the whole story and leave `picture.png`, `result.json`, `report/` and `model/` in a folder.

    Args:
        out: Folder of the results. It is created if need be, and checked to be writable before anything is computed.
        seed: Seed of heads, attacks and training.
        hardening: Recipe of the two hardened encoders; its seed is replaced.
        benign: Recipe of the benign branch; its seed is replaced.
        limit: Number of test images that are attacked and scored at most; None takes all 497.
        progress: Show progress bars.
        say: Function that is called with one line of text per step.

    Raises:
        InputError: If the folder cannot be written.
        CheckpointError: If the saved model does not predict the same after loading.
    """
    start = time.perf_counter()
    prepare_folder(out, resume=True)
    everything, test = digits("train"), digits("test")
    test = LabelledImages(test.images[:limit], test.labels[:limit], test.classes)
    images, labels = test.images, test.labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        validation, train = random_split(everything, [_VALIDATION, len(everything) - _VALIDATION])
        loader = DataLoader(train, batch_size=_BATCH, shuffle=True)

        say(f"1/5  two public encoders ({VICTIM}, {AUXILIARY}), the first of them under attack")
        rule, detector = RECOMMENDED
        defense = ZePAD.from_encoders(VICTIM, AUXILIARY, preset="paper", detector=detector)
        public = copy.deepcopy(defense.encoder("victim"))

        say(f"2/5  two attacks on that public encoder alone, no label, no head, eps {EPS * 255:.0f}/255")
        universal = UniversalFeatureAttack(eps=EPS, seed=seed).fit(public, loader, progress=progress)
        per_image = FeaturePGD(eps=EPS, steps=20, step_size=EPS / 8)
        attacked = {
            "universal": universal.apply(images),
            "per_image": per_image(public, images, generator=torch.Generator().manual_seed(seed)),
        }

        say(f"3/5  hardening both encoders on {len(train)} images, then the benign branch and the heads")
        defense.harden(loader, replace(hardening, seed=seed), progress=progress)
        defense.fit_benign(loader, replace(benign, seed=seed), head_config=None, progress=progress)
        undefended = defense.branch(REFERENCE).eval()

        say(f"4/5  scoring {len(test)} test images, white-box attacks on the whole ensemble included")
        shared = [
            Attacker(name=_TITLES[key], threat_model="semi-black-box", attack=_Crafted(eps=EPS, attacked=batch))
            for key, batch in attacked.items()
        ]
        attackers = [*shared, _white_box(EPS)]
        paper = _evaluate("ZePAD with RFDM", defense.configure(fusion="rfdm", detector="gap"), test, attackers, seed)
        defense.configure(fusion=rule, detector=detector).calibrate(
            DataLoader(validation, batch_size=_BATCH), fit_loader=loader
        )
        bare = _evaluate("classifier on the public victim encoder", undefended, test, attackers, seed)
        recommended = with_baseline(_evaluate("ZePAD", defense, test, attackers, seed), bare)
        own_budget = {
            role: _evaluate(role, defense.branch(role).eval(), test, [_white_box(hardening.eps)], seed)
            for role in HARDENED_ROLES
        }

        say(f"5/5  writing {out}")
        saved = out / "model"
        defense.attach(recommended).save_pretrained(saved)
        save_report(recommended, out / "report")
        same = torch.equal(ZePAD.from_pretrained(saved).predict_proba(images), defense.predict_proba(images))
        if not same:
            raise CheckpointError(f"the model in {saved} does not predict the same after loading.")
        from .picture import draw  # matplotlib is slow to import

        shown = {_TITLES[key]: batch for key, batch in attacked.items()}
        draw(out / "picture.png", recommended, defense, undefended, images, labels, shown, EPS)
    result = DemoResult(
        undefended=_scores(bare),
        zepad=_scores(paper),
        recommended=_scores(recommended),
        hardened_branches={role: _branch_scores(role, recommended, own) for role, own in own_budget.items()},
        detection_auroc={"gap": _aurocs(paper), detector: _aurocs(recommended)},
        false_positive_rate=recommended.false_positive_rate.value if recommended.false_positive_rate else float("nan"),
        vote=defense.fusion.settings()["vote"],
        eps=EPS,
        hardening_eps=hardening.eps,
        test_images=len(test),
        seed=seed,
        reload_equal=same,
        seconds=round(time.perf_counter() - start, 1),
    )
    with writing(out, InputError):
        write_text(out / "result.json", result.to_json() + "\n")
    return result


def format_table(result: DemoResult) -> str:
    """Return the result as the table a person reads."""
    columns = (result.undefended, result.zepad, result.recommended)
    rows = [("no attack", [scores.benign_accuracy for scores in columns])]
    rows += [(title, [scores.robust_accuracy[key] for scores in columns]) for key, title in _TITLES.items()]
    branches = result.hardened_branches
    best = max(branches, key=lambda role: branches[role].robust_accuracy["white_box"])
    rule, detector = RECOMMENDED
    lines = [
        f"{result.test_images} test images of handwritten digits, "
        f"L-infinity eps {result.eps * 255:.0f}/255, seed {result.seed}",
        "",
        f"{'images classified right, per cent':<47} {'undefended':>10} {'ZePAD, RFDM':>12} {f'ZePAD, {rule}':>15}",
        *(f"{title:<47} {a:>10.1%} {b:>12.1%} {c:>15.1%}" for title, (a, b, c) in rows),
        "",
        "Universal and one image at a time: crafted on the public victim encoder alone. White box: knows everything.",
        f"RFDM is the paper's fusion, {rule} the recommended one, in which the benign branch's vote adds at "
        f"most {result.vote:.2g} to a log-probability.",
        f"best hardened branch alone ({best}): benign {branches[best].benign_accuracy:.1%}, "
        f"white-box at {result.hardening_eps * 255:.0f}/255 {branches[best].robust_accuracy['white_box']:.1%}",
        *(
            f"detection AUROC, {_DETECTORS[name]}: "
            + ", ".join(f"{attack_title(key).lower()} {value:.2f}" for key, value in aurocs.items())
            for name, aurocs in result.detection_auroc.items()
        ),
        f"benign images flagged by {_DETECTORS[detector]}: {result.false_positive_rate:.1%} (5 % asked for)",
    ]
    return "\n".join(lines)


_DETECTORS = {"gap": "the paper's confidence gap", "features": "the recommended feature detector"}


def _aurocs(report: EvalReport) -> dict[str, float]:
    return {_KEYS[row.name]: row.detection.auroc for row in report.group("semi-black-box") if row.detection}


class _Fast(nn.Module):
    """A model in half precision where that is faster, to craft attacks on but not to score with."""

    def __init__(self, model: ImageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with autocast(images.device, "auto"):
            logits: Tensor = self.model(images)
        return logits


@dataclass(frozen=True, kw_only=True, eq=False)
class _Crafted:
    """Attacked images that were crafted on the public encoder, whatever model they are asked for."""

    eps: float
    attacked: Tensor
    norm: str = "linf"

    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        del model, images, targets, generator
        return self.attacked


@dataclass(frozen=True, kw_only=True)
class _WhiteBoxes:
    """PGD on cross-entropy through the model; for what is left PGD on the margin of the mean logits, then joint APGD.

    Fusions hide gradients: RFDM in its weights, a bounded vote where it is certain. The mean of the logits and a joint
    attack on all branches reveal them.
    """

    eps: float
    steps: int = 20
    norm: str = "linf"

    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        assert isinstance(model, nn.Module)
        pgd = PGD(eps=self.eps, steps=self.steps, step_size=self.eps / 8)
        attacks: list[Attack] = [pgd]
        if isinstance(model, Branched):
            branches = _Fast(model.branch_logits)
            attacks.append(Transfer(attack=replace(pgd, loss_fn=margin), surrogate=mean_logits(branches)))
            attacks.append(
                JointAPGD(eps=self.eps, branch_logits=branches, fuse=model.fuse, steps=self.steps, classes=2)
            )
        else:
            attacks.append(replace(pgd, loss_fn=margin))
        return WorstOf(attacks=tuple(attacks))(_Fast(model), images, targets, generator=generator)


def _white_box(eps: float) -> Attacker:
    return Attacker(name=_TITLES["white_box"], threat_model="white-box", attack=_WhiteBoxes(eps=eps))


def _evaluate(name: str, model: nn.Module, data: LabelledImages, attackers: list[Attacker], seed: int) -> EvalReport:
    loader = DataLoader(data, batch_size=len(data))
    # The sanity checks cost more than the demo has time for; `zepad evaluate` makes them.
    return evaluate(
        model, loader, attackers, name=name, data="handwritten digits", seed=seed, sanity=False, progress=False
    )


def _scores(report: EvalReport) -> Scores:
    return Scores(
        benign_accuracy=report.benign_accuracy.value,
        robust_accuracy={_KEYS[row.name]: row.rates.robust_accuracy.value for row in report.attacks},
    )


def _branch_scores(role: str, ensemble: EvalReport, own: EvalReport) -> Scores:
    """Return the scores of a hardened branch under attacks on the public encoder and its own white-box attack."""
    shared = {_KEYS[row.name]: row.rates.branches[role].value for row in ensemble.group("semi-black-box")}
    return Scores(benign_accuracy=own.benign_accuracy.value, robust_accuracy={**shared, **_scores(own).robust_accuracy})
