"""Progress of long work. Whoever works opens a stage and advances it; this module decides where and how it is shown.

All open stages of a process are drawn together: on a terminal as lines that are renewed in place, in a notebook in the
output of the cell. Where nobody watches, as in a log file, a line is written once a minute at most, and less often the
longer the work takes.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .escaping import clean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

_REDRAWN = 0.1  # seconds between two drawings of the same lines
_MINUTE, _LONGEST = 60.0, 1800.0  # shortest and longest pause between two lines of a log, in seconds
_PAUSE = 0.2  # share of the time since the beginning that a log pauses before its next line
_LEAST_BAR, _LARGEST_BAR, _LEAST_TITLE = 6, 40, 12  # in columns


class Stage:
    """A part of some work: its name, how much of it is done, and numbers to show beside.

    Args:
        name: Name of the stage, such as `"harden victim"`.
        total: Number of steps; None if it is unknown.
        done: Number of steps that were done before, as by an interrupted run.
    """

    def __init__(self, name: str, *, total: int | None = None, done: int = 0) -> None:
        self.name, self.total, self.done = name, total, done
        self.values: Mapping[str, str] = {}
        self.inner: Stage | None = None
        """The stage that is open inside this one, whose share counts as a part of the next step."""
        self._begun, self._at_first, self._shown = time.monotonic(), (done / total if total else 0.0), 0.0

    def advance(self, values: Mapping[str, str] | None = None, *, steps: int = 1) -> None:
        """Add steps to those that are done.

        Args:
            values: Numbers to show from now on, by name, the most important one first; None leaves them as they are.
            steps: Number of steps.
        """
        self.done += steps
        if values is not None:
            self.values = values
        _screen.renew()

    def rename(self, name: str) -> None:
        """Show another name from now on."""
        self.name = name
        _screen.renew()

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self._begun

    @property
    def share(self) -> float | None:
        """Share of the stage that is done, in [0, 1]; None if the number of steps is unknown."""
        if not self.total:
            return None
        within = (self.inner.share or 0.0) if self.inner is not None else 0.0
        # It never falls: a step may turn out to consist of two stages.
        self._shown = max(self._shown, min((self.done + within) / self.total, 1.0))
        return self._shown

    @property
    def left(self) -> float | None:
        """Seconds left if the stage goes on as it went so far; None if nothing can be said yet."""
        share = self.share
        return None if share is None else seconds_left(self.elapsed, share, self._at_first)


@contextmanager
def stage(name: str, *, total: int | None = None, done: int = 0, shown: bool = True) -> Iterator[Stage]:
    """Open a stage for the time of a block. It is a part of the stage that is open at that time, if one is.

    Args:
        name: Name of the stage, such as `"harden victim"`.
        total: Number of steps; None if it is unknown.
        done: Number of steps that were done before.
        shown: Whether it is shown at all.

    Examples:
        >>> with stage("count", total=3, shown=False) as counting:
        ...     for _ in range(3):
        ...         counting.advance()
        >>> counting.share
        1.0
    """
    opened = Stage(name, total=total, done=done)
    if not shown:
        yield opened
        return
    _screen.enter(opened)
    try:
        yield opened
    except BaseException:
        _screen.leave(opened, finished=False)
        raise
    _screen.leave(opened, finished=True)


def close() -> None:
    """Take all stages off the screen, as after an interruption: some may be held open by a generator."""
    _screen.close()


def seconds_left(elapsed: float, share: float, at_first: float = 0.0) -> float | None:
    """Return the number of seconds that the rest takes at the speed so far; None before anything is done.

    Args:
        elapsed: Seconds so far.
        share: Share that is done, in [0, 1].
        at_first: Share that was done at the beginning.

    Examples:
        >>> seconds_left(30.0, 0.75), seconds_left(30.0, 0.75, 0.5), seconds_left(3.0, 0.0)
        (10.0, 30.0, None)
    """
    won = share - at_first
    return elapsed * (1 - share) / won if won > 0 else None


def clock(seconds: float) -> str:
    """Return a length of time as people read it.

    Examples:
        >>> clock(9), clock(151), clock(3723)
        ('0:09', '2:31', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sentence(stages: Sequence[Stage]) -> str:
    """Return the line of a log that says how far the open stages are, the outermost first."""
    names = ": ".join(clean(part.name) for part in stages)
    numbers = [f"{name} {value}" for name, value in stages[-1].values.items()]
    share, left = stages[0].share, stages[0].left
    numbers += [] if share is None else [f"{share:.0%}"]
    numbers.append(f"{clock(stages[0].elapsed)} passed" if left is None else f"{clock(left)} left")
    return f"{names}, {', '.join(map(clean, numbers))}"


def pause(elapsed: float) -> float:
    """Return how many seconds a log stays quiet after a line.

    Args:
        elapsed: Seconds since the work began. A day of work comes to about 60 lines.
    """
    return min(max(_MINUTE, _PAUSE * elapsed), _LONGEST)


def draw(part: Stage, depth: int, *, width: int, ascii_only: bool = False) -> Text:
    """Return one stage as one line: name, bar, share, numbers and the time left.

    The first number and the time left are always there. Further ones follow where the line is wide enough, and the name
    is cut where it is not.

    Args:
        part: The stage.
        depth: Number of stages that it is inside of.
        width: Number of columns.
        ascii_only: Whether the terminal knows ASCII alone.
    """
    from rich.text import Text

    title = "  " * depth + clean(part.name)
    share, left = part.share, part.left
    ends = [f"{part.done}" if share is None else f"{share:.0%}".rjust(4)]
    ends.append(f"{clock(part.elapsed)} passed" if left is None else f"{clock(left)} left")
    shown: list[str] = []
    for number, value in enumerate(f"{name} {clean(text)}" for name, text in part.values.items()):
        room = width - len("  ".join([ends[0], *shown, value, ends[1]])) - _LEAST_BAR - 2
        if number and room < len(title):
            break
        shown.append(value)
    tail = "  ".join([ends[0], *shown, ends[1]])
    room = max(width - len(tail) - _LEAST_BAR - 2, _LEAST_TITLE)
    dots = "..." if ascii_only else "…"
    title = title if len(title) <= room else title[: room - len(dots)] + dots
    bar = max(min(width - len(title) - len(tail) - 2, _LARGEST_BAR), 0)
    full = round(bar * (share or 0.0))
    marks = ("#", "-") if ascii_only else ("━", "─")
    line = Text(title + " ", no_wrap=True, overflow="crop")
    return line.append(marks[0] * full, "bar.complete").append(marks[1] * (bar - full), "bar.back").append(" " + tail)


class _Screen:
    """The open stages of this process, and the place where they are shown."""

    def __init__(self) -> None:
        self._stages: list[Stage] = []
        self._live: Live | None = None
        self._drawn = 0.0
        self._begun = self._written = self._left = -_LONGEST

    def enter(self, opened: Stage) -> None:
        now = time.monotonic()
        if self._stages:
            self._stages[-1].inner = opened
        elif now - self._left > _MINUTE:  # stages that follow each other share the clock of the log
            self._begun = self._written = now
        self._stages.append(opened)
        if self._live is None:
            self._live = _live(self)
        self.renew()

    def leave(self, closed: Stage, *, finished: bool) -> None:
        if closed not in self._stages:
            return
        depth = self._stages.index(closed)
        self._stages.remove(closed)
        for other in self._stages:
            other.inner = None if other.inner is closed else other.inner
        if self._live is not None and finished:
            numbers = [f"{name} {clean(value)}" for name, value in closed.values.items()]
            told = "  ".join(["  " * depth + clean(closed.name), *numbers, f"in {clock(closed.elapsed)}"])
            self._live.console.print(told, markup=False, highlight=False, soft_wrap=True)
        if not self._stages:
            self.close()

    def close(self) -> None:
        self._stages.clear()
        self._left = time.monotonic()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def renew(self) -> None:
        if not self._stages:
            return
        now = time.monotonic()
        if self._live is not None:
            if now - self._drawn >= _REDRAWN:
                self._drawn = now
                self._live.refresh()
        elif now - self._written >= pause(now - self._begun):
            self._written = now
            print(sentence(self._stages), file=sys.stderr, flush=True)  # noqa: T201 - progress is what it prints

    def lines(self, console: Console) -> Text:
        from rich.text import Text

        plain = not console.encoding.lower().startswith("utf")
        drawn = (draw(part, depth, width=console.width, ascii_only=plain) for depth, part in enumerate(self._stages))
        return Text("\n").join(drawn)


def _live(screen: _Screen) -> Live | None:
    """Return lines that are renewed in place, where somebody can watch them."""
    console = _console()
    if console is None:
        return None
    from rich.live import Live

    # No thread draws: one that holds a lock while a loader forks its workers would hold it in them for ever.
    settings: dict[str, Any] = {"auto_refresh": False, "transient": True, "redirect_stdout": sys.stdout.isatty()}
    live = Live(console=console, get_renderable=lambda: screen.lines(console), **settings)
    live.start()
    return live


def _console() -> Console | None:
    """Return the terminal or the notebook; None where standard error is a file or a pipe."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if not terminal and "IPython" not in sys.modules:
        return None
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_jupyter:
        return console if importlib.util.find_spec("ipywidgets") else None
    return console if terminal and not console.is_dumb_terminal else None


_screen = _Screen()
