"""API keys, checked before a body is read; and signed media addresses, which a browser can put in ``<img src>``.

A key file has one line a key: role (``read`` or ``admin``), name, SHA-256 of the key in hex. Keys are 256 random bits,
so a plain hash cannot be guessed back. Make one with

    python -m serve.auth read website >> keys.txt

which writes the line for the file to standard output, and shows the key, once, on standard error.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import quote

from ace_core.errors import SettingsError

Role = Literal["read", "admin"]
_SIGNED_SECONDS = 3600
_RELOAD_SECONDS = 1.0


@dataclass(frozen=True)
class Key:
    """One line of a key file."""

    role: Role
    name: str
    digest: str


def new_key(role: Role, name: str) -> tuple[str, str]:
    """A fresh key: the secret, and its line for the key file."""
    secret = "ace_" + secrets.token_urlsafe(32)
    return secret, f"{role} {'-'.join(name.split())} {_digest(secret)}"


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """Keys of a file; empty lines and lines that begin with ``#`` are skipped.

    Raises:
        SettingsError: the file is missing, has no key, or a line is malformed (named by number, never quoted).
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as e:
        raise SettingsError(
            f"the key file cannot be read ({e.strerror})", where=path, remedy="Check serve.keys_file."
        ) from None
    keys = []
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        if len(fields) != 3 or fields[0] not in get_args(Role) or not _is_digest(fields[2]):
            raise SettingsError(
                "a line is not `role name sha256`",
                where=f"{path}:{number}",
                remedy="Make lines with `python -m serve.auth read NAME`.",
            )
        keys.append(Key("admin" if fields[0] == "admin" else "read", fields[1], fields[2].lower()))
    if not keys:
        raise SettingsError("the key file has no key", where=path, remedy="Make one: `python -m serve.auth read NAME`.")
    return tuple(keys)


def _version_of(path: Path) -> tuple[int, int, int]:
    """Changes with the file: a clock of some milliseconds alone would miss the second of two quick writes."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdefABCDEF" for c in text)


class KeyRing:
    """The keys of a server. A changed file is read again within a second; a broken one leaves the old keys in force."""

    def __init__(self, path: Path | None) -> None:
        """Read the keys; ``path`` None leaves the server open.

        Raises:
            SettingsError: see :func:`read_keys`.
        """
        self._path = path
        # Before the keys: what is written in between is then read again, and not missed for ever.
        self._version = _version_of(path) if path and path.exists() else None
        self._keys = read_keys(path) if path else ()
        self._checked = time.monotonic()

    @property
    def open(self) -> bool:
        """Whether anyone may read."""
        return self._path is None

    def role_of(self, authorization: str | None) -> Role | None:
        """Role of the key in an ``Authorization`` header, or None. Takes the same time wherever a key differs."""
        self._reload()
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            return None
        digest = _digest(secret.strip())
        found: Role | None = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key.role
        return found

    def sign(self, path: str) -> str:
        """``path`` (``/media/ID`` or ``/thumb/ID``, unquoted) as an address that needs no key for an hour or two.

        The expiry is rounded, so that an item keeps its address, and browsers their cache, for up to an hour.
        """
        # A browser would resolve dot segments, so an id that has any is sent with its slashes quoted too.
        parts = path.split("/")[1:]
        safe = "/" if all(part not in ("", ".", "..") for part in parts) else ""
        address = f"/{parts[0]}/" + quote("/".join(parts[1:]), safe=safe)
        if self.open:
            return address
        expires = (int(time.time()) // _SIGNED_SECONDS + 2) * _SIGNED_SECONDS
        return f"{address}?expires={expires}&signature={self._signature(path, expires)}"

    def signed(self, path: str, expires: str | None, signature: str | None) -> bool:
        """Whether ``path`` (unquoted) was signed by this server and has not expired."""
        if self.open or not expires or not signature or not expires.isascii() or not expires.isdigit():
            return False
        if len(expires) > 12 or int(expires) < time.time():
            return False
        return hmac.compare_digest(self._signature(path, int(expires)).encode(), signature.encode())

    def _signature(self, path: str, expires: int) -> str:
        # The secret comes from the key file, so that every ingress replica signs alike and a changed file revokes.
        secret = hashlib.sha256("".join(k.digest for k in self._keys).encode()).digest()
        return hmac.new(secret, f"{path}\n{expires}".encode(), hashlib.sha256).hexdigest()[:32]

    def _reload(self) -> None:
        if self._path is None or time.monotonic() - self._checked < _RELOAD_SECONDS:
            return
        self._checked = time.monotonic()
        try:
            version = _version_of(self._path)
            if version != self._version:
                self._keys, self._version = read_keys(self._path), version
        except (OSError, SettingsError) as e:
            print(f"serve: the key file was not read again: {e}", file=sys.stderr)


def main(arguments: list[str]) -> int:
    """``python -m serve.auth ROLE NAME``: see the module's docstring."""
    if len(arguments) != 2 or arguments[0] not in get_args(Role):
        print("usage: python -m serve.auth read|admin NAME >> KEYS_FILE", file=sys.stderr)
        return 2
    secret, line = new_key("admin" if arguments[0] == "admin" else "read", arguments[1])
    print(line)
    print(f"The key (shown once): {secret}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
