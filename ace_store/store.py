"""A store: immutable parts in folders by kind, ``LATEST`` per kind, ``CURRENT`` for the published snapshot.

- ``STORE.json``: the store's format version, checked on every open
- ``features/<id>/``, ``aligner/<id>/``, ...: one folder a part, ``manifest.json`` written last
- ``<kind>/LATEST``: the part that the next stage takes as its input
- ``CURRENT``: the snapshot that is served
- ``runs/``: checkpoints of unfinished fits
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pyarrow import fs

from ace_core.errors import StoreError
from ace_core.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    PartKind,
    hash_folder,
    parse_manifest,
    write_manifest,
)
from ace_store.current import CURRENT_NAME, Current, move_current, read_current
from ace_store.files import STORE_NAME, Files
from ace_store.location import Location, open_location
from ace_store.making import making

if TYPE_CHECKING:
    from ace_core.snapshot import SnapshotManifest

_FOLDERS: dict[str, str] = {"segment": "segments", "snapshot": "snapshots"}
_STAGES: dict[str, str] = {
    "features": "ace ingest",
    "captions": "ace caption",
    "text_encoder": "ace fit text",
    "texts": "ace fit aligner",
    "aligner": "ace fit aligner",
    "quantizer": "ace fit quantizer",
    "generator": "ace fit generator",
    "segment": "ace publish",
    "snapshot": "ace publish",
    "evaluation": "ace evaluate",
}


def folder_of(kind: PartKind) -> str:
    """The folder that parts of a kind are in."""
    return _FOLDERS.get(kind, kind)


def _manifest_model(kind: PartKind) -> type[Manifest]:
    if kind != "snapshot":
        return Manifest
    from ace_core.snapshot import SnapshotManifest  # brings the whole index code with it

    return SnapshotManifest


class Store(Files):
    """Reads and writes parts, the same way for a local folder and for object storage."""

    def __init__(self, location: Location, cache: Path | None) -> None:
        super().__init__(location)
        self._cache = cache

    @classmethod
    def open(cls, uri: str | Path, *, cache: Path | None = None) -> Store:
        """Open a store; a place with nothing in it is a new, empty store.

        Args:
            uri: folder or s3:// prefix.
            cache: where parts of a remote store are mirrored; by default ``$ACE_CACHE`` or ``~/.cache/ace``.

        Raises:
            StoreError: the store is of another version, cannot be reached, or is not a folder.
        """
        location = open_location(str(uri))
        if location.local is not None and location.local.exists() and not location.local.is_dir():
            raise StoreError("the store is a file, not a folder", where=uri, remedy="Choose another --store.")
        if location.local is None and cache is None:
            base = Path(os.environ.get("ACE_CACHE", "~/.cache/ace")).expanduser()
            cache = base / hashlib.sha256(location.uri.encode()).hexdigest()[:16]
        store = cls(location, cache)
        marker = store.read_json(STORE_NAME)
        version = FORMAT_VERSION if marker is None else marker.get("format_version")
        if version != FORMAT_VERSION:
            raise StoreError(
                f"the store has format version {version}, this ACE reads version {FORMAT_VERSION}",
                where=uri,
                remedy="Use the ACE release that wrote it, or choose another --store and run the stages again.",
            )
        return store

    # -- parts ---------------------------------------------------------------------------------------------

    def parts(self, kind: PartKind) -> list[Manifest]:
        """Manifests of the finished parts of a kind, oldest first."""
        found = [self.find(kind, info.base_name) for info in self.listing(folder_of(kind)) if not info.is_file]
        return sorted((m for m in found if m is not None), key=lambda m: (m.created_at, m.id))

    def find(self, kind: PartKind, part_id: str) -> Manifest | None:
        """The manifest of a finished part, or None."""
        name = f"{folder_of(kind)}/{part_id}/{MANIFEST_NAME}"
        data = self.read_bytes(name)
        model = _manifest_model(kind)
        return None if data is None else parse_manifest(data, where=self.path(name), expect=kind, model=model)

    def snapshot(self, snapshot_id: str) -> SnapshotManifest:
        """The manifest of a snapshot.

        Raises:
            StoreError: there is no such snapshot.
        """
        manifest = self.find("snapshot", snapshot_id)
        if manifest is None:
            raise StoreError(
                f"there is no snapshot {snapshot_id}", where=self.uri, remedy="`ace status` lists the snapshots kept."
            )
        return cast("SnapshotManifest", manifest)

    def latest(self, kind: PartKind) -> Manifest:
        """The part that the next stage should read.

        Raises:
            StoreError: there is none; says which command makes one.
        """
        pointer = self.read_json(f"{folder_of(kind)}/LATEST")
        manifest = None if pointer is None else self.find(kind, str(pointer.get("id")))
        if manifest is None:
            raise StoreError(f"the store has no {kind} yet", where=self.uri, remedy=f"Run `{_STAGES[kind]}` first.")
        return manifest

    def set_latest(self, kind: PartKind, part_id: str) -> None:
        """Name the part that the next stage should read."""
        name = f"{folder_of(kind)}/LATEST"
        if self.read_json(name) != {"id": part_id}:
            self.write_json(name, {"id": part_id})

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A local folder to build a part in, on the same disk as a local store, removed afterwards."""
        if self.local is not None:
            self._mark()
        try:
            folder = Path(tempfile.mkdtemp(dir=self.local, prefix=".building-"))
        except OSError as e:
            raise self._unreachable(e) from None
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def making(self, kind: PartKind) -> Iterator[None]:
        """Make parts of a kind while no other process does. Object storage has no lock that a killed process lets go
        of: there it is on the operator to run one at a time.

        Raises:
            StoreError: another process does, or the store cannot be written.
        """
        with ExitStack() as held:
            if self.local is not None:
                self._mark()
                try:
                    held.enter_context(making(self.local / folder_of(kind)))
                except OSError as e:
                    raise self._unreachable(e) from None
            yield

    def upload_part(self, folder: Path, manifest: Manifest) -> Manifest:
        """Put a built folder in the store as a part; ``manifest.files`` is filled in here."""
        manifest = manifest.model_copy(update={"files": hash_folder(folder)})
        write_manifest(folder, manifest)
        self.adopt_part(folder, manifest.kind, manifest.id)
        return manifest

    def adopt_part(self, folder: Path, kind: PartKind, part_id: str) -> None:
        """Put a built folder with its manifest in the store: all files first, the manifest last.

        Locally the folder is moved, so that it becomes visible whole; one that another process finished meanwhile
        stays, for a snapshot may name it by now.
        """
        target = f"{folder_of(kind)}/{part_id}"
        self._mark()
        try:
            if self.local is not None:
                home = self.local / target
                home.parent.mkdir(parents=True, exist_ok=True)
                if (home / MANIFEST_NAME).exists():
                    return
                if home.exists():  # left behind by a run that was killed: nobody refers to it yet
                    shutil.rmtree(home)
                folder.chmod(0o755)
                folder.rename(home)
            else:
                names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
                for name in sorted(names, key=lambda n: n == MANIFEST_NAME):
                    fs.copy_files(
                        str(folder / name),
                        self.path(target, name),
                        source_filesystem=fs.LocalFileSystem(),
                        destination_filesystem=self.filesystem,
                    )
        except OSError as e:
            raise self._unreachable(e) from None

    def seal_part(self, manifest: Manifest) -> None:
        """Write the manifest of a part whose files were written in place (``manifest.files`` filled by the caller)."""
        name = f"{folder_of(manifest.kind)}/{manifest.id}/{MANIFEST_NAME}"
        self.write_bytes(name, (manifest.model_dump_json(indent=1) + "\n").encode())

    def delete_part(self, kind: PartKind, part_id: str) -> None:
        """Remove a part, manifest first, so that a half-deleted part is never taken for a whole one."""
        folder = f"{folder_of(kind)}/{part_id}"
        self.delete_file(f"{folder}/{MANIFEST_NAME}")
        self.delete(folder)
        if self._cache is not None:
            shutil.rmtree(self._cache / folder, ignore_errors=True)

    def local_copy(self, kind: PartKind, part_id: str) -> Path:
        """The part as a local folder: itself in a local store, a mirror in the cache for a remote one.

        An id stands for what a part was made from, not for what came out of it: one that was deleted and made again is
        mirrored again.

        Raises:
            StoreError: there is no such finished part.
        """
        name = f"{folder_of(kind)}/{part_id}"
        wanted = self.read_bytes(f"{name}/{MANIFEST_NAME}")
        if wanted is None:
            raise StoreError(
                f"there is no {kind} {part_id}", where=self.uri, remedy=f"Run `{_STAGES[kind]}`, or check the id."
            )
        if self.local is not None:
            return self.local / name
        assert self._cache is not None
        home = self._cache / name
        if _manifest_in(home) == wanted:
            return home
        home.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=home.parent, prefix=".mirror-"))
        try:
            fs.copy_files(
                self.path(name),
                str(building),
                source_filesystem=self.filesystem,
                destination_filesystem=fs.LocalFileSystem(),
            )
            if _manifest_in(home) not in (None, wanted):
                (home / MANIFEST_NAME).unlink(missing_ok=True)
            take_place(building, home)
        except OSError as e:
            raise self._unreachable(e) from None
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return home

    def mirror(self, snapshot_id: str | None = None) -> Path:
        """A local folder that reads as a store with this snapshot (by default the current one) and all it names.
        Mirrors of parts that were deleted from the store meanwhile go.

        Raises:
            StoreError: nothing is published, or a part is missing.
        """
        snapshot_id = snapshot_id or self.published()
        if self.local is not None:
            return self.local
        assert self._cache is not None
        self._forget_deleted(self._cache)
        self.local_copy("snapshot", snapshot_id)
        manifest = self.snapshot(snapshot_id)
        for segment in manifest.segments:
            self.local_copy("segment", segment.id)
        for kind, model in manifest.models.items():
            self.local_copy(kind, model.id)
        descriptor, pointer = tempfile.mkstemp(dir=self._cache, prefix=".writing-")
        with os.fdopen(descriptor, "w") as f:
            json.dump({"snapshot": snapshot_id}, f)
        Path(pointer).replace(self._cache / CURRENT_NAME)
        return self._cache

    def _forget_deleted(self, cache: Path) -> None:
        """Without this the disk of a server that follows ``CURRENT`` would fill up with what it once served."""
        for mirrors in cache.glob("*/"):  # one question a kind, for there may be hundreds of snapshots
            there = {info.base_name for info in self.listing(mirrors.name)}
            for home in mirrors.glob("[!.]*/"):
                if home.name not in there:
                    shutil.rmtree(home, ignore_errors=True)

    # -- CURRENT -------------------------------------------------------------------------------------------

    def current(self, *, damaged: bool = False) -> Current:
        """The published snapshot, see :func:`ace_store.current.read_current`."""
        return read_current(self.location, damaged=damaged)

    def published(self) -> str:
        """Id of the published snapshot.

        Raises:
            StoreError: there is none.
        """
        snapshot_id = self.current().snapshot
        if snapshot_id is None:
            raise StoreError(
                "nothing has been published here", where=self.uri, remedy="Run `ace publish` first, or check --store."
            )
        return snapshot_id

    def move_current(self, snapshot_id: str, seen: Current) -> bool:
        """Publish a snapshot, unless somebody else published since ``seen`` was read; whether that is certain, see
        :func:`ace_store.current.move_current`."""
        self._mark()
        try:
            return move_current(self.location, snapshot_id, seen)
        except OSError as e:
            raise self._unreachable(e) from None


def _manifest_in(folder: Path) -> bytes | None:
    try:
        return (folder / MANIFEST_NAME).read_bytes()
    except FileNotFoundError:
        return None


def take_place(building: Path, home: Path) -> None:
    """Rename a finished mirror to its place, unless another process was faster; what is there without a manifest was
    being deleted, and goes."""
    try:
        building.rename(home)
    except OSError:
        if (home / MANIFEST_NAME).exists():
            return
        shutil.rmtree(home, ignore_errors=True)
        building.rename(home)
