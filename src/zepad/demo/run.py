"""The demo: handwritten digits, two label-free encoders, one undefended classifier and one ZePAD."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..attacks import PGD, UniversalFeatureAttack, attack_features, cross_entropy, margin
from ..config import BenignConfig, HardenConfig, HeadConfig
from ..data import digits
from ..errors import CheckpointError, InputError
from ..evaluation import auroc
from ..model import ZePAD
from ..modules import Branch, evaluating
from ..training import autocast, fit_heads, prepare_folder
from ..types import HARDENED_ROLES, ImageModel

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
    """Run the whole story and leave `picture.png`, `result.json` and `model/` in a folder.

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
        per_image = PGD(eps=EPS, steps=20, step_size=EPS / 8)
        universal = UniversalFeatureAttack(eps=EPS, seed=seed).fit(public, loader)
        attacked = {
            "universal": universal.apply(images),
            "per_image": attack_features(per_image, public, images, generator=_generator(seed)),
        }

        say(f"3/5  hardening both encoders on {len(train)} images, then the benign branch and the heads")
        defense.harden(loader, replace(hardening, seed=seed), progress=progress)
        defense.fit_benign(loader, BenignConfig(seed=seed), head_config=HeadConfig(seed=seed), progress=progress)

        say(f"4/5  scoring {len(test)} test images, white-box attacks on the whole ensemble included")
        white_box = {
            "undefended": _white_box(per_image, undefended, (undefended, undefended), images, labels, seed),
            "zepad": _white_box(per_image, defense, (defense, _MeanLogits(defense)), images, labels, seed),
        }
        scores = {
            name: _scores(model, images, labels, attacked, white_box[name])
            for name, model in (("undefended", undefended), ("zepad", defense))
        }
        branches: dict[str, Scores] = {}
        for role in HARDENED_ROLES:
            branch = defense.branch(role).eval()
            own_budget = PGD(eps=hardening.eps, steps=20, step_size=hardening.eps / 8)
            survived = _white_box(own_budget, branch, (branch, branch), images, labels, seed)
            branches[role] = _scores(branch, images, labels, attacked, survived)
        benign_scores = defense.detection_score(images)
        detection = {
            name: auroc(benign=benign_scores, attacked=defense.detection_score(x)) for name, x in attacked.items()
        }

        say(f"5/5  writing {out}")
        saved = out / "model"
        defense.save_pretrained(saved)
        same = torch.equal(ZePAD.from_pretrained(saved).predict_proba(images), defense.predict_proba(images))
        if not same:
            raise CheckpointError(f"the model in {saved} does not predict the same after loading.")
        from .picture import draw  # matplotlib is slow to import

        draw(out / "picture.png", defense, undefended, images, labels, attacked, EPS)
    result = DemoResult(
        undefended=scores["undefended"],
        zepad=scores["zepad"],
        hardened_branches=branches,
        detection_auroc=detection,
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


class _MeanLogits(nn.Module):
    """The ensemble with equal weights, a surrogate that gives the attacker the gradients RFDM's weights hide."""

    def __init__(self, defense: ZePAD) -> None:
        super().__init__()
        self.defense = defense

    def forward(self, images: Tensor) -> Tensor:
        return self.defense.branch_logits(images).mean(dim=0)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _hits(model: ImageModel, images: Tensor, labels: Tensor) -> Tensor:
    with evaluating(model), torch.no_grad():
        return model(images).argmax(dim=1) == labels


def _white_box(
    attack: PGD,
    model: ImageModel,
    surrogates: tuple[nn.Module, nn.Module],
    images: Tensor,
    labels: Tensor,
    seed: int,
) -> Tensor:
    """Return which images survive both attacks: cross-entropy on the first surrogate, the margin on the second.

    An image that is wrong already needs no further attack.
    """
    survives = _hits(model, images, labels)
    for objective, surrogate in zip((cross_entropy, margin), surrogates, strict=True):
        left = survives.nonzero().flatten()
        if len(left):
            aimed = replace(attack, objective=objective)
            with autocast(images.device, "auto"):  # crafted in half precision where that is faster, scored in full
                attacked = aimed(surrogate, images[left], labels[left], generator=_generator(seed))
            survives[left] = _hits(model, attacked, labels[left])
    return survives


def _scores(model: ImageModel, images: Tensor, labels: Tensor, attacked: dict[str, Tensor], survives: Tensor) -> Scores:
    robust = {name: _hits(model, batch, labels) for name, batch in attacked.items()}
    robust["white_box"] = survives
    return Scores(
        benign_accuracy=float(_hits(model, images, labels).float().mean()),
        robust_accuracy={name: float(hits.float().mean()) for name, hits in robust.items()},
    )
