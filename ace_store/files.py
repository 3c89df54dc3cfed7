"""Files below a location: read, written whole, listed and removed, the same way on a disk and on object storage."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pyarrow import fs

from ace_core.errors import StoreError, storage_error
from ace_core.manifest import FORMAT_VERSION
from ace_store.location import Location

STORE_NAME = "STORE.json"


class Files:
    """The files of a store. The first write marks the place as a store of this format."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self.filesystem = location.filesystem
        self.local = location.local
        self._marked = False

    @property
    def uri(self) -> str:
        return self.location.uri

    def path(self, *names: str) -> str:
        """Path of something in the store, for use with :attr:`filesystem`."""
        return self.location.path(*names)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON object, or None when there is no such file."""
        data = self.read_bytes(name)
        if data is None:
            return None
        try:
            value = json.loads(data)
        except ValueError as e:
            raise StoreError(f"the file is not JSON ({e})", where=self.path(name), remedy="Restore it.") from None
        if not isinstance(value, dict):
            raise StoreError("the file is not a JSON object", where=self.path(name), remedy="Restore it.")
        return value

    def read_bytes(self, name: str) -> bytes | None:
        """The bytes of a file, or None when it is not there."""
        try:
            with self.filesystem.open_input_stream(self.path(name)) as f:
                return f.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            raise self._unreachable(e) from None

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON object whole: a reader sees the old file or the new one."""
        self.write_bytes(name, (json.dumps(value, indent=1, sort_keys=True, default=str) + "\n").encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file whole: temporary name and rename locally, one put on object storage."""
        if name != STORE_NAME:
            self._mark()
        try:
            if self.local is None:
                with self.filesystem.open_output_stream(self.path(name)) as f:
                    f.write(data)
                return
            target = self.local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=".writing-")
            with os.fdopen(descriptor, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            Path(temporary).replace(target)
        except OSError as e:
            raise self._unreachable(e) from None

    def exists(self, name: str) -> bool:
        """Whether a file or folder is there."""
        return self._info(name).type != fs.FileType.NotFound

    def listing(self, name: str, *, recursive: bool = False) -> list[fs.FileInfo]:
        """What is in a folder (nothing when the folder is not there), sorted by path."""
        selector = fs.FileSelector(self.path(name), allow_not_found=True, recursive=recursive)
        try:
            return sorted(self.filesystem.get_file_info(selector), key=lambda i: i.path)
        except OSError as e:
            raise self._unreachable(e) from None

    def delete(self, name: str) -> None:
        """Remove a folder and all that is in it; nothing happens when it is not there."""
        try:
            if self._info(name).type == fs.FileType.Directory:
                self.filesystem.delete_dir(self.path(name))
        except OSError as e:
            raise self._unreachable(e) from None

    def delete_file(self, name: str) -> None:
        """Remove a file; nothing happens when it is not there."""
        try:
            if self._info(name).type == fs.FileType.File:
                self.filesystem.delete_file(self.path(name))
        except OSError as e:
            raise self._unreachable(e) from None

    def _mark(self) -> None:
        if not self._marked and self._info(STORE_NAME).type == fs.FileType.NotFound:
            self.write_json(STORE_NAME, {"format_version": FORMAT_VERSION})
        self._marked = True

    def _info(self, name: str) -> fs.FileInfo:
        try:
            return self.filesystem.get_file_info(self.path(name))
        except OSError as e:
            raise self._unreachable(e) from None

    def _unreachable(self, error: OSError) -> StoreError:
        return storage_error(error, where=self.uri)
