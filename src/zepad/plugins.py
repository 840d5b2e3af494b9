"""A register of named classes whose fields are settings. Fusion rules and detectors are found by name in one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, TypeVar

from .errors import CheckpointError, ConfigError
from .schema import STRICT, parse_json

_P = TypeVar("_P", bound="Plugin")


@dataclass(frozen=True, kw_only=True)
class PluginRecord:
    """Name and settings of a plug-in, as they are written to a file.

    Attributes:
        name: Name under which the class is registered.
        settings: All settings by name.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """Base class of everything that a register holds: a frozen dataclass whose fields are its settings.

    Attributes:
        name: Name under which the class is registered.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    name: ClassVar[str] = ""

    def settings(self) -> dict[str, Any]:
        """Return the settings by name, JSON-ready."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    def record(self) -> PluginRecord:
        """Return the record of name and settings, from which `Register.read` rebuilds an equal object."""
        return PluginRecord(name=self.name, settings=self.settings())

    def summary(self) -> str:
        """Return name and settings in readable form, such as `"bounded (vote 0.5)"`."""
        settings = ", ".join(f"{key.replace('_', ' ')} {_shown(value)}" for key, value in vars(self).items())
        return f"{self.name} ({settings})" if settings else self.name


def _shown(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(_shown, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Register(Generic[_P]):
    """A register of classes by name.

    Args:
        kind: Kind of the classes for error messages, such as `"fusion rule"`.
        base: Class that every entry extends.
        home: Module whose `register` function adds an entry, for error messages.
    """

    def __init__(self, kind: str, base: type[_P], *, home: str) -> None:
        self.kind = kind
        self.base = base
        self.home = home
        self._classes: dict[str, type[_P]] = {}

    def names(self) -> tuple[str, ...]:
        """Return the registered names in the order of registration, those of installed packages included."""
        _load_installed()
        return tuple(self._classes)

    def register(self, name: str, cls: type[_P]) -> None:
        """Add a class under a name. A class of the same module and name replaces the earlier one, as in a notebook.

        Args:
            name: Name of lower-case letters, digits, `-` and `_` that starts with a letter. Saved models refer to it.
            cls: A frozen dataclass that extends the base class and has a default for every field.

        Raises:
            ConfigError: If the name is malformed or taken by another class, or the class is not such a dataclass.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
            raise ConfigError(f"the name of a {self.kind} must be lower-case letters and digits; got {name!r}.")
        if not (isinstance(cls, type) and issubclass(cls, self.base) and "__dataclass_fields__" in vars(cls)):
            raise ConfigError(
                f"a {self.kind} must be a class decorated with @dataclass(frozen=True, kw_only=True) that extends "
                f"{self.home}.{self.base.__name__}; got {cls!r}."
            )
        taken = self._classes.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"the name {name!r} already belongs to the {self.kind} {taken.__qualname__}.")
        try:
            cls()
        except TypeError as error:
            raise ConfigError(f"the {self.kind} {cls.__qualname__} must work without arguments: {error}.") from error
        cls.name = name
        self._classes[name] = cls

    def get(self, name: object, *, argument: str = "rule") -> type[_P]:
        """Return the class that is registered under a name.

        Args:
            name: Name of the class.
            argument: Name of the argument that held the name, for error messages.

        Raises:
            ConfigError: If no class is registered under the name.
        """
        found = self._find(name)
        if found is None:
            known = " or ".join(f'"{known}"' for known in self._classes)
            raise ConfigError(f"{argument} must be {known}; got {name!r}. Add your own with {self.home}.register.")
        return found

    def _find(self, name: object) -> type[_P] | None:
        if name not in self._classes:
            _load_installed()
        return self._classes.get(name) if isinstance(name, str) else None

    def resolve(self, given: _P | str, *, argument: str) -> _P:
        """Return an object of a registered class.

        Args:
            given: An object, which is returned as it is, or a name, which gives that class with its default settings.
            argument: Name of the argument that held it, for error messages.

        Raises:
            ConfigError: If the name is unknown, or the class of the object is not registered.
        """
        if isinstance(given, self.base):
            if self._classes.get(given.name) is not type(given):
                raise ConfigError(
                    f"{argument}: {type(given).__qualname__} is not registered, so a saved model could not name it. "
                    f"Call {self.home}.register(name, {type(given).__qualname__}) first."
                )
            return given
        return self.get(given, argument=argument)()

    def read(self, record: PluginRecord, *, origin: str) -> _P:
        """Rebuild an object from its record.

        Args:
            record: Name of the class and all of its settings.
            origin: File that holds the record, for error messages.

        Raises:
            CheckpointError: If no such class is registered, or the settings are not exactly those of the class.
        """
        name, found = record.name, self._find(record.name)
        if found is None:
            raise CheckpointError(
                f"{origin} uses the {self.kind} {name!r}, which is not registered here; known are "
                f"{', '.join(self._classes)}. Import the code that calls {self.home}.register({name!r}, ...) first."
            )
        return parse_json(found, json.dumps(record.settings), origin=f"{origin}, {self.kind} {name!r}")


@cache
def _load_installed() -> None:
    """Import the plug-ins of installed packages once: entry points of the group `zepad.plugins`, which call `register`.

    Only packages that the user installed are imported; a saved model cannot name a module to import.
    """
    for entry_point in entry_points(group="zepad.plugins"):
        entry_point.load()
