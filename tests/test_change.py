"""add, remove, roll back, collect: what is published changes, the models do not, and nothing is lost on the way."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from ace_core.arrays import map_arrays, save_arrays
from ace_core.config import Settings
from ace_core.errors import CorpusError, QueryError, StoreError
from ace_core.manifest import file_entry, write_manifest
from ace_core.retriever import Retriever
from ace_core.snapshot import Snapshot
from ace_store import Store
from pipelines import cli
from pipelines.change import add_stage, remove_stage, rollback_stage
from pipelines.drift import UNSEEN_ERROR, Drift
from pipelines.ingest import ingest
from pipelines.keep import gc_stage, status_table
from pipelines.progress import Reporter
from pipelines.publish import commit, live_ids, part_ref, publish_stage
from tests.corpora import write_picture
from tests.world import World

pytestmark = pytest.mark.ray


@dataclass
class Copy:
    """A store of its own over a corpus of its own."""

    settings: Settings
    store: Store
    corpus: Path

    def ids(self) -> set[str]:
        return set(live_ids(Snapshot.open(self.store.mirror())).to_pylist())

    def ingest(self) -> None:
        ingest(self.settings, self.store, Reporter(quiet=True))

    def caption(self, path: str, *captions: str) -> None:
        with (self.corpus / "captions.jsonl").open("a") as f:
            f.write(json.dumps({"path": path, "captions": captions, "colour": "red"}) + "\n")


@pytest.fixture
def copy(world: World, tmp_path: Path) -> Iterator[Copy]:
    shutil.copytree(world.corpus, tmp_path / "corpus")
    shutil.copytree(world.settings.store, tmp_path / "store")
    corpus = world.settings.corpus.model_copy(update={"path": str(tmp_path / "corpus")})
    settings = world.settings.model_copy(update={"corpus": corpus, "store": str(tmp_path / "store")})
    yield Copy(settings, Store.open(settings.store), tmp_path / "corpus")


def test_add_replace_remove_roll_back(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    quiet, loud = Reporter(quiet=True), Reporter()
    first = copy.store.current().snapshot
    before = copy.ids()
    copy.ingest()
    assert add_stage(copy.settings, copy.store, quiet).id == first  # the same corpus, at another place

    write_picture(copy.corpus / "images" / "new.png", "red", "square", shift=9)
    write_picture(copy.corpus / "images" / "003.png", "blue", "bar", shift=5)
    (copy.corpus / "images" / "004.png").unlink()
    lines = [json.loads(line) for line in (copy.corpus / "captions.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["path"] != "images/004.png"]
    (copy.corpus / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    copy.caption("images/new.png", "a wholly new red square")
    copy.ingest()
    added = add_stage(copy.settings, copy.store, loud)
    said = capsys.readouterr().err
    assert "adding 1 item, replacing 1" in said and "drift of 2 added items" in said and "too few to tell" in said
    assert "images/004.png" in said and "--gone" in said
    assert added.parent == first and len(added.segments) == 2 and added.removed == 1
    assert copy.ids() == before | {"images/new.png"}

    retriever = Retriever.open(copy.store.mirror())
    item = retriever.item("images/new.png")
    assert item is not None and item.captions == ("a wholly new red square",) and item.attributes == {"colour": "red"}
    found = retriever.search(["a red square"], k=100, modality="image")[0]
    assert [h.item_id for h in found].count("images/003.png") == 1
    assert {h.item_id for h in found} == {i for i in copy.ids() if i.startswith("images/")}

    assert remove_stage(copy.store, quiet, gone=True).removed == 2
    assert copy.ids() == before - {"images/004.png"} | {"images/new.png"}
    remove_stage(copy.store, quiet, ids=["images/new.png", "images/005.png"])
    remove_stage(copy.store, quiet, filters={"colour": "green"})
    retriever = Retriever.open(copy.store.mirror())
    left = copy.ids()
    assert "images/new.png" not in left and "images/005.png" not in left
    hits = retriever.search(["a green square"], k=100)[0]
    assert {h.item_id for h in hits} == left and all(h.attributes.get("colour") != "green" for h in hits)

    last = copy.store.current().snapshot
    before_last = copy.store.snapshot(str(last)).parent
    capsys.readouterr()
    assert rollback_stage(copy.store, loud).id == before_last
    said = capsys.readouterr().err
    assert f"rolled back from snapshot {last} to {before_last} (remove of 20" in said and "is published" not in said
    assert "running servers change to it" in said and f"back again: `ace rollback {last}`" in said
    rollback_stage(copy.store, quiet, first)
    rollback_stage(copy.store, loud, first)
    assert f"snapshot {first} is the current one already" in capsys.readouterr().err
    assert copy.store.current().snapshot == first and copy.ids() == before
    assert rollback_stage(copy.store, quiet, last).id == last


def test_a_corpus_that_moved_is_served_from_where_it_is_once_it_is_published(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    loud, root = Reporter(), str(copy.corpus)
    retriever = Retriever.open(copy.store.mirror())
    before = retriever.item("images/003.png")
    assert before is not None and before.root != root
    copy.ingest()
    add_stage(copy.settings, copy.store, loud)
    said = capsys.readouterr().err
    assert f"the files of {len(copy.ids())} published items are still looked for below {before.root};" in said
    assert f"`ace publish` has them served from {root}" in said and "nothing to add" in said

    publish_stage(copy.settings, copy.store, loud)
    after = Retriever.open(copy.store.mirror()).item("images/003.png")
    assert after is not None and after.root == root and after.identifier == before.identifier
    capsys.readouterr()
    add_stage(copy.settings, copy.store, loud)
    assert "the corpus moved" not in capsys.readouterr().err


def test_what_was_removed_by_name_stays_out_until_it_changes(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    """Its file is still in the corpus: the next `ace add` must not bring it back. A file that was gone comes back."""
    quiet, before = Reporter(quiet=True), copy.ids()
    green = {r["path"] for r in map(json.loads, (copy.corpus / "captions.jsonl").read_text().splitlines())
             if r.get("colour") == "green"}  # fmt: skip
    (copy.corpus / "images" / "004.png").rename(copy.corpus / "kept.bytes")
    copy.ingest()
    remove_stage(copy.store, quiet, ids=["images/005.png", "images/007.png"], gone=True)
    remove_stage(copy.store, quiet, filters={"colour": "green"})
    out = {"images/005.png", "images/007.png"} | green
    assert copy.ids() == before - out - {"images/004.png"}

    (copy.corpus / "kept.bytes").rename(copy.corpus / "images" / "004.png")
    write_picture(copy.corpus / "images" / "007.png", "yellow", "bar", shift=3)
    copy.ingest()
    add_stage(copy.settings, copy.store, Reporter())
    said = capsys.readouterr().err
    assert f"{len(out - {'images/007.png'})} removed items kept out" in said and "`ace add --removed`" in said
    assert copy.ids() == before - out | ({"images/004.png", "images/007.png"} - green)
    shared = float(re.findall(r"([\d.]+) % share", said)[0])
    assert shared < 100, "an item that comes back shares its identifier with its removed self only"
    again = copy.store.current().snapshot
    assert add_stage(copy.settings, copy.store, quiet).id == again  # and the time after that
    rollback_stage(copy.store, quiet)
    assert len(Snapshot.open(copy.store.mirror()).unwanted[0]) == len(out)


def test_publishing_keeps_out_what_was_removed_by_name(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    """Also in a new segment of the whole corpus, as after a refit; until the file changes, or `ace add` is told."""
    quiet, before = Reporter(quiet=True), copy.ids()
    out = ["images/005.png", "images/007.png", "images/009.png"]
    copy.ingest()
    remove_stage(copy.store, quiet, ids=out)
    write_picture(copy.corpus / "images" / "007.png", "yellow", "bar", shift=3)
    write_picture(copy.corpus / "images" / "new.png", "red", "square", shift=9)
    copy.ingest()
    published = publish_stage(copy.settings, copy.store, Reporter())
    said = capsys.readouterr().err
    assert "2 removed items kept out (" in said and "`ace add --removed`" in said
    assert len(published.segments) == 1 and published.removed == 2
    assert copy.ids() == before - {"images/005.png", "images/009.png"} | {"images/new.png"}
    assert publish_stage(copy.settings, copy.store, quiet).id == published.id
    assert add_stage(copy.settings, copy.store, quiet).id == published.id

    with pytest.raises(QueryError, match=r"1 item not removed by name \(images/001.png\)"):
        add_stage(copy.settings, copy.store, quiet, again=["images/001.png"])
    add_stage(copy.settings, copy.store, quiet, again=["images/009.png"])
    assert copy.ids() == before - {"images/005.png"} | {"images/new.png"}
    publish_stage(copy.settings, copy.store, quiet)  # what was taken in again stays in
    assert copy.ids() == before - {"images/005.png"} | {"images/new.png"}
    add_stage(copy.settings, copy.store, quiet, removed=True)
    assert copy.ids() == before | {"images/new.png"}
    assert Retriever.open(copy.store.mirror()).item("images/005.png") is not None
    remove_stage(copy.store, quiet, ids=["images/005.png"])
    (copy.corpus / "images" / "005.png").unlink()
    copy.ingest()
    with pytest.raises(QueryError, match=r"1 item not in the corpus any more \(images/005.png\)"):
        add_stage(copy.settings, copy.store, quiet, again=["images/005.png"])


def test_publishing_never_forgets_what_was_removed(copy: Copy) -> None:
    """Where the record cannot be read, nothing is published; where CURRENT is damaged, the newest record counts."""
    quiet, before, out = Reporter(quiet=True), copy.ids(), {"images/005.png", "images/007.png"}
    latest = remove_stage(copy.store, quiet, ids=sorted(out))
    (Path(copy.settings.store) / "CURRENT").write_text("junk")
    assert publish_stage(copy.settings, copy.store, quiet).removed == 2
    assert copy.ids() == before - out
    rollback_stage(copy.store, quiet, latest.id)
    (Path(copy.settings.store) / "snapshots" / latest.id / "tombstones.safetensors").write_bytes(b"junk")
    with pytest.raises(StoreError, match=rf"removed by name from snapshot {latest.id} .*`ace publish --removed`"):
        publish_stage(copy.settings, copy.store, quiet)
    assert copy.store.current().snapshot == latest.id
    publish_stage(copy.settings, copy.store, quiet, removed=True)
    assert copy.ids() == before


def test_what_cannot_be_removed_is_refused_whole(copy: Copy) -> None:
    before = copy.store.current()
    with pytest.raises(QueryError, match=r"1 item not in the snapshot, or not any more \(nobody\)"):
        remove_stage(copy.store, Reporter(quiet=True), ids=["images/001.png", "nobody"])
    with pytest.raises(QueryError, match="nothing was said"):
        remove_stage(copy.store, Reporter(quiet=True))
    assert remove_stage(copy.store, Reporter(quiet=True), filters={"colour": "plaid"}).id == before.snapshot
    with pytest.raises(QueryError, match="no item has an attribute 'color'"):
        remove_stage(copy.store, Reporter(quiet=True), filters={"color": "red"})
    assert copy.store.current() == before
    with pytest.raises(StoreError, match="no snapshot nosuch"):
        rollback_stage(copy.store, Reporter(quiet=True), "nosuch")
    with pytest.raises(CorpusError, match="no snapshot before"):
        rollback_stage(copy.store, Reporter(quiet=True))


@pytest.mark.parametrize("content", ["junk", '{"snapshot": "gone"}'])
def test_a_damaged_current_is_mended_by_what_the_error_advises(
    copy: Copy, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    first, quiet = str(copy.store.current().snapshot), Reporter(quiet=True)
    (Path(copy.settings.store) / "CURRENT").write_text(content)
    with pytest.raises(StoreError, match="`ace rollback ID`"):
        rollback_stage(copy.store, quiet)
    named = "no snapshot" if content == "junk" else "snapshot gone"
    assert f"CURRENT names {named}" in str(status_table(copy.store).caption)
    assert rollback_stage(copy.store, Reporter(), first).id == first == copy.store.current().snapshot
    said = capsys.readouterr().err
    left = "a damaged CURRENT" if content == "junk" else "snapshot gone, which is gone or damaged,"
    assert f"rolled back from {left} to {first}" in said and "back again" not in said
    assert "CURRENT" not in str(status_table(copy.store).caption)
    (Path(copy.settings.store) / "CURRENT").write_text(content)
    assert publish_stage(copy.settings, copy.store, quiet).id == copy.store.current().snapshot


def test_everything_can_be_removed_and_brought_back(copy: Copy) -> None:
    first = copy.store.current().snapshot
    remove_stage(copy.store, Reporter(quiet=True), ids=sorted(copy.ids()))
    assert copy.ids() == set()
    assert Retriever.open(copy.store.mirror()).search(["anything"]) == [[]]
    assert rollback_stage(copy.store, Reporter(quiet=True)).id == first


def test_the_snapshot_before_one_whose_own_is_gone_is_the_newest_older_one(copy: Copy) -> None:
    quiet, first = Reporter(quiet=True), copy.store.current().snapshot
    middle = remove_stage(copy.store, quiet, ids=["images/001.png"])
    last = remove_stage(copy.store, quiet, ids=["images/002.png"])
    assert last.parent == middle.id and middle.parent == first
    copy.store.delete_part("snapshot", middle.id)
    assert rollback_stage(copy.store, quiet).id == first


def test_gc_keeps_what_is_needed(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Reporter(quiet=True)
    first = copy.store.current().snapshot
    for item_id in ("images/001.png", "images/002.png", "images/003.png"):
        remove_stage(copy.store, quiet, ids=[item_id])
    last = copy.store.current().snapshot
    assert gc_stage(copy.store, quiet, keep=1, min_age=timedelta(hours=1), dry_run=False) == []  # all too young
    gc_stage(copy.store, Reporter(), keep=1, min_age=timedelta(hours=1), dry_run=False)
    assert (
        "deleted 0 parts, 0.0 MB; kept: 2 parts younger than 1 h (--min-age-hours), or needed by one that is"
        in capsys.readouterr().err
    )
    named = gc_stage(copy.store, quiet, keep=1, min_age=timedelta(0), dry_run=True)
    assert len(named) == 2 and all(name.startswith("snapshot/") for name in named) and f"snapshot/{first}" in named
    assert copy.store.find("snapshot", str(first)) is not None
    assert gc_stage(copy.store, quiet, keep=1, min_age=timedelta(0), dry_run=False) == named
    assert {m.id for m in copy.store.parts("snapshot")} >= {last} and len(copy.store.parts("snapshot")) == 2
    Snapshot.open(copy.store.mirror())  # every part that the current one names is still there, hashes and all
    assert cli.main(["status", "--store", copy.settings.store]) == 0
    out = capsys.readouterr().out
    assert str(last) in out and re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", out)


def test_status_says_of_older_segments_what_rewrites_them(
    copy: Copy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older segment may find less, and nothing else tells. Its inputs did not change, yet it is written anew."""
    quiet, status = Reporter(quiet=True), ["status", "--store", copy.settings.store]
    with monkeypatch.context() as patch:
        for module in ("pipelines.publish", "ace_core.segment_writer"):
            patch.setattr(f"{module}.FORMAT", 3)
        older = publish_stage(copy.settings, copy.store, quiet)
    assert cli.main(status) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "In the current snapshot a segment was written by an earlier ACE" in said and "`ace publish`" in said
    newer = publish_stage(copy.settings, copy.store, quiet)
    assert newer.segments != older.segments
    assert cli.main(status) == 0
    assert "earlier ACE" not in " ".join(capsys.readouterr().out.split())


def test_a_segment_whose_index_spells_something_else_is_not_published(copy: Copy) -> None:
    """Hashes agree and counts agree: only following the index to the items shows it."""
    before = copy.store.current()
    snapshot = Snapshot.open(copy.store.mirror())
    folder = snapshot.segments[0].folder
    arrays = {k: np.array(v) for k, v in map_arrays(folder / "constraint.safetensors").items()}
    arrays["tail"][0, -1] += 1
    save_arrays(folder / "constraint.safetensors", arrays)
    files = snapshot.segments[0].manifest.files | {
        "constraint.safetensors": file_entry(folder / "constraint.safetensors")
    }
    write_manifest(folder, snapshot.segments[0].manifest.model_copy(update={"files": files}))
    ref = part_ref(copy.store, "segment", folder.name)
    manifest = snapshot.manifest.model_copy(update={"id": "other", "segments": (ref,)})
    with pytest.raises(StoreError, match="does not spell its identifiers"):
        commit(copy.store, manifest, {}, before, Reporter(quiet=True), 0.0)
    assert copy.store.current() == before


def test_a_publisher_that_was_overtaken_is_refused(copy: Copy) -> None:
    seen = copy.store.current()
    remove_stage(copy.store, Reporter(quiet=True), ids=["images/001.png"])
    with pytest.raises(StoreError):
        copy.store.move_current(str(seen.snapshot), seen)


def test_drift_says_when_a_refit_is_due() -> None:
    fine = Drift(1000, 1.1, 0.02, 0.02, 0.1)
    assert not fine.refit_due and "no refit needed" in str(fine)
    for change in ({"error_ratio": 1.5}, {"collision_rate": 0.2}, {"balance_shift": 0.6}):
        drift = Drift(**{**fine.__dict__, **change})
        assert drift.refit_due and "a refit is due" in str(drift)
        assert not Drift(**{**drift.__dict__, "items": 10}).refit_due


def test_drift_is_measured(copy: Copy) -> None:
    from ace_core.segment import Segment
    from pipelines.drift import measure_drift

    snapshot = Snapshot.open(copy.store.mirror())
    same = measure_drift(snapshot, snapshot.segments[0], copy.store, snapshot.removed)
    fitted = copy.store.find("quantizer", snapshot.manifest.models["quantizer"].id)
    assert fitted is not None
    unseen = 1 + UNSEEN_ERROR * fitted.metrics["fine_codes"] / fitted.metrics["items"]
    assert same.balance_shift == pytest.approx(0, abs=1e-9) and same.error_ratio == pytest.approx(1 / unseen, rel=1e-3)
    assert same.collision_rate == 1 and isinstance(snapshot.segments[0], Segment)
    assert np.isfinite(same.collision_before)
    # Of what was removed, nothing collides with what comes.
    segment = snapshot.segments[0]
    alone = measure_drift(snapshot, segment, copy.store, [np.arange(len(segment))])
    assert alone.collision_rate == same.collision_before and alone.collision_before == 0


def test_drift_counts_as_a_plain_loop_does() -> None:
    """Identifiers compared as byte strings, zeros at their end included."""
    from collections import Counter

    from pipelines.drift import _keys, _repeated

    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (500, 4)).astype(np.uint16)
    codes[::7] *= 256
    codes = codes[np.lexsort(codes.T[::-1])]
    assert (np.diff(np.unique(_keys(codes), return_inverse=True)[1]) >= 0).all()  # the order is that of the tokens
    rows = [tuple(c) for c in codes.tolist()]
    counts = Counter(rows)
    assert _repeated(codes).tolist() == [counts[r] > 1 for r in rows]
    assert len(np.unique(_keys(codes))) == len(counts)
