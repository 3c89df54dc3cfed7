"""Where the media of a corpus are, and what is written about them: one class for each way in which users keep them."""

from __future__ import annotations

import heapq
import os
from dataclasses import replace
from pathlib import Path

from pyarrow import fs

from ace_core.config import CorpusSettings
from ace_core.errors import CorpusError
from ace_core.media.kinds import modality_of
from ace_store import Address, Location, Store, open_location
from pipelines.captions import CAPTIONS_NAMES
from pipelines.sources.folder import FolderSource
from pipelines.sources.listing import LISTING_SCHEMA, Listing, Remembered, Source, below
from pipelines.sources.table import TABLE_SUFFIXES, TableSource
from pipelines.sources.webdataset import SHARD_SUFFIX, WebDatasetSource

__all__ = ["LISTING_SCHEMA", "Listing", "list_corpus"]

_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


def list_corpus(settings: CorpusSettings, store: Store | None = None) -> Listing:
    """List a corpus, whatever it is kept as. Names that start with ``.`` or ``_`` are left out.

    Args:
        store: where listings of shards and tables of bytes are kept for the next time; None keeps none.

    Raises:
        CorpusError: nothing is there, or nothing that is of use; says what to do.
    """
    location, files, outside = _files(settings, store)
    remembered = Remembered(store, location)
    listing = _source(settings, location, files, remembered).find()
    remembered.forget_others()
    return _outside_counted(listing, outside) if outside and listing.location.root == location.root else listing


def _outside_counted(listing: Listing, outside: set[str]) -> Listing:
    """The listing with how many of its items lie in these files in its summary."""
    files = [path for uri in listing.items.column("uri").to_pylist() if (path := Address.parse(uri).path) in outside]
    if not files:
        return listing
    links = "a link that leads" if len(files) == 1 else "links that lead"
    said = f"{len(files):,} behind {links} out of the folder: searched, but never shown by the server"
    return replace(listing, summary=f"{listing.summary}; {said} ({files[0]}{', ...' * (len(set(files)) > 1)})")


def _source(
    settings: CorpusSettings, location: Location, files: dict[str, fs.FileInfo], remembered: Remembered
) -> Source:
    """What ``corpus.format`` says, or what the files look like: media make a folder, else tars a webdataset, else
    tables a table."""
    shards = {name: info for name, info in files.items() if name.lower().endswith(SHARD_SUFFIX)}
    tables = {
        name: info
        for name, info in files.items()
        if name.lower().endswith(TABLE_SUFFIXES) and (len(files) == 1 or name not in CAPTIONS_NAMES)
    }
    kind = settings.format
    media = any(modality_of(name) for name in files)
    if kind == "auto":
        kind = "folder" if media else "webdataset" if shards else "table" if tables else "folder"
    if kind == "webdataset" and shards:
        return WebDatasetSource(location, shards, settings, remembered)
    if kind == "table" and tables:
        return TableSource(location, tables, settings, remembered)
    if kind != "folder":
        raise CorpusError(
            f"there is no {'tar shard' if kind == 'webdataset' else 'table'} here",
            where=settings.path,
            remedy="Check corpus.path and corpus.format.",
        )
    packed = next((name for name in files if name.lower().endswith(_COMPRESSED)), None)
    if packed and not media:
        raise CorpusError(
            f"{packed} is a compressed tar, of which no part can be read by itself",
            where=settings.path,
            remedy="Unpack it to .tar (the media in it are compressed already), or to a folder.",
        )
    return FolderSource(location, files, settings)


def _files(settings: CorpusSettings, store: Store | None) -> tuple[Location, dict[str, fs.FileInfo], set[str]]:
    """The corpus folder and its files by relative name, sorted; of a shard or table by itself, the folder it is in.
    Last, those that lie outside of the folder, behind a link."""
    location = open_location(settings.path)
    try:
        root = location.filesystem.get_file_info(location.root)
        if root.type == fs.FileType.NotFound:
            before = _ingested_before(store)
            remedy = (
                f"The store was made of {before}: say so with --set corpus.path=..., or once for all in ace.yaml."
                if before is not None
                else "Check corpus.path (--set corpus.path=FOLDER); `ace demo` makes a corpus to try."
            )
            raise CorpusError("the corpus folder does not exist", where=location.uri, remedy=remedy)
        if root.type == fs.FileType.File:
            if not root.path.lower().endswith((SHARD_SUFFIX, *TABLE_SUFFIXES)):
                raise CorpusError(
                    "the corpus is a file, and neither a table nor a tar",
                    where=location.uri,
                    remedy=f"Give a folder, a {SHARD_SUFFIX}, or a table ({', '.join(TABLE_SUFFIXES)}).",
                )
            return _folder_of(location), {root.base_name: root}, set()
        found, outside = _below(location, hidden=settings.listed_only)
    except OSError as e:
        raise CorpusError(
            f"the corpus folder cannot be listed ({e})",
            where=location.uri,
            remedy="Check the path and its permissions; for s3:// the credentials, region and endpoint.",
        ) from None
    named = {below(location, info.path): info for info in found if info.type == fs.FileType.File}
    files = {name: named[name] for name in sorted(named) if settings.listed_only or not _hidden(name)}
    if not files:
        raise CorpusError("the corpus folder is empty", where=location.uri, remedy="Put images, audio or video in it.")
    return location, files, {below(location, path) for path in outside}


def _ingested_before(store: Store | None) -> str | None:
    """The corpus of the store's latest features."""
    pointer = None if store is None else store.read_json("features/LATEST")
    manifest = None if store is None or pointer is None else store.find("features", str(pointer["id"]))
    return None if manifest is None else manifest.settings.get("corpus_root")


def _below(location: Location, *, hidden: bool) -> tuple[list[fs.FileInfo], set[str]]:
    """All that is below a location, and the paths of those files that a link leads out of it for.

    On a disk every folder counts once, by its own name before any link's: a link back up would repeat the corpus forty
    times over, one to a neighbour show its files twice.

    Args:
        hidden: also what is in folders whose name starts with ``.`` or ``_``.
    """
    if location.local is None:
        return location.filesystem.get_file_info(fs.FileSelector(location.root, recursive=True)), set()
    root = location.local.resolve()
    found: list[fs.FileInfo] = []
    outside: set[str] = set()
    seen: set[Path] = set()
    waiting = [(False, location.root)]  # links last, each kind by name
    while waiting:
        linked, folder = heapq.heappop(waiting)
        place = Path(folder).resolve()
        if place in seen:
            continue
        seen.add(place)
        with os.scandir(folder) as entries:
            links = {entry.name for entry in entries if entry.is_symlink()}
        for info in location.filesystem.get_file_info(fs.FileSelector(folder)):
            by_link = info.base_name in links
            if info.type == fs.FileType.File:
                found.append(info)
                file = Path(info.path).resolve() if by_link else place
                if (linked or by_link) and not file.is_relative_to(root):
                    outside.add(info.path)
            elif info.type == fs.FileType.Directory and (hidden or not _hidden(info.base_name)):
                heapq.heappush(waiting, (linked or by_link, info.path))
    return found, outside


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _folder_of(location: Location) -> Location:
    address, query, options = location.uri.partition("?")
    return open_location(address.rstrip("/").rpartition("/")[0] + query + options)
