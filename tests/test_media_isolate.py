"""Decoding in child processes: same results, and a crash or a hang costs one file."""

from __future__ import annotations

import fcntl
import io
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import soundfile
from PIL import Image

from ace_core.config import LimitSettings
from ace_core.errors import MediaError
from ace_core.media import Cause, isolate
from ace_core.media.decoders import AudioDecoder, ImageDecoder
from ace_core.media.isolate import IsolatedDecoder, guarded
from tests.corpora import fatal_decoders


def png(level: int = 90, side: int = 40) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), (level, 10, 10)).save(out, "PNG")
    return out.getvalue()


def wav(seconds: float) -> bytes:
    out = io.BytesIO()
    samples = np.sin(np.arange(round(seconds * 8000)) / 3).astype(np.float32)
    soundfile.write(out, samples, 8000, format="WAV")
    return out.getvalue()


def child_of(decoder: IsolatedDecoder) -> int:
    return decoder._idle[0].pid


def test_same_array_writable() -> None:
    plain = ImageDecoder(LimitSettings(), side=32)
    isolated = IsolatedDecoder(plain)
    got = isolated(png())
    assert (got == plain(png())).all() and got.dtype == np.uint8 and got.shape == (32, 32, 3)
    got[0] = 0


def test_parts_and_large_results_pass() -> None:
    isolated = IsolatedDecoder(AudioDecoder(LimitSettings(), 48_000))
    assert len(isolated(wav(40.0))) == 40 * 48_000
    assert len(isolated(wav(4.0), 1.0, 1.5)) == 24_000


def test_errors_keep_their_cause_and_the_child() -> None:
    isolated = IsolatedDecoder(ImageDecoder(LimitSettings(max_pixels=2000)))
    isolated(png())
    child = child_of(isolated)
    for data, cause in ((b"", Cause.EMPTY), (b"no picture", Cause.NOT_AN_IMAGE), (png(side=50), Cause.TOO_MANY_PIXELS)):
        with pytest.raises(MediaError) as error:
            isolated(data)
        assert error.value.cause == cause
    assert "limits.max_pixels" in str(error.value)
    isolated(png())
    assert child_of(isolated) == child


def test_too_little_memory_is_no_fault_of_the_file() -> None:
    class Greedy(ImageDecoder):
        def whole(self, data: bytes, most: float = math.inf) -> np.ndarray:
            raise MemoryError

    header, _ = isolate._decoded(Greedy(LimitSettings()), png(), isolate._WHOLE, math.inf, math.nan)
    assert header["cause"] == Cause.OUT_OF_MEMORY and "memory" in header["found"]


def test_a_crash_costs_one_file() -> None:
    isolated = IsolatedDecoder(ImageDecoder(LimitSettings()))
    isolated(png())
    child = child_of(isolated)
    os.kill(child, signal.SIGSTOP)  # so that it is surely still busy with the next file when it dies

    def crash() -> None:
        while isolated._idle:  # until the next file takes it
            time.sleep(0.01)
        os.kill(child, signal.SIGSEGV)
        os.kill(child, signal.SIGCONT)

    crashing = threading.Thread(target=crash)
    crashing.start()
    with pytest.raises(MediaError, match="SIGSEGV") as error:
        isolated(png())
    crashing.join()
    assert error.value.cause == Cause.CRASHED
    assert isolated(png(level=77))[0, 0, 0] == 77
    assert child_of(isolated) != child


def test_a_dead_idle_child_is_noticed() -> None:
    isolated = IsolatedDecoder(ImageDecoder(LimitSettings()))
    isolated(png())
    child = child_of(isolated)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # until it is dead; its owner hears of it by itself
    assert isolated(png(level=55))[0, 0, 0] == 55


def test_a_hang_ends_at_the_limit() -> None:
    """Much sound at an absurd rate takes a minute: a decoder busy in C code is ended all the same."""
    isolated = IsolatedDecoder(AudioDecoder(LimitSettings(decode_seconds=2.0, max_seconds=1e9), 1_920_000))
    isolated(wav(0.1))
    began = time.monotonic()
    with pytest.raises(MediaError) as error:
        isolated(wav(1200.0))
    assert error.value.cause == Cause.TIMEOUT and "decode_seconds" in str(error.value)
    assert time.monotonic() - began < 60
    assert len(isolated(wav(0.1))) > 0


def test_of_files_asked_about_together_a_bad_one_costs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes before and behind it is decoded."""
    fatal_decoders(monkeypatch)
    isolated = IsolatedDecoder(AudioDecoder(LimitSettings(), 16_000))
    files = [wav(0.1), b"dies", wav(0.2), b"junk", wav(9.0), b"hangs", b"dies", wav(0.3), b"dies"]
    answers = isolated.wholes(files, 5.0)
    assert [len(answers[i]) for i in (0, 2, 7)] == [1600, 3200, 4800]  # type: ignore[arg-type]
    assert answers[4] == 9.0
    causes = [a.cause for a in answers if isinstance(a, MediaError)]
    assert causes == [Cause.CRASHED, Cause.NOT_AUDIO, Cause.TIMEOUT, Cause.CRASHED, Cause.CRASHED]
    assert "SIGSEGV" in str(answers[1]) and "limits.decode_seconds" in str(answers[5])
    assert isolated.wholes([], 5.0) == []


def test_a_child_that_dies_late_crashed_and_ran_out_of_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's time does not run while the child starts, however long that takes."""
    start = subprocess.Popen
    late = "import os, time; time.sleep(0.3); os.kill(os.getpid(), 11)"
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kwargs: start([command[0], "-c", late], **kwargs))
    isolated = IsolatedDecoder(ImageDecoder(LimitSettings(decode_seconds=0.1)))
    (of_several,) = isolated.wholes([png()], 5.0)
    with pytest.raises(MediaError) as alone:
        isolated(png())
    for error in (of_several, alone.value):
        assert isinstance(error, MediaError) and error.cause == Cause.CRASHED and "SIGSEGV" in str(error)


def test_a_file_for_which_no_child_can_be_had_costs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    isolated = IsolatedDecoder(ImageDecoder(LimitSettings()))
    with monkeypatch.context() as patched:
        starts = iter([PermissionError("no more pipes")])  # the first only
        start = subprocess.Popen
        patched.setattr(subprocess, "Popen", lambda *args, **kwargs: _raise_next(starts) or start(*args, **kwargs))
        answers = isolated.wholes([png(1), png(2), png(3)], 5.0)
    assert isinstance(answers[0], PermissionError)
    assert [answer[0, 0, 0] for answer in answers[1:]] == [2, 3]  # type: ignore[index]


@pytest.mark.skipif(sys.platform != "linux", reason="pipes have a size to set on Linux only")
def test_a_user_whose_pipes_may_not_be_large_decodes_through_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    def refuse(pipe: object, command: int, *args: object) -> None:
        assert command == fcntl.F_SETPIPE_SZ
        refused.append(pipe)
        raise PermissionError("fs.pipe-user-pages-soft")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    isolated = IsolatedDecoder(ImageDecoder(LimitSettings()))
    assert isolated(png(side=800)).shape == (800, 800, 3)
    assert len(refused) == 2


def test_an_answer_for_which_there_is_no_memory_costs_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    isolated = IsolatedDecoder(ImageDecoder(LimitSettings()))
    read = isolate._read

    def short_of_memory(stream: IO[bytes], count: int) -> memoryview:
        if count == 100 * 100 * 3:
            raise MemoryError(count)
        return read(stream, count)

    monkeypatch.setattr(isolate, "_read", short_of_memory)
    answers = isolated.wholes([png(1), png(2, side=100), png(3)], 5.0)
    assert isinstance(answers[1], MemoryError)
    assert [answers[i][0, 0, 0] for i in (0, 2)] == [1, 3]  # type: ignore[index]


def _raise_next(errors: Iterator[Exception]) -> None:
    for error in errors:
        raise error


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_child_holds_one_long_file_at_a_time() -> None:
    isolated = IsolatedDecoder(ImageDecoder(LimitSettings()))
    isolated(png())
    before = _peak(child_of(isolated))
    long = bytes(64 << 20)
    for _ in range(2):
        (answer,) = isolated.wholes([long], 5.0)
        assert isinstance(answer, MediaError) and answer.cause == Cause.NOT_AN_IMAGE
        with pytest.raises(MediaError), isolated.opened(long) as media:
            media.part()
    assert _peak(child_of(isolated)) - before < 1.5 * len(long)


def _peak(pid: int) -> int:
    """Most bytes that a process had in memory."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def test_threads_have_children_of_their_own() -> None:
    isolated = IsolatedDecoder(ImageDecoder(LimitSettings()))
    with ThreadPoolExecutor(3) as pool:
        levels = list(pool.map(lambda level: int(isolated(png(level))[0, 0, 0]), range(100, 160)))
    assert levels == list(range(100, 160))
    assert 1 <= len(isolated._idle) <= 3


def test_children_end_with_their_owner() -> None:
    isolated = IsolatedDecoder(ImageDecoder(LimitSettings()))
    isolated(png())
    child = child_of(isolated)
    isolated.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_isolate_can_be_turned_off() -> None:
    decoder = ImageDecoder(LimitSettings(isolate=False))
    assert guarded(decoder) is decoder
    assert isinstance(guarded(ImageDecoder(LimitSettings())), IsolatedDecoder)
