"""The model card that travels with a published model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_CARD = """---
library_name: zepad
pipeline_tag: image-classification
tags:
- adversarial-robustness
- zepad
---

# An encoder hardened with zepad

Two public image encoders, adversarially fine-tuned (the multi-pattern adversarial enhancement branch, MPAE), one
encoder trained on clean data (the benign memory preservation branch, BMP), and a confidence-weighted fusion of the
three
(robust federated decision mechanism, RFDM), against downstream-agnostic adversarial examples (DAEs).

| part | architecture |
|---|---|
{encoders}

Stage: {stage}. Classes: {num_classes}. Detection threshold: {threshold}.

## Use

```python
from zepad import ZePAD

defense = ZePAD.from_pretrained("<this repository or folder>")
labels, flagged = defense.predict(images), defense.detect(images)
```

Images are float in [0, 1], `(N, C, H, W)`, un-normalised.

## Training

```json
{provenance}
```

## Threat model and limits

* The defense is meant for attackers who know the public encoders and not the deployed ensemble (semi-black-box).
* An attacker who knows the whole ensemble needs only to make the benign branch confidently wrong: under a white-box
  attack the paper's fusion rule is expected to keep little accuracy. Measure it before you rely on it.
* Every image costs three encoder passes.
{measured}
"""

_UNMEASURED = "* No accuracy is stated here because none was measured when the card was written."


def model_card(
    *,
    stage: str,
    encoders: Mapping[str, str],
    num_classes: int | None,
    threshold: float,
    provenance: Mapping[str, Any],
) -> str:
    """Return the card as Markdown with Hub metadata.

    Args:
        stage: Of the model.
        encoders: Source of each encoder, by role.
        num_classes: Of the task, if there is one.
        threshold: Of the detection score.
        provenance: Of the training; the per-epoch history is left out.
    """
    training = {step: record for step, record in provenance.items() if step != "evaluation"}
    brief = {step: {k: v for k, v in record.items() if k != "history"} for step, record in training.items()}
    return _CARD.format(
        encoders="\n".join(f"| {role} | {spec} |" for role, spec in encoders.items()),
        stage=stage,
        num_classes=num_classes or "none yet",
        threshold=f"{threshold:.4g}",
        provenance=json.dumps(brief, indent=2),
        measured=_measured(provenance["evaluation"]) if "evaluation" in provenance else _UNMEASURED,
    )


def _measured(summary: Mapping[str, Any]) -> str:
    """What an evaluation found, the white box as plainly as the rest."""
    rows = [("none", "none", summary["benign_accuracy"])]
    rows += [
        (f"{group}: worst of {', '.join(found['attackers'])}", ", ".join(found["budgets"]), found["robust_accuracy"])
        for group, found in summary["groups"].items()
    ]
    table = "\n".join(
        f"| {attack} | {budget} | {value:.1%} | {low:.1%} to {high:.1%} |"
        for attack, budget, (value, low, high) in rows
    )
    detection = ", ".join(f"{name} {value:.2f}" for name, value in summary["detection_auroc"].items())
    failed = ", ".join(summary["failed_checks"])
    return (
        f"\n## Measured\n\n{summary['images']} images of {summary['data']}, seed {summary['seed']}. An image counts as "
        "right only if it survives every attack of its row.\n\n"
        "| attack | budget | accuracy | 95 % interval |\n|---|---|---|---|\n"
        f"{table}\n"
        + (f"\nDetection, area under the ROC curve: {detection}.\n" if detection else "")
        + (f"\nSanity checks that failed, so that accuracies may be too high: {failed}.\n" if failed else "")
    )
