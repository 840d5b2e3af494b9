"""An attack from outside the package: any object that fits the `Attack` protocol works like those of zepad."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from zepad.attacks import PGD, Transfer, WorstOf
from zepad.evaluation import Attacker, evaluate

EPS = 64 / 255


@dataclass(frozen=True)
class FGSM:
    """The fast gradient sign method as a third party would write it: no base class, no registration."""

    eps: float
    norm: str = "linf"

    def __call__(self, model, images, targets, *, generator=None):  # noqa: ARG002 - it draws no random number
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(images), targets)
            (gradient,) = torch.autograd.grad(loss, images)
        return (images + self.eps * gradient.sign()).clamp(0, 1).detach()


def test_an_attack_from_outside_is_evaluated_and_combined_like_ours(trained, toy):
    model, (images, labels) = trained, toy
    fgsm = FGSM(eps=EPS)
    attacks = {
        "FGSM": fgsm,
        "transferred": Transfer(attack=fgsm, surrogate=model),
        "worst": WorstOf(attacks=(fgsm, PGD(eps=EPS, steps=3))),
    }
    attackers = [Attacker(name=name, threat_model="white-box", attack=attack) for name, attack in attacks.items()]
    report = evaluate(model, [(images, labels)], attackers, sanity=False, progress=False)
    robust = {row.name: row.rates.robust_accuracy.value for row in report.attacks}
    expected = (model(fgsm(model, images, labels)).argmax(1) == labels).float().mean().item()
    assert report.benign_accuracy.value == 1
    assert robust["FGSM"] == robust["transferred"]
    assert abs(robust["FGSM"] - expected) < 1e-6
    assert robust["worst"] <= robust["FGSM"] < 1
