"""The model card that travels with a published model: what it is, what was measured, and what it does not withstand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..config import _JSONConfig, is_hub_id, is_number, require
from ..errors import CheckpointError
from ..evaluation.rendering.table import escape_markdown
from ..evaluation.rendering.wording import clean
from ..modules import Fusion
from .config import SavedConfig

_CARD = """---
{metadata}
---

# {title}

Two public image encoders and a benign one, hardened with [zepad](https://arxiv.org/abs/2602.11204) against
downstream-agnostic adversarial examples (DAEs): images that are attacked on a public encoder alone and then fool every
classifier built on it. Victim and auxiliary are adversarially fine-tuned (the multi-pattern adversarial enhancement
branch, MPAE), the benign encoder only ever saw clean data (the benign memory preservation branch, BMP), and a
fusion lets the right one speak for each image.

## Use

```python
from zepad import ZePAD

defense = ZePAD.from_pretrained("{model_id}"{modules})
{use}
```

Images are float in [0, 1], `(N, {channels}, H, W)`, un-normalised: every encoder normalises inside.

## What it is

| part | architecture | head |
|---|---|---|
{encoders}

{facts}

| | this model | the paper's | recommended |
|---|---|---|---|
| fusion | {fusion} | rfdm (sharpness 3) | bounded, its vote calibrated |
| detector | {detector} | gap, threshold 0.1 | features, its threshold calibrated |

`defense.configure(fusion=..., detector=...)` and `defense.calibrate(validation_loader)` change either without training;
a detector that needs the undefended victim must have been asked for when the model was built.

## Threat model

Meant for an attacker who knows the public encoders and neither the deployed ensemble nor the task (semi-black-box).

## Measured

{measured}
## Limits

* {knowing} {white_box}
* Detection is not robustness: an attacker who knows of the detector can evade it.
* Every image costs {passes} encoder passes.
* Nothing here holds for images unlike those it was trained and measured on.

## Training

```json
{training}
```
"""

_UNMEASURED = "Nothing was measured when this card was written: no accuracy, clean or robust, is claimed.\n"
_TASKS = {
    "mlp": "image-classification",
    "zero_shot": "zero-shot-image-classification",
    None: "image-feature-extraction",
}


@dataclass(frozen=True, kw_only=True)
class CardDetails(_JSONConfig):
    """What only the publisher knows of a model.

    Attributes:
        license: Identifier of the Hub, such as `"apache-2.0"`; the licences of the public encoders bind you too.
        datasets: Hub ids of the training data.
        base_models: Hub ids of the public encoders, added to those that are known from the encoders themselves.
        tags: Added to zepad's own.

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
            ConfigError: Naming the field, the value and what was expected.
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
        config: Of the model; an attached evaluation becomes the measured numbers and the `model-index`.
        model_id: Hub id it is published under, where known.
        details: What only the publisher knows.

    Raises:
        CheckpointError: If the config's provenance is not as zepad writes it.
    """
    try:
        text = _card(config, model_id, details)
        text.encode()  # JSON can hold half a letter, which no file can
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(
            f"no card can be written: the provenance in config.json is not as zepad writes it "
            f"({type(error).__name__}: {error}). Save the model again."
        ) from error
    return text


def _card(config: SavedConfig, model_id: str | None, details: CardDetails) -> str:
    measured = config.provenance.get("evaluation")
    custom = [
        role
        for role, record in config.encoders.items()
        if record.spec.source == "custom" and record.architecture_of is None
    ]
    return _CARD.format(
        metadata=_metadata(config, model_id, details, measured).to_yaml(),
        title=model_id or "An encoder hardened with zepad",
        model_id=model_id or "<this repository or folder>",
        modules="".join(f", {role}=my_{role}" for role in custom),
        use=_use(config),
        channels=config.channels,
        encoders="\n".join(
            f"| {role} | {record.spec}, {record.features} features | {config.heads.get(role, 'none')} |"
            for role, record in config.encoders.items()
        ),
        facts=_facts(config, custom),
        fusion=Fusion(config.fusion).summary(),
        detector=_detector(config),
        knowing=_knowing(config),
        passes={3: "three", 4: "four", 5: "five"}[config.detector.passes],
        measured=_UNMEASURED if measured is None else _measured(measured),
        white_box=_white_box(measured),
        training=_training(config.provenance),
    )


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
    """One result per claim: benign accuracy, and the worst case under each kind of attacker, named."""
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


def _white_box(measured: Mapping[str, Any] | None) -> str:
    known = measured is not None and "white-box" in measured["groups"]
    return "How much is in the table above." if known else "How much was not measured here."


def _use(config: SavedConfig) -> str:
    if config.stage == "fitted":
        return "labels, flagged = defense.predict(images), defense.detect(images)"
    return 'features = defense.encoder("victim")(images)'


def _facts(config: SavedConfig, custom: list[str]) -> str:
    facts = [f"Stage: {config.stage}.", f"Classes: {config.num_classes or 'none yet'}."]
    if config.class_names and len(config.class_names) <= 100:
        facts.append(f"Class names: {', '.join(map(escape_markdown, config.class_names))}.")
    if config.base is not None:
        facts.append(
            f"The encoders are those of [{config.base.repo_id}](https://huggingface.co/{config.base.repo_id}/tree/"
            f"{config.base.revision}); this repository adds the heads of a task, and loads whole."
        )
    if custom:
        facts.append(f"Modules of the publisher's own, whose architecture you pass when loading: {', '.join(custom)}.")
    return "\n".join(facts)


def _detector(config: SavedConfig) -> str:
    threshold = "not set: calibrate it before use" if config.threshold is None else f"{config.threshold:.4g}"
    return f"{config.detector.name}, threshold {threshold}"


def _knowing(config: SavedConfig) -> str:
    """What somebody who knows the whole model can do to this fusion."""
    bounds = {
        "bounded": f"a log-probability by more than {config.fusion.vote:.3g}",
        "candidates": f"a log-probability by more than {config.fusion.depth:.3g}",
        "mixed": "a transformed probability by more than "
        f"{config.fusion.benign_weight / (1 - config.fusion.benign_weight):.3g}",
    }
    if config.fusion.rule in bounds:
        return (
            "An attacker who knows the whole ensemble (white box) can make the benign branch say anything; it cannot "
            f"overturn hardened branches that lead in {bounds[config.fusion.rule]}."
        )
    return (
        "An attacker who knows the whole ensemble (white box) needs only to make the benign branch confidently wrong: "
        "under such an attack this fusion rule keeps little accuracy."
    )


def _training(provenance: Mapping[str, Any]) -> str:
    steps = {step: record for step, record in provenance.items() if step not in ("evaluation", "encoders")}
    return json.dumps({s: {k: v for k, v in r.items() if k != "history"} for s, r in steps.items()}, indent=2)


def _measured(summary: Mapping[str, Any]) -> str:
    """What an evaluation found, the white box as plainly as the rest."""
    rows = [("none", "none", summary["benign_accuracy"])]
    rows += [
        (f"{group}: worst of {', '.join(found['attackers'])}", ", ".join(found["budgets"]), found["robust_accuracy"])
        for group, found in summary["groups"].items()
    ]
    table = "\n".join(
        f"| {escape_markdown(attack)} | {escape_markdown(budget)} | {_share(value):.1%} | "
        f"{_share(low):.1%} to {_share(high):.1%} |"
        for attack, budget, (value, low, high) in rows
    )
    detection = ", ".join(f"{escape_markdown(name)} {value:.2f}" for name, value in summary["detection_auroc"].items())
    failed = escape_markdown(", ".join(summary["failed_checks"]))
    return (
        f"{summary['images']} images of {escape_markdown(summary['data'])}, seed {summary['seed']}. An image counts as "
        "right only if it survives every attack of its row.\n\n"
        "| attack | budget | accuracy | 95 % interval |\n|---|---|---|---|\n"
        f"{table}\n"
        + (f"\nDetection, area under the ROC curve: {detection}.\n" if detection else "")
        + (f"\nSanity checks that failed, so that accuracies may be too high: {failed}.\n" if failed else "")
    )


def _share(value: object) -> float:
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{value!r} is no share in [0, 1]")
    return value


def _is_license(text: str) -> bool:
    return bool(re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text))
