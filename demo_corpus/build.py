"""Build the demo corpus: pictures, sounds and clips in a folder, and what they are in captions.jsonl."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from demo_corpus.clips import entries as clip_entries
from demo_corpus.entries import Entry
from demo_corpus.pictures import entries as picture_entries
from demo_corpus.sounds import entries as sound_entries

CAPTIONS = "captions.jsonl"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CorpusSummary:
    """Items by modality, and how many files this run had to make."""

    images: int
    audio: int
    video: int
    made: int


def build_demo_corpus(
    folder: Path,
    pictures: int = 1500,
    sounds: int = 400,
    clips: int = 240,
    progress: Progress | None = None,
) -> CorpusSummary:
    """Render what is missing of the demo corpus into ``folder``, then write ``captions.jsonl``.

    The same arguments give the same files and captions on every run. A build that was killed continues: each file is
    written beside its place and renamed, and the captions file comes last. Items that an earlier build with other
    counts left behind are removed, so that the folder holds exactly what the captions file names.

    Args:
        progress: called with ("pictures" | "sounds" | "clips", done, total) after each item.

    Raises:
        ModelError: a package of the extra ``demo`` is not installed.
        SettingsError: more items are asked for than can be made.
    """
    made = 0
    kinds: list[tuple[str, int, Iterable[Entry]]] = [
        ("pictures", pictures, picture_entries(pictures)),
        ("sounds", sounds, sound_entries(sounds)),
        ("clips", clips, clip_entries(clips)),
    ]
    entries: list[Entry] = []
    for kind, total, source in kinds:
        for done, entry in enumerate(source, start=1):
            made += _make(folder / entry.path, entry)
            entries.append(entry)
            if progress is not None:
                progress(kind, done, total)
    _remove_others(folder, {entry.path for entry in entries})
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(entries))
    captions = folder / CAPTIONS
    if not captions.is_file() or captions.read_text() != rows:
        _write(captions, rows.encode())
    return CorpusSummary(pictures, sounds, clips, made)


def rows_of(entries: list[Entry]) -> list[dict]:
    """The rows of captions.jsonl. A caption that two items would share is dropped from both: it could not be a fair
    query for either. Broad texts stand before the last caption, which evaluation keeps out of training."""
    shared = {text for text, n in Counter(chain.from_iterable(e.captions for e in entries)).items() if n > 1}
    taken = {text for e in entries for text in e.captions} - shared
    rows = []
    for entry in entries:
        own = [text for text in entry.captions if text not in shared] or [_told_apart(entry)]
        broad = [text for text in entry.broad if text not in taken]
        rows.append(
            {
                "item_id": entry.item_id,
                "path": entry.path,
                "captions": [*own[:-1], *broad, own[-1]],
                **{k: v for k, v in entry.attributes.items() if v is not None},
            }
        )
    return rows


def _told_apart(entry: Entry) -> str:
    return f"{entry.captions[0]} ({entry.item_id})"


def _make(path: Path, entry: Entry) -> bool:
    if path.is_file():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, entry.make())
    return True


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    beside.replace(path)


def _remove_others(folder: Path, paths: set[str]) -> None:
    for modality in ("images", "audio", "video"):
        for path in (folder / modality).glob("*"):  # half-written files of a killed build too
            if path.relative_to(folder).as_posix() not in paths:
                path.unlink()
