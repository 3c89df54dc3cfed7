"""Small corpora of real files, made by the tests."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 190, 40), "blue": (30, 40, 220), "yellow": (235, 220, 30)}
SHAPES = ("square", "bar", "frame", "stripe")


def write_picture(path: Path, colour: str, shape: str, size: int = 64, shift: int = 0) -> None:
    """A shape of one colour on white."""
    pixels = np.full((size, size, 3), 255, np.uint8)
    box = {
        "square": np.s_[16 + shift : 40 + shift, 16:40],
        "bar": np.s_[8 + shift : 56, 28:36],
        "frame": np.s_[4 + shift : 60, 4:60],
        "stripe": np.s_[26 + shift : 34 + shift, :],
    }[shape]
    pixels[box] = COLOURS[colour]
    if shape == "frame":
        pixels[14:50, 14:50] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_tone(path: Path, hertz: float, seconds: float = 1.0, rate: int = 16_000) -> None:
    """A sine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(int(rate * seconds)) / rate
    soundfile.write(path, (0.4 * np.sin(2 * np.pi * hertz * t)).astype(np.float32), rate)


def write_clip(path: Path, colour: str, *, to_right: bool) -> None:
    """A square that moves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for frame in range(10):
            pixels = np.full((64, 64, 3), 255, np.uint8)
            x = 5 * frame if to_right else 45 - 5 * frame
            pixels[24:40, x : x + 16] = COLOURS[colour]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def write_mixed_corpus(folder: Path, pictures: int = 32, sounds: int = 8, clips: int = 8) -> list[dict]:
    """Pictures, sounds and clips with captions.jsonl; returns its rows."""
    rows = []
    for i in range(pictures):
        colour, shape = list(COLOURS)[i % 4], SHAPES[i // 4 % 4]
        write_picture(folder / f"images/{i:03d}.png", colour, shape, shift=i // 16)
        captions = [f"a {colour} {shape} number {i}", f"{shape} in {colour}, picture {i}", f"{i}: {colour} {shape}"]
        split = {13: "val", 14: "test"}.get(i % 16, "train")
        rows.append({"path": f"images/{i:03d}.png", "captions": captions, "colour": colour, "split": split, "rank": i})
    for i in range(sounds):
        write_tone(folder / f"audio/{i:03d}.flac", 220 * (1 + i))
        captions = [f"a tone of {220 * (1 + i)} hertz", f"beep number {i}"]
        rows.append({"path": f"audio/{i:03d}.flac", "captions": captions, "split": "test" if i == 5 else "train"})
    for i in range(clips):
        colour, way = list(COLOURS)[i // 2 % 4], "right" if i % 2 else "left"
        write_clip(folder / f"video/{i:03d}.mp4", colour, to_right=bool(i % 2))
        captions = [f"a {colour} square moves to the {way}, clip {i}", f"{way}wards goes {colour}, clip {i}"]
        rows.append({"path": f"video/{i:03d}.mp4", "captions": captions, "split": "test" if i == 3 else "train"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    """A tar of (name, bytes), as img2dataset writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def tone_bytes(hertz: float, seconds: float = 0.3) -> bytes:
    """A FLAC of a sine."""
    out = io.BytesIO()
    t = np.arange(int(16_000 * seconds)) / 16_000
    soundfile.write(out, (0.4 * np.sin(2 * np.pi * hertz * t)).astype(np.float32), 16_000, format="FLAC")
    return out.getvalue()


def sample(key: str, media: bytes, suffix: str, caption: str, **more: object) -> list[tuple[str, bytes]]:
    """Members of one webdataset sample."""
    said = {"caption": caption, "key": key, "status": "success", "error_message": None, **more}
    return [(f"{key}.{suffix}", media), (f"{key}.txt", caption.encode()), (f"{key}.json", json.dumps(said).encode())]


FATAL = {b"dies": "crashed", b"hangs": "timeout"}  # files that :func:`fatal_decoders` do not survive, and their causes

_CHILD = """
import os, signal, time
from ace_core.media import decoders, isolate

whole = decoders.AudioDecoder.whole

def fatal(self, data, most):
    if data == b"dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == b"hangs":
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0  # its time runs,
        signal.setitimer(signal.ITIMER_REAL, 0.01)  # and is put forward: no test waits for it, nor runs out of it
        time.sleep(1000)
    return whole(self, data, most)

decoders.AudioDecoder.whole = fatal
isolate.main()
"""


def fatal_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sounds are decoded in child processes that die, or hang, on the files of ``FATAL``."""
    start = subprocess.Popen

    def popen(command: list[str], **kwargs: Any) -> subprocess.Popen[bytes]:
        assert command[1:3] == ["-m", "ace_core.media.isolate"]
        return start([command[0], "-c", _CHILD, command[3]], **kwargs)

    monkeypatch.setattr(subprocess, "Popen", popen)
