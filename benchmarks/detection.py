"""How the two hardened confidences should combine in the detection score: AUROC of each way, one JSON line.

python benchmarks/detection.py zepad-demo/model      (after `zepad demo`)
"""

from __future__ import annotations

import json
import sys

import torch
from common import load_encoders, load_images

from zepad import Encoder, ZePAD
from zepad.attacks import PGD, UniversalFeatureAttack, attack_features
from zepad.demo import EPS
from zepad.evaluation import auroc
from zepad.functional import confidence, detection_score


def main() -> None:
    torch.set_num_threads(1)
    defense = ZePAD.from_pretrained(sys.argv[1])
    train, test = load_images("digits-train", None, None), load_images("digits-test", None, None)
    public: Encoder = ZePAD.from_encoders(*load_encoders("digits", None)).encoder("victim")
    batches = list(train.images.split(128))
    generator = torch.Generator().manual_seed(0)
    attacked = {
        "universal": UniversalFeatureAttack(eps=EPS).fit(public, batches).apply(test.images),
        "per_image": attack_features(
            PGD(eps=EPS, steps=20, step_size=EPS / 8), public, test.images, generator=generator
        ),
    }
    with torch.no_grad():
        logits = {name: defense.branch_logits(images) for name, images in {"benign": test.images, **attacked}.items()}
    scores = {
        "mean of m (the library's)": detection_score,
        "max of m": lambda z: z.softmax(-1).amax(-1)[:-1].amax(0) - z.softmax(-1).amax(-1)[-1],
        "mean of c, sharpness 3": lambda z: confidence(z)[:-1].mean(0) - confidence(z)[-1],
    }
    record = {
        name: {a: round(auroc(benign=score(logits["benign"]), attacked=score(logits[a])), 3) for a in attacked}
        for name, score in scores.items()
    }
    flagged = {name: round(float((detection_score(z) > 0.1).float().mean()), 3) for name, z in logits.items()}
    print(json.dumps({"auroc": record, "flagged at 0.1": flagged}))


if __name__ == "__main__":
    main()
