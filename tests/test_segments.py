"""Long recordings are cut into items of their own; scenes; batches tried out; files that kill the encoder."""

from __future__ import annotations

import io
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
import soundfile

from ace_core.config import LimitSettings, MediaEncoderSettings, SegmentSettings
from ace_core.encoders.batching import BatchTrial
from ace_core.errors import AceError, MediaError
from ace_core.features import read_errors, read_features
from ace_core.items import Modality
from ace_core.media.decoders import AudioDecoder, VideoDecoder
from ace_core.media.isolate import IsolatedDecoder
from ace_core.media.scenes import scene_times
from ace_core.media.segments import cut
from ace_core.media.video import decode_video
from ace_core.settings_file import load_settings
from ace_store import Store
from pipelines.cluster import Pool, map_rows
from pipelines.encode import EncodeItems
from pipelines.ingest import files_a_call, ingest
from pipelines.progress import Reporter
from tests.corpora import write_tone

LIMITS = LimitSettings()
COLOURS = [(230, 20, 20), (20, 210, 40), (20, 40, 230), (240, 230, 20)]


def _melody(*tones: float, seconds: float = 2.0, rate: int = 8000) -> np.ndarray:
    t = np.arange(round(rate * seconds)) / rate
    return np.concatenate([0.4 * np.sin(2 * np.pi * hertz * t) for hertz in tones]).astype(np.float32)


def _flac(samples: np.ndarray) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, 8000, format="FLAC")
    return out.getvalue()


def _film(seconds_of: list[tuple[int, float]], rate: int = 10) -> bytes:
    """A video of still colours, each for some seconds."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for colour, seconds in seconds_of:
            for _ in range(round(seconds * rate)):
                pixels = np.full((64, 64, 3), COLOURS[colour], np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


def _colours(frames: np.ndarray) -> list[int]:
    mean = frames.astype(np.float32).mean((1, 2))
    return [int(np.argmin(np.linalg.norm(np.array(COLOURS) - m, axis=1))) for m in mean]


# -- where a recording is cut ------------------------------------------------------------------------------------


def test_segments_cover_the_recording_and_keep_their_places_when_it_grows() -> None:
    assert cut(0, 30, 0.1) == cut(45, 30, 0.1) == cut(1e6, 0, 0.1) == []
    assert cut(60, 30, 0) == [(0, 30), (30, 60)]
    assert cut(100, 30, 0.5) == [(0, 30), (15, 45), (30, 60), (45, 75), (60, 90), (70, 100)]
    for seconds in (45.5, 61.3, 3600.0, 7199.99):
        spans = cut(seconds, 30, 0.1)
        assert spans[0][0] == 0 and spans[-1][1] == pytest.approx(seconds, abs=0.01)
        assert all(b[0] <= a[1] and b[0] > a[0] for a, b in pairwise(spans))
        assert all(end - start == pytest.approx(30, abs=0.02) for start, end in spans)
        assert cut(seconds + 300, 30, 0.1)[: len(spans) - 1] == spans[:-1]


@pytest.mark.parametrize("isolate", [True, False])
def test_a_file_is_decoded_whole_unless_it_is_long_and_in_parts_once_opened(isolate: bool) -> None:
    sound, film = _flac(_melody(300, 500, 800)), _film([(0, 2), (1, 2)])
    for decoder, data, seconds in (
        (AudioDecoder(LIMITS, 8000), sound, 6.0), (VideoDecoder(LIMITS, 2, 32), film, 4.0),
    ):  # fmt: skip
        guarded = IsolatedDecoder(decoder) if isolate else decoder
        long, junk = guarded.wholes([data, b"junk"], seconds - 0.2)
        assert long == pytest.approx(seconds, abs=0.11) and isinstance(junk, MediaError)
        np.testing.assert_array_equal(guarded.wholes([data], seconds + 0.2)[0], decoder(data))
        with guarded.opened(data) as media:
            for start, end in ((0.0, 2.0), (2.0, 4.0), (1.0, 3.0)):
                np.testing.assert_array_equal(media.part(start, end), decoder(data, start, end))
            np.testing.assert_array_equal(media.part(), decoder(data))
        with pytest.raises(MediaError), guarded.opened(b"junk") as media:
            media.part(0.0, 1.0)


def test_a_child_that_dies_within_a_file_costs_one_part() -> None:
    isolated = IsolatedDecoder(AudioDecoder(LIMITS, 8000))
    data = _flac(_melody(300, 500))
    with isolated.opened(data) as media:
        first = media.part(0.0, 1.0)
        os.kill(media.child.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        with pytest.raises(MediaError) as error:
            media.part(1.0, 2.0)
        assert error.value.cause == "crashed"
        np.testing.assert_array_equal(media.part(0.0, 1.0), first)  # by another child, which gets the bytes again


# -- segments become rows ----------------------------------------------------------------------------------------


def _encode(folder: Path, names: list[str], seconds: float = 2.0) -> dict[str, np.ndarray]:
    segments = SegmentSettings(audio_seconds=seconds, overlap=0)
    settings = MediaEncoderSettings(kind="log-mel", batch_size=4)
    transform = EncodeItems(Modality.AUDIO, settings, LIMITS, str(folder), threads=1, device="cpu", segments=segments)
    sizes = np.array([(folder / n).stat().st_size for n in names])
    return transform({"row": np.arange(len(names)), "uri": np.array(names), "bytes": sizes})


def test_a_long_sound_is_a_row_for_each_segment(tmp_path: Path) -> None:
    tones = [300.0, 500.0, 800.0, 1200.0]
    (tmp_path / "long.flac").write_bytes(_flac(_melody(*tones)))
    (tmp_path / "short.flac").write_bytes(_flac(_melody(800)))
    (tmp_path / "junk.flac").write_bytes(b"junk")
    result = _encode(tmp_path, ["short.flac", "long.flac", "junk.flac"])
    assert result["row"].tolist() == [0, 1, 1, 1, 1, 2]
    assert result["cause"].tolist() == [""] * 5 + ["not-audio"]
    np.testing.assert_array_equal(result["start"], [np.nan, 0, 2, 4, 6, np.nan])
    np.testing.assert_array_equal(result["end"], [np.nan, 2, 4, 6, 8, np.nan])
    likeness = result["embedding"][1:5].astype(np.float32) @ result["embedding"][0].astype(np.float32)
    assert np.argmax(likeness) == 2  # the moment that sounds like the short one
    assert len(set(result["content_hash"][1:5])) == 1


def test_a_bad_segment_costs_itself_and_a_bad_file_is_one_row(tmp_path: Path) -> None:
    data = _flac(np.random.default_rng(0).uniform(-0.5, 0.5, 8 * 8000).astype(np.float32))
    damaged = bytearray(data)
    middle = len(data) * 5 // 8
    damaged[middle : middle + 3000] = bytes(3000)
    (tmp_path / "hole.flac").write_bytes(damaged)
    (tmp_path / "head.flac").write_bytes(data[:600])
    result = _encode(tmp_path, ["hole.flac", "head.flac"])
    of_hole = result["cause"][result["row"] == 0].tolist()
    assert len(of_hole) == 4 and of_hole[0] == of_hole[3] == "" and of_hole[2] in ("corrupt", "truncated")
    assert result["cause"][result["row"] == 1].tolist() == ["truncated"]


def test_a_file_of_bad_segments_has_the_cause_of_most_unless_one_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verdict that lasts would keep the file from being tried again."""
    (tmp_path / "long.flac").write_bytes(_flac(_melody(300, 500, 800)))
    corrupt, cut_off = MediaError("corrupt", "a hole"), MediaError("truncated", "no end")
    for errors, cause, detail in (
        ([corrupt, MediaError("timeout", "slow"), corrupt], "timeout", "slow; so 1 of 3 segments, all bad"),
        ([cut_off, corrupt, corrupt], "corrupt", "a hole; so 2 of 3 segments, all bad"),
        ([corrupt] * 3, "corrupt", "a hole"),
    ):
        left = list(errors)

        def failing(*args: object, left: list[MediaError] = left) -> np.ndarray:
            raise left.pop(0)

        monkeypatch.setattr(IsolatedDecoder, "part", failing)
        result = _encode(tmp_path, ["long.flac"])
        assert result["cause"].tolist() == [cause] and result["detail"].tolist() == [detail]
        assert np.isnan(result["start"]).all()


def test_segments_are_items_that_stay_what_they_are(in_process: None, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "talk.flac").write_bytes(_flac(_melody(300, 500, 800)))
    (corpus / "talk.txt").write_text("somebody talks")
    write_tone(corpus / "short.flac", 440)
    options = [f"corpus.path={corpus}", f"store={tmp_path / 'store'}", "segments.overlap=0"]
    settings = load_settings(None, (*options, "segments.audio_seconds=2"))
    store = Store.open(settings.store)
    first = ingest(settings, store, Reporter(quiet=True))
    items = read_features(store.path("features", first.id)).items.to_pylist()
    assert [(i["item_id"], i["start_seconds"], i["end_seconds"], i["captions"]) for i in items] == [
        ("short.flac", None, None, []),
        ("talk.flac#t=0,2", 0, 2, ["somebody talks"]),
        ("talk.flac#t=2,4", 2, 4, ["somebody talks"]),
        ("talk.flac#t=4,6", 4, 6, ["somebody talks"]),
    ]
    assert {i["uri"] for i in items} == {"short.flac", "talk.flac"}

    # Another file comes, one moves, one goes: segments are carried over whole, by place and by content.
    (corpus / "talk.flac").rename(corpus / "speech.flac")
    (corpus / "short.flac").unlink()
    (corpus / "other.flac").write_bytes(_flac(_melody(900, 400)))
    again = ingest(settings, store, Reporter(quiet=True))
    assert again.metrics["items"] == {"audio": 5} and again.metrics["reused"] == {"audio": 3}
    assert again.metrics["disappeared"] == 2  # files, not segments
    (corpus / "speech.txt").write_text("a speech")
    told = ingest(settings, store, Reporter(quiet=True))
    assert told.metrics["reused"] == {"audio": 5}
    ids = read_features(store.path("features", told.id)).items.column("item_id").to_pylist()
    assert ids == [*(f"other.flac#t={a},{a + 2}" for a in (0, 2)), *(f"speech.flac#t={a},{a + 2}" for a in (0, 2, 4))]

    # Cut otherwise, nothing of it fits any more.
    longer = ingest(load_settings(None, (*options, "segments.audio_seconds=0")), store, Reporter(quiet=True))
    assert longer.metrics["items"] == {"audio": 2} and longer.metrics["reused"] == {"audio": 0}


# -- scenes ------------------------------------------------------------------------------------------------------


def test_a_clip_without_cuts_is_sampled_uniformly() -> None:
    looks = np.random.default_rng(0).integers(100, 110, (32, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_allclose(scene_times(looks, 10, 18, 4), [11, 13, 15, 17])


def test_every_scene_is_shown() -> None:
    film = _film([(0, 7), (1, 0.8), (2, 0.8), (3, 1.4)])
    for backend in ("pyav", None):
        uniform = decode_video(film, LIMITS, 4, 32, backend=backend)
        scenes = decode_video(film, LIMITS, 4, 32, backend=backend, sampling="scenes")
        assert _colours(scenes.frames) == [0, 1, 2, 3] and _colours(uniform.frames) != [0, 1, 2, 3]
        assert (np.diff(scenes.times) > 0).all()
    more = decode_video(film, LIMITS, 6, 32, sampling="scenes")
    assert _colours(more.frames) == [0, 0, 0, 1, 2, 3]
    part = decode_video(film, LIMITS, 3, 32, start=6.0, end=10.0, sampling="scenes")
    assert len(set(_colours(part.frames))) == 3


def test_the_sampling_is_part_of_what_an_encoder_is() -> None:
    from ace_core.encoders import load_media_encoder

    by_scenes, uniform = (
        load_media_encoder(Modality.VIDEO, MediaEncoderSettings(kind="frames", sampling=s), LIMITS)
        for s in ("scenes", "uniform")
    )
    assert by_scenes.identity != uniform.identity
    film = _film([(0, 7), (1, 0.8), (2, 0.8), (3, 1.4)])
    assert _colours(by_scenes.decoder(film)) == [0, 1, 2, 3] != _colours(uniform.decoder(film))


# -- batches that are tried out ----------------------------------------------------------------------------------


def _tried(fixed: float, each: float, most: int, memory: int = 10**9, inputs: int = 5000) -> list[int]:
    """Sizes of the batches that a trial asks for: n inputs take a device ``fixed`` + ``each`` n seconds, and it holds
    ``memory`` of them."""
    trial, sizes = BatchTrial(most), []
    while inputs > 0:
        count = min(trial.size, inputs)
        sizes.append(count)
        if count > memory:
            trial.too_large(count)
            continue
        trial.ran(count, (fixed + each * count) * (1 if len(sizes) > 1 else 100))
        inputs -= count
    return sizes


def test_the_batch_grows_as_long_as_it_pays() -> None:
    assert _tried(0.0, 1.0, 64)[:8] == [1, 1, 2, 4, 1, 1, 1, 1]  # nothing to share
    grown = _tried(10.0, 1.0, 1024)  # 512 and 1024 bring 2 and 3 %
    assert grown[:12] == [1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024] and set(grown[12:-1]) == {256}
    assert set(_tried(1e6, 1.0, 32)[8:-1]) == {32}  # the most that is allowed
    small = _tried(1e6, 1.0, 1024, memory=20)
    assert small[:8] == [1, 1, 2, 4, 8, 16, 32, 16] and set(small[8:-1]) == {16}


class _Counting:
    """An encoder that notes how many inputs it gets at once."""

    dim = 2

    def __init__(self) -> None:
        self.sizes: list[int] = []

    @property
    def decoder(self) -> _Counting:
        return self

    def wholes(self, files: list[bytes], most: float) -> list[bytes]:
        return files

    def encode(self, batch: list[bytes]) -> np.ndarray:
        self.sizes.append(len(batch))
        time.sleep(0.02)  # the same for any number of inputs
        return np.full((len(batch), 2), 0.5, np.float32)


@pytest.mark.parametrize("batch_size", ["auto", 3])
def test_the_encoder_gets_batches_of_the_size_that_was_set_or_found(tmp_path: Path, batch_size: str | int) -> None:
    for i in range(70):
        (tmp_path / f"{i}").write_text(str(i))
    settings = MediaEncoderSettings(kind="log-mel", batch_size=batch_size)  # type: ignore[arg-type]
    transform = EncodeItems(Modality.AUDIO, settings, LIMITS, str(tmp_path), threads=1, device="cpu")
    transform._encoder = counting = _Counting()  # type: ignore[assignment]
    result = transform({"row": np.arange(70), "uri": np.array([f"{i}" for i in range(70)]), "bytes": np.ones(70)})
    assert (result["cause"] == "").all() and (result["embedding"] == 0.5).all()
    if batch_size == 3:
        assert counting.sizes == [3] * 23 + [1]
    else:
        assert counting.sizes[:3] == [1, 1, 2] and max(counting.sizes) > 3 and sum(counting.sizes) == 70


class _Narrow(_Counting):
    """An encoder whose device holds three inputs."""

    def encode(self, batch: list[bytes]) -> np.ndarray:
        import torch

        if len(batch) > 3:
            raise torch.OutOfMemoryError("no memory")
        return super().encode(batch)


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}").write_text(str(i))
    for batch_size in ("auto", 16):
        settings = MediaEncoderSettings(kind="log-mel", batch_size=batch_size)  # type: ignore[arg-type]
        transform = EncodeItems(Modality.AUDIO, settings, LIMITS, str(tmp_path), threads=1, device="cpu")
        transform._encoder = narrow = _Narrow()  # type: ignore[assignment]
        result = transform({"row": np.arange(20), "uri": np.array([f"{i}" for i in range(20)]), "bytes": np.ones(20)})
        assert (result["cause"] == "").all() and max(narrow.sizes) == 2 and sum(narrow.sizes) == 20


# -- files that kill the encoder's process -----------------------------------------------------------------------


class _Deadly:
    """Dies on some rows, as a driver or a library may."""

    def __init__(self, deadly: tuple[int, ...]) -> None:
        self._deadly = deadly

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if set(batch["row"].tolist()) & set(self._deadly):
            os.kill(os.getpid(), signal.SIGKILL)
        return {"row": batch["row"], "cause": np.array([""] * len(batch["row"]), dtype=object)}


def _map(deadly: tuple[int, ...], rows: int) -> list[tuple[int, str]]:
    work = pa.table({"row": np.arange(rows)})
    out = []
    for result in map_rows(work, _Deadly, Pool(2, 1, 0), 4, (deadly,), {}, lost=EncodeItems.lost):
        out += zip(result["row"].tolist(), result["cause"].tolist())
    return out


@pytest.mark.ray
def test_a_file_that_kills_its_encoder_costs_that_file(ray_cluster: None) -> None:
    found = _map((5,), 12)
    assert sorted(row for row, _ in found) == list(range(12))  # each once
    assert [pair for pair in sorted(found) if pair[1]] == [(5, "crashed")]


@pytest.mark.ray
@pytest.mark.slow
def test_several_such_files_cost_themselves(ray_cluster: None) -> None:
    found = _map((5, 41), 60)
    assert sorted(row for row, _ in found) == list(range(60))
    assert [pair for pair in sorted(found) if pair[1]] == [(5, "crashed"), (41, "crashed")]


@pytest.mark.ray
@pytest.mark.slow
def test_an_encoder_that_always_dies_ends_the_job(ray_cluster: None) -> None:
    with pytest.raises(AceError, match="4 rows one after the other killed the workers") as error:
        _map(tuple(range(40)), 40)
    assert error.value.where == "_Deadly" and "memory" in error.value.remedy


def test_a_quarantined_crash_is_a_row_of_the_errors(
    in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``lost`` answers passes through ingestion like any other bad file."""
    for i in range(6):
        write_tone(tmp_path / "corpus" / f"{i}.flac", 300 + 50 * i, seconds=0.3)
    settings = load_settings(None, (f"corpus.path={tmp_path / 'corpus'}", f"store={tmp_path / 'store'}"))
    import pipelines.ingest

    whole = pipelines.ingest.map_rows

    def die_on_the_third(work: pa.Table, *args, lost):  # type: ignore[no-untyped-def]
        yield from whole(work.filter(pa.array(np.arange(6) != 3)), *args)
        yield lost(np.array([3]), "ActorDiedError")

    monkeypatch.setattr("pipelines.ingest.map_rows", die_on_the_third)
    store = Store.open(settings.store)
    manifest = ingest(settings, store, Reporter(quiet=True))
    assert manifest.metrics["items"] == {"audio": 5} and manifest.metrics["errors"] == {"crashed": 1}
    (error,) = read_errors(store.path("features", manifest.id)).to_pylist()
    assert error["item_id"] == "3.flac" and "died on it, twice" in error["detail"]


@pytest.mark.parametrize(
    ("kind", "size", "count"),
    [("log-mel", 20_000, 416), ("log-mel", 1_000, 512), ("log-mel", 10**7, 32), ("frames", 1_000, 32)],
)
def test_short_files_of_fast_encoders_go_in_larger_calls(kind: str, size: int, count: int) -> None:
    files = pa.table({"bytes": pa.array([size - 1, size + 1], pa.int64())})
    assert files_a_call(files, MediaEncoderSettings(kind=kind), together=32) == count  # type: ignore[arg-type]
