"""Webdataset tar shards, as img2dataset writes them: ``key.jpg``, ``key.txt`` and ``key.json`` one after another.

A shard is read once, to learn what is where in it; after that every item is a range of bytes of the shard.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
from pyarrow import fs

from ace_core.config import CorpusSettings
from ace_core.items import Modality
from ace_core.media.kinds import mime_of, modality_of
from ace_store import Address, Location
from pipelines.captions import Columns, Described, read_sidecar
from pipelines.sources.listing import Found, Listing, Remembered, listing, stamp_of

SHARD_SUFFIX = ".tar"
_READERS = 16  # shards listed at the same time
_BUFFER = 1 << 20  # small members are read in passing, large ones are skipped
_MAX_TEXT = 1 << 20  # bytes of a text or JSON member
_TEXTS = (".txt", ".json")


@dataclass
class _Sample:
    """Members of a shard with the same key."""

    media: list[tuple[str, Modality, int, int]] = field(default_factory=list)  # suffix, modality, offset, bytes
    described: Described = field(default_factory=Described)


class WebDatasetSource:
    """Tar shards. An item's id is its shard and its key, ``00000/000000012``, with the suffix where a key has several
    media.

    Args:
        files: the shards, by name relative to the location.
    """

    def __init__(
        self, location: Location, files: Mapping[str, fs.FileInfo], settings: CorpusSettings, remembered: Remembered
    ) -> None:
        self._location = location
        self._files = files
        self._settings = settings
        self._columns = Columns.of(settings)
        self._remembered = remembered

    def find(self) -> Listing:
        """All samples of all shards, in the order in which they are in them.

        Raises:
            CorpusError: there is no media in any of them.
        """
        reading = ["webdataset", self._columns.captions, self._columns.item_id]

        def one(name: str) -> pa.Table:
            info = self._files[name]
            return self._remembered.get(info, reading, lambda: self._shard(name, info))

        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(one, self._files))
        count = len(self._files)
        said = f" in a webdataset of {count:,} shard{'s' * (count != 1)}, {{captioned}} of them with captions"
        empty = f"there are no media in these {count:,} tar shards"
        return listing(self._location, found, said, columns=self._columns, where=self._settings.path, empty=empty)

    def _shard(self, name: str, info: fs.FileInfo) -> pa.Table:
        """What one shard holds. What is cut off or damaged in it is an error row; what came before is not lost."""
        found, stem = Found(), name.removesuffix(SHARD_SUFFIX)
        samples: dict[str, _Sample] = {}
        try:
            with self._location.filesystem.open_input_file(info.path) as f, io.BufferedReader(f, _BUFFER) as file:
                for member in _members(file):
                    self._take(file, member, samples)
                end = _end_of(file, info.size)
        except (tarfile.TarError, OSError, ValueError) as e:
            cut = any(o + n > info.size for s in samples.values() for *_, o, n in s.media) or "end of data" in str(e)
            end = ("truncated" if cut else "corrupt", f"the shard cannot be read on: {e}")
        if end is not None:
            found.error(stem, name, None, *end)
        for key, sample in samples.items():
            for suffix, modality, offset, size in sample.media:
                item_id = sample.described.item_id or f"{stem}/{key}"
                item_id += suffix if len(sample.media) > 1 else ""
                uri = str(Address(name, span=(offset, size)))
                if offset + size > info.size:
                    found.error(item_id, uri, modality, "truncated", "the shard ends before this member does")
                    continue
                mime = mime_of(f"x{suffix}")
                found.item(item_id, uri, modality, sample.described, mime=mime, stamp=stamp_of(info), size=size)
        return found.table()

    def _take(self, file: io.BufferedReader, member: tarfile.TarInfo, samples: dict[str, _Sample]) -> None:
        """Note where a media member is, or read what a text member says."""
        path = posixpath.normpath(member.name).lstrip("/")
        folder, base = posixpath.split(path)
        if any(part.startswith((".", "_")) for part in path.split("/")):
            return
        key, _, extension = base.partition(".")
        sample = samples.setdefault(posixpath.join(folder, key), _Sample())
        if (modality := modality_of(base)) is not None:
            sample.media.append((f".{extension}", modality, member.offset_data, member.size))
        elif base.lower().endswith(_TEXTS) and member.size <= _MAX_TEXT:
            file.seek(member.offset_data)
            said = read_sidecar(file.read(member.size), base, self._columns)
            said.attributes.pop("key", None)  # img2dataset says it again
            sample.described.add(said.captions, said.attributes)
            sample.described.item_id = sample.described.item_id or said.item_id


def _members(file: io.BufferedReader) -> Iterator[tarfile.TarInfo]:
    """Regular files of an uncompressed tar, read header by header; leaves ``file`` behind the last one."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or it keeps all of them
            if member.isreg() and not member.issparse():
                yield member
        file.seek(tar.offset)


def _end_of(file: io.BufferedReader, size: int) -> tuple[str, str] | None:
    """Cause and detail where a tar does not end as it should: with a block of zeros."""
    place = file.tell()
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return "truncated", f"the shard ends after {size:,} bytes, without the end mark of a tar"
    return ("corrupt", f"there is no tar header at byte {place:,}") if any(block) else None
