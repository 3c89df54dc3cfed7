"""Manifests: every part of a store is a folder whose ``manifest.json`` is written last.

A part (features, aligner, quantizer, generator, segment, snapshot) is immutable. Its manifest says what it was
made from, with which settings, what it measured, and the SHA-256 of every file, so that resume, audit and the
next stage need nothing else, and parts that do not belong together can refuse each other by name.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ace_core.errors import StoreError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

PartKind = Literal[
    "features",
    "captions",
    "text_encoder",
    "texts",
    "aligner",
    "quantizer",
    "generator",
    "segment",
    "snapshot",
    "evaluation",
]


class FileEntry(BaseModel):
    """One file of a part: size in bytes and SHA-256 in hex."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What one part of a store is. ``inputs`` maps a kind (or ``kind:name``) to the id it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: int = FORMAT_VERSION
    kind: PartKind
    id: str
    created_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="microseconds"))
    inputs: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, FileEntry] = Field(default_factory=dict)


def fingerprint(*parts: Any) -> str:
    """Twelve hex digits of the SHA-256 of the JSON of ``parts``: equal inputs and settings give equal ids."""
    text = json.dumps(parts, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def code_version() -> str:
    """Twelve hex digits that change with the code of this library."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return fingerprint([(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files])


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a local file, read in blocks."""
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return FileEntry(bytes=path.stat().st_size, sha256=digest)


def hash_folder(folder: Path) -> dict[str, FileEntry]:
    """Entries of every file below ``folder`` except the manifest itself, by POSIX relative path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
    return {p.relative_to(folder).as_posix(): file_entry(p) for p in files}


M = TypeVar("M", bound=Manifest)


def parse_manifest(
    text: str | bytes,
    *,
    where: object,
    expect: PartKind | None = None,
    model: type[M] = Manifest,  # type: ignore[assignment]
) -> M:
    """Read a manifest (of class ``model``), refusing other versions and kinds by name.

    Raises:
        StoreError: unreadable, of another format version, or of another kind than ``expect``.
    """
    try:
        raw = json.loads(text)
    except ValueError as e:
        raise StoreError(
            f"the manifest is not JSON ({e})", where=where, remedy="Delete this part and run its stage again."
        ) from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise StoreError(
            f"the part has format version {version}, this ACE reads version {FORMAT_VERSION}",
            where=where,
            remedy="Use the ACE release that wrote it, or choose another --store and run the stages again.",
        )
    if expect is not None and raw.get("kind") != expect:
        raise StoreError(
            f"expected a {expect}, found a {raw.get('kind')} ({raw.get('id')})", where=where, remedy="Check the path."
        )
    try:
        return model.model_validate(raw)
    except ValidationError as e:
        raise StoreError(
            f"the manifest is malformed ({e.errors()[0]['msg']})", where=where, remedy="Run its stage again."
        ) from None


def read_manifest(folder: Path, *, expect: PartKind, model: type[M] = Manifest) -> M:  # type: ignore[assignment]
    """Read ``manifest.json`` of a part's folder.

    Raises:
        StoreError: there is none (the part was never finished), or it is refused by :func:`parse_manifest`.
    """
    path = folder / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise StoreError(
            f"there is no finished {expect} here", where=folder, remedy="Run its stage (again), or check --store."
        ) from None
    return parse_manifest(text, where=path, expect=expect, model=model)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` atomically: the last file of a part, the sign that it is whole."""
    temporary = folder / f".{MANIFEST_NAME}.part"
    temporary.write_text(manifest.model_dump_json(indent=1))
    temporary.replace(folder / MANIFEST_NAME)


def verify_files(folder: Path, manifest: Manifest, *, hashes: bool = True) -> None:
    """Check that every listed file is there with its size, and (``hashes``) its SHA-256.

    Raises:
        StoreError: names the first file that is missing or differs.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        remedy = f"The {manifest.kind} {manifest.id} is damaged: restore it, or publish again."
        if not path.is_file():
            raise StoreError(f"the file {name} is missing", where=folder, remedy=remedy)
        if path.stat().st_size != entry.bytes:
            raise StoreError(
                f"the file {name} has {path.stat().st_size} bytes, its manifest says {entry.bytes}",
                where=folder,
                remedy=remedy,
            )
        if hashes and file_entry(path).sha256 != entry.sha256:
            raise StoreError(f"the file {name} does not match its SHA-256", where=folder, remedy=remedy)
