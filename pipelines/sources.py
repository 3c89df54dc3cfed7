"""What a corpus folder holds: its media files, what is written about them, and what does not fit together."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from ace_core.config import CorpusSettings
from ace_core.errors import CorpusError
from ace_core.features import ERRORS_SCHEMA
from ace_core.items import MODALITIES, Modality
from ace_core.media.kinds import SUFFIXES, mime_of, modality_of, sniff
from ace_store import Location, open_location
from pipelines.captions import CAPTIONS_NAMES, Described, read_captions, read_sidecar

LISTING_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("uri", pa.string()),
        ("modality", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("attributes", pa.string()),
        ("mime", pa.string()),
        ("stamp", pa.string()),
        ("bytes", pa.int64()),
    ]
)
_READERS = 16  # sidecar files read at the same time


@dataclass(frozen=True)
class Listing:
    """A corpus before anything of it is decoded.

    Attributes:
        location: the corpus folder.
        items: rows of :data:`LISTING_SCHEMA`, by id; ``uri`` is relative to the folder.
        errors: rows of ``ERRORS_SCHEMA``: what the captions file names in vain.
        summary: one sentence for a person.
    """

    location: Location
    items: pa.Table
    errors: pa.Table
    summary: str

    @property
    def root(self) -> str:
        """Where relative URIs start: an absolute folder, or the URI as given."""
        return self.location.uri if self.location.local is None else str(self.location.local)

    def of(self, modality: Modality) -> pa.Table:
        """The items of one modality."""
        return self.items.filter(pc.equal(self.items.column("modality"), modality.value))

    def digest(self) -> str:
        """Changes with any file's name, size or time, and with anything written about it."""
        digest = hashlib.sha256()
        for batch in self.items.to_batches(max_chunksize=10_000):
            digest.update(json.dumps(batch.to_pylist(), sort_keys=True, default=str).encode())
        digest.update(json.dumps(self.errors.to_pylist()).encode())
        return digest.hexdigest()


def list_corpus(settings: CorpusSettings) -> Listing:
    """List the media below ``corpus.path``. Names that start with ``.`` or ``_`` are left out.

    A file is known by its suffix; one without suffix by its first bytes.

    Raises:
        CorpusError: the folder is missing, empty or holds no known media, or the captions file is of no use.
    """
    location = open_location(settings.path)
    files = _files(location)
    relative = {_below(location, info.path): info for info in files}
    media: dict[str, Modality] = {}
    sniffed: dict[str, str] = {}
    other: Counter[str] = Counter()
    for name, info in relative.items():
        modality = modality_of(name)
        if modality is None and "." not in posixpath.basename(name):
            sniffed[name] = f"x{sniff(_head(location, info.path)) or ''}"
            modality = modality_of(sniffed[name])
        if modality is None:
            other[posixpath.splitext(name)[1].lower() or "no suffix"] += 1
        else:
            media[name] = modality
    if not media:
        seen = ", ".join(f"{count} {suffix}" for suffix, count in other.most_common(5))
        raise CorpusError(
            f"there are {len(files)} files here ({seen}), and none of a known kind",
            where=settings.path,
            remedy=f"ACE reads {', '.join(sorted(SUFFIXES))}.",
        )
    described = _read_sidecars(location, media, relative)
    captions_name = _captions_file(settings, relative)
    errors = [] if captions_name is None else _describe(described, location, captions_name, media)
    items, duplicates = _rows(media, sniffed, relative, described)
    summary = _summary(items, other, captions_name)
    return Listing(location, items, pa.Table.from_pylist(errors + duplicates, schema=ERRORS_SCHEMA), summary)


def _files(location: Location) -> list[fs.FileInfo]:
    try:
        root = location.filesystem.get_file_info(location.root)
        if root.type == fs.FileType.NotFound:
            raise CorpusError(
                "the corpus folder does not exist",
                where=location.uri,
                remedy="Check corpus.path (--set corpus.path=FOLDER); `ace demo` makes a corpus to try.",
            )
        if root.type == fs.FileType.File:
            raise CorpusError(
                "the corpus is a file, not a folder", where=location.uri, remedy="Give the folder that holds the media."
            )
        found = location.filesystem.get_file_info(fs.FileSelector(location.root, recursive=True))
    except OSError as e:
        raise CorpusError(
            f"the corpus folder cannot be listed ({e})",
            where=location.uri,
            remedy="Check the path and its permissions; for s3:// the credentials, region and endpoint.",
        ) from None
    files = [i for i in found if i.type == fs.FileType.File and not _hidden(_below(location, i.path))]
    if not files:
        raise CorpusError("the corpus folder is empty", where=location.uri, remedy="Put images, audio or video in it.")
    return sorted(files, key=lambda i: i.path)


def _below(location: Location, path: str) -> str:
    return posixpath.relpath(path, location.root)


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _head(location: Location, path: str) -> bytes:
    try:
        with location.filesystem.open_input_stream(path) as f:
            return f.read(64)
    except OSError:
        return b""


def _captions_file(settings: CorpusSettings, relative: dict[str, fs.FileInfo]) -> str | None:
    if settings.captions is not None:
        return settings.captions
    return next((name for name in CAPTIONS_NAMES if name in relative), None)


def _read(location: Location, name: str) -> bytes:
    with location.filesystem.open_input_stream(location.path(name)) as f:
        return f.read()


def _read_captions_file(location: Location, name: str) -> bytes:
    """A captions file named relative to the corpus folder, or by any other path or URI."""
    try:
        if location.filesystem.get_file_info(location.path(name)).type == fs.FileType.File:
            return _read(location, name)
        outside = open_location(name)
        with outside.filesystem.open_input_stream(outside.root) as f:
            return f.read()
    except OSError as e:
        raise CorpusError(
            f"the captions file cannot be read ({e})",
            where=name,
            remedy="Check corpus.captions: a path below the corpus folder, or any other path or URI.",
        ) from None


def _read_sidecars(location: Location, media: Iterable[str], relative: dict[str, fs.FileInfo]) -> dict[str, Described]:
    """Same-named .txt and .json files, by media file."""
    wanted = [
        (name, stem + suffix)
        for name in media
        for stem in [posixpath.splitext(name)[0]]
        for suffix in (".txt", ".json")
        if stem + suffix in relative
    ]
    described: dict[str, Described] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        for (name, sidecar), data in zip(wanted, pool.map(lambda pair: _read(location, pair[1]), wanted)):
            found = read_sidecar(data, sidecar)
            described.setdefault(name, Described()).add(found.captions, found.attributes)
    return described


def _describe(
    described: dict[str, Described],
    location: Location,
    captions_name: str,
    media: dict[str, Modality],
) -> list[dict[str, str]]:
    """Add what the captions file says to ``described``; returns a row for each file that it names in vain."""
    said = read_captions(_read_captions_file(location, captions_name), captions_name)
    by_name: dict[str, list[str]] = {}
    for name in media:
        by_name.setdefault(posixpath.basename(name), []).append(name)
    errors, matched = [], 0
    for written, entry in said.items():
        target = _match(written, location, media, by_name)
        if target is None:
            known = modality_of(written)
            errors.append(
                {
                    "item_id": entry.item_id or written,
                    "uri": written,
                    "modality": known.value if known else "",
                    "cause": "absent",
                    "detail": f"{captions_name} names it; it is not in the corpus folder",
                }
            )
            continue
        matched += 1
        mine = described.setdefault(target, Described())
        mine.item_id = entry.item_id or mine.item_id
        mine.captions = entry.captions + [c for c in mine.captions if c not in entry.captions]
        mine.attributes = {**mine.attributes, **entry.attributes}
    if said and not matched:
        example = next(iter(said))
        raise CorpusError(
            f"none of the {len(said)} files that {captions_name} names is in the corpus (the first is {example!r})",
            where=location.uri,
            remedy="Write paths relative to the corpus folder, or check corpus.path.",
        )
    return errors


def _match(written: str, location: Location, media: dict[str, Modality], by_name: dict[str, list[str]]) -> str | None:
    """The media file that a captions file means: its relative path, its full path, or a name that only one has."""
    path = written.replace("\\", "/")
    if path.startswith(location.root + "/"):
        path = path[len(location.root) + 1 :]
    elif path.startswith(location.uri.rstrip("/") + "/"):
        path = path[len(location.uri.rstrip("/")) + 1 :]
    path = posixpath.normpath(path)
    if path in media:
        return path
    same = by_name.get(path, [])
    return same[0] if len(same) == 1 else None


def _rows(
    media: dict[str, Modality],
    sniffed: dict[str, str],
    relative: dict[str, fs.FileInfo],
    described: dict[str, Described],
) -> tuple[pa.Table, list[dict[str, str]]]:
    rows, duplicates, taken = [], [], set()
    for name, modality in media.items():
        entry = described.get(name, Described())
        item_id = entry.item_id or name
        if item_id in taken:
            duplicates.append(
                {
                    "item_id": item_id,
                    "uri": name,
                    "modality": modality.value,
                    "cause": "duplicate-id",
                    "detail": f"another file already has the id {item_id!r}",
                }
            )
            continue
        taken.add(item_id)
        info = relative[name]
        rows.append(
            {
                "item_id": item_id,
                "uri": name,
                "modality": modality.value,
                "captions": entry.captions,
                "attributes": json.dumps(entry.attributes, sort_keys=True, ensure_ascii=False),
                "mime": mime_of(sniffed.get(name, name)),
                "stamp": f"{info.size}-{info.mtime_ns}",
                "bytes": info.size,
            }
        )
    return pa.Table.from_pylist(rows, schema=LISTING_SCHEMA).sort_by("item_id"), duplicates


def _summary(items: pa.Table, other: Counter[str], captions_name: str | None) -> str:
    counts = Counter(items.column("modality").to_pylist())
    plural = {Modality.IMAGE: "images", Modality.AUDIO: "sounds", Modality.VIDEO: "videos"}
    found = [f"{counts[m.value]:,} {plural[m]}" for m in MODALITIES if counts[m.value]]
    captioned = sum(1 for c in items.column("captions").to_pylist() if c)
    text = f"found {' and '.join([', '.join(found[:-1]), found[-1]] if len(found) > 1 else found)}"
    text += f", {captioned:,} of them with captions"
    return text + (f" ({captions_name})" if captions_name else "")
