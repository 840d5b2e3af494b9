"""Records of the steps that a model went through. A new step removes the records that it makes stale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STEPS = (
    ("encoders",),
    ("preset",),
    ("harden",),
    ("benign",),
    ("heads", "zero_shot"),
    ("calibration",),
    ("evaluation",),
)
"""Steps in the order in which a model goes through them. Steps of one group replace each other."""


def recorded(provenance: Mapping[str, Any], step: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the records of all earlier steps and of this one. Records of later steps are stale and left out.

    Args:
        provenance: Records by step.
        step: Name of the step that was completed.
        record: Record of the step, JSON-ready.

    Examples:
        >>> recorded({"encoders": {}, "harden": {"old": True}, "evaluation": {}}, "harden", {"old": False})
        {'encoders': {}, 'harden': {'old': False}}
    """
    return {**without(provenance, step), step: record}


def without(provenance: Mapping[str, Any], step: str) -> dict[str, Any]:
    """Return the records of the steps that come before a step.

    Args:
        provenance: Records by step.
        step: Name of the first step whose record is stale.

    Examples:
        >>> without({"harden": {}, "benign": {}, "calibration": {}, "evaluation": {}}, "calibration")
        {'harden': {}, 'benign': {}}
    """
    rank = next(rank for rank, group in enumerate(_STEPS) if step in group)
    earlier = [name for group in _STEPS[:rank] for name in group]
    return {name: provenance[name] for name in earlier if name in provenance}
