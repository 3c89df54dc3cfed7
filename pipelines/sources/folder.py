"""A folder tree of media files, with captions from a table for all of them or from a text file beside each."""

from __future__ import annotations

import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from pyarrow import fs

from ace_core.config import CorpusSettings
from ace_core.errors import CorpusError
from ace_core.items import Modality
from ace_core.media.kinds import SUFFIXES, mime_of, modality_of, sniff
from ace_store import Location, open_location
from pipelines.captions import CAPTIONS_NAMES, Columns, Described, read_captions, read_sidecar
from pipelines.sources.listing import Found, Listing, head_of, listing, stamp_of

# What lies beside media for a reason, and nobody takes for an item.
_KNOWN_OTHERS = frozenset(
    (".txt", ".json", ".jsonl", ".csv", ".parquet", ".tar", ".md", ".html", ".xml", ".yaml", ".db")
)
_READERS = 16  # sidecar files read at the same time


class FolderSource:
    """Media files below a folder. A file is known by its suffix; one without suffix by its first bytes.

    Args:
        files: by name relative to the folder.
    """

    def __init__(self, location: Location, files: Mapping[str, fs.FileInfo], settings: CorpusSettings) -> None:
        self._location = location
        self._files = files
        self._settings = settings
        self._columns = Columns.of(settings)

    def find(self) -> Listing:
        """Every file of a known kind.

        Raises:
            CorpusError: there is none, or the captions file is of no use.
        """
        settings, found = self._settings, Found()
        media, sniffed, other = self._media()
        described = self._read_sidecars(media)
        captions_name = settings.captions or next((name for name in CAPTIONS_NAMES if name in self._files), None)
        named: set[str] = set()
        if captions_name is not None:
            named = self._describe(described, captions_name, media, found)
        if settings.listed_only:
            if captions_name is None:
                raise CorpusError(
                    "corpus.listed_only is set, and there is no captions file",
                    where=settings.path,
                    remedy="Name it with corpus.captions, or leave corpus.listed_only out.",
                )
            media = {name: modality for name, modality in media.items() if name in named}
        for name, modality in media.items():
            entry, info = described.get(name, Described()), self._files[name]
            mime = mime_of(sniffed.get(name, name))
            item_id = entry.item_id or name
            found.item(item_id, name, modality, entry, mime=mime, stamp=stamp_of(info), size=info.size)
        said = ", {captioned} of them with captions" + (f" ({captions_name})" if captions_name else "")
        if shards := sum(name.lower().endswith(".tar") for name in self._files):
            said += f"; {shards:,} tar files left aside (corpus.format=webdataset reads those instead)"
        if strange := Counter({suffix: n for suffix, n in other.items() if suffix not in _KNOWN_OTHERS}):
            said += f"; files of other kinds left out ({_some(strange)})"
        if captions_name is None and (unread := self._captions_of_other_kinds(media)):
            said += (
                f"; {unread} is not read: captions are in {', '.join(CAPTIONS_NAMES)}, or where corpus.captions says"
            )
        empty = "there are no media here"
        return listing(self._location, [found.table()], said, columns=self._columns, where=settings.path, empty=empty)

    def _media(self) -> tuple[dict[str, Modality], dict[str, str], Counter[str]]:
        """Modality by file, a name with the right suffix for each file that has none, and how many files of which other
        suffixes there are."""
        media: dict[str, Modality] = {}
        sniffed: dict[str, str] = {}
        other: Counter[str] = Counter()
        for name in self._files:
            modality = modality_of(name)
            if modality is None and "." not in posixpath.basename(name):
                sniffed[name] = f"x{sniff(head_of(self._location, name)) or ''}"
                modality = modality_of(sniffed[name])
            if modality is None:
                other[posixpath.splitext(name)[1].lower() or "no suffix"] += 1
            else:
                media[name] = modality
        if not media:
            seen = _some(other)
            raise CorpusError(
                f"there are {len(self._files)} files here ({seen}), and none of a known kind",
                where=self._settings.path,
                remedy=f"ACE reads {', '.join(sorted(SUFFIXES))}.",
            )
        return media, sniffed, other

    def _captions_of_other_kinds(self, media: Iterable[str]) -> str:
        """What looks like the captions file, in the corpus folder itself, and has another name than the usual ones."""
        stems = {name: posixpath.splitext(name)[0] for name in self._files}
        beside = {stems[name] for name in media}
        return ", ".join(name for name, s in stems.items() if s.lower() == "captions" and s not in beside)

    def _read_sidecars(self, media: Iterable[str]) -> dict[str, Described]:
        """Same-named .txt and .json files, by media file."""
        wanted = [
            (name, stem + suffix)
            for name in media
            for stem in [posixpath.splitext(name)[0]]
            for suffix in (".txt", ".json")
            if stem + suffix in self._files
        ]
        described: dict[str, Described] = {}
        with ThreadPoolExecutor(_READERS) as pool:
            for (name, sidecar), data in zip(wanted, pool.map(lambda pair: self._read(pair[1]), wanted)):
                said = read_sidecar(data, sidecar, self._columns)
                entry = described.setdefault(name, Described())
                entry.add(said.captions, said.attributes)
                entry.item_id = entry.item_id or said.item_id
        return described

    def _read(self, name: str) -> bytes:
        with self._location.filesystem.open_input_stream(self._location.path(name)) as f:
            return f.read()

    def _read_captions_file(self, name: str) -> bytes:
        """A captions file named relative to the corpus folder, or by any other path or URI."""
        try:
            if self._location.filesystem.get_file_info(self._location.path(name)).type == fs.FileType.File:
                return self._read(name)
            outside = open_location(name)
            with outside.filesystem.open_input_stream(outside.root) as f:
                return f.read()
        except OSError as e:
            raise CorpusError(
                f"the captions file cannot be read ({e})",
                where=name,
                remedy="Check corpus.captions: a path below the corpus folder, or any other path or URI.",
            ) from None

    def _describe(
        self, described: dict[str, Described], captions_name: str, media: dict[str, Modality], found: Found
    ) -> set[str]:
        """Add what the captions file says to ``described``, and what it names in vain to ``found``; returns the media
        that it names."""
        said = read_captions(self._read_captions_file(captions_name), captions_name, self._columns)
        by_name: dict[str, list[str]] = {}
        for name in media:
            for key in {name, posixpath.basename(name)}:
                by_name.setdefault(_composed(key), []).append(name)
        named: set[str] = set()
        for written, entry in said.items():
            target = self._match(written, media, by_name)
            if target is None:
                detail = f"{captions_name} names it; it is not in the corpus folder"
                found.error(entry.item_id or written, written, modality_of(written), "absent", detail)
                continue
            named.add(target)
            mine = described.setdefault(target, Described())
            mine.item_id = entry.item_id or mine.item_id
            mine.captions = entry.captions + [c for c in mine.captions if c not in entry.captions]
            mine.attributes = {**mine.attributes, **entry.attributes}
        if said and not named:
            example = next(iter(said))
            raise CorpusError(
                f"none of the {len(said)} files that {captions_name} names is in the corpus (the first is {example!r})",
                where=self._location.uri,
                remedy="Write paths relative to the corpus folder, or check corpus.path.",
            )
        return named

    def _match(self, written: str, media: dict[str, Modality], by_name: dict[str, list[str]]) -> str | None:
        """The media file that is meant: by its relative path, its full path, or a name that only one has; accents may
        be written otherwise, for macOS takes letters apart."""
        path = written.replace("\\", "/")
        for start in (self._location.root, self._location.uri.rstrip("/")):
            path = path.removeprefix(start + "/")
        path = posixpath.normpath(path)
        if path in media:
            return path
        same = by_name.get(_composed(path), [])
        return same[0] if len(same) == 1 else None


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _some(suffixes: Counter[str]) -> str:
    """The most frequent suffixes with their counts."""
    return ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))
