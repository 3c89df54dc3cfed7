"""The one thing in a store that changes: ``CURRENT``, moved by compare-and-swap so that two publishers cannot both win.

Locally a lock file guards read-compare-rename. On S3 the put carries ``If-Match`` (or ``If-None-Match: *`` for the
first), which the server refuses with 412 or 409 when somebody was faster. Other file systems that can create a file
only where there is none (fsspec's ``mode="create"``) get a lock file that only one publisher can make. On the rest the
swap is a plain write, and the publisher is told so.
"""

from __future__ import annotations

import fcntl
import json
from dataclasses import dataclass
from typing import Any

from ace_core.errors import StoreError
from ace_store.location import Location

CURRENT_NAME = "CURRENT"


@dataclass(frozen=True)
class Current:
    """What ``CURRENT`` said when it was read: a snapshot id, and the version to compare with when moving it."""

    snapshot: str | None
    version: str | None


def read_current(location: Location, *, damaged: bool = False) -> Current:
    """The published snapshot (None before the first publish).

    Args:
        damaged: take a file that names none for no snapshot: whoever is about to move it can mend it.

    Raises:
        StoreError: the file is not what ``ace publish`` writes.
    """
    if location.s3_options is not None:
        body, version = _s3_get(location)
    else:
        try:
            with location.filesystem.open_input_stream(location.path(CURRENT_NAME)) as f:
                body = f.read()
        except (FileNotFoundError, NotADirectoryError):
            body = None
        version = None if body is None else body.decode(errors="replace")
    if body is None:
        return Current(None, None)
    try:
        snapshot = json.loads(body)["snapshot"]
    except (ValueError, KeyError, TypeError):
        if damaged:
            return Current(None, version)
        raise StoreError(
            "CURRENT does not name a snapshot",
            where=location.uri,
            remedy="Choose a snapshot with `ace rollback ID`, or run `ace publish` again.",
        ) from None
    return Current(snapshot, version)


def move_current(location: Location, snapshot: str, seen: Current) -> bool:
    """Point ``CURRENT`` at ``snapshot`` if it is still as ``seen``.

    Returns:
        whether two publishers cannot both win here; False where the file system has nothing to forbid it with.

    Raises:
        StoreError: another publisher moved it in between.
    """
    body = json.dumps({"snapshot": snapshot}).encode()
    if location.s3_options is not None:
        _s3_put(location, body, seen)
    elif location.local is not None:
        _local_swap(location, body, seen)
    else:
        return _other_swap(location, body, seen)
    return True


def _conflict(location: Location) -> StoreError:
    return StoreError(
        "another publisher moved CURRENT while this one worked",
        where=location.uri,
        remedy="Look at `ace status`; run this command again to publish on top of it.",
    )


def _local_swap(location: Location, body: bytes, seen: Current) -> None:
    assert location.local is not None
    with (location.local / ".CURRENT.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = location.local / CURRENT_NAME
        now = path.read_text() if path.exists() else None
        if now != seen.version:
            raise _conflict(location)
        temporary = path.with_name(".CURRENT.new")
        temporary.write_bytes(body)
        temporary.replace(path)


def _other_swap(location: Location, body: bytes, seen: Current) -> bool:
    handler = getattr(location.filesystem, "handler", None)
    lock = location.path(f".{CURRENT_NAME}.lock")
    filesystem = None if handler is None else handler.fs
    guarded = filesystem is not None and _locked(filesystem, lock, location)
    try:
        if read_current(location, damaged=True) != seen:
            raise _conflict(location)
        with location.filesystem.open_output_stream(location.path(CURRENT_NAME)) as f:
            f.write(body)
    finally:
        if filesystem is not None and guarded:
            filesystem.rm_file(lock)
    return guarded


def _locked(filesystem: Any, lock: str, location: Location) -> bool:
    """Make the lock file; False where the file system would let two publishers make it.

    Raises:
        StoreError: another publisher holds it.
    """
    try:
        filesystem.pipe_file(lock, b"", mode="create")
    except FileExistsError:
        raise StoreError(
            "another publisher is moving CURRENT, or was killed while it did",
            where=lock,
            remedy="Run this command again; if it stays, delete that file.",
        ) from None
    except (TypeError, ValueError, NotImplementedError):
        return False
    try:
        filesystem.pipe_file(lock, b"", mode="create")
    except FileExistsError:
        return True
    filesystem.rm_file(lock)  # it does not keep to "create": no lock at all
    return False


def _s3_key(location: Location) -> dict[str, str]:
    bucket, _, prefix = location.root.partition("/")
    return {"Bucket": bucket, "Key": f"{prefix}/{CURRENT_NAME}".lstrip("/")}


def _s3_get(location: Location) -> tuple[bytes | None, str | None]:
    import s3fs

    fs = s3fs.S3FileSystem(**(location.s3_options or {}))
    key = _s3_key(location)
    name = f"{key['Bucket']}/{key['Key']}"
    try:
        version = fs.call_s3("head_object", **key)["ETag"]
        return fs.cat_file(name), version
    except FileNotFoundError:
        return None, None
    except OSError as e:
        # head_object has no body: S3 (and moto) answer a bare 404 that s3fs does not translate.
        if "404" in str(e) or "Not Found" in str(e):
            return None, None
        raise StoreError(f"S3 refused the request ({e})", where=location.uri, remedy="Check the credentials.") from None


def _s3_put(location: Location, body: bytes, seen: Current) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(**(location.s3_options or {}))
    condition = {"IfNoneMatch": "*"} if seen.version is None else {"IfMatch": seen.version}
    try:
        fs.call_s3("put_object", **_s3_key(location), Body=body, **condition)
    except OSError as e:
        if isinstance(e, FileExistsError) or any(code in str(e) for code in ("412", "409", "PreconditionFailed")):
            raise _conflict(location) from None
        if "condition" in str(e).lower():
            raise _conflict(location) from None
        raise StoreError(f"S3 refused the request ({e})", where=location.uri, remedy="Check the credentials.") from None
