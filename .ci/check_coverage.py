"""The parts whose mistakes nobody would see must be covered by more than 95 %."""

from __future__ import annotations

import io
import sys

from coverage import Coverage

measured = Coverage()
measured.load()
failed = False
for part in ("functional/*", "modules.py", "persistence/*"):
    share = measured.report(include=[f"*/zepad/{part}"], file=io.StringIO())
    sys.stdout.write(f"coverage of {part}: {share:.1f} %\n")
    failed |= share <= 95
sys.exit(failed)
