"""One process at a time makes parts of a kind: two would write into each other's."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ace_core.errors import StoreError

LOCK_NAME = ".making"


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Hold the folder that parts of a kind are in. A process that is killed lets go of it.

    Raises:
        StoreError: another process holds it.
        OSError: nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"another command is making {folder.name} in this store",
                where=folder.parent,
                remedy="Let it end, or stop it (what it did is not lost); then run this one again.",
            ) from None
        except OSError:
            pass  # a network's file system without locks
        yield
