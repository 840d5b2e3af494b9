"""Reports with made-up numbers, for the tests of how reports are shown. Nothing in them was measured."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from zepad.evaluation import with_baseline
from zepad.evaluation.attackers import THREAT_MODELS
from zepad.evaluation.report import AttackResult, Check, Cost, EvalReport, RobustRates, Sample
from zepad.evaluation.statistics import Detection, Rate

BRANCHES = ("victim", "auxiliary", "benign")
IMAGES = 500
ATTACKERS = (
    ("AdvEncoder", "semi-black-box", 0.71),
    ("PAP", "semi-black-box", 0.68),
    ("UAP", "semi-black-box", 0.83),
    ("UAPGD", "semi-black-box", 0.79),
    ("SSP", "semi-black-box", 0.74),
    ("PAP on both encoders", "semi-black-box+", 0.55),
    ("APGD-CE", "white-box", 0.06),
    ("APGD-DLR", "white-box", 0.08),
    ("APGD that evades the detector", "white-box", 0.11),
    ("Square", "white-box", 0.34),
    ("PGD on the benign branch", "white-box", 0.21),
    ("FAB", "white-box", 0.09),
)


@cache
def png(seed: int, size: int = 64, *, noise: bool = False) -> bytes:
    """A picture that does not compress much: a colour gradient with grain, or grain alone."""
    generator = np.random.default_rng(seed)
    slope = np.linspace(40, 200, size)
    picture = np.stack([np.add.outer(slope * generator.random(), slope * generator.random()) for _ in range(3)], -1)
    grain = generator.integers(0, 255 if noise else 60, picture.shape)
    buffer = io.BytesIO()
    Image.fromarray((grain if noise else picture / 2 + grain).clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def field_names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def histogram(mean: float, images: int = IMAGES) -> tuple[int, ...]:
    """Counts of values around a mean, in 20 bins of [0, 1]."""
    values = np.clip(np.random.default_rng(int(mean * 1e6)).normal(mean, 0.15, images), 0, 1)
    return tuple(int(count) for count in np.histogram(values, 20, (0, 1))[0])


def rate(share: float, total: int = IMAGES) -> Rate:
    return Rate(round(share * total), total)


def robust_rates(share: float, branches: Sequence[str], total: int = IMAGES) -> RobustRates:
    right = round(0.91 * total)
    return RobustRates(
        robust_accuracy=rate(share, total),
        fooling_rate=rate(0.96 - share, total),
        attack_success_rate=Rate(max(right - round(share * total), 0), right),
        branches={name: rate(share * (0.9 - 0.2 * i), total) for i, name in enumerate(branches)},
    )


def worst_of(shares: Sequence[float]) -> float:
    """Several attackers leave less together than the best of them alone."""
    return min(shares) * (0.9 if len(shares) > 1 else 1)


def detection(share: float, total: int = IMAGES) -> Detection:
    area = 0.98 - share / 2
    x = np.linspace(0, 1, 40)
    return Detection(
        auroc=area,
        auroc_interval=(area - 0.021, area + 0.017),
        auroc_fooling=None if share > 0.8 else area + 0.008,
        fooling_images=0 if share > 0.8 else round((1 - share) * total),
        fpr_at_95_tpr=share / 2,
        accuracy=area - 0.06,
        flagged=rate(0.05 ** ((1 - area) / area), total),  # the curve at the benign images' rate
        evading=rate((1 - share) * 0.2, total),
        curve=tuple((float(a), float(b)) for a, b in zip(x, x ** ((1 - area) / area), strict=True)),
    )


def attack(
    name: str,
    threat_model: Any,
    share: float,
    *,
    branches: Sequence[str] = BRANCHES,
    detector: bool = True,
    eps: float = 10 / 255,
    norm: str = "linf",
    settings: dict[str, Any] | None = None,
) -> AttackResult:
    return AttackResult(
        name=name,
        threat_model=threat_model,
        eps=eps,
        norm=norm,
        settings=settings
        or {"attack": name, "eps": eps, "steps": 20, "step_size": None, "schedule": {"first": 0.1, "halvings": [3, 7]}},
        rates=robust_rates(share, branches),
        detection=detection(share) if detector else None,
        cost=Cost(seconds=12.34 + share, forwards=101.5, gradients=100.0),
        confidences={branch: histogram(0.3 + share / 2 - 0.04 * i) for i, branch in enumerate((*branches, "fused"))},
        scores=histogram(0.9 - share / 2) if detector else (),
    )


def samples(
    attackers: Sequence[str], count: int = 4, *, size: int = 64, flags: bool = True, noise: bool = False
) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            attacker=name,
            index=index,
            label=index % 3,
            before=index % 3,
            after=(index + number) % 3,
            flagged=(index + number) % 2 == 0 if flags else None,
            benign=png(index, size, noise=noise),
            attacked=png(1000 + 50 * number + index, size, noise=noise),
            perturbation=png(9000 + 50 * number + index, size, noise=True),
        )
        for number, name in enumerate(attackers)
        for index in range(count)
    )


TRAINING = tuple(
    {"branch": branch, "stage": stage, "epoch": epoch, "step": 9 * epoch, "lr": 1e-3, "loss": 1 / epoch}
    for branch, stage in (("victim", "hardening"), ("auxiliary", "hardening"), ("benign", "benign"))
    for epoch in (1, 2, 3)
)
"""Learning curves of three branches."""


def report(
    *,
    model: str = "ZePAD",
    data: str = "made-up data",
    attackers: Sequence[tuple[str, str, float]] = ATTACKERS,
    branches: Sequence[str] = BRANCHES,
    detector: bool = True,
    failed: bool = True,
    **changes: Any,
) -> EvalReport:
    attacks = tuple(
        attack(name, threat_model, share, branches=branches, detector=detector)
        for name, threat_model, share in attackers
    )
    members: dict[str, list[float]] = {}
    for result in attacks:
        for group in (result.threat_model, "all"):
            members.setdefault(group, []).append(result.rates.robust_accuracy.value)
    checks = (
        Check(name="outputs are not random", passed=True, detail="two passes of the same images differ by up to 0"),
        Check(name="gradients are not zero", passed=True, detail="0.0% of 64 images have a gradient of exactly zero"),
        Check(
            name="a large budget breaks it",
            passed=not failed,
            detail="robust accuracy 31.0% under APGD-CE (40 steps) at eps 0.5"
            + (": no model can withstand that, so the gradients must be masked." if failed else ""),
        ),
    )
    values: dict[str, Any] = {
        "model": model,
        "data": data,
        "images": IMAGES,
        "classes": ("cat", "dog", "truck"),
        "benign_accuracy": rate(0.91),
        "benign_branches": {name: rate(0.85 + 0.02 * i) for i, name in enumerate(branches)},
        "false_positive_rate": rate(0.05) if detector else None,
        "threshold": 0.9 if detector else None,
        "attacks": attacks,
        "worst": {group: robust_rates(worst_of(shares), branches) for group, shares in members.items()},
        "checks": checks,
        "confidences": {branch: histogram(0.9 - 0.03 * i) for i, branch in enumerate((*branches, "fused"))},
        "provenance": {"seed": 0, "data_digest": "d1" * 32, "zepad": "0.0", "device": "cpu", "batches": 8},
        "scores": histogram(0.2) if detector else (),
        "score_range": (-1.5, 4.5) if detector else None,
    }
    if "samples" not in changes:  # pictures take long to draw
        values["samples"] = samples([name for name, _, _ in attackers], flags=detector)
    return EvalReport(**{**values, **changes})


def plain(**changes: Any) -> EvalReport:
    """A classifier without branches and without a detector."""
    return report(model="plain classifier", branches=(), detector=False, failed=False, **changes)


def compared() -> EvalReport:
    """A defense beside a plain classifier under the same attackers, who leave nothing of it; FAB attacked only one."""
    shares = tuple((name, group, share / 8) for name, group, share in ATTACKERS if name != "FAB")
    bare = report(model="plain classifier", attackers=shares, branches=(), detector=False, failed=False)
    return with_baseline(report(training=TRAINING), bare)


def ladder() -> EvalReport:
    """Seven attackers of each threat model on a defense and on what it is compared with, as an evaluation has them."""
    names = [f"feature PGD-20 (hardened encoders) {number}" for number in range(7)]
    attackers = tuple((f"{n} of {group}", group, 0.9 - 0.1 * i) for i, group in enumerate(THREAT_MODELS) for n in names)
    public = tuple(attacker for attacker in attackers if attacker[1] != "published")
    bare = report(model="undefended zepad:digits", attackers=public, branches=(), detector=False, failed=False)
    return with_baseline(report(attackers=attackers, failed=False), bare)


def unattacked() -> EvalReport:
    """Nobody attacked, nothing was checked."""
    return report(attackers=(), checks=())


HOSTILE = "<script>alert(1)</script>|\"'&amp;`*_[x](http://a.b)\\ \x00\ud800\u202e\n# $x^"


def hostile() -> EvalReport:
    """Names and settings that look like markup, and letters that no file may hold."""
    shown = report(model=HOSTILE, data=HOSTILE, attackers=((HOSTILE, "white-box", 0.3),), branches=(HOSTILE,))
    values = {name: getattr(shown, name) for name in field_names(EvalReport)}
    named = attack(HOSTILE, "white-box", 0.3, branches=(HOSTILE,), settings={HOSTILE: {HOSTILE: HOSTILE}})
    failed = Check(name=HOSTILE, passed=False, detail=HOSTILE)
    provenance = {**shown.provenance, HOSTILE: HOSTILE}
    return EvalReport(
        **{
            **values,
            "classes": (HOSTILE,) * 3,
            "attacks": (named,),
            "checks": (failed,),
            "provenance": provenance,
        }
    )


def large() -> EvalReport:
    """Twenty attackers with very long names, a thousand classes, images that do not compress."""
    long = "an attacker whose name nobody thought of shortening_before_it_was_put_into_a_table " * 2
    attackers = tuple((f"{i} {long}", THREAT_MODELS[i % 5], 0.04 * i) for i in range(20))
    return report(
        model="a model " * 30,
        attackers=attackers,
        classes=tuple(f"class number {i}, with a long name" for i in range(1000)),
        samples=samples([name for name, _, _ in attackers], noise=True),
    )


def empty_rates() -> EvalReport:
    """Denominators of zero, and nothing counted anywhere."""
    nothing = Rate(0, 0)
    none = RobustRates(robust_accuracy=nothing, fooling_rate=nothing, attack_success_rate=nothing, branches={})
    bare = attack("nothing", "white-box", 0.5, branches=(), detector=False)
    values = {name: getattr(bare, name) for name in field_names(AttackResult)}
    result = AttackResult(**{**values, "rates": none, "confidences": {"fused": (0,) * 20}})
    return plain(
        benign_accuracy=nothing,
        attackers=(),
        attacks=(result,),
        worst={"white-box": none, "all": none},
        confidences={"fused": (0,) * 20},
        samples=(),
    )


EXAMPLES = {
    "full": report,
    "compared": compared,
    "plain": plain,
    "unattacked": unattacked,
    "hostile": hostile,
    "large": large,
    "empty_rates": empty_rates,
}
