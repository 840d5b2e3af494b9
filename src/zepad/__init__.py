"""zepad makes any pre-trained image encoder safe to build on.

```python
from zepad import ZePAD

defense = ZePAD.from_encoders(victim, auxiliary)
defense.harden(train_loader).fit_benign(train_loader)
labels, flagged = defense.predict(images), defense.detect(images)
```
"""

import importlib.util
import typing

from ._version import __version__

if typing.TYPE_CHECKING:
    from .config import BenignConfig, HardenConfig, HeadConfig
    from .encoders import Encoder, EncoderSpec, Preprocessing
    from .errors import (
        CheckpointError,
        ConfigError,
        HubError,
        InputError,
        StageError,
        TrainingError,
        ZePADError,
    )
    from .inspection import BranchReport
    from .model import ZePAD
    from .persistence import CardDetails
    from .pipelines import pipeline
    from .zero_shot import ZeroShotHead

__all__ = [
    "BenignConfig",
    "BranchReport",
    "CardDetails",
    "CheckpointError",
    "ConfigError",
    "Encoder",
    "EncoderSpec",
    "HardenConfig",
    "HeadConfig",
    "HubError",
    "InputError",
    "Preprocessing",
    "StageError",
    "TrainingError",
    "ZePAD",
    "ZePADError",
    "ZeroShotHead",
    "__version__",
    "pipeline",
]

_HOMES = {
    "config": ("BenignConfig", "HardenConfig", "HeadConfig"),
    "encoders": ("Encoder", "EncoderSpec", "Preprocessing"),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "HubError",
        "InputError",
        "StageError",
        "TrainingError",
        "ZePADError",
    ),
    "inspection": ("BranchReport",),
    "model": ("ZePAD",),
    "persistence": ("CardDetails",),
    "pipelines": ("pipeline",),
    "zero_shot": ("ZeroShotHead",),
}


def __getattr__(name: str) -> typing.Any:
    """Import a public name when it is first asked for: PyTorch takes seconds, which `zepad --version` need not wait."""
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    # A room, as in `import zepad; zepad.fusion.Bounded()`.
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
