"""A trial in words and pictures: the part of a page that the app shows, and a page of its own to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._version import __version__
from ..data import read_image
from ..errors import InputError
from ..evaluation.rendering.templating import render
from ..evaluation.samples import encode_png
from ..model import ZePAD
from ..types import HARDENED_ROLES
from .attackers import Attacker, Choice
from .trial import Opinion, Trial, try_attack

NO_REFERENCE = (
    "This model does not keep the undefended encoder, so there is nothing to compare with. "
    'A model that is built with detector="features" keeps it.'
)


def trial_section(trial: Trial) -> str:
    """Return a trial as a piece of HTML, with its pictures inside and without a style of its own."""
    return render("trial.html", **_values(trial))


def trial_page(trial: Trial, defense: ZePAD) -> str:
    """Return a trial as a page of its own, which loads nothing from elsewhere.

    Args:
        trial: The trial.
        defense: The model, of which the page names fusion rule and detector.
    """
    model = f"The model fuses by {defense.fusion.summary()} and detects by {defense.detector.rule.summary()}."
    return render("trial_page.html", title="One image under attack", model_said=model, **_values(trial))


def answer_section(defense: ZePAD, attacker: Attacker, path: str | None, *, eps: float) -> str:
    """Attack an image file and return the trial, with a link to it as a page; or what is wrong, as a piece of HTML.

    Args:
        defense: A fitted model.
        attacker: Attacker of the model.
        path: Path of the image file, or None where there is none yet.
        eps: L-infinity budget in [0, 1] pixel units.
    """
    if path is None:
        return render("trial_error.html", said="There is no image yet. Drop one, or choose a test image.")
    try:
        trial = try_attack(defense, attacker, read_image(Path(path), channels=defense.channels), eps=eps)
    except InputError as error:
        return render("trial_error.html", said=str(error).replace(path, Path(path).name))
    return trial_section(trial) + render("trial_link.html", page=trial_page(trial, defense).encode())


def attackers_section(choice: Choice) -> str:
    """Return what every attacker knows, and why others are not offered, as a piece of HTML."""
    known = {attacker.name: attacker.knows for attacker in choice.attackers.values()}
    return render("attackers.html", attackers=known, missing=choice.missing)


def trial_css() -> str:
    """Return the style of `trial_section`."""
    return render("trial.css")


def _values(trial: Trial) -> dict[str, Any]:
    compared = trial.largest_change > 0
    return {
        "trial": trial,
        "compared": compared,
        "weighed": all(opinion.weight is not None for opinion in trial.branches.values()),
        "branches": {
            f"{name} (hardened)" if name in HARDENED_ROLES else name: opinion
            for name, opinion in trial.branches.items()
        },
        "heading": _heading(trial, compared),
        "undefended_said": NO_REFERENCE if trial.undefended is None else _said(trial.undefended, compared),
        "defended_said": _said(trial.defended, compared),
        "detection_said": _detection(trial, compared),
        "attacker_said": _attacker(trial, compared),
        "budget_said": _in_255ths(trial.eps),
        "clean": encode_png(trial.clean),
        "attacked": encode_png(trial.attacked),
        "perturbation": encode_png(0.5 + (trial.attacked - trial.clean) / (2 * trial.eps)),
    }


def _heading(trial: Trial, compared: bool) -> str:
    if not compared:
        return "Without an attack"
    outcomes = {"undefended": trial.undefended, "defended": trial.defended}
    said = [
        f"the {name} classifier {'is fooled' if opinion.changed else 'is not fooled'}"
        for name, opinion in outcomes.items()
        if opinion is not None
    ]
    return f"Under attack, {' and '.join(said)}"


def _said(opinion: Opinion, compared: bool) -> str:
    before, after = opinion.clean[0], opinion.attacked[0]
    if not compared:
        return f"It says {before.label}."
    return f"It said {before.label} and now says {after.label}." if opinion.changed else f"It still says {after.label}."


def _detection(trial: Trial, compared: bool) -> str:
    image = "attacked image" if compared else "image"
    if trial.scores is None or trial.threshold is None:
        return f"The detector is not calibrated, so it does not say whether the {image} looks attacked."
    relation = "above" if trial.flagged else "not above"
    clean = f" The clean image scores {trial.scores[0]:.3f}." if compared else ""
    verdict = "flagged" if trial.flagged else "not flagged"
    score, threshold = f"{trial.scores[1]:.3f}", f"{trial.threshold:.3f}"
    return f"The {image} is {verdict}: its score {score} is {relation} the threshold {threshold}.{clean}"


def _attacker(trial: Trial, compared: bool) -> str:
    height, width = trial.clean.shape[1:]
    size = f"The image has {width} by {height} pixels."
    version = f"Computed by zepad {__version__}."
    if trial.attacker == "no attack":
        return f"{size} {version}"
    largest = (
        f"The largest change of a pixel is {_in_255ths(trial.largest_change)}." if compared else "Nothing changed."
    )
    return f"Attacker “{trial.attacker}”, budget {_in_255ths(trial.eps)} L∞. {trial.knows} {largest} {size} {version}"


def _in_255ths(value: float) -> str:
    return f"{255 * value:.3g}/255"
