"""The bytes of items: one resolver from what a snapshot lists to a file, and answers with ranges.

A request names an item, never a path. The path comes from the snapshot, and even so it must lie below the corpus folder
that the item's segment was made from: a caption file or a symbolic link cannot make the server open anything else.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pyarrow import fs
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse

from ace_core.errors import StoreError
from ace_store.address import Address, ItemReader
from ace_store.location import Location, open_location

_BLOCK = 256 * 1024
_SERVED_TYPES = re.compile(r"(image|audio|video)/[a-z0-9][a-z0-9.+-]*")
# A picture or clip opened by itself is a document of this origin: an SVG must not be able to run a script in it.
_MEDIA_POLICY = "default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'; sandbox"
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@dataclass(frozen=True)
class MediaFile:
    """The bytes of an item: an existing regular file, a part of one (in a tar shard), or a cell of a table.

    Attributes:
        size: number of bytes, and
        offset: where they begin in the file.
        etag: strong; changes when the file does.
        cell: the bytes themselves, where they are a table's cell.
    """

    filesystem: fs.FileSystem
    path: str
    size: int
    etag: str
    offset: int = 0
    cell: bytes | None = None


def resolve(root: str, uri: str) -> MediaFile:
    """Find the file of an item.

    Args:
        root: the corpus folder or prefix, as its segment's manifest has it.
        uri: a path below ``root``, an absolute path or a URI, as the snapshot lists it (:class:`ace_store.Address`).

    Raises:
        StoreError: it is not below ``root``, or is not there.
    """
    location = _location(root)
    address = Address.parse(uri)
    parts = _below(root, location, address.path)
    path = location.path(*parts)
    if location.local is not None:
        real = Path(path).resolve()
        if not real.is_relative_to(location.local.resolve()):
            raise _escape(root, uri)
        path = real.as_posix()
    try:
        info = location.filesystem.get_file_info(path)
    except OSError as e:
        raise StoreError(f"the corpus cannot be read ({e})", where=root, remedy="Check that it is mounted.") from None
    if info.type != fs.FileType.File:
        raise StoreError(
            "the file is not there any more",
            where=uri,
            remedy="Restore it, or `ace remove` the item. Where the corpus moved: `ace ingest`, then `ace publish`.",
        )
    version = f"{path}\n{uri}\n{info.size}\n{info.mtime_ns}".encode()
    etag = f'"{hashlib.sha256(version).hexdigest()[:24]}"'
    if address.cell is not None:
        try:
            cell = ItemReader(location).read("/".join(parts) + uri[len(address.path) :])
        except OSError as e:
            raise _changed(uri, str(e)) from None
        return MediaFile(location.filesystem, path, len(cell), etag, cell=cell)
    offset, size = address.span or (0, info.size)
    if offset + size > info.size:
        raise _changed(uri, f"the file has {info.size:,} bytes")
    return MediaFile(location.filesystem, path, size, etag, offset)


def _changed(uri: str, found: str) -> StoreError:
    return StoreError(
        f"the item is not where it was ({found})", where=uri, remedy="Run `ace add`: the shard or table has changed."
    )


@lru_cache(maxsize=64)
def _location(root: str) -> Location:
    return open_location(root)


def _below(root: str, location: Location, uri: str) -> list[str]:
    """The parts of ``uri`` below ``root``; refuses everything else."""
    base = root.partition("?")[0].removeprefix("file://").rstrip("/")
    name = uri.partition("?")[0] if "://" in uri and "?" in root else uri
    name = name.removeprefix("file://")
    if "://" in name or name.startswith("/"):
        if location.local is not None and "://" not in name:
            base = location.local.as_posix().rstrip("/")
        if not name.startswith(base + "/"):
            raise _escape(root, uri)
        name = name[len(base) + 1 :]
    parts = name.split("/")
    if "\0" in name or ".." in parts or posixpath.normpath(name) in (".", "/") or name.startswith("/"):
        raise _escape(root, uri)
    return [part for part in parts if part not in ("", ".")]


def _escape(root: str, uri: str) -> StoreError:
    return StoreError(
        f"{uri!r} is not below the corpus folder", where=root, remedy="Ingest from the folder that holds the media."
    )


def respond(file: MediaFile, mime: str, headers: Headers, *, head: bool) -> Response:
    """Answer with the file: whole, one range (206), unchanged (304) or not satisfiable (416)."""
    out = {
        "ETag": file.etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=3600",
        "Content-Type": mime if _SERVED_TYPES.fullmatch(mime) else "application/octet-stream",
        "Content-Security-Policy": _MEDIA_POLICY,
        "X-Content-Type-Options": "nosniff",
    }
    if _names(headers.get("if-none-match"), file.etag):
        return Response(status_code=304, headers=out)
    asked = headers.get("range")
    if_range = headers.get("if-range")
    span = None if asked is None or (if_range is not None and if_range != file.etag) else _span(asked, file.size)
    if span is _UNSATISFIABLE:
        return Response(status_code=416, headers=out | {"Content-Range": f"bytes */{file.size}"})
    first, last = span or (0, file.size - 1)
    out["Content-Length"] = str(last - first + 1)
    if span:
        out["Content-Range"] = f"bytes {first}-{last}/{file.size}"
    status = 206 if span else 200
    if head:
        return Response(status_code=status, headers=out)
    return StreamingResponse(blocks(file, first, last), status_code=status, headers=out)


_UNSATISFIABLE = (-1, -1)


def _span(asked: str, size: int) -> tuple[int, int] | None:
    """First and last byte of a ``Range`` header; None (the whole file) for what we need not understand."""
    match = _RANGE.fullmatch(asked.strip())
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        length = min(int(last), size)
        return (size - length, size - 1) if length else _UNSATISFIABLE
    if last and int(last) < int(first):
        return None
    if int(first) >= size:
        return _UNSATISFIABLE
    return int(first), min(int(last), size - 1) if last else size - 1


def _names(header: str | None, etag: str) -> bool:
    if header is None:
        return False
    return any(tag.strip().removeprefix("W/") in (etag, "*") for tag in header.split(","))


def blocks(file: MediaFile, first: int, last: int) -> Iterator[bytes]:
    """The bytes from ``first`` to ``last`` (both included), piece by piece."""
    left = last - first + 1
    if file.cell is not None:
        yield file.cell[first : last + 1]
        return
    with file.filesystem.open_input_file(file.path) as f:
        f.seek(file.offset + first)
        while left > 0 and (block := f.read(min(_BLOCK, left))):
            left -= len(block)
            yield block
