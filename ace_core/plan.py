"""What a search does, as far as its shapes go: how it spells, and how wide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ace_core.config import SearchSettings
from ace_core.query import Mode

Scoring = Literal["vocabulary", "children"]
"""Over what a token's probability is normalised: its level's whole vocabulary (comparable between segments, filters
and snapshots), or the allowed children of its row, where the model is asked about fewer rows."""


@dataclass(frozen=True)
class Spelling:
    """One way to spell identifiers.

    Attributes:
        mode: see :mod:`ace_core.decoding`.
        width: identifiers kept: a beam's rows at each level, those that a draft ends with.
        scoring: of a beam.
    """

    mode: Mode
    width: int
    scoring: Scoring = "vocabulary"

    @property
    def limit(self) -> int:
        """Candidates returned for a query at most, where nothing else is asked for."""
        return (4 if self.mode == "beam" else 2) * self.width


Plan = tuple[Spelling, ...]
"""What is spelled of a query; results are pooled."""


def spellings(settings: SearchSettings, beam: int | None = None) -> Plan:
    """What a search by ``settings`` spells; ``beam`` takes the place of ``settings.beam``.

    Where a beam's candidates are ranked again (``settings.rerank``), drafted ones join them (``settings.pool``) with
    the log-probabilities of the one-shot heads.
    """
    beam = beam or settings.beam
    if settings.mode != "beam":
        return (Spelling(settings.mode, max(settings.draft, beam)),)
    spelled = Spelling("beam", beam, settings.scoring)
    return (spelled, Spelling("one-shot", settings.pool)) if settings.pool and settings.rerank else (spelled,)
