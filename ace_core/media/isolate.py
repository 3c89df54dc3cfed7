"""Decoding in a child process: a decoder that crashes or hangs costs one file, not the job.

Media decoders are C code that reads what strangers made; decord 0.6, for one, dies of a segmentation fault on some
damaged MP4 files. A child stays for many files (starting one costs as much as decoding hundreds of pictures), is
killed by its own alarm when a file takes too long, and is replaced when it died.

The two speak over pipes, lengths before bytes; no pickles. A question may be about several files: then the answers come
one by one, so that the first file without one is the one that the child died on.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ace_core.config import LimitSettings
from ace_core.errors import MediaError
from ace_core.media.causes import Cause, no_memory
from ace_core.media.decoders import Answer, AudioDecoder, Decoder, ImageDecoder, OpenedMedia, VideoDecoder

_KINDS = {kind.__name__: kind for kind in (ImageDecoder, AudioDecoder, VideoDecoder)}
# How many files follow (0: it is about the one before), what is asked, two numbers of seconds (NaN for none).
_REQUEST = struct.Struct("<QBdd")
_LENGTH = struct.Struct("<Q")  # bytes of a file; those of all files come before the files
_PART, _WHOLE = range(2)  # what is asked: the part from .. to .., or the file unless it lasts longer than ..
PIECE = 1 << 20  # bytes that pass in one piece: a question of so many is one switch to the other process
_REPLY = struct.Struct("<QQ")  # bytes of the JSON header, bytes of the array


def guarded(decoder: Decoder) -> Decoder | IsolatedDecoder:
    """The decoder in child processes, or itself where ``limits.isolate`` is off."""
    return IsolatedDecoder(decoder) if decoder.limits.isolate else decoder


class IsolatedDecoder:
    """Calls like the decoder that it is given; safe to call from several threads, each with a child of its own.

    A call raises MediaError ``timeout`` after ``limits.decode_seconds``, ``crashed`` when the child died, and whatever
    the decoder itself raises. Children start with the first call and end with this object or its process.
    """

    def __init__(self, decoder: Decoder) -> None:
        fields = {f.name: getattr(decoder, f.name) for f in dataclasses.fields(decoder)}
        limits = fields.pop("limits").model_dump()
        self._spec = json.dumps({"kind": type(decoder).__name__, "limits": limits, "fields": fields})
        self._seconds = decoder.limits.decode_seconds
        self._idle: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def __call__(self, data: bytes, start: float | None = None, end: float | None = None) -> np.ndarray:
        with self.opened(data) as media:
            return media.part(start, end)

    @contextmanager
    def opened(self, data: bytes) -> Iterator[OpenedMedia]:
        """A file of which several parts are wanted: its bytes go to a child once."""
        media = _OpenedInChild(self, data)
        try:
            yield media
        finally:
            if media.child is not None:
                self._give_back(media.child)

    def wholes(self, files: Sequence[bytes], most: float) -> list[Answer]:
        """As the decoder's own, in one question: short files cost a switch between two processes together. One on
        which the child dies is ``timeout`` or ``crashed``, one for which this process has no child or no memory is
        what Python raised; those behind it go to another child."""
        answers: list[Answer] = []
        while len(answers) < len(files):
            try:
                child = self._take() or self._start()
            except Exception as e:
                answers.append(e)
                continue
            try:
                _send(child, files[len(answers) :], _WHOLE, most, None)
                while len(answers) < len(files):
                    answers.append(_answer(child))
            except (OSError, EOFError, ValueError):
                answers.append(self._why_dead(child))
            except BaseException as e:  # between question and answer: this child's pipe is out of step
                _end(child)
                if not isinstance(e, Exception):
                    raise
                answers.append(e)
            else:
                self._give_back(child)
        return answers

    def part(self, media: _OpenedInChild, start: float | None, end: float | None) -> np.ndarray:
        """A part of an opened file; after a child died on one, the next goes to another child.

        Raises:
            MediaError: ``timeout``, ``crashed``, or what the decoder raises.
        """
        files = [media.data] if media.child is None else []
        child, media.child = media.child or self._take() or self._start(), None
        try:
            _send(child, files, _PART, start, end)
            answer = _answer(child)
        except (OSError, EOFError, ValueError):
            raise self._why_dead(child) from None
        except BaseException:
            _end(child)
            raise
        media.child = child
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, np.ndarray)
        return answer

    def _why_dead(self, child: subprocess.Popen[bytes]) -> MediaError:
        """End a child that broke off, and say why it did. Its own alarm is the only clock: what this process waits
        for includes the child's start."""
        code = _end(child)
        if code == -signal.SIGALRM:
            return MediaError(
                Cause.TIMEOUT,
                f"decoding took more than {self._seconds:g} s",
                remedy="Raise limits.decode_seconds if the file is meant to be in the corpus.",
            )
        return MediaError(Cause.CRASHED, f"the decoder died on it ({_name_of(code)})")

    def close(self) -> None:
        """End the idle children."""
        with self._lock:
            children, self._idle = self._idle, []
        for child in children:
            _end(child)

    def __del__(self) -> None:
        self.close()

    def _take(self) -> subprocess.Popen[bytes] | None:
        """An idle child that still lives."""
        with self._lock:
            while self._idle:
                child = self._idle.pop()
                if child.poll() is None:
                    return child
                _end(child)
        return None

    def _give_back(self, child: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._idle.append(child)

    def _start(self) -> subprocess.Popen[bytes]:
        # The child finds this package wherever the parent found it, installed or not.
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        child = subprocess.Popen(
            [sys.executable, "-m", "ace_core.media.isolate", self._spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=PIECE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        if sys.platform == "linux":
            for pipe in (child.stdin, child.stdout):
                # A user's pipes together may hold a few dozen of this size: what comes after makes do with small ones.
                with suppress(OSError):
                    fcntl.fcntl(cast(IO[bytes], pipe), fcntl.F_SETPIPE_SZ, PIECE)
        return child


@dataclasses.dataclass
class _OpenedInChild:
    """A file, and the child that has its bytes (None before the first question, and after a child died)."""

    owner: IsolatedDecoder
    data: bytes
    child: subprocess.Popen[bytes] | None = None

    def part(self, start: float | None = None, end: float | None = None) -> np.ndarray:
        return self.owner.part(self, start, end)


def _send(
    child: subprocess.Popen[bytes], files: Sequence[bytes], asked: int, first: float | None, last: float | None
) -> None:
    assert child.stdin is not None
    nan = math.nan
    child.stdin.write(_REQUEST.pack(len(files), asked, nan if first is None else first, nan if last is None else last))
    child.stdin.write(b"".join(_LENGTH.pack(len(data)) for data in files))
    for data in files:
        child.stdin.write(data)
    child.stdin.flush()


def _answer(child: subprocess.Popen[bytes]) -> Answer:
    assert child.stdout is not None
    header_length, body_length = _REPLY.unpack(_read(child.stdout, _REPLY.size))
    header = json.loads(bytes(_read(child.stdout, header_length)))
    body = _read(child.stdout, body_length)
    if "cause" in header:
        return MediaError(header["cause"], header["found"], remedy=header["remedy"])
    if "seconds" in header:
        return float(header["seconds"])
    return np.frombuffer(body, np.dtype(header["dtype"])).reshape(header["shape"])


def _read(stream: IO[bytes], count: int) -> memoryview:
    """Exactly ``count`` bytes, writable (so that arrays over them are)."""
    view, filled = np.empty(count, np.uint8).data, 0
    while filled < count:
        got = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not got:
            raise EOFError
        filled += got
    return view


def _read_bytes(stream: IO[bytes], count: int) -> bytes:
    """Exactly ``count`` bytes, as decoders take them; not a copy of what :func:`_read` gives."""
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _end(child: subprocess.Popen[bytes]) -> int:
    """Close a child's pipes, wait for it (killing it if it does not go by itself), and give its exit code."""
    for pipe in (child.stdin, child.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except OSError:
            pass  # it died with something still in the pipe
    try:
        return child.wait(timeout=2)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _name_of(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def main() -> None:
    """The child: answers requests on its standard streams until the parent closes them."""
    spec = json.loads(sys.argv[1])
    decoder = _KINDS[spec["kind"]](limits=LimitSettings(**spec["limits"]), **spec["fields"])
    decoder.load()  # before the clock of the first file runs
    requests = os.fdopen(os.dup(0), "rb", PIECE)
    replies = os.fdopen(os.dup(1), "wb", PIECE)
    # Whatever a C library prints must not get between the replies.
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    files: list[bytes] = []
    while True:
        try:
            count, asked, first, last = _REQUEST.unpack(_read(requests, _REQUEST.size))
            if count:
                files = []  # before the next ones come: two long ones need not fit the memory
                lengths = [_LENGTH.unpack(_read(requests, _LENGTH.size))[0] for _ in range(count)]
                files = [_read_bytes(requests, length) for length in lengths]
        except EOFError:
            return
        _reply(replies, decoder, files, asked, first, last)


def _reply(replies: IO[bytes], decoder: Decoder, files: list[bytes], asked: int, first: float, last: float) -> None:
    """Answer one question, file by file."""
    for data in files:
        # The default action ends the process even inside C code that never comes back.
        signal.setitimer(signal.ITIMER_REAL, decoder.limits.decode_seconds)
        header, body = _decoded(decoder, data, asked, first, last)
        signal.setitimer(signal.ITIMER_REAL, 0)
        text = json.dumps(header).encode()
        replies.write(_REPLY.pack(len(text), body.nbytes))
        replies.write(text)
        replies.write(np.ascontiguousarray(body).data.cast("B") if body.size else b"")
        replies.flush()


def _decoded(decoder: Decoder, data: bytes, asked: int, first: float, last: float) -> tuple[dict[str, Any], np.ndarray]:
    """Header and array of the reply about one file."""
    nothing = np.empty(0, np.uint8)
    try:
        if asked == _WHOLE:
            answer = decoder.whole(data, first)
        else:
            answer = decoder(data, *(None if math.isnan(seconds) else seconds for seconds in (first, last)))
    except MediaError as e:
        return _header(e), nothing
    except MemoryError:
        return _header(no_memory()), nothing
    except Exception as e:  # a decoder's own bug with this file
        return _header(MediaError(Cause.CORRUPT, f"{type(e).__name__}: {e}")), nothing
    if isinstance(answer, float):
        return {"seconds": answer}, nothing
    return {"shape": answer.shape, "dtype": answer.dtype.str}, answer


def _header(error: MediaError) -> dict[str, str]:
    return {"cause": str(error.cause), "found": error.found, "remedy": error.remedy}


if __name__ == "__main__":
    main()
