"""Where an encoder comes from, and how to build it again without the network."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..config import _JSONConfig, require
from ..errors import ConfigError

Source = Literal["timm", "torchvision", "zepad", "custom"]

SOURCES: tuple[Source, ...] = ("timm", "torchvision", "zepad", "custom")


# Arguments of timm and torchvision that choose weights, some of them from any path: a published config must not.
_WEIGHTS = ("pretrained", "checkpoint", "weights", "cache_dir")


@dataclass(frozen=True, kw_only=True)
class EncoderSpec(_JSONConfig):
    """A name that a known source can build an architecture from. It holds names and numbers, never code.

    Attributes:
        source: `"timm"`, `"torchvision"`, `"zepad"` (encoders shipped inside this package), or `"custom"` for a
            module that only the caller can build.
        name: The architecture's name at its source; empty for `"custom"`.
        arguments: Keyword arguments of the architecture, JSON scalars only.

    Examples:
        >>> spec = EncoderSpec.parse("timm:resnet18")
        >>> spec.source, spec.name, str(spec)
        ('timm', 'resnet18', 'timm:resnet18')
    """

    source: Source
    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field. A name is an identifier: no path, no address, no dotted import.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        require(self.source in SOURCES, "source", self.source, f"one of {SOURCES}")
        require(isinstance(self.name, str), "name", self.name, "a string")
        if self.source == "custom":
            require(not self.name and not self.arguments, "name", self.name, 'empty for source "custom"')
        else:
            plain = bool(self.name) and all(c.isalnum() or c in "_-." for c in self.name) and self.name[0] not in "-."
            require(plain, "name", self.name, f"a plain model name of {self.source}, without ':' or '/'")
        scalars = isinstance(self.arguments, dict) and all(
            isinstance(k, str)
            and isinstance(v, (str, int, float, bool, type(None)))
            and not (isinstance(v, float) and not math.isfinite(v))
            for k, v in self.arguments.items()
        )
        require(scalars, "arguments", self.arguments, "a mapping of names to JSON scalars")
        harmless = not any(name.startswith(_WEIGHTS) for name in self.arguments)
        require(harmless, "arguments", self.arguments, f"of the architecture, none named {', '.join(_WEIGHTS)}...")

    def __str__(self) -> str:
        return f"{self.source}:{self.name}" if self.name else self.source

    @classmethod
    def parse(cls, text: str) -> EncoderSpec:
        """Read the string form `"source:name"`.

        Raises:
            ConfigError: If the source is unknown or the name is not plain.
        """
        source, colon, name = text.partition(":")
        known = [s for s in SOURCES if s != "custom"]
        if not colon or source not in known:
            forms = ", ".join(f'"{s}:<name>"' for s in known)
            raise ConfigError(f"an encoder spec must read {forms}; got {text!r}.")
        return cls(source=source, name=name)
