"""What the ingress and the decoding replicas say to each other.

Plain frozen values, so that the ingress holds no model, and an HTTP test needs neither Ray nor weights.
A replica never raises for a bad query: it answers a :class:`Refusal`, so that one request cannot fail the others of its
batch, and no exception has to survive the way between two processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ace_core.query import Hit, Mode


@dataclass(frozen=True)
class Options:
    """How a search is to be answered. None takes the setting."""

    k: int
    modalities: tuple[str, ...] = ()
    filters: Mapping[str, Any] = field(default_factory=dict)
    mode: Mode | None = None


@dataclass(frozen=True)
class TextCall:
    """Search for one or several texts. ``deadline`` is in seconds since the epoch; later than that nobody listens."""

    texts: tuple[str, ...]
    options: Options
    deadline: float


@dataclass(frozen=True)
class ExampleCall:
    """Search by an item of the corpus (``item_id``) or by an uploaded file (``media`` of a ``modality``)."""

    options: Options
    deadline: float
    item_id: str | None = None
    media: bytes | None = None
    modality: str | None = None


@dataclass(frozen=True)
class ReplicaState:
    """What a replica serves.

    Attributes:
        replica: its name.
        snapshot: the snapshot that answers.
        loaded_at: when it began to answer, seconds since the epoch.
        refused: a published snapshot that failed its checks, and is not served; None when all is well.
        reason: why it was refused, or why the store cannot be read.
    """

    replica: str
    snapshot: str
    loaded_at: float
    refused: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Reply:
    """An answer, all of it from one snapshot.

    Attributes:
        results: hits of each text (one list for a search by example), best first.
        threshold: scores below it are no confident match.
        stages: seconds spent by stage: ``queue``, ``example`` (decoding an upload), ``search``.
        batch: queries that were decoded together with this call's.
        beam: beam width that was used.
        note: why nothing was found, where no item is of the modalities and passes the filters.
    """

    state: ReplicaState
    results: tuple[tuple[Hit, ...], ...]
    threshold: float
    stages: Mapping[str, float]
    batch: int
    beam: int
    note: str = ""


@dataclass(frozen=True)
class Refusal:
    """Why a call was not answered; ``kind`` decides the HTTP status."""

    kind: Literal["query", "media", "missing", "model", "store", "deadline", "failed"]
    found: str
    where: str = ""
    remedy: str = ""


class Overloaded(Exception):
    """Every queue is full: answered with 429."""


class Unavailable(Exception):
    """No replica can answer now: answered with 503."""


class Backend(Protocol):
    """The decoding replicas as the ingress sees them."""

    async def search(self, call: TextCall | ExampleCall) -> Reply | Refusal:
        """Answer a call.

        Raises:
            Overloaded: the replicas' queues are full.
            Unavailable: no replica is up.
            TimeoutError: the deadline passed.
        """
        ...

    async def probe(self) -> ReplicaState:
        """Let one replica answer a small query, and say what it serves. Raises as :meth:`search`."""
        ...

    async def state(self) -> ReplicaState:
        """What one replica serves, without a query. Raises as :meth:`search`."""
        ...
