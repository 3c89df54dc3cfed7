"""What a person reads while something long runs."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console
from rich.table import Table

from pipelines.progress import Reporter, Step, counted_items, duration


def _reporter(*, terminal: bool, log_seconds: float = 15.0) -> tuple[Reporter, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, highlight=False, soft_wrap=True)
    return Reporter(console, log_seconds=log_seconds), out


def _advance(step: Step, clock: list[float], done: int, seconds: float, note: str | None = None) -> None:
    clock[0] += seconds
    step.advance(done, note)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: now[0])
    return now


def test_pace_and_estimate_are_counted_from_the_first_result(clock: list[float]) -> None:
    step = Step("encode", 1000, "items")
    assert step.figures() == "1,000 items, starting"
    _advance(step, clock, 100, 60)  # a minute of starting up is not the pace
    assert step.pace is None
    _advance(step, clock, 50, 5, "2 bad files")
    assert step.pace == pytest.approx(10)
    assert step.figures() == "150/1,000 items, 10.0 items/s, 1 min 25 s left, 2 bad files"
    _advance(step, clock, 850, 85)
    assert "left" not in step.figures()


def test_another_phase_has_its_own_pace(clock: list[float]) -> None:
    step = Step("fit", 0, "steps")
    step.update(0, total=25)
    clock[0] += 1
    step.update(20, total=25)
    assert step.pace == pytest.approx(20)
    clock[0] += 1
    step.update(1, "second phase", total=300)
    assert step.pace is None
    clock[0] += 10
    step.update(11)
    assert step.pace == pytest.approx(1) and "4 min 49 s left" in step.figures()


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end() -> None:
    reporter, out = _reporter(terminal=False, log_seconds=0.05)
    with reporter.step("encode", 4) as step:
        for done in range(1, 4):
            step.advance(1)
            _wait_for(out, f"encode: {done}/4 items")
        step.advance(1)
    lines = out.getvalue().splitlines()
    assert len(lines) >= 4 and all(line.startswith("encode: ") for line in lines)
    assert re.search(r"4/4 items.* took \d+ s$", lines[-1])
    assert "\x1b" not in out.getvalue()


def test_a_log_does_not_repeat_itself() -> None:
    reporter, out = _reporter(terminal=False, log_seconds=0.02)
    with reporter.step("encode", 4) as step:
        _wait_for(out, "starting")
        time.sleep(0.2)
        step.advance(4)
        _wait_for(out, "finishing")
        time.sleep(0.2)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["encode: 4 items, starting", "encode: 4/4 items, finishing"]
    assert len(lines) == 3 and "took" in lines[2]


def _wait_for(out: io.StringIO, text: str) -> None:
    end = time.monotonic() + 60
    while text not in out.getvalue():
        assert time.monotonic() < end, out.getvalue()
        time.sleep(0.01)


def test_a_terminal_gets_a_bar_that_leaves_one_line() -> None:
    reporter, out = _reporter(terminal=True)
    with reporter.step("encode", 2) as step:
        step.advance(1, "1 bad files")
        _wait_for(out, "1/2 items")
        step.advance(1)
    assert "\x1b" in out.getvalue() and "2/2 items" in out.getvalue()
    assert re.search(r"took \d+ s$", out.getvalue().rstrip())


def test_a_failed_step_says_nothing_of_success() -> None:
    reporter, out = _reporter(terminal=False)
    with pytest.raises(KeyError), reporter.step("encode", 2):
        raise KeyError("x")
    assert "took" not in out.getvalue()


def test_quiet_is_quiet_and_results_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    reporter = Reporter(Console(file=out), quiet=True)
    reporter.say("something")
    with reporter.step("encode", 1) as step:
        step.advance(1)
    assert out.getvalue() == ""
    table = Table("a column")
    table.add_row("x" * 140)  # wider than most terminals, not cut when it goes to a file
    reporter.result(table)
    reporter.result("[not markup]")
    printed = capsys.readouterr().out
    assert "x" * 140 in printed and "[not markup]" in printed


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.4, 60, 3599, 3600, 7500)] == [
        "0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip


def test_counts_have_their_nouns() -> None:
    assert counted_items({"image": 1200, "audio": 1, "video": 0}) == "1,200 images, 1 sound, 0 videos"
