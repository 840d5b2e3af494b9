"""Settings of training in a file, for several commands: a section for each config, in YAML or JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config import BenignConfig, HardenConfig, HeadConfig

CONFIG = typer.Option(metavar="FILE", help="Settings, in YAML or JSON. Options of the command line win over them.")
SAVE_CONFIG = typer.Option(metavar="FILE", help="Write the settings that are used, for --config: .yaml, .yml or .json.")
EPS = typer.Option(metavar="NUMBER", help="L-infinity budget in [0, 1] pixel units, such as 8/255.")
EPOCHS = typer.Option(min=1, metavar="NUMBER", help="Number of passes over the images; by default as many as needed.")

SECTIONS = ("harden", "benign", "heads")
_LARGEST = 2**20  # bytes


def parse_eps(text: str) -> float:
    """Read a budget such as `10/255` or `0.04`.

    Raises:
        ConfigError: If it is no number, or lies outside (0, 1].
    """
    from ..config import check_budget

    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(?:/\s*([0-9.]+)\s*)?", text)
    try:
        if match is None:
            raise ValueError
        eps = float(match[1]) / float(match[2] or 1)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"eps must be a number or a fraction such as 10/255; got {text!r}.") from None
    check_budget(eps)
    return eps


def read_settings(path: Path | None) -> dict[str, dict[str, Any]]:
    """Return the sections of a file; none where there is no file.

    Raises:
        ConfigError: If it cannot be read, or holds a section that no command knows.
    """
    if path is None:
        return {}
    import yaml

    from ..files import read_bytes

    try:
        text = read_bytes(path, limit=_LARGEST).decode()
        found = json.loads(text) if path.suffix.lower() == ".json" else yaml.load(text, _loader())  # noqa: S506
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Pass a file that --save-config wrote.") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is neither YAML nor JSON: {reason}. --save-config writes such a file.") from error
    if found is None:
        return {}
    sections = found if isinstance(found, dict) else {}
    if not isinstance(found, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise ConfigError(f"{path} must map {', '.join(SECTIONS)} to their settings, as --save-config writes it.")
    unknown = [str(name) for name in sections if name not in SECTIONS]
    if unknown:
        raise ConfigError(f"{path} has no section {', '.join(unknown)}; it can have {', '.join(SECTIONS)}.")
    return sections


def write_settings(path: Path | None, configs: Mapping[str, HardenConfig | BenignConfig | HeadConfig]) -> None:
    """Write the settings of some sections, and leave those of others that the file has.

    Args:
        path: File to write; None writes nothing.
        configs: Configs by section.

    Raises:
        ConfigError: If the file cannot be written, or is there and no such file.
    """
    if path is None:
        return
    import yaml

    from ..files import write_text, writing

    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"settings are written as .yaml, .yml or .json; got {path.name!r}.")
    sections = read_settings(path if path.exists() else None)
    sections |= {name: config.to_dict() for name, config in configs.items()}
    text = (
        json.dumps(sections, indent=2) if path.suffix.lower() == ".json" else yaml.safe_dump(sections, sort_keys=False)
    )
    with writing(path, ConfigError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text.rstrip("\n") + "\n")


def merge(config: Any, section: Mapping[str, Any], **options: Any) -> Any:
    """Return a config with the settings of a file in the place of its own, and the options given above both.

    Args:
        config: A config, such as that of a preset.
        section: Settings of the file by name.
        **options: Options of the command line; None was not given.

    Raises:
        ConfigError: If a setting is unknown or out of range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    written = dict(section)
    if isinstance(written.get("eps"), str):
        written["eps"] = parse_eps(written["eps"])
    return type(config).from_dict({**config.to_dict(), **written, **given})


def _loader() -> Any:
    """Return the safe loader of YAML, for which `1e-4` is a number, as it is in JSON and in YAML 1.2."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
    )
    return Loader
