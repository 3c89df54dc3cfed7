"""What an earlier ingestion found out is not found out again: above all, which files are bad."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from rich.console import Console

from ace_core.config import LimitSettings
from ace_core.errors import CorpusError
from ace_core.features import ERRORS_SCHEMA, read_errors, read_features
from ace_core.manifest import Manifest
from ace_core.media.causes import PASSING, no_memory
from ace_core.media.decoders import Answer
from ace_core.media.isolate import IsolatedDecoder
from ace_core.settings_file import load_settings
from ace_store import Store
from pipelines.carried import judged_by
from pipelines.encode import EncodeItems
from pipelines.ingest import ingest
from pipelines.progress import Reporter
from tests.corpora import write_tone

pytestmark = pytest.mark.usefixtures("in_process")


class Corpus:
    """A folder of two sounds and bad files, and what ingestions of it decode and say."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "corpus"
        self.store = Store.open(str(folder / "store"))
        write_tone(self.folder / "a.wav", 440)
        write_tone(self.folder / "b.wav", 660)
        self.decoded: list[str] = []
        self.said = ""
        load = EncodeItems._load

        def noted(self_: EncodeItems, files: list) -> list:
            self.decoded += [uri for _, uri, _ in files]
            return load(self_, files)

        monkeypatch.setattr(EncodeItems, "_load", noted)

    def ingest(self, *changes: str) -> Manifest:
        self.decoded.clear()
        settings = load_settings(None, (f"corpus.path={self.folder}", f"store={self.store.uri}", *changes))
        said = io.StringIO()
        manifest = ingest(settings, self.store, Reporter(Console(file=said, soft_wrap=True)))
        self.said = said.getvalue()
        return manifest

    def caption(self, text: str) -> None:
        (self.folder / "captions.jsonl").write_text(json.dumps({"file": "a.wav", "caption": text}))

    def errors(self, manifest: Manifest) -> dict[str, str]:
        table = read_errors(self.store.path("features", manifest.id))
        assert table.schema.equals(ERRORS_SCHEMA)
        return dict(zip(table.column("item_id").to_pylist(), table.column("cause").to_pylist()))


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    return Corpus(tmp_path, monkeypatch)


def test_a_file_known_to_be_bad_is_not_decoded_again_and_said_every_time(corpus: Corpus) -> None:
    for name, data in (("junk.wav", b"junk"), ("empty.wav", b"")):
        (corpus.folder / name).write_bytes(data)
    first = corpus.ingest()
    assert corpus.decoded == ["a.wav", "b.wav", "empty.wav", "junk.wav"] and "not tried again" not in corpus.said
    bad = {"empty.wav": "empty", "junk.wav": "not-audio"}
    assert corpus.errors(first) == bad
    for text in ("one tone", "one other tone"):  # known from an ingestion that did not decode it, too
        corpus.caption(text)
        again = corpus.ingest()
        assert corpus.decoded == [] and corpus.errors(again) == bad and again.id != first.id
        assert again.metrics["errors"] == {"empty": 1, "not-audio": 1}
        assert "2 unchanged since the last ingestion, 2 known to be bad and not tried again" in corpus.said
        assert "2 files could not be used" in corpus.said and "junk.wav: not-audio (" in corpus.said
        assert "`touch` it" in corpus.said
    corpus.ingest()
    assert "nothing changed" in corpus.said and "junk.wav: not-audio (" in corpus.said


def test_a_bad_file_is_tried_again_when_it_is_touched_or_mended(corpus: Corpus) -> None:
    for name in ("junk.wav", "mended.wav"):
        (corpus.folder / name).write_bytes(b"junk")
    corpus.ingest()
    stat = (corpus.folder / "junk.wav").stat()
    os.utime(corpus.folder / "junk.wav", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    write_tone(corpus.folder / "mended.wav", 550)
    again = corpus.ingest()
    assert corpus.decoded == ["junk.wav", "mended.wav"]
    assert corpus.errors(again) == {"junk.wav": "not-audio"} and again.metrics["items"] == {"audio": 3}


def test_a_verdict_ends_with_the_limits_and_decoders_that_gave_it(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tone(corpus.folder / "long.wav", 300, seconds=3)
    first = corpus.ingest("limits.max_seconds=2")
    assert corpus.errors(first) == {"long.wav": "too-long"}
    second = corpus.ingest("limits.max_seconds=1.5")
    assert corpus.decoded == ["long.wav"] and corpus.errors(second) == {"long.wav": "too-long"}
    assert corpus.ingest().metrics["items"] == {"audio": 3} and corpus.decoded == ["long.wav"]

    (corpus.folder / "junk.wav").write_bytes(b"junk")
    corpus.ingest()
    before = judged_by(LimitSettings())
    monkeypatch.setattr("pipelines.carried.version", lambda package: "99")
    assert judged_by(LimitSettings()) != before
    corpus.caption("one tone")
    corpus.ingest()
    assert corpus.decoded == ["junk.wav"]


def _always(monkeypatch: pytest.MonkeyPatch, cause: str) -> None:
    """What cannot be used fails for this cause."""
    call: Callable[..., dict[str, np.ndarray]] = EncodeItems.__call__

    def failing(self: EncodeItems, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        result = call(self, batch)
        result["cause"][result["cause"] != ""] = cause
        return result

    monkeypatch.setattr(EncodeItems, "__call__", failing)


@pytest.mark.parametrize("cause", sorted(PASSING))
def test_what_may_be_the_machines_fault_is_tried_again(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    (corpus.folder / "bad.wav").write_bytes(b"junk")
    _always(monkeypatch, cause)
    assert corpus.errors(corpus.ingest()) == {"bad.wav": cause}
    corpus.caption("one tone")
    assert corpus.errors(corpus.ingest()) == {"bad.wav": cause} and corpus.decoded == ["bad.wav"]


def test_what_may_have_passed_is_tried_again_though_nothing_changed(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that ran out is no verdict; a part with nothing new in it would have the models fitted again."""
    (corpus.folder / "junk.wav").write_bytes(b"junk")
    write_tone(corpus.folder / "c.wav", 880)
    wholes = IsolatedDecoder.wholes

    def starved(self: IsolatedDecoder, files: list[bytes], most: float) -> list[Answer]:
        answers = wholes(self, files, most)
        return [no_memory() if file == data else answer for file, answer in zip(files, answers)]

    data = (corpus.folder / "c.wav").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(IsolatedDecoder, "wholes", starved)
        first = corpus.ingest()
        assert corpus.errors(first) == {"c.wav": "out-of-memory", "junk.wav": "not-audio"}
        assert "by the next `ace ingest` after out-of-memory" in corpus.said
        assert corpus.ingest().id == first.id and corpus.decoded == ["c.wav"]
        assert "trying again what may have passed: 1 file" in corpus.said and "as they were" in corpus.said
    again = corpus.ingest()
    assert corpus.decoded == ["c.wav"] and corpus.errors(again) == {"junk.wav": "not-audio"}
    assert again.metrics["items"] == {"audio": 3} and again.metrics["reused"] == {"audio": 2}
    corpus.store.delete_part("features", first.id)  # as `ace gc` does
    assert corpus.ingest().id == again.id and corpus.decoded == [] and "nothing to do" in corpus.said


@pytest.mark.parametrize("changing", [False, True])
def test_what_fails_every_time_is_left_alone_in_the_end(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, changing: bool
) -> None:
    """A sound that always takes too long costs its time three times, whether the corpus changes in between or not."""
    (corpus.folder / "slow.wav").write_bytes(b"junk")
    _always(monkeypatch, "timeout")

    def ingest(*changes: str) -> str:
        if changing:
            corpus.caption(f"tone {os.urandom(4).hex()}")
        return corpus.ingest(*changes).id

    first = ingest()
    for _ in range(2):
        assert "slow.wav" in corpus.decoded or not changing
        assert "by the next `ace ingest` after timeout" in corpus.said and "left alone" not in corpus.said
        ingest()
        assert corpus.decoded == ["slow.wav"]
    for _ in range(2):
        assert "1 file tried 3 times and left alone from now on (slow.wav: timeout)" in corpus.said
        assert "by the next" not in corpus.said and "corpus.tries=4" in corpus.said
        last = ingest()
        assert corpus.decoded == [] and (last == first) != changing

    ingest("corpus.tries=4")
    assert corpus.decoded == ["slow.wav"] and "corpus.tries=5" in corpus.said
    stat = (corpus.folder / "slow.wav").stat()
    os.utime(corpus.folder / "slow.wav", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    for decoded in (["slow.wav"],) * 3 + ([],):
        ingest()
        assert corpus.decoded == decoded
    ingest("limits.decode_seconds=90")
    assert corpus.decoded == ["slow.wav"] and "left alone" not in corpus.said


def test_what_storage_does_not_give_is_asked_for_every_time(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """That costs nothing, and neither size nor time of a file tell that it may be read now."""
    (corpus.folder / "locked.wav").write_bytes(b"junk")
    _always(monkeypatch, "unreadable")
    for _ in range(5):
        corpus.ingest()
        assert "locked.wav" in corpus.decoded and "left alone" not in corpus.said


def test_trying_again_never_takes_away_what_could_be_used(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of a file is tried for one of its segments; on a busier machine than the first time, all may fail."""
    cut = _with_a_hole(corpus)
    _always(monkeypatch, "timeout")
    first = corpus.ingest(*cut)
    assert first.metrics["items"]["audio"] > 2

    def busy(self: IsolatedDecoder, files: list[bytes], most: float) -> list[Answer]:
        return [no_memory()] * len(files)

    monkeypatch.setattr(IsolatedDecoder, "wholes", busy)
    again = corpus.ingest(*cut)
    assert corpus.decoded == ["hole.flac"] and again.id == first.id and "as they were" in corpus.said


def test_a_corpus_of_which_nothing_could_be_used_for_now_is_tried_again(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(self: IsolatedDecoder, files: list[bytes], most: float) -> list[Answer]:
        return [MemoryError()] * len(files)

    with monkeypatch.context() as patch:
        patch.setattr(IsolatedDecoder, "wholes", starved)
        with pytest.raises(CorpusError, match=r"2 out-of-memory.*That may pass: run `ace ingest` again"):
            corpus.ingest()
    assert corpus.ingest().metrics["items"] == {"audio": 2}


def _with_a_hole(corpus: Corpus) -> tuple[str, ...]:
    """A sound of which some segments are bad; the settings that cut it."""
    out, noise = io.BytesIO(), np.random.default_rng(0).uniform(-0.5, 0.5, 8 * 8000)
    soundfile.write(out, noise.astype(np.float32), 8000, format="FLAC")
    data = bytearray(out.getvalue())
    middle = len(data) * 5 // 8
    data[middle : middle + 3000] = bytes(3000)
    (corpus.folder / "hole.flac").write_bytes(data)
    return "segments.audio_seconds=2", "segments.overlap=0"


def test_a_bad_segment_stays_known_beside_the_good_ones(corpus: Corpus) -> None:
    cut = _with_a_hole(corpus)
    first = corpus.ingest(*cut)
    bad = corpus.errors(first)
    assert "hole.flac#t=4,6" in bad and "hole.flac#t=0,2" not in bad
    corpus.caption("one tone")
    again = corpus.ingest(*cut)
    assert corpus.decoded == [] and corpus.errors(again) == bad
    assert again.metrics["items"] == first.metrics["items"] == {"audio": 2 + 4 - len(bad)}


def test_a_file_with_a_bad_segment_is_tried_again_whole(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a verdict holds no longer; what is known of the good segments does not hide the bad one."""
    cut = _with_a_hole(corpus)
    call: Callable[..., dict[str, np.ndarray]] = EncodeItems.__call__

    def busy(self: EncodeItems, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        result = call(self, batch)
        result["cause"][(result["start"] == 4) & (result["cause"] != "")] = "timeout"
        return result

    with monkeypatch.context() as patch:
        patch.setattr(EncodeItems, "__call__", busy)
        assert corpus.errors(corpus.ingest(*cut))["hole.flac#t=4,6"] == "timeout"
    corpus.caption("one tone")
    bad = corpus.errors(corpus.ingest(*cut))
    assert corpus.decoded == ["hole.flac"] and bad["hole.flac#t=4,6"] != "timeout"
    looser = (*cut, "limits.max_seconds=100")
    assert corpus.errors(corpus.ingest(*looser)) == bad and corpus.decoded == ["hole.flac"]
    stat = (corpus.folder / "hole.flac").stat()
    os.utime(corpus.folder / "hole.flac", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    last = corpus.ingest(*looser)
    assert corpus.decoded == ["hole.flac"] and corpus.errors(last) == bad
    assert last.metrics["items"] == {"audio": 2 + 4 - len(bad)} and "not tried again" not in corpus.said


def test_errors_written_before_there_were_stamps_are_found_out_again(corpus: Corpus) -> None:
    (corpus.folder / "junk.wav").write_bytes(b"junk")
    first = corpus.ingest()
    folder = Path(corpus.store.path("features", first.id))
    shard = folder / "shards" / "audio-000000.json"
    written = json.loads(shard.read_text())
    del written["judged"]
    shard.write_text(json.dumps(written))
    path = folder / "errors" / "audio-000000.parquet"
    pq.write_table(pa.Table.from_pylist(pq.read_table(path).to_pylist(), ERRORS_SCHEMA), path)
    corpus.caption("one tone")
    again = corpus.ingest()
    assert corpus.decoded == ["junk.wav"] and corpus.errors(again) == {"junk.wav": "not-audio"}
    assert again.metrics["reused"] == {"audio": 2}
    assert len(read_features(corpus.store.path("features", again.id))) == 2
