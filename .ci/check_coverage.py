"""Hold the coverage of lines against 95 %: of the whole package, and of each part whose mistakes nobody would see."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path

from coverage import Coverage

measured = Coverage()
measured.load()
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "coverage.json"
    measured.json_report(outfile=str(file))
    totals = json.loads(file.read_text())["totals"]
shares = {"all lines": 100 * totals["covered_lines"] / totals["num_statements"]}
# What asks the Hub runs in a process of its own in the tests, where no line is counted.
ON_DISK = [f"persistence/{name}.py" for name in ("config", "contents", "rebuilding", "saving", "weights")]
for name, files in {"functional": ["functional/*"], "modules": ["modules.py"], "models on disk": ON_DISK}.items():
    shares[name] = measured.report(include=[f"*/zepad/{file}" for file in files], file=io.StringIO())
for part, share in shares.items():
    sys.stdout.write(f"coverage of {part}: {share:.1f} %\n")
sys.exit(min(shares.values()) < 95)
