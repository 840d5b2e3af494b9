"""The model card that travels with a published model: what it is, what was measured, and what it does not withstand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined, Template, TemplateError
from markupsafe import Markup

from ..config import _JSONConfig, is_hub_id, is_number, require
from ..errors import CheckpointError
from ..escaping import clean, escape_markdown
from ..types import MEMORY, ROLES
from .config import SavedConfig

# Exceptions that are raised by a provenance that zepad did not write.
_UNFIT = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, TemplateError)

_TASKS = {
    "mlp": "image-classification",
    "zero_shot": "zero-shot-image-classification",
    None: "image-feature-extraction",
}


@dataclass(frozen=True, kw_only=True)
class CardDetails(_JSONConfig):
    """Facts about a model that only its publisher knows.

    Attributes:
        license: Identifier of a license on the Hub, such as `"apache-2.0"`. Those of the public encoders bind you too.
        datasets: Hub ids of the training data.
        base_models: Hub ids of the public encoders, added to those that are known from the encoders themselves.
        tags: Tags for the Hub, added to those of zepad.

    Examples:
        >>> CardDetails(license="mit", datasets=("uoft-cs/cifar10",)).license
        'mit'
    """

    license: str | None = None
    datasets: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is malformed.
        """
        license_id = self.license is None or (isinstance(self.license, str) and _is_license(self.license))
        require(license_id, "license", self.license, 'an identifier such as "apache-2.0", or None')
        for name in ("datasets", "base_models"):
            value = getattr(self, name)
            ids = isinstance(value, (tuple, list)) and all(map(is_hub_id, value))
            require(ids, name, value, 'a tuple of Hub ids such as ("user/name",)')
        words = isinstance(self.tags, (tuple, list)) and all(isinstance(tag, str) and tag.strip() for tag in self.tags)
        require(words, "tags", self.tags, "a tuple of words")


def model_card(config: SavedConfig, *, model_id: str | None = None, details: CardDetails = CardDetails()) -> str:
    """Return the card as Markdown with Hub metadata, from what config.json says.

    Args:
        config: Config of the model. An attached evaluation becomes the measured numbers and the `model-index`.
        model_id: Hub id that the model is published under, where known.
        details: Facts that only the publisher knows.

    Raises:
        CheckpointError: If the config's provenance is not as zepad writes it.
    """
    try:
        text = _card(config, model_id, details)
        text.encode()  # JSON can hold a lone surrogate, which cannot be written to a file
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        TemplateError,
    ) as error:
        raise CheckpointError(
            f"no card can be written: the provenance in config.json is not as zepad writes it "
            f"({type(error).__name__}: {error}). Save the model again."
        ) from error
    return text


def _card(config: SavedConfig, model_id: str | None, details: CardDetails) -> str:
    measured = config.provenance.get("evaluation")
    return _template().render(
        config=config,
        metadata=_metadata(config, model_id, details, measured).to_yaml(),
        title=model_id or "An encoder hardened with zepad",
        model_id=model_id or "<this repository or folder>",
        custom=[
            role
            for role, record in config.encoders.items()
            if record.spec.source == "custom" and record.architecture_of is None
        ],
        words=_words(config),
        measured=measured,
        rows=None if measured is None else _rows(measured),
        published=measured is not None and "published" in measured["groups"],
        white_box=measured is not None and "white-box" in measured["groups"],
        training=_training(config.provenance),
    )


@cache
def _template() -> Template:
    # The card is Markdown, so nothing is escaped for HTML; whatever is put in is escaped for Markdown instead.
    environment = Environment(  # noqa: S701
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=_escaped
    )
    environment.filters |= {
        "json": _fenced_json,
        "percent": lambda share: f"{_share(share):.1%}",
        "verbatim": Markup,
    }
    return environment.from_string(files(__package__).joinpath("card.md.jinja").read_text(encoding="utf-8"))


def _fenced_json(value: Any) -> Markup:
    """Return JSON in ASCII that no text inside can lead out of its code block: it has no backtick and no line break."""
    return Markup(json.dumps(value, indent=2).replace("`", "\\u0060"))  # noqa: S704 - Markdown's code, not HTML


def _escaped(value: Any) -> Any:
    """Escape what is put into the card, except for what the template calls verbatim: metadata and code of our own."""
    return value if isinstance(value, Markup) else escape_markdown(str(value))


# guarantees of the fusion rule and the detector -----------------------------------------------------------------

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, kw_only=True)
class _Words:
    fusion: str
    detector: str
    fusion_guarantee: str
    detector_guarantee: str
    passes: str


def _words(config: SavedConfig) -> _Words:
    rule, detector = config.fusion_rule, config.detector_rule
    threshold = "not set: calibrate it before use" if config.threshold is None else f"{config.threshold:.4g}"
    remembers, gap = MEMORY in config.encoders, config.abstain_above
    passes = len(ROLES) + remembers + detector.extra_passes()
    who = "memory" if remembers else "benign branch"
    silence = "" if gap is None else f"; the {who} abstains above a restoration gap of {gap:.4g}"
    return _Words(
        fusion=rule.summary() + silence,
        detector=f"{detector.summary()}, threshold {threshold}",
        fusion_guarantee=rule.guarantee(),
        detector_guarantee=detector.guarantee(),
        passes=_NUMBERS[passes] if passes < len(_NUMBERS) else str(passes),
    )


# metadata, numbers and provenance -------------------------------------------------------------------------------


def _metadata(
    config: SavedConfig, model_id: str | None, details: CardDetails, measured: Mapping[str, Any] | None
) -> ModelCardData:
    origins = config.provenance.get("encoders", {}).values()
    known = [origin for origin in origins if is_hub_id(origin)]
    bases = [*([config.base.repo_id] if config.base else known), *details.base_models]
    return ModelCardData(
        library_name="zepad",
        pipeline_tag=_TASKS[config.heads.get("benign")],
        tags=[*dict.fromkeys(("zepad", "adversarial-robustness", *details.tags))],
        base_model=[*dict.fromkeys(bases)] or None,
        datasets=list(details.datasets) or None,
        license=details.license,
        metrics=["accuracy"] if measured else None,
        model_name=(model_id or "hardened-encoder").rpartition("/")[2] if measured else None,
        eval_results=_eval_results(measured) if measured else None,
    )


def _eval_results(measured: Mapping[str, Any]) -> list[EvalResult]:
    """Return one result per claim: benign accuracy, and robust accuracy under each kind of attacker."""
    claims = [("benign accuracy", measured["benign_accuracy"][0])]
    claims += [
        (
            f"robust accuracy, {group}, worst of {', '.join(found['attackers'])} at {', '.join(found['budgets'])}",
            found["robust_accuracy"][0],
        )
        for group, found in measured["groups"].items()
    ]
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", measured["data"].lower()).strip("-") or "data",
            dataset_name=clean(measured["data"]),
            metric_type="accuracy",
            metric_name=clean(name),
            metric_value=round(_share(value), 4),
        )
        for name, value in claims
    ]


def _training(provenance: Mapping[str, Any]) -> dict[str, Any]:
    steps = {step: record for step, record in provenance.items() if step not in ("evaluation", "encoders")}
    return {s: {k: v for k, v in r.items() if k != "history"} for s, r in steps.items()}


def _rows(measured: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Return attack, budget and accuracy with its interval of each row, the white box like the rest."""
    return [
        ("none", "none", measured["benign_accuracy"]),
        *(
            (
                f"{group}: worst of {', '.join(found['attackers'])}",
                ", ".join(found["budgets"]),
                found["robust_accuracy"],
            )
            for group, found in measured["groups"].items()
        ),
    ]


def _share(value: object) -> float:
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{value!r} is no share in [0, 1]")
    return value


def _is_license(text: str) -> bool:
    return bool(re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text))
