"""One small corpus that went the whole road on a real Ray, for every test that needs a fitted and published store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ace_core.config import Settings
from ace_core.manifest import Manifest
from ace_core.settings_file import load_settings
from ace_core.snapshot import SnapshotManifest
from ace_store import Store
from pipelines.fit_aligner import fit_aligner_stage
from pipelines.fit_generator import fit_generator_stage
from pipelines.fit_quantizer import fit_quantizer_stage
from pipelines.ingest import ingest
from pipelines.progress import Reporter
from pipelines.publish import publish_stage
from tests.corpora import write_mixed_corpus

SMALL = (
    "aligner.dim=32", "aligner.hidden=64", "aligner.epochs=40", "aligner.batch_size=64", "aligner.learning_rate=0.01",
    "quantizer.coarse=8", "quantizer.fine_codes=16", "quantizer.fine_levels=2", "quantizer.epochs=5",
    "quantizer.max_collision_rate=1", "quantizer.min_perplexity=0",
    "generator.width=32", "generator.heads=2", "generator.layers=1", "generator.epochs=3", "generator.batch_size=32",
    "compute.threads=1", "evaluation.bootstrap=20", "encoders.text.fusion_layers=2",
)  # fmt: skip


@dataclass
class World:
    """A corpus that went the whole road."""

    corpus: Path
    rows: list[dict[str, Any]]
    settings: Settings
    store: Store
    snapshot: SnapshotManifest


def fit_all(settings: Settings, store: Store) -> list[Manifest]:
    quiet = Reporter(quiet=True)
    return [stage(settings, store, quiet) for stage in (fit_aligner_stage, fit_quantizer_stage, fit_generator_stage)]


@pytest.fixture(scope="session")
def world(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("road")
    rows = write_mixed_corpus(folder / "corpus", pictures=48, sounds=8, clips=8)
    settings = load_settings(None, (f"corpus.path={folder / 'corpus'}", f"store={folder / 'store'}", *SMALL))
    store = Store.open(settings.store)
    ingest(settings, store, Reporter(quiet=True))
    fit_all(settings, store)
    return World(folder / "corpus", rows, settings, store, publish_stage(settings, store, Reporter(quiet=True)))
