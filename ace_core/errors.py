"""Errors a person can act on: what was found, where, and the remedy.

Everything ACE raises on purpose is an :class:`AceError`. The command line prints its three parts and
exits with :attr:`AceError.exit_code`; the server turns it into a problem document.
"""

from __future__ import annotations

import errno

_FULL = (errno.ENOSPC, errno.EDQUOT)


class AceError(Exception):
    """A failure with a remedy.

    Args:
        found: what was found, as a sentence ("the corpus folder is empty").
        where: the file, setting or store it was found in.
        remedy: what the reader can do about it.
    """

    exit_code = 1
    title = "error"

    def __init__(self, found: str, *, where: object = "", remedy: str = "") -> None:
        self.found = found
        self.where = str(where)
        self.remedy = remedy
        super().__init__(self.__str__())

    def __str__(self) -> str:
        text = self.found
        if self.where:
            text += f" [{self.where}]"
        if self.remedy:
            text += f". {self.remedy}"
        return text

    def __reduce__(self) -> tuple:
        # Ray carries exceptions between processes; the default would drop the keyword arguments.
        return (_rebuild, (type(self), self.found, self.where, self.remedy))


def _rebuild(kind: type[AceError], found: str, where: str, remedy: str) -> AceError:
    return kind(found, where=where, remedy=remedy)


class SettingsError(AceError):
    """A setting is unknown, malformed or contradicts another."""

    exit_code = 2
    title = "bad settings"


class CorpusError(AceError):
    """The corpus as a whole cannot be used (missing, empty, no known media, bad captions file)."""

    exit_code = 3
    title = "bad corpus"


class MediaError(AceError):
    """One file cannot be decoded. Becomes a row with ``cause``, never a failed job.

    Args:
        cause: short stable code that counts are kept by, for example ``"truncated"``.
    """

    exit_code = 3
    title = "bad media"

    def __init__(self, cause: str, found: str, *, where: object = "", remedy: str = "") -> None:
        self.cause = cause
        super().__init__(found, where=where, remedy=remedy)

    def __reduce__(self) -> tuple:
        return (_rebuild_media, (self.cause, self.found, self.where, self.remedy))


def _rebuild_media(cause: str, found: str, where: str, remedy: str) -> MediaError:
    return MediaError(cause, found, where=where, remedy=remedy)


class ModelError(AceError):
    """A model folder or hub name cannot be had, or is not what it should be."""

    exit_code = 4
    title = "model unavailable"


class StoreError(AceError):
    """The store lacks a part, holds another version, or a part fails its checks."""

    exit_code = 5
    title = "bad store"


class QualityError(AceError):
    """A fit finished with figures that must not be published (a collapsed codebook)."""

    exit_code = 6
    title = "quality gate"


class QueryError(AceError):
    """A query or filter cannot be answered as asked."""

    exit_code = 2
    title = "bad query"


def storage_error(error: OSError, *, where: object = "") -> StoreError:
    """What a person is told of a disk or storage that refuses; ``where`` by default the file, if the error names it."""
    where = where or error.filename or ""
    if error.errno in _FULL:
        return StoreError(
            f"the disk is full ({error})",
            where=where,
            remedy="Make room there and where temporary files go (TMPDIR), then run the command again: it goes on.",
        )
    return StoreError(
        f"the store cannot be used ({error})",
        where=where,
        remedy="Check the path, its permissions, and for s3:// the credentials, region and endpoint.",
    )


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full, wherever it was noticed."""
    return isinstance(error, OSError) and error.errno in _FULL
