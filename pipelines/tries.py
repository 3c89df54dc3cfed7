"""How often bad files were tried whose cause may pass: one that always times out must not cost its time for ever.

Counted beside the features, in one small file that every ingestion of the store replaces: parts are immutable, and
trying in vain makes no new one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ace_core.media.causes import PASSING, Cause
from ace_store import Store

NAME = "features/TRIED.json"
COUNTED = PASSING - {Cause.UNREADABLE}
"""Causes that cost something to find again. To ask the storage once more costs nothing, and nothing else shows that it
gives a file now."""


@dataclass
class Tries:
    """The count of each file as it is now, judged as it would be now.

    Attributes:
        judged: by what files are encoded and found bad; what was counted with another one begins anew.
        most: how often a file is tried (``corpus.tries``).
    """

    store: Store
    judged: str
    most: int
    _before: dict[str, tuple[str, int]] = field(default_factory=dict)  # file id -> stamp, count
    _failed: dict[str, tuple[str, int]] = field(default_factory=dict)  # the same, of this ingestion

    @classmethod
    def read(cls, store: Store, judged: str, most: int) -> Tries:
        """What earlier ingestions counted."""
        written = store.read_json(NAME)
        files = written["files"] if written is not None and written["judged"] == judged else {}
        return cls(store, judged, most, {file_id: (stamp, count) for file_id, (stamp, count) in files.items()})

    def failed(self, rows: Iterable[Mapping[str, str]]) -> None:
        """Count files that were tried in vain just now, each once (rows of ``BAD_SCHEMA``, one a file or a segment)."""
        for row in rows:
            if row["cause"] in COUNTED:
                stamp, count = self._before.get(row["file_id"], ("", 0))
                again = count + 1 if stamp == row["stamp"] else 1
                self._failed[row["file_id"]] = (row["stamp"], again)

    def count(self, row: Mapping[str, str]) -> int:
        """How often a bad file (a row of ``BAD_SCHEMA``) was tried in vain for a cause that may pass."""
        stamp, count = self._failed.get(row["file_id"]) or self._before.get(row["file_id"], ("", 0))
        return count if stamp == row["stamp"] else 0

    def again(self, row: Mapping[str, str]) -> bool:
        """Whether a bad file (a row of ``BAD_SCHEMA``) is to be tried by the next ingestion though it did not
        change."""
        return row["cause"] in PASSING and (row["cause"] not in COUNTED or self.count(row) < self.most)

    def write(self, listed: Collection[str]) -> None:
        """Keep the counts of files that are still in the corpus."""
        files = {file_id: entry for file_id, entry in (self._before | self._failed).items() if file_id in listed}
        if self._failed or len(files) < len(self._before):
            self.store.write_json(NAME, {"judged": self.judged, "files": files})
