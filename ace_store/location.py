"""One way to name a place: a local folder, ``s3://bucket/prefix``, or any file system that pyarrow or fsspec knows.

Credentials, region and endpoint of S3 come from where every AWS tool looks for them (``AWS_*`` variables, profile,
role), or from the URI: ``s3://bucket/prefix?endpoint_override=127.0.0.1:9000&scheme=http&region=eu-west-1`` and
``&anonymous=true``.
"""

from __future__ import annotations

import os
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from ace_core.errors import StoreError


@dataclass(frozen=True)
class Location:
    """A folder somewhere: ``filesystem`` and ``root`` (a path without scheme, as pyarrow wants it).

    Attributes:
        uri: as the user wrote it.
        local: the folder as a path where the file system is the local one, else None.
        s3_options: keyword arguments for ``s3fs.S3FileSystem`` that reach the same bucket, else None.
    """

    uri: str
    filesystem: fs.FileSystem
    root: str
    local: Path | None
    s3_options: dict[str, Any] | None = None

    def path(self, *names: str) -> str:
        """Path of something below this folder, for use with :attr:`filesystem`."""
        return "/".join([self.root.rstrip("/"), *names])


def open_location(uri: str) -> Location:
    """Resolve a folder path or URI. Nothing is read or created.

    Raises:
        StoreError: the URI is malformed, or names a file system that is not installed.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme == "file":
        local = Path(uri.removeprefix("file://")).expanduser().absolute()
        return Location(uri, fs.LocalFileSystem(), local.as_posix(), local)
    if scheme == "s3":
        return _open_s3(uri)
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError, NotImplementedError):
        filesystem, path = _open_fsspec(uri)
    return Location(uri, filesystem, path, None)


def _open_fsspec(uri: str) -> tuple[fs.FileSystem, str]:
    import fsspec

    try:
        handler, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as e:
        raise StoreError(
            f"no file system for this address ({e})", where=uri, remedy="Use a folder, s3://, or install its driver."
        ) from None
    return fs.PyFileSystem(fs.FSSpecHandler(handler)), path


def _open_s3(uri: str) -> Location:
    # Without this, a machine outside AWS waits for a metadata server before it says that there are no credentials.
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    parsed = urllib.parse.urlsplit(uri)
    query = dict(urllib.parse.parse_qsl(parsed.query))
    known = {"endpoint_override", "scheme", "region", "anonymous"}
    if unknown := set(query) - known:
        raise StoreError(
            f"unknown S3 option {sorted(unknown)[0]!r}", where=uri, remedy=f"Known: {', '.join(sorted(known))}."
        )
    if len(parsed.netloc) < 3:
        raise StoreError("an S3 bucket name has 3 characters or more", where=uri, remedy="Write s3://bucket/prefix.")
    endpoint = query.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL") or ""
    scheme = query.get("scheme") or (endpoint.partition("://")[0] if "://" in endpoint else "https")
    endpoint = endpoint.rpartition("://")[2].rstrip("/")
    region = query.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and not endpoint:
        try:
            region = fs.resolve_s3_region(parsed.netloc)
        except OSError:
            region = None  # a private bucket behind a proxy: let the request itself say what is wrong
    options: dict[str, Any] = {
        "anonymous": query.get("anonymous", "").lower() in ("1", "true", "yes"),
        "allow_delayed_open": True,  # a small file is one request, not three
    }
    if endpoint:
        options |= {"endpoint_override": endpoint, "scheme": scheme, "allow_bucket_creation": False}
    if region:
        options["region"] = region
    client: dict[str, Any] = {"region_name": region} if region else {}
    s3_options: dict[str, Any] = {"anon": options["anonymous"], "client_kwargs": client, "skip_instance_cache": True}
    if endpoint:
        s3_options["endpoint_url"] = f"{scheme}://{endpoint}"
    root = (parsed.netloc + parsed.path).rstrip("/")
    return Location(uri, fs.S3FileSystem(**options), root, None, s3_options)
