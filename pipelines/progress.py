"""Progress that a person can read: a live bar in a terminal, a quiet line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.table import Table

LOG_SECONDS = 15.0  # between two lines of one step in a log
_NOUNS = {"image": "image", "audio": "sound", "video": "video"}
LOG_WIDTH = 160  # columns of a table that goes to a file or another program


class Step:
    """One long step under way. Thread-safe."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.done = 0
        self.note = ""
        self._first_done = 0
        self._first_time: float | None = None
        self.lock = threading.Lock()

    def update(self, done: int, note: str | None = None, *, total: int | None = None) -> None:
        """Set how far the step is. The pace is counted from the first update, so that start-up does not blur it."""
        with self.lock:
            if self._first_time is None or total not in (None, self.total):  # another phase has another pace
                self._first_time, self._first_done = time.monotonic(), done
            self.done = done
            self.total = self.total if total is None else total
            self.note = self.note if note is None else note

    def advance(self, count: int, note: str | None = None) -> None:
        """Say that ``count`` more are done."""
        self.update(self.done + count, note)

    def restart_pace(self) -> None:
        """What follows takes another time an item than what was."""
        with self.lock:
            self._first_time = None

    @property
    def pace(self) -> float | None:
        """Units a second, or None before there is anything to measure."""
        if self._first_time is None:
            return None
        elapsed = time.monotonic() - self._first_time
        return (self.done - self._first_done) / elapsed if elapsed > 0.5 and self.done > self._first_done else None

    def under_way(self) -> str:
        """:meth:`figures` of a step that has not ended."""
        with self.lock:
            if self.total and self.done >= self.total:
                return f"{self.done:,}/{self.total:,} {self.unit}, finishing"
            return self.figures()

    def figures(self) -> str:
        """For example "480/1500 items, 12.1 items/s, 1 min 24 s left, 2 errors"."""
        if self._first_time is None and not self.done:
            return f"{self.total:,} {self.unit}, starting" if self.total else "starting"
        parts = [f"{self.done:,}/{self.total:,} {self.unit}"]
        pace = self.pace
        if pace:
            parts.append(f"{pace:,.1f} {self.unit}/s" if pace < 1000 else f"{pace:,.0f} {self.unit}/s")
            if self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / pace)} left")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """For example "8 s", "1 min 24 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def counted(count: int, noun: str) -> str:
    """For example "1 item", "1,200 items"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def counted_items(by_modality: Mapping[str, int]) -> str:
    """For example "1,200 images, 1 sound"."""
    return ", ".join(counted(count, _NOUNS[name]) for name, count in by_modality.items())


class _Figures(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task):  # type: ignore[no-untyped-def]
        step: Step = task.fields["step"]
        return super().render(task).append(step.figures())


class Reporter:
    """Says what a command is doing, on stderr; results that a script may want go to stdout through :meth:`result`."""

    def __init__(
        self, console: Console | None = None, *, quiet: bool = False, log_seconds: float = LOG_SECONDS
    ) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet
        self._log_seconds = log_seconds

    def say(self, text: str) -> None:
        """One line about what happened."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def result(self, table: Table | str) -> None:
        """The answer of a command."""
        width = None if sys.stdout.isatty() else LOG_WIDTH
        console = Console(file=sys.stdout, highlight=False, soft_wrap=isinstance(table, str), width=width)
        if isinstance(table, str):
            console.print(table, markup=False)
        else:
            console.print(table)

    @contextmanager
    def step(self, name: str, total: int, unit: str = "items") -> Iterator[Step]:
        """Show a long step while the block runs, and one line with its figures when it ends well."""
        step = Step(name, total, unit)
        started = time.monotonic()
        if self.quiet:
            yield step
            return
        with self._bar(step) if self.console.is_terminal else self._lines(step):
            yield step
        self.say(f"{name}: {step.figures()}, took {duration(time.monotonic() - started)}")

    @contextmanager
    def _bar(self, step: Step) -> Iterator[None]:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), _Figures(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(step.name, total=step.total, step=step)
            with _every(0.3, lambda: bar.update(task, completed=step.done, total=step.total)):
                yield

    @contextmanager
    def _lines(self, step: Step) -> Iterator[None]:
        said = ""

        def say() -> None:
            nonlocal said
            text = f"{step.name}: {step.under_way()}"
            if text != said:
                self.say(text)
            said = text

        with _every(self._log_seconds, say):
            yield


@contextmanager
def _every(seconds: float, action) -> Iterator[None]:  # type: ignore[no-untyped-def]
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(seconds):
            action()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
