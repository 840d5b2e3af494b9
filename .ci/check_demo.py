"""Hold the demo's JSON against what the project promises of it. Time is printed, not judged: it is the machine's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

result = json.loads(Path(sys.argv[1]).read_text())
undefended, zepad, recommended = result["undefended"], result["zepad"], result["recommended"]
best_branch = max(branch["robust_accuracy"]["white_box"] for branch in result["hardened_branches"].values())
promises = {
    "undefended below 30 % under both attacks": all(
        undefended["robust_accuracy"][attack] < 0.30 for attack in ("universal", "per_image")
    ),
    "benign accuracy at least the undefended classifier's": zepad["benign_accuracy"] >= undefended["benign_accuracy"],
    "at least 95 % under both semi-black-box attacks": all(
        fused["robust_accuracy"][attack] >= 0.95
        for attack in ("universal", "per_image")
        for fused in (zepad, recommended)
    ),
    "the recommended fusion within a point of the undefended benign accuracy": recommended["benign_accuracy"]
    >= undefended["benign_accuracy"] - 0.01,
    "the recommended fusion at least 50 % under the white box, and above the paper's": recommended["robust_accuracy"][
        "white_box"
    ]
    >= max(0.5, zepad["robust_accuracy"]["white_box"]),
    "the recommended detector's AUROC at least 0.95 under both": min(result["detection_auroc"]["features"].values())
    >= 0.95,
    "it flags at most 10 % of benign images": result["false_positive_rate"] <= 0.1,
    "best hardened branch at least 60 % under white-box PGD-20 at 25/255": best_branch >= 0.60,
    "the reloaded model predicts the same": result["reload_equal"],
}
for promise, kept in promises.items():
    sys.stdout.write(f"{'kept  ' if kept else 'BROKEN'} {promise}\n")
sys.stdout.write(f"demo took {result['seconds']} s\n{json.dumps(result)}\n")
sys.exit(not all(promises.values()))
