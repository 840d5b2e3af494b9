"""Every error zepad raises on purpose.

```
ZePADError
├── ConfigError(ValueError)        a setting out of range
├── InputError(ValueError)         images, labels, loaders or encoders that do not fit
├── StageError(RuntimeError)       a call out of order; the message names the call to make
├── TrainingError(RuntimeError)    training that cannot go on, such as a loss that is not finite
├── CheckpointError(RuntimeError)  files that are missing, damaged, foreign or newer than this version
└── HubError(RuntimeError)         the Hugging Face Hub or a model source could not deliver
```

Four warnings are no errors: `EvaluationWarning(UserWarning)` when the numbers of an evaluation may be too high,
`CalibrationWarning(UserWarning)` when calibration could not reach what was asked for,
`HardeningWarning(UserWarning)` when a hardened branch is far less accurate than its public encoder, and
`InputWarning(UserWarning)` when encoders or labels fit and are probably not what was meant.

Every message says what was got, what was expected and what to do.
"""

from __future__ import annotations


class ZePADError(Exception):
    """Base of every error raised by zepad."""


class ConfigError(ZePADError, ValueError):
    """A setting is out of range or contradicts another one."""


class InputError(ZePADError, ValueError):
    """Images, labels, a loader or an encoder do not fit."""


class StageError(ZePADError, RuntimeError):
    """A call came out of order. The message names the call to make first."""


class TrainingError(ZePADError, RuntimeError):
    """Training cannot go on, for instance because the loss is not finite."""


class CheckpointError(ZePADError, RuntimeError):
    """Saved files are missing, damaged, foreign, or written by a newer version."""


class HubError(ZePADError, RuntimeError):
    """The Hugging Face Hub or a model source could not deliver."""


class CalibrationWarning(UserWarning):
    """Calibration could not reach what was asked for, and took the nearest that it found."""


class EvaluationWarning(UserWarning):
    """A sanity check of an evaluation failed: its robust accuracies may be too high."""


class HardeningWarning(UserWarning):
    """A hardened branch is far less accurate on held-out images than the public encoder it started from."""


class InputWarning(UserWarning):
    """Encoders or labels fit, and are probably not what was meant."""
