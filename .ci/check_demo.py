"""Hold the demo's JSON against what the project promises of it. Time is printed, not judged: it is the machine's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

result = json.loads(Path(sys.argv[1]).read_text())
undefended, zepad = result["undefended"], result["zepad"]
best_branch = max(branch["robust_accuracy"]["white_box"] for branch in result["hardened_branches"].values())
promises = {
    "undefended below 30 % under both attacks": all(
        undefended["robust_accuracy"][attack] < 0.30 for attack in ("universal", "per_image")
    ),
    "benign accuracy at least the undefended classifier's": zepad["benign_accuracy"] >= undefended["benign_accuracy"],
    "at least 95 % under both semi-black-box attacks": all(
        zepad["robust_accuracy"][attack] >= 0.95 for attack in ("universal", "per_image")
    ),
    "best hardened branch at least 60 % under white-box PGD-20 at 25/255": best_branch >= 0.60,
    "the reloaded model predicts the same": result["reload_equal"],
}
for promise, kept in promises.items():
    sys.stdout.write(f"{'kept  ' if kept else 'BROKEN'} {promise}\n")
sys.stdout.write(f"demo took {result['seconds']} s\n{json.dumps(result)}\n")
sys.exit(not all(promises.values()))
