"""Decoding in child processes: same results, and a crash or a hang costs one file."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
from PIL import Image

from ace_core.config import LimitSettings
from ace_core.errors import MediaError
from ace_core.media import Cause
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
    """What comes before and behind it is decoded, and every file has the whole time limit for itself."""
    fatal_decoders(monkeypatch)
    isolated = IsolatedDecoder(AudioDecoder(LimitSettings(decode_seconds=2.0), 16_000))
    files = [wav(0.1), b"dies", wav(0.2), b"junk", wav(9.0), b"hangs", b"dies", wav(0.3), b"dies"]
    answers = isolated.wholes(files, 5.0)
    assert [len(answers[i]) for i in (0, 2, 7)] == [1600, 3200, 4800]  # type: ignore[arg-type]
    assert answers[4] == 9.0
    causes = [a.cause for a in answers if isinstance(a, MediaError)]
    assert causes == [Cause.CRASHED, Cause.NOT_AUDIO, Cause.TIMEOUT, Cause.CRASHED, Cause.CRASHED]
    assert "SIGSEGV" in str(answers[1]) and "limits.decode_seconds" in str(answers[5])
    assert isolated.wholes([], 5.0) == []


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
