"""The whole road on a real Ray: ingest, three fits, publish, evaluate, search; then what changes and what resumes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from ace_core.errors import CorpusError, QualityError, StoreError
from ace_core.features import split_of
from ace_core.manifest import Manifest
from ace_core.ranking import Ranker
from ace_core.retriever import RANKING_NAME, Retriever
from ace_core.settings_file import load_settings
from ace_core.snapshot import Snapshot
from ace_store import Store
from pipelines import cli
from pipelines.corpus import load_corpus
from pipelines.evaluate import DUAL_TOWER, MODES, evaluate_stage, query_kinds
from pipelines.fit_aligner import fit_aligner_stage
from pipelines.fit_quantizer import fit_quantizer_stage
from pipelines.ingest import ingest
from pipelines.progress import Reporter
from pipelines.publish import live_ids, publish_stage
from pipelines.ranking import nonsense
from pipelines.train import FitContext, run_fit
from tests.corpora import write_tone
from tests.world import SMALL, World, fit_all

pytestmark = pytest.mark.ray


def test_everything_is_published_and_belongs_together(world: World) -> None:
    assert world.snapshot.items == {"image": 48, "audio": 8, "video": 8}
    assert world.store.current().snapshot == world.snapshot.id
    snapshot = Snapshot.open(world.store.mirror())  # checks every hash and every relation
    assert set(live_ids(snapshot).to_pylist()) == {row["path"] for row in world.rows}
    segment = snapshot.segments[0]
    codes = segment.gallery.codes
    assert codes.dtype == np.uint16 and (np.lexsort(codes.T[::-1]) == np.arange(len(codes))).all()
    item = segment.item(segment.row_of("images/017.png") or 0)
    assert item.captions == tuple(world.rows[17]["captions"])
    assert item.attributes == {"colour": "green", "rank": 17, "split": "train"}
    assert (Path(item.root) / item.uri).read_bytes() == (world.corpus / "images/017.png").read_bytes()
    assert not list(Path(world.settings.store).glob("runs/*"))  # checkpoints of finished fits are gone
    assert not list(Path(world.settings.store).glob(".building-*"))


def test_what_was_fitted_finds_what_it_was_fitted_on(world: World) -> None:
    retriever = Retriever.open(world.store.mirror())
    asked = [row for row in world.rows if row["split"] == "train"]
    answers = retriever.search([row["captions"][0] for row in asked], k=10)
    found = np.mean([row["path"] in [h.item_id for h in hits] for row, hits in zip(asked, answers)])
    assert found > 3 * 10 / 64  # three times better than by chance, after seconds of training
    for hits in retriever.search(["a red square", "beep"], k=5, modality="audio"):
        assert len(hits) == 5 and {h.modality for h in hits} == {"audio"}
    for hit in retriever.search(["a square"], k=20, filters={"colour": "red", "rank": {"lt": 20}})[0]:
        assert hit.attributes["colour"] == "red" and hit.attributes["rank"] < 20  # type: ignore[operator]


def test_the_ranking_was_taught_what_no_match_is(world: World) -> None:
    """On texts that mean nothing, encoded by the corpus' own text encoder."""
    ranker = Ranker.load(Path(world.settings.store) / "generator" / world.store.latest("generator").id / RANKING_NAME)
    retriever = Retriever.open(world.store.mirror())
    assert ranker.threshold == retriever.threshold
    asked = [row["captions"][0] for row in world.rows if row["split"] == "train"]
    plain = retriever.search(asked, k=1)
    stray = retriever.search(nonsense(asked, 50, seed=5), k=1)
    assert np.mean([h[0].score for h in stray]) < np.mean([h[0].score for h in plain])
    assert ranker.answerable is not None and ranker.answerable[0] > 0


def test_running_again_does_nothing(world: World) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(world.settings.store).rglob("*.json")}
    quiet = Reporter(quiet=True)
    ingest(world.settings, world.store, quiet)
    fit_all(world.settings, world.store)
    assert publish_stage(world.settings, world.store, quiet).id == world.snapshot.id
    assert {path: path.stat().st_mtime_ns for path in Path(world.settings.store).rglob("*.json")} == before


def test_the_evaluation_states_its_queries_and_galleries(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    measured = evaluate_stage(world.settings, world.store, Reporter(quiet=True))
    lines = {(x["queries"], x["gallery"], x["method"]): x for x in measured["lines"]}
    assert {q for q, _, _ in lines} == {"seen", "unseen"}
    assert {m for _, _, m in lines} == {DUAL_TOWER, *MODES}
    for (_, gallery, _), line in lines.items():
        assert line["gallery_count"] == {"all": 64, "image": 48, "audio": 8, "video": 8}[gallery]
        assert 0 <= line["recall_1"]["value"] <= line["recall_10"]["value"] <= 1
    unseen = sum(len(row["captions"]) for row in world.rows if row["split"] == "test")
    assert lines["unseen", "all", "beam"]["queries_count"] == unseen
    assert lines["unseen", "audio", "one-shot"]["recall_10"]["value"] == 1  # eight items
    path = Path(world.settings.store) / "evaluation" / f"{measured['id']}.json"
    assert json.loads(path.read_text()) == measured
    assert cli.main(["evaluate", "--store", world.settings.store, *_as_options(world)]) == 0
    said = capsys.readouterr()
    assert "dual tower" in said.out and "warning: fewer than 50 queries say little (" in said.err
    assert "unseen in audio: " in said.err


@pytest.mark.parametrize(("caption", "said"), [("a sound", "another item's, too"), (None, "was kept out of training")])
def test_why_there_is_nothing_to_ask(world: World, caption: str | None, said: str) -> None:
    """Captions that name classes are many, and none of them asks for one item."""
    corpus = load_corpus(world.store, world.snapshot.inputs["features"], world.settings)
    items = corpus.features.items
    captions = pa.array([[] if caption is None else [caption]] * items.num_rows, pa.list_(pa.string()))
    items = items.set_column(items.schema.get_field_index("captions"), "captions", captions)
    split = split_of(items, world.settings.split)
    with pytest.raises(CorpusError, match=said):
        query_kinds(world.store, world.snapshot, replace(corpus, split=split), world.settings)


def test_search_prints_a_table_and_json(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "a red square", "--store", world.settings.store, "-k", "3", "-m", "image"]) == 0
    out = capsys.readouterr().out
    assert "a red square" in out and "images/" in out
    assert "file" not in out and len(re.findall(r"images/\d+\.png", out)) == 3  # the id is the path: said once
    arguments = ["search", "beep", "--store", world.settings.store, "-m", "audio", "--where", "split=test", "--json"]
    assert cli.main(arguments) == 0
    hits = json.loads(capsys.readouterr().out)
    assert [h["item_id"] for h in hits] == ["audio/005.flac"]
    missed = ["search", "beep", "--store", world.settings.store, "--where", "colour=Red"]
    assert cli.main(missed) == 0
    assert 'nothing found: no item passes colour="Red": did you mean "red"?' in capsys.readouterr().err
    assert cli.main([*missed, "--json"]) == 0
    assert json.loads((said := capsys.readouterr()).out) == [] and "did you mean" in said.err
    assert cli.main(["search", "beep", "--store", world.settings.store, "-m", "smell"]) == 2
    assert "image, audio, video" in capsys.readouterr().err
    assert cli.main(["search", "beep", "--store", world.settings.store, "--where", "colour"]) == 2


def _as_options(world: World) -> list[str]:
    return [part for change in SMALL for part in ("--set", change)] + ["--set", f"corpus.path={world.corpus}"]


def test_a_collapsed_codebook_is_not_kept(world: World) -> None:
    strict = world.settings.model_copy(
        update={"quantizer": world.settings.quantizer.model_copy(update={"min_perplexity": 1.0, "coarse": 2})}
    )
    before = world.store.latest("quantizer").id
    with pytest.raises(QualityError, match="perplexity"):
        fit_quantizer_stage(strict, world.store, Reporter(quiet=True))
    assert world.store.latest("quantizer").id == before
    assert not list(Path(world.settings.store).glob("runs/quantizer-*"))  # or the next run would take it for its own


def test_publishing_another_kind_of_vectors_than_was_fitted_is_refused(world: World) -> None:
    other = world.settings.model_copy(update={"publish": world.settings.publish.model_copy(update={"vectors": "none"})})
    with pytest.raises(StoreError, match=r"publish\.vectors=int8"):
        publish_stage(other, world.store, Reporter(quiet=True))
    assert world.store.current().snapshot == world.snapshot.id


def test_captions_are_needed(ray_cluster: None, tmp_path: Path) -> None:
    for i in range(9):
        write_tone(tmp_path / "corpus" / f"{i}.wav", 300 + 20 * i, seconds=0.3)
    settings = load_settings(None, (f"corpus.path={tmp_path / 'corpus'}", f"store={tmp_path / 'store'}", *SMALL))
    store = Store.open(settings.store)
    ingest(settings, store, Reporter(quiet=True))
    with pytest.raises(CorpusError, match="caption"):
        fit_aligner_stage(settings, store, Reporter(quiet=True))


def test_too_few_items_are_refused_before_anything_is_fitted(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    features = Manifest(
        kind="features", id="0", settings={"corpus_root": "c"}, metrics={"items": {"image": 5, "audio": 2}}
    )
    with store.scratch() as part:
        store.upload_part(part, features)
    store.set_latest("features", "0")
    with pytest.raises(CorpusError, match="7 items are too few") as error:
        fit_aligner_stage(load_settings(), store, Reporter(quiet=True))
    assert "at least 8" in error.value.remedy


def test_few_captions_are_said_to_be_few(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.fit_aligner.FEW_CAPTIONS", 1_000_000)
    fit_aligner_stage(world.settings, world.store, Reporter())
    assert re.search(r"\d+ captions are few to learn from", capsys.readouterr().err)


# -- what Ray Train must do for every fit ------------------------------------------------------------------------


def _counts_and_dies_once(context: FitContext) -> dict[str, Any]:
    """Counts to ten with a checkpoint at each step; the first life of worker 0 ends at five, without a word."""
    import os

    import torch

    from ace_core.fitting import Progress

    resume = context.hooks.resume
    first_life = resume is None
    count = 0 if resume is None else int(resume["count"][0])
    started_at = count
    while count < 10:
        count += 1
        total = context.collective.all_reduce(torch.tensor([1.0]))
        if context.collective.rank == 0:
            context.hooks.save_checkpoint({"count": torch.tensor([count])})
        context.hooks.on_progress(Progress("count", count, 10, {"workers": float(total[0])}))
        if first_life and count == 5 and context.collective.rank == 0:
            os._exit(1)
    (context.folder / "model.txt").write_text(f"started at {started_at}, workers {int(total[0])}")
    return {"count": count}


def test_a_fit_on_two_workers_resumes_after_losing_one(world: World) -> None:
    settings = world.settings.model_copy(update={"compute": world.settings.compute.model_copy(update={"workers": 2})})
    with run_fit("aligner", "counts", _counts_and_dies_once, {}, settings, world.store, Reporter(quiet=True)) as (
        folder,
        metrics,
    ):
        text = (folder / "model.txt").read_text()
    assert metrics == {"count": 10}
    started = int(text.split(",")[0].removeprefix("started at "))
    assert 3 <= started <= 5 and text.endswith("workers 2")


def test_a_fit_leaves_ctrl_c_as_it_is(world: World) -> None:
    """Ray Train's own handler would end the process without a word, and stay after the fit."""
    before = signal.getsignal(signal.SIGINT)
    with run_fit("aligner", "leaves", _no_fit, {}, world.settings, world.store, Reporter(quiet=True)):
        pass
    assert signal.getsignal(signal.SIGINT) is before


def _no_fit(context: FitContext) -> dict[str, Any]:
    return {}


@pytest.mark.slow
def test_the_server_says_that_it_stops(world: World, tmp_path: Path) -> None:
    """`ace serve` as a service manager starts and ends it."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "pipelines.cli", "serve", "--port", "0", "--store", world.settings.store]
    with log.open("wb") as err:
        server = subprocess.Popen(
            [*command, "--set", "compute.threads=1"],
            stderr=err,
            env=os.environ | {"RAY_AUTH_MODE": "disabled"},
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 240
        while "server's log: " not in log.read_text():
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        address = log.read_text().partition("search page: ")[2].split()[0]
        assert httpx.get(f"{address}/readyz", timeout=60).status_code == 200
        logs = Path(log.read_text().partition("server's log: ")[2].split()[0])
        assert any("Searcher" in one.read_text() for one in logs.parent.glob(logs.name))
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0
        assert log.read_text().splitlines()[-2:] == ["stopping the server ...", "stopped"]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/readyz", timeout=60)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
