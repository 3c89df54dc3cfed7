"""Ingestion: encoding without Ray, and the whole on a real Ray."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from ace_core.config import CorpusSettings, LimitSettings, MediaEncoderSettings, Settings
from ace_core.errors import AceError, CorpusError
from ace_core.features import read_errors, read_features
from ace_core.items import Modality
from ace_core.media.isolate import PIECE, IsolatedDecoder
from ace_core.settings_file import load_settings
from ace_store import Store
from pipelines.encode import EncodeItems, KnownEmbeddings, questions
from pipelines.progress import Reporter
from pipelines.sources import list_corpus
from tests.corpora import (
    FATAL,
    fatal_decoders,
    write_clip,
    write_mixed_corpus,
    write_picture,
    write_tone,
)

LIMITS = LimitSettings()
AUDIO = MediaEncoderSettings(kind="log-mel", batch_size=4)


# -- encoding, without Ray ---------------------------------------------------------------------------------------


def _encode(folder: Path, names: list[str], **kwargs: object) -> dict[str, np.ndarray]:
    transform = EncodeItems(Modality.AUDIO, AUDIO, LIMITS, str(folder), threads=2, device="cpu", **kwargs)  # type: ignore[arg-type]
    sizes = [(folder / n).stat().st_size if (folder / n).exists() else 1 for n in names]
    return transform({"row": np.arange(len(names)), "uri": np.array(names), "bytes": np.array(sizes)})


def test_a_bad_file_is_a_row_and_its_neighbours_are_unharmed(tmp_path: Path) -> None:
    write_tone(tmp_path / "good.wav", 440)
    write_tone(tmp_path / "other.wav", 880)
    (tmp_path / "junk.wav").write_bytes(b"this is not audio at all")
    (tmp_path / "empty.wav").write_bytes(b"")
    result = _encode(tmp_path, ["junk.wav", "good.wav", "empty.wav", "gone.wav", "other.wav"])
    assert result["cause"].tolist() == ["not-audio", "", "empty", "unreadable", ""]
    assert all(result["detail"][i] for i in (0, 2, 3))
    alone = _encode(tmp_path, ["good.wav"])
    np.testing.assert_array_equal(result["embedding"][1], alone["embedding"][0])
    np.testing.assert_allclose(np.linalg.norm(result["embedding"][[1, 4]].astype(np.float32), axis=1), 1, atol=2e-3)
    assert not result["embedding"][[0, 2, 3]].any()
    assert result["content_hash"][1] != result["content_hash"][4]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_file_that_kills_its_decoder_costs_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Short files are decoded together; those around one that crashes or hangs the decoder are encoded all the same."""
    names = [f"{number:02d}.wav" for number in range(12)]
    for number, name in enumerate(names):
        write_tone(tmp_path / name, 300 + 50 * number, seconds=0.3)
    want = _encode(tmp_path, names)
    fatal_decoders(monkeypatch)
    causes = np.full(12, "", object)
    for number, data in ((2, b"dies"), (5, b"hangs"), (6, b"dies"), (11, b"dies")):
        (tmp_path / names[number]).write_bytes(data)
        causes[number] = FATAL[data]
    encoder = AUDIO.model_copy(update={"batch_size": 12})
    transform = EncodeItems(Modality.AUDIO, encoder, LIMITS, str(tmp_path), threads=threads, device="cpu")
    result = transform({"row": np.arange(12), "uri": np.array(names), "bytes": np.full(12, 5000)})
    assert result["row"].tolist() == list(range(12))
    assert result["cause"].tolist() == causes.tolist()
    good = causes == ""
    np.testing.assert_array_equal(result["embedding"][good], want["embedding"][good])
    assert not result["embedding"][~good].any()


def test_a_decoder_that_cannot_be_started_costs_rows_not_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tone(tmp_path / "a.wav", 440)
    write_tone(tmp_path / "b.wav", 550)

    def refused(self: IsolatedDecoder) -> None:
        raise PermissionError("no more processes")

    monkeypatch.setattr(IsolatedDecoder, "_start", refused)
    result = _encode(tmp_path, ["a.wav", "b.wav"])
    assert result["cause"].tolist() == ["unexpected"] * 2
    assert all("no more processes" in detail for detail in result["detail"])


def test_short_files_are_decoded_together_and_long_ones_alone() -> None:
    sizes = [100, 200, PIECE, 300, 2 * PIECE, PIECE - 500, 500, 1]
    files = [(row, f"{row}", size) for row, size in enumerate(sizes)]
    for threads, groups in ((1, [[0, 1], [2], [3], [4], [5, 6], [7]]), (8, [[row] for row in range(8)])):
        assert [[row for row, _, _ in group] for group in questions(files, threads)] == groups
    assert [len(group) for group in questions(files[:2] * 50, 4)] == [25] * 4


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    write_tone(tmp_path / "good.wav", 440)
    small = EncodeItems(Modality.AUDIO, AUDIO, LimitSettings(max_bytes=100), str(tmp_path), threads=1, device="cpu")
    batch = {"row": np.arange(1), "uri": np.array(["good.wav"]), "bytes": np.array([5000])}
    assert small(batch)["cause"].tolist() == ["too-large"]


class _Fragile:
    """An encoder that fails on a batch with a bad input, and is broken by some inputs alone."""

    dim = 2

    @property
    def decoder(self) -> _Fragile:
        return self

    def wholes(self, files: list[bytes], most: float) -> list[bytes]:
        return files

    def encode(self, batch: list[bytes]) -> np.ndarray:
        if b"bad" in batch:
            raise RuntimeError("cannot encode this")
        return np.array([[np.nan, 0] if item == b"nan" else [3 / 5, 4 / 5] for item in batch], np.float32)


def test_an_input_that_breaks_the_encoder_costs_one_row(tmp_path: Path) -> None:
    for name in ("a", "bad", "nan", "b"):
        (tmp_path / name).write_text(name)
    transform = EncodeItems(Modality.AUDIO, AUDIO, LIMITS, str(tmp_path), threads=1, device="cpu")
    transform._encoder = _Fragile()  # type: ignore[assignment]
    names = ["a", "bad", "nan", "b"]
    result = transform({"row": np.arange(4), "uri": np.array(names), "bytes": np.ones(4)})
    assert result["cause"].tolist() == ["", "unexpected", "no-content", ""]
    assert "cannot encode this" in result["detail"][1]


def test_known_content_is_not_encoded_again(tmp_path: Path) -> None:
    write_tone(tmp_path / "a.wav", 440)
    write_tone(tmp_path / "b.wav", 660)
    first = _encode(tmp_path, ["a.wav"])
    vector = np.full((1, first["embedding"].shape[1]), 0.25, np.float16)  # recognisably not what the encoder says
    from pipelines.shards import item_rows

    listed = list_corpus(CorpusSettings(path=str(tmp_path))).items.slice(0, 1)
    pq.write_table(item_rows(listed, pa.array([first["content_hash"][0]]), vector), tmp_path / "old.parquet")
    known = KnownEmbeddings(None, {str(first["content_hash"][0]): {None: (str(tmp_path / "old.parquet"), 0)}})
    result = _encode(tmp_path, ["b.wav", "a.wav"], known=known)
    assert result["reused"].tolist() == [False, True]
    np.testing.assert_array_equal(result["embedding"][1], vector[0])
    assert result["cause"].tolist() == ["", ""]


# -- the whole, on Ray -------------------------------------------------------------------------------------------


def _settings(corpus: Path, store: Path, *more: str) -> Settings:
    return load_settings(None, (f"corpus.path={corpus}", f"store={store}", "compute.encoders=2", *more))


def _ingest(settings: Settings, reporter: Reporter | None = None) -> tuple[dict, Path]:
    from pipelines.ingest import ingest

    manifest = ingest(settings, Store.open(settings.store), reporter or Reporter(quiet=True))
    return manifest.metrics | {"id": manifest.id}, Path(settings.store) / "features" / manifest.id


@pytest.mark.ray
def test_a_mixed_corpus_with_bad_files_and_what_changes_later(ray_cluster: None, tmp_path: Path) -> None:
    corpus, store = tmp_path / "corpus", tmp_path / "store"
    write_mixed_corpus(corpus, pictures=20, sounds=6, clips=4)
    (corpus / "images" / "junk.png").write_bytes(b"no picture")
    whole = (corpus / "video" / "000.mp4").read_bytes()
    (corpus / "video" / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    settings = _settings(corpus, store, "encoders.image.batch_size=4")
    said = io.StringIO()
    metrics, folder = _ingest(settings, Reporter(Console(file=said, soft_wrap=True)))
    assert metrics["items"] == {"image": 20, "audio": 6, "video": 4}
    log = said.getvalue()
    assert "images/junk.png: not-an-image (" in log and "video/cut.mp4: " in log and f"{folder / 'errors'} (Parq" in log
    assert sum(metrics["errors"].values()) == 2 and metrics["errors"]["not-an-image"] == 1
    features = read_features(folder)
    assert len(features) == 30 and len(set(features.items.column("item_id").to_pylist())) == 30
    for vectors in features.embeddings.values():
        np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=5e-3)
    assert read_errors(folder).column("uri").to_pylist() == ["images/junk.png", "video/cut.mp4"]

    again, _ = _ingest(settings)
    assert again["id"] == metrics["id"]

    # One file is new, one moved, one changed, one is gone, and one has another caption.
    write_tone(corpus / "audio" / "new.flac", 555)
    (corpus / "images" / "000.png").rename(corpus / "images" / "moved.png")
    write_picture(corpus / "images" / "001.png", "blue", "frame", shift=7)
    (corpus / "images" / "002.png").unlink()
    text = (corpus / "captions.jsonl").read_text()
    (corpus / "captions.jsonl").write_text(text.replace('number 3"', 'number three"'))
    changed, new_folder = _ingest(settings)
    assert changed["id"] != metrics["id"]
    assert changed["items"] == {"image": 19, "audio": 7, "video": 4}
    assert changed["reused"] == {"image": 18, "audio": 6, "video": 4}  # all but the changed picture and the new sound
    assert changed["disappeared"] == 2  # the removed one, and the old name of the moved one
    assert changed["errors"]["absent"] == 2
    old = dict(zip(features.items.column("item_id").to_pylist(), features.embeddings[Modality.IMAGE]))
    now = read_features(new_folder)
    new = dict(zip(now.items.column("item_id").to_pylist(), now.embeddings[Modality.IMAGE]))
    np.testing.assert_array_equal(new["images/moved.png"], old["images/000.png"])
    np.testing.assert_array_equal(new["images/005.png"], old["images/005.png"])
    assert not np.array_equal(new["images/001.png"], old["images/001.png"])
    row = now.items.column("item_id").to_pylist().index("images/003.png")
    assert now.items.column("captions")[row].as_py()[0].endswith("number three")


@pytest.mark.ray
def test_a_corpus_of_bad_files_only_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / f"{i}.wav").write_bytes(b"junk")
    with pytest.raises(
        CorpusError, match=r"not one of 3 files can be used \(3 not-audio\), such as 0.wav: not-audio \("
    ):
        _ingest(_settings(tmp_path / "corpus", tmp_path / "store"))


@pytest.mark.ray
def test_more_actors_than_the_cluster_has_room_for_are_refused(ray_cluster: None, tmp_path: Path) -> None:
    for i in range(40):
        write_tone(tmp_path / "corpus" / f"{i}.wav", 200 + i, seconds=0.2)
    settings = _settings(tmp_path / "corpus", tmp_path / "store", "compute.encoders=4", "encoders.audio.batch_size=4")
    with pytest.raises(AceError, match="1 must stay free") as error:
        _ingest(settings)
    assert "compute.encoders" in error.value.where


_DRIVER = """
import os, sys, time
from pathlib import Path
os.environ["RAY_AUTH_MODE"] = "disabled"
from ace_core.settings_file import load_settings
from ace_store import Store
from pipelines.ingest import ingest
from pipelines.progress import Reporter
from pipelines.shards import PartWriter
commit = PartWriter.commit

def commit_three(self, *args):
    if len(self.shards) == 3:  # the data of the fourth are written, but never its statistics
        self.store.write_json = lambda *_: (Path(sys.argv[1]).touch(), time.sleep(3600))
    commit(self, *args)

PartWriter.commit = commit_three
settings = load_settings(None, tuple(sys.argv[2:]))
ingest(settings, Store.open(settings.store), Reporter(quiet=True))
"""


@pytest.mark.ray
def test_a_killed_driver_goes_on_where_it_stopped(ray_cluster: None, tmp_path: Path) -> None:
    corpus, store = tmp_path / "corpus", tmp_path / "store"
    for i in range(240):
        write_tone(corpus / f"{i:03d}.flac", 200 + i, seconds=3)
    write_clip(corpus / "clip.mp4", "red", to_right=True)
    (corpus / "000.flac").write_bytes(b"junk")
    options = [
        f"corpus.path={corpus}", f"store={store}", "encoders.audio.batch_size=8", "corpus.shard_items=8",
        "compute.encoders=1",
    ]  # fmt: skip
    import ray

    address = ray.get_runtime_context().gcs_address
    there = tmp_path / "there"
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER, str(there), *options, f"compute.address={address}"])
    try:
        deadline = time.monotonic() + 240
        while not there.exists():
            assert time.monotonic() < deadline and driver.poll() is None
            time.sleep(0.05)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    (shards,) = store.glob("features/*/shards")
    done = sorted(path.stem for path in shards.iterdir())
    files = list(shards.parent.glob("*/*.parquet"))
    written = {path: path.stat() for path in files if path.stem in done}
    assert len(done) == 3 <= len(written) < len(files)
    metrics, folder = _ingest(load_settings(None, tuple(options)))
    features = read_features(folder)
    assert features.counts() == {"audio": 239, "video": 1}
    assert len(set(features.items.column("item_id").to_pylist())) == 240
    assert metrics["errors"] == {"not-audio": 1}
    for path, before in written.items():  # finished shards were not written again
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
