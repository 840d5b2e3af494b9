"""How far long work is: on a terminal of any width, in a log file, and across stages inside stages."""

from __future__ import annotations

import io
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zepad import progress
from zepad.progress import Stage, clock, draw, pause, seconds_left, sentence, stage


class Clock:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1e6

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock in the place of the machine's, and a screen that no other test has used."""
    time = Clock()
    monkeypatch.setattr(progress, "time", time)
    monkeypatch.setattr(progress, "_screen", progress._Screen())
    return time


def trained(passing: Clock, seconds: float = 30.0) -> Stage:
    part = Stage("harden auxiliary", total=40)
    passing.now += seconds
    part.advance({"loss": "1.234", "adversarial": "45.2%", "clean": "80.1%", "epoch": "3/10"}, steps=10)
    return part


def test_at_60_columns_the_line_shows_loss_and_time_left(passing: Clock) -> None:
    line = draw(trained(passing), 0, width=60).plain
    assert len(line) == 60
    assert line.startswith("harden auxiliary ━")
    assert line.endswith("25%  loss 1.234  1:30 left")


def test_a_wide_terminal_shows_every_number(passing: Clock) -> None:
    line = draw(trained(passing), 1, width=140).plain
    assert line.startswith("  harden auxiliary ")
    assert line.endswith("25%  loss 1.234  adversarial 45.2%  clean 80.1%  epoch 3/10  1:30 left")


@given(width=st.integers(44, 250), name=st.text(max_size=90), done=st.integers(0, 40), depth=st.integers(0, 3))
def test_a_line_never_breaks_and_keeps_loss_and_time(width: int, name: str, done: int, depth: int) -> None:
    part = Stage(name, total=40)
    part.advance({"loss": "1.234", "adversarial": "45.2%", "clean": "80.1%"}, steps=done)
    line = draw(part, depth, width=width, ascii_only=True).plain
    assert len(line) <= width
    assert "\n" not in line
    assert "  loss 1.234  " in line
    assert line.endswith(("left", "passed"))
    assert set(line) & {"━", "─", "…"} <= set(name)


def test_on_a_terminal_of_60_columns_both_stages_are_drawn_and_a_finished_one_stays(
    passing: Clock, terminal: io.StringIO
) -> None:
    with stage("encoders", total=2) as outer:
        for number in (1, 2):
            outer.rename(f"encoder {number} of 2")
            with stage("harden victim", total=4) as inner:
                for _ in range(4):
                    passing.now += 10
                    inner.advance({"loss": "0.500"})
            outer.advance()
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, drawn)) <= 60
    middle = next(number for number, line in enumerate(drawn) if line.endswith("50%  loss 0.500  0:20 left"))
    assert drawn[middle - 1].startswith("encoder 1 of 2 ")
    assert drawn[middle - 1].endswith(" 25%  1:00 left")  # two of four steps of the first of two encoders
    assert "  harden victim  loss 0.500  in 0:40" in drawn
    assert "encoder 2 of 2  in 1:20" in drawn


def test_where_nobody_watches_a_line_is_written_once_a_minute_at_most(
    passing: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with stage("attackers", total=290) as bar:
        for number in range(290):
            passing.now += 1
            bar.rename(f"attacker {number % 11 + 1} of 11: APGD")
            bar.advance()
    assert capsys.readouterr().err.splitlines() == [
        f"attacker {(60 * minute - 1) % 11 + 1} of 11: APGD, {share}, {left} left"
        for minute, share, left in ((1, "20%", "3:55"), (2, "41%", "2:52"), (3, "62%", "1:52"), (4, "82%", "0:51"))
    ]


def test_a_day_of_work_writes_less_than_five_kilobytes(passing: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(24):
        with stage(f"universal attack {number} of 24 (copies)", total=3600) as bar:
            for _ in range(3600):
                passing.now += 1
                bar.advance({"loss": "0.123"})
    written = capsys.readouterr().err
    assert 20 <= len(written.splitlines()) <= 70
    assert len(written) <= 5000


def test_short_work_writes_nothing_to_a_log(passing: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(5):
        with stage("features", total=3) as bar:
            for _ in range(3):
                passing.now += 3
                bar.advance()
    assert capsys.readouterr().err == ""


def test_work_after_a_rest_has_a_minute_of_its_own(passing: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with stage("fit", total=2) as bar:
            passing.now += 50
            bar.advance()
        passing.now += 1000
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_stage_leaves_the_screen_empty(
    passing: Clock, terminal: io.StringIO, error: type[BaseException]
) -> None:
    def work() -> None:
        with stage("encoders", total=2), stage("harden victim", total=4):
            raise error

    with pytest.raises(error):
        work()
    assert progress._screen._stages == []
    assert progress._screen._live is None
    assert not isinstance(sys.stderr, io.StringIO)
    assert " in " not in terminal.getvalue()


def test_a_stage_that_a_generator_holds_open_can_be_closed(passing: Clock, terminal: io.StringIO) -> None:
    def batches():
        with stage("UAP", total=4) as bar:
            while True:
                yield
                bar.advance()

    held = batches()
    next(held)
    progress.close()
    assert progress._screen._live is None
    next(held)  # it goes on, unseen
    held.close()
    assert progress._screen._live is None


def test_time_left_is_what_the_rest_takes_at_the_speed_so_far(passing: Clock) -> None:
    resumed = Stage("harden victim", total=100, done=50)
    assert resumed.left is None
    passing.now += 30
    resumed.advance(steps=10)  # ten in half a minute, forty to go
    assert resumed.left == pytest.approx(120)
    assert Stage("UAP").left is None
    assert seconds_left(10, 1.0) == 0


def test_the_share_of_a_stage_never_falls(passing: Clock) -> None:
    outer, first, second = Stage("encoders", total=2), Stage("harden victim", total=2), Stage("adaptation", total=2)
    outer.inner = first
    first.advance()
    assert outer.share == 0.25
    outer.inner = second
    assert outer.share == 0.25
    second.advance(steps=2)
    assert outer.share == 0.5


def test_a_log_names_the_stages_from_outside_in_and_no_name_is_a_command(passing: Clock) -> None:
    outer, inner = Stage("encoder 1 of 2", total=2), Stage("harden\x1b[2J victim", total=2)
    outer.inner = inner
    inner.advance({"loss": "\x1b1"})
    passing.now += 75
    assert sentence([outer, inner]) == "encoder 1 of 2: harden\ufffd[2J victim, loss \ufffd1, 25%, 3:45 left"
    assert draw(inner, 0, width=80).plain.isprintable()


def test_a_log_pauses_a_minute_at_first_and_half_an_hour_at_most() -> None:
    assert [pause(seconds) for seconds in (0, 300, 3000, 1e6)] == [60, 60, 600, 1800]
    assert clock(59.6) == "1:00"
