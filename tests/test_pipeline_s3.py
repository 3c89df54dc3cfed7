"""Corpus and store on a real S3 server: ingestion, a fit with checkpoints, search, change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from ace_core.features import read_errors, read_features
from ace_core.settings_file import load_settings
from ace_store import Store, open_location
from pipelines import cli
from pipelines.ingest import ingest
from pipelines.progress import Reporter
from pipelines.train import FitContext, run_fit
from tests.corpora import write_tone
from tests.world import World

pytestmark = pytest.mark.ray


def _upload(folder: Path, uri: str) -> None:
    place = open_location(uri)
    fs.copy_files(
        str(folder), place.root, source_filesystem=fs.LocalFileSystem(), destination_filesystem=place.filesystem
    )


def test_a_corpus_on_s3_is_ingested_to_a_store_on_s3(ray_cluster: None, s3: str, tmp_path: Path) -> None:
    for i in range(6):
        write_tone(tmp_path / "corpus" / "in" / f"{i}.flac", 300 + 50 * i, seconds=0.3)
    (tmp_path / "corpus" / "broken.flac").write_bytes(b"junk")
    rows = [{"path": f"in/{i}.flac", "caption": f"tone {i}"} for i in range(7)]
    (tmp_path / "corpus" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus, place = f"s3://bucket/{tmp_path.name}/corpus{s3}", f"s3://bucket/{tmp_path.name}/store{s3}"
    _upload(tmp_path / "corpus", corpus)
    settings = load_settings(None, (f"corpus.path={corpus}", f"store={place}", "corpus.shard_items=2"))
    store = Store.open(place, cache=tmp_path / "cache")
    manifest = ingest(settings, store, Reporter(quiet=True))
    folder = store.path("features", manifest.id)
    features = read_features(folder, store.filesystem)
    assert features.items.column("uri").to_pylist() == [f"in/{i}.flac" for i in range(6)]
    assert features.items.column("captions").to_pylist() == [[f"tone {i}"] for i in range(6)]
    assert read_errors(folder, store.filesystem).column("cause").to_pylist() == ["not-audio", "absent"]
    assert manifest.settings["corpus_root"] == corpus
    assert ingest(settings, store, Reporter(quiet=True)).id == manifest.id

    place_of = open_location(corpus)
    with place_of.filesystem.open_output_stream(place_of.path("in", "new.flac")) as f:
        f.write((tmp_path / "corpus" / "in" / "0.flac").read_bytes())  # a copy: its content is known
    again = ingest(settings, store, Reporter(quiet=True))
    assert again.id != manifest.id
    assert again.metrics["items"] == {"audio": 7} and again.metrics["reused"] == {"audio": 7}


def _checkpoints_twice(context: FitContext) -> dict[str, Any]:
    import torch

    from ace_core.fitting import Progress

    for step in (1, 2):
        context.hooks.save_checkpoint({"step": torch.tensor([step])})
        context.hooks.on_progress(Progress("steps", step, 2))
    (context.folder / "model.txt").write_text(context.store.uri)
    return {"steps": 2}


def test_a_fit_keeps_its_checkpoints_on_s3(ray_cluster: None, s3: str, tmp_path: Path) -> None:
    store = Store.open(f"s3://bucket/{tmp_path.name}{s3}", cache=tmp_path / "cache")
    settings = load_settings(None, (f"store={store.uri}", "compute.threads=1"))
    with run_fit("aligner", "on-s3", _checkpoints_twice, {}, settings, store, Reporter(quiet=True)) as (
        folder,
        metrics,
    ):
        assert (folder / "model.txt").read_text() == store.uri
        assert store.exists("runs/aligner-on-s3")
    assert metrics == {"steps": 2}
    assert not store.exists("runs/aligner-on-s3")


def test_a_store_on_s3_is_searched_and_changed(
    world: World, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"s3://bucket/{tmp_path.name}{s3}"
    _upload(Path(world.settings.store), uri)
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    query = ["search", "a tone of 440 hertz", "--store", uri, "-m", "audio", "-k", "10", "--json"]
    assert cli.main(query) == 0
    before = [hit["item_id"] for hit in json.loads(capsys.readouterr().out)]
    assert len(before) == 8
    assert cli.main(["remove", before[0], "--store", uri]) == 0
    capsys.readouterr()
    assert cli.main(query) == 0
    assert [hit["item_id"] for hit in json.loads(capsys.readouterr().out)] == before[1:]
    assert cli.main(["rollback", "--store", uri]) == 0
    assert Store.open(uri).current().snapshot == world.snapshot.id
    assert cli.main(["status", "--store", uri]) == 0
    assert world.snapshot.id in capsys.readouterr().out
