"""Where an encoder comes from, and how to build it again without the network."""

from __future__ import annotations

import math
import re
import reprlib
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..arguments import checked
from ..config import _JSONConfig, require
from ..errors import ConfigError
from .preprocessing import Preprocessing

Pooling = Literal["class_token", "mean"]
Weights = Literal["fixed", "tag", "file", "repository"]
"""How a source's specs name pre-trained weights; `register_source` explains each."""

POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
WEIGHTS: tuple[Weights, ...] = get_args(Weights)

FORMS: dict[str, Weights] = {}
"""How each registered source names weights; `register_source` writes it."""

_FORM_TEXTS = {"fixed": "<model>", "tag": "<model>@<weights>", "file": "<file>", "repository": "<Hub id or folder>"}

# Specs of such a source name a file or a repository of weights, from which the architecture is read; a bare word is the
# architecture.
_NAMED_BY_WEIGHTS = ("file", "repository")

# Larger than in any published vision model: a config from elsewhere must not ask for hours or for all memory.
_MOST, _MOST_LAYERS = 2**16, 256

# Arguments of timm and torchvision that choose weights, some of them from any path. A published config may have none.
_WEIGHTS = ("pretrained", "checkpoint", "weights", "cache_dir")


@dataclass(frozen=True, kw_only=True)
class EncoderSpec(_JSONConfig):
    """The name of an encoder at its source, its arguments, and how images go in and features come out.

    It holds names and numbers, never code.

    Attributes:
        source: `"timm"`, `"torchvision"`, `"open_clip"`, `"transformers"`, `"solo"` and `"lightly"` (checkpoints of
            solo-learn and lightly), `"zepad"` (encoders shipped inside this package), a name given to
            `register_source`, or `"custom"` for a module that only the caller can build.
        name: The architecture's name at its source; empty for `"custom"`.
        arguments: Keyword arguments of the architecture: JSON scalars, or lists of them. Integers are at most 65,536.
        preprocessing: Resize and normalisation that the backbone expects; None takes those of the model's own
            configuration.
        pooling: How token sequences become one feature vector; None takes the model's own way.
        weights: Name of the pre-trained weights: a file for solo and lightly, a tag for open_clip and torchvision, a
            Hub id or folder for transformers. It is used when pre-trained weights are asked for, and never saved with
            a model.

    Examples:
        >>> spec = EncoderSpec.parse("timm:resnet18")
        >>> spec.source, spec.name, str(spec)
        ('timm', 'resnet18', 'timm:resnet18')
        >>> EncoderSpec.parse("open_clip:ViT-B-32@laion2b_s34b_b79k").weights
        'laion2b_s34b_b79k'
        >>> EncoderSpec.parse("solo:runs/byol.ckpt").weights
        'runs/byol.ckpt'
    """

    source: str
    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    pooling: Pooling | None = None
    weights: str = ""

    def __post_init__(self) -> None:
        """Check every field. A name is an identifier: no path, no address, no dotted import.

        Raises:
            ConfigError: If a field is malformed.
        """
        word = isinstance(self.source, str) and bool(re.fullmatch(r"[a-z][a-z0-9_-]*", self.source))
        require(word, "source", self.source, f"a plain word, such as {', '.join(FORMS)} or custom")
        require(isinstance(self.name, str), "name", self.name, "a string")
        # A source may be known in another process alone. Whether this one can build it is asked when it is built.
        form = "fixed" if self.source == "custom" else FORMS.get(self.source, "repository")
        taken = isinstance(self.weights, str) and (not self.weights or form != "fixed")
        require(taken, "weights", self.weights, f"a string, and empty for {self.source}, whose names say it all")
        if self.source == "custom":
            require(not self.name and not self.arguments, "name", self.name, 'empty for source "custom"')
        elif self.name or not (self.weights and form in _NAMED_BY_WEIGHTS):
            plain = bool(self.name) and all(c.isalnum() or c in "_-." for c in self.name) and self.name[0] not in "-."
            require(plain, "name", self.name, f"a plain model name of {self.source}, without ':' or '/'")
        plain = isinstance(self.arguments, dict) and all(
            isinstance(name, str) and (all(map(_is_scalar, value)) if isinstance(value, list) else _is_scalar(value))
            for name, value in self.arguments.items()
        )
        require(plain, "arguments", self.arguments, "a mapping of names to plain JSON scalars or lists of them")
        harmless = not any(name.startswith(_WEIGHTS) for name in self.arguments)
        require(harmless, "arguments", self.arguments, f"of the architecture, none named {', '.join(_WEIGHTS)}...")
        for name, value in self.arguments.items():
            counts = [count for count in (value if isinstance(value, list) else [value]) if isinstance(count, int)]
            layers = "depth" in name or "layers" in name
            modest = max(map(abs, counts), default=0) <= _MOST and len(counts) <= _MOST_LAYERS
            modest = modest and not (layers and sum(map(abs, counts)) > _MOST_LAYERS)
            if not modest:
                most = f"{_MOST_LAYERS} layers" if layers else f"{_MOST}, and of at most {_MOST_LAYERS} entries"
                raise ConfigError(f"arguments[{name!r}] must be at most {most}; got {reprlib.repr(value)}.")
        typed = self.preprocessing is None or isinstance(self.preprocessing, Preprocessing)
        require(typed, "preprocessing", self.preprocessing, "a Preprocessing or None")
        require(self.pooling in (None, *POOLINGS), "pooling", self.pooling, f"one of {POOLINGS} or None")

    def __str__(self) -> str:
        if not self.name:
            return f"{self.source}:{self.weights}" if self.weights else self.source
        return f"{self.source}:{self.name}" + (f"@{self.weights}" if self.weights else "")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EncoderSpec:
        """Rebuild a spec from its JSON form.

        Raises:
            ConfigError: If a name is unknown or a value out of range.
        """
        inner = values.get("preprocessing")
        if isinstance(inner, dict):
            values = {**values, "preprocessing": Preprocessing.from_dict(inner)}
        return super().from_dict(values)

    @classmethod
    @checked
    def parse(cls, text: str) -> EncoderSpec:
        """Read the string form: `"source:name"`, `"source:name@weights"`, or `"source:weights"`.

        For solo, lightly, transformers and other sources that read the architecture from the weights, a text with a
        dot or a slash names weights, and any other an architecture.

        Raises:
            ConfigError: If the source is not registered or the name is not plain.
        """
        source, _, rest = text.partition(":")
        if not rest or source not in FORMS:
            forms = ", ".join(f"{name}:{_FORM_TEXTS[form]}" for name, form in FORMS.items())
            raise ConfigError(
                f"an encoder spec must read {forms}; got {text!r}. A source of another package has to be registered "
                "first: import that package, or call zepad.encoders.register_source."
            )
        if FORMS[source] in _NAMED_BY_WEIGHTS and set(rest) & set("./\\"):
            return cls(source=source, weights=rest)
        name, _, weights = rest.partition("@")
        return cls(source=source, name=name, weights=weights)


def _is_scalar(value: object) -> bool:
    """Whether a value is a finite number, a flag, None or a word; text with ':' or '/' may be an address or a path."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return not set(value) & set(":/\\")
    return isinstance(value, (int, type(None)))
