"""Web pages from the templates beside this file. Whatever is put into them is cleaned and escaped."""

from __future__ import annotations

import base64
from functools import cache
from typing import Any

from ...escaping import clean
from .charts import bar_svg
from .wording import budget, counted, interval, percent, shorten


def render(template: str, **values: Any) -> str:
    """Return a page.

    Args:
        template: Name of a file in the folder `templates`.
        values: Values of the variables in the template. Text is plain text, not HTML.
    """
    return str(_environment().get_template(template).render(values))


def macros() -> Any:
    """Return the macros of `templates/macros.html` as functions that return HTML."""
    return _environment().get_template("macros.html").module


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_cleaned,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "base64": lambda content: base64.b64encode(content).decode("ascii"),
        "counted": counted,
        "interval": interval,
        "percent": percent,
        "shorten": shorten,
    }
    environment.globals |= {"bar_svg": bar_svg, "budget": budget}
    return environment


def _cleaned(value: Any) -> Any:
    """Clean text that is about to be escaped; HTML that a macro made is left as it is."""
    return value if hasattr(value, "__html__") else clean(str(value))
