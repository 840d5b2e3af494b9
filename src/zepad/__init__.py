"""zepad makes any pre-trained image encoder safe to build on.

```python
from zepad import ZePAD

defense = ZePAD.from_encoders(victim, auxiliary)
defense.harden(train_loader).fit_benign(train_loader)
labels, flagged = defense.predict(images), defense.detect(images)
```
"""

from ._version import __version__
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
]
