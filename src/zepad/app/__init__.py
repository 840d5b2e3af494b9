"""A page in the browser on which a saved model is attacked, one image at a time; `launch` needs the extra `app`."""

from .attackers import Attacker, Choice, attackers_for
from .layout import build_app, launch
from .space import export_space
from .trial import Guess, Opinion, Trial, try_attack

__all__ = [
    "Attacker",
    "Choice",
    "Guess",
    "Opinion",
    "Trial",
    "attackers_for",
    "build_app",
    "export_space",
    "launch",
    "try_attack",
]
