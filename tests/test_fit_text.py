"""A text encoder trained on the corpus, on a real Ray: the rest of the road follows it, and the snapshot carries it."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from ace_core.config import Settings
from ace_core.encoders import load_text_encoder
from ace_core.errors import SettingsError, StoreError
from ace_core.retriever import Retriever
from ace_store import Store
from pipelines.fit_aligner import fit_aligner_stage
from pipelines.fit_text import fit_text_stage
from pipelines.keep import gc_stage
from pipelines.progress import Reporter
from pipelines.publish import publish_stage
from tests.world import World, fit_all

pytestmark = pytest.mark.ray
QUIET = Reporter(quiet=True)


@pytest.fixture
def settings(world: World, tmp_path: Path) -> Settings:
    shutil.copytree(world.settings.store, tmp_path / "store")
    tuning = world.settings.text_tuning.model_copy(update={"layers": 1, "epochs": 1, "batch_size": 32})
    return world.settings.model_copy(update={"store": str(tmp_path / "store"), "text_tuning": tuning})


def test_what_is_published_is_asked_with_the_trained_encoder(settings: Settings) -> None:
    store = Store.open(settings.store)
    with pytest.raises(StoreError, match="no text_encoder yet"):
        fit_aligner_stage(settings, store, QUIET)
    frozen = load_text_encoder(settings.encoders.text).identity
    trained = fit_text_stage(settings, store, QUIET)
    assert fit_text_stage(settings, store, QUIET).created_at == trained.created_at
    aligner, *_ = fit_all(settings, store)
    assert aligner.inputs["text_encoder"] == trained.id
    snapshot = publish_stage(settings, store, QUIET)
    assert snapshot.models["text_encoder"].id == trained.id and snapshot.encoder_identities["text"] != frozen

    elsewhere = Path(settings.store).rename(Path(settings.store).with_name("moved"))  # nothing names the old place
    gc_stage(Store.open(elsewhere), QUIET, keep=0, min_age=timedelta(0), dry_run=False)
    retriever = Retriever.open(elsewhere)
    assert retriever.queries.text_encoder.identity == snapshot.encoder_identities["text"]
    assert len(retriever.search(["a red square"], k=5)[0]) == 5

    shutil.rmtree(elsewhere / "text_encoder" / trained.id)
    with pytest.raises(StoreError, match=f"needs text_encoder/{trained.id}, which is not there"):
        Retriever.open(elsewhere)


def test_a_frozen_encoder_is_not_trained(world: World) -> None:
    with pytest.raises(SettingsError, match=r"stays frozen.*text_tuning\.layers"):
        fit_text_stage(world.settings, world.store, QUIET)
