"""The demo corpus: real files, honest captions, the same every time, and a killed build continues."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ace_core.config import LimitSettings
from ace_core.encoders.frames import motion_map
from ace_core.errors import SettingsError
from ace_core.items import Modality
from ace_core.media import decode_audio, decode_image, decode_video, modality_of
from demo_corpus import clips, pictures, sounds
from demo_corpus.build import CAPTIONS, build_demo_corpus, rows_of
from demo_corpus.colours import colour_words
from demo_corpus.entries import Entry, split_of, with_article
from demo_corpus.synthesis import INSTRUMENTS, RATE, mix

LIMITS = LimitSettings()
COUNTS = {"pictures": 8, "sounds": 5, "clips": 4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    build_demo_corpus(folder, **COUNTS)
    return folder


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / CAPTIONS).read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_item_decodes_and_is_described(corpus: Path) -> None:
    listed = rows(corpus)
    assert Counter(modality_of(r["path"]) for r in listed) == {
        Modality.IMAGE: 8,
        Modality.AUDIO: 5,
        Modality.VIDEO: 4,
    }
    assert len({r["item_id"] for r in listed}) == 17
    for row in listed:
        data = (corpus / row["path"]).read_bytes()
        match modality_of(row["path"]):
            case Modality.IMAGE:
                picture = decode_image(data, LIMITS)
                assert picture.shape == (224, 224, 3) and (picture[0, 0] == 255).all() and picture.std() > 10
            case Modality.AUDIO:
                sound = decode_audio(data, LIMITS, 16_000)
                assert 1.5 * 16_000 < len(sound) < 7 * 16_000 and 0.5 < np.abs(sound).max() <= 1
            case _:
                clip = decode_video(data, LIMITS, 4)
                assert clip.frames.shape == (4, 224, 224, 3) and abs(clip.seconds - 2.5) < 0.1
        assert row["split"] in ("train", "val", "test")
        assert row["attribution"] and row["licence"] and row["source"]
        assert len(row["captions"]) >= 2 and all(c.strip() for c in row["captions"])
        assert all(isinstance(v, str | int | float | bool) for k, v in row.items() if k != "captions")
    assert {r["path"].rsplit(".", 1)[1] for r in listed} == {"png", "flac", "ogg", "mp4"}


def test_the_same_bytes_in_another_folder(corpus: Path, tmp_path: Path) -> None:
    build_demo_corpus(tmp_path, **COUNTS)
    assert files(tmp_path) == files(corpus)


def test_building_again_makes_nothing(corpus: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in corpus.rglob("*")}
    summary = build_demo_corpus(corpus, **COUNTS)
    assert (summary.images, summary.audio, summary.video, summary.made) == (8, 5, 4, 0)
    assert {p: p.stat().st_mtime_ns for p in corpus.rglob("*")} == before


@pytest.mark.parametrize("after", [("pictures", 3), ("sounds", 2), ("clips", 3)])
def test_a_killed_build_continues(corpus: Path, tmp_path: Path, after: tuple[str, int]) -> None:
    class Killed(BaseException):
        pass

    def kill(kind: str, done: int, total: int) -> None:
        assert total == COUNTS[kind]
        if (kind, done) == after:
            raise Killed

    with pytest.raises(Killed):
        build_demo_corpus(tmp_path, **COUNTS, progress=kill)
    assert not (tmp_path / CAPTIONS).exists(), "the captions file says that the corpus is whole"
    partial = len(files(tmp_path))
    assert build_demo_corpus(tmp_path, **COUNTS).made == 17 - partial
    assert files(tmp_path) == files(corpus)


def test_a_half_written_file_is_not_taken_for_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_demo_corpus(tmp_path, pictures=1, sounds=0, clips=0)
    path = next((tmp_path / "images").iterdir())
    whole = path.read_bytes()
    path.unlink()
    path.with_name(f".{path.name}.123").write_bytes(whole[:100])  # what a kill in the middle of a write leaves
    build_demo_corpus(tmp_path, pictures=1, sounds=0, clips=0)
    assert path.read_bytes() == whole
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_other_counts_leave_nothing_behind(tmp_path: Path) -> None:
    build_demo_corpus(tmp_path, pictures=4, sounds=2, clips=0)
    build_demo_corpus(tmp_path, pictures=2, sounds=1, clips=0)
    assert len(rows(tmp_path)) == 3
    assert set(files(tmp_path)) == {CAPTIONS, *(r["path"] for r in rows(tmp_path))}


def test_too_many_are_refused() -> None:
    for make in (sounds.entries, clips.entries):
        with pytest.raises(SettingsError, match="can be"):
            next(iter(make(10_000_000)))
    with pytest.raises(SettingsError, match="can be"):
        next(pictures.entries(10_000_000))


# --- captions and splits


@pytest.fixture(scope="module")
def described() -> list[dict]:
    """Rows of a large corpus, nothing rendered but small drawings for the colours."""
    return rows_of([*pictures.entries(300), *sounds.entries(400), *clips.entries(240)])


def test_no_caption_is_shared_between_items_that_are_evaluated(described: list[dict]) -> None:
    """A caption that two items bear cannot be a fair query for either; a trained one cannot be a held-out query."""
    trained = Counter(c for r in described if r["split"] == "train" for c in r["captions"])
    held_out = Counter(c for r in described if r["split"] != "train" for c in r["captions"])
    assert set(held_out.values()) == {1}
    assert not set(trained) & set(held_out)
    last = Counter(r["captions"][-1] for r in described if r["split"] == "train")
    assert all(trained[c] == 1 for c in last), "the last caption is the query for a seen item"
    assert all(len(set(r["captions"])) == len(r["captions"]) for r in described)
    assert any(n > 1 for n in trained.values()), "broad captions are shared by trained items"


def test_shared_captions_are_dropped_from_both() -> None:
    def entry(name: str, *captions: str) -> Entry:
        return Entry(name, f"images/{name}.png", captions, make=bytes, attributes={"split": "test", "colour": None})

    first, second, third = rows_of([entry("1", "a thing", "one"), entry("2", "a thing", "two"), entry("3", "a thing")])
    assert first["captions"] == ["one"] and second["captions"] == ["two"]
    assert third["captions"] == ["a thing (3)"]
    assert "colour" not in first


def test_splits(described: list[dict]) -> None:
    for prefix in ("picture", "sound", "clip"):
        shares = Counter(r["split"] for r in described if r["item_id"].startswith(prefix))
        total = sum(shares.values())
        assert 0.05 < shares["val"] / total < 0.17 and 0.09 < shares["test"] / total < 0.22


def test_test_pictures_are_other_pictures() -> None:
    """Variants by gender show one thing: all of them are of one split."""
    by_concept: dict[str, set[str]] = {}
    for picture in pictures.catalogue():
        by_concept.setdefault(picture.concept, set()).add(split_of(picture.concept))
    assert all(len(splits) == 1 for splits in by_concept.values())
    concept = {p.name: p.concept for p in pictures.catalogue()}
    assert concept["man astronaut"] == concept["woman astronaut"] == concept["astronaut"]


def test_unseen_sounds_are_new_combinations_of_known_parts(described: list[dict]) -> None:
    heard = [r for r in described if r["item_id"].startswith("sound")]
    assert len({(r["instrument"], r["pattern"], r["tempo"]) for r in heard}) == len(heard)
    for part in ("instrument", "pattern", "tempo", "register"):
        known = {r[part] for r in heard if r["split"] == "train"}
        assert {r[part] for r in heard if r["split"] == "test"} <= known
    seen = [r for r in described if r["item_id"].startswith("clip")]
    assert {r["thing"] for r in seen if r["split"] == "test"} <= {r["thing"] for r in seen if r["split"] == "train"}
    assert len({(r["thing"], r["motion"]) for r in seen}) == len(seen)
    assert max(Counter(r["motion"] for r in seen).values()) < 2 * min(Counter(r["motion"] for r in seen).values())


# --- pictures


def test_catalogue() -> None:
    catalogue = pictures.catalogue()
    assert len(catalogue) > 1800
    assert len({p.code for p in catalogue}) == len(catalogue) == len({p.name for p in catalogue})
    assert not any("1F3F" in p.code[4:] or "skin tone" in p.name for p in catalogue)
    first = catalogue[:200]
    assert len({p.subgroup for p in first}) > 60, "few pictures are as mixed as many"
    apple = next(p for p in catalogue if p.code == "1F34E")
    assert (apple.name, apple.kind, apple.subgroup) == ("red apple", "fruit", "food-fruit")
    assert apple.names["de"] == "roter apfel" and len(apple.names) >= 12


def test_captions_say_name_kind_tags_and_colour() -> None:
    entry = next(e for e in pictures.entries(1900) if e.attributes["name"] == "strawberry")
    said = " | ".join(entry.captions)
    assert "a strawberry" in entry.captions and "fruit" in said and "red" in said
    assert "a red fruit" in pictures.broad_of(next(p for p in pictures.catalogue() if p.name == "strawberry"), ("red",))
    assert entry.attributes["colour"] == "red" and entry.attributes["licence"] == "CC BY-SA 4.0"


@pytest.mark.parametrize(
    ("code", "colour"),
    [("1F34E", "red"), ("1F438", "green"), ("1F34B", "yellow"), ("1F433", "blue"), ("1F346", "purple"),
     ("1F437", "pink"), ("1F43B", "brown"), ("1F34A", "orange"), ("1F418", "grey"), ("26AB", "black"),
     ("1F411", "white")],
)  # fmt: skip
def test_colours_of_drawings(code: str, colour: str) -> None:
    assert colour in pictures.drawing_colours(code)


def test_colour_words() -> None:
    drawing = np.zeros((10, 10, 4), np.uint8)
    assert colour_words(drawing) == ()
    drawing[:6] = (220, 30, 30, 255)
    drawing[6:9] = (30, 60, 220, 255)
    drawing[9:] = (0, 0, 0, 255)  # an outline
    assert colour_words(drawing) == ("red", "blue")
    drawing[:8] = (0, 0, 0, 255)
    assert colour_words(drawing)[0] == "black"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("apple", "an apple"), ("dog", "a dog"), ("glasses", "glasses"), ("smiling face with hearts", None),
     ("octopus", "an octopus"), ("unicorn", "a unicorn"), ("UFO", "UFO"), ("person in bed", "a person in bed"),
     ("clock at one o'clock", None)],
)  # fmt: skip
def test_with_article(name: str, expected: str | None) -> None:
    assert with_article(name) == (expected or f"a {name}")


# --- sounds


def lowest_peak(samples: np.ndarray) -> float:
    """Frequency in Hz of the strongest part of a short sound."""
    return float(np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * RATE / len(samples))


@pytest.mark.parametrize("instrument", ["flute", "game console", "church organ"])
def test_scales_go_where_they_say(instrument: str) -> None:
    for pattern, sign in (("ascending scale", 1), ("descending scale", -1)):
        samples = sounds.play(sounds.Composition(instrument, pattern, "slow", "middle"))
        pitches = [lowest_peak(samples[round((k * 0.5 + 0.1) * RATE) : round((k * 0.5 + 0.4) * RATE)]) for k in (0, 6)]
        assert sign * (pitches[1] - pitches[0]) > 40


def test_tempo_and_register() -> None:
    def onsets(tempo: str) -> int:
        samples = sounds.play(sounds.Composition("marimba", "single repeated note", tempo, "middle"))
        level = np.abs(samples[: 2 * RATE]).reshape(-1, 441).max(axis=1)
        return int(((level[1:] > 0.3) & (level[:-1] < 0.3)).sum())

    assert onsets("slow") < onsets("moderate") < onsets("fast")
    low, high = (
        lowest_peak(sounds.play(sounds.Composition("flute", "single repeated note", "slow", r))[:10_000])
        for r in ("low", "high")
    )
    assert high > 3 * low


def test_instruments_sound_different() -> None:
    """Spectra and envelopes of one note: no two instruments are alike."""
    prints = []
    for play in INSTRUMENTS.values():
        note = mix([(0, 220.0, 1.0)], play)[:RATE]
        spectrum = np.log(1e-3 + np.abs(np.fft.rfft(note))[:5500].reshape(-1, 50).max(axis=1))
        envelope = np.abs(note).reshape(-1, 630).max(axis=1)
        prints.append(np.concatenate([spectrum - spectrum.mean(), 20 * (envelope - envelope.mean())]))
        assert np.isfinite(note).all() and np.abs(note).max() <= 0.81
    similarity = np.corrcoef(prints) - np.eye(len(prints))
    assert similarity.max() < 0.97


# --- clips


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("left to right", 1, 1), ("right to left", 1, -1), ("upwards", 0, -1), ("downwards", 0, 1)],
)
def test_clips_move_as_they_say(motion: str, axis: int, sign: int) -> None:
    scene = clips.Scene(next(p for p in pictures.catalogue() if p.code == "1F34E"), motion, "white")
    clip = decode_video(clips.encoded(clips.frames_of(scene)), LIMITS, 4).frames
    where = [float((m.sum(axis=1 - axis) * np.arange(8)).sum() / m.sum()) for m in motion_map(clip)]
    assert sign * (where[-1] - where[0]) > 2


def test_growing_shrinking_appearing() -> None:
    apple = next(p for p in pictures.catalogue() if p.code == "1F34E")

    def drawn(motion: str) -> list[float]:
        frames = list(clips.frames_of(clips.Scene(apple, motion, "white")))
        return [float((255 - frames[k].astype(int)).sum()) for k in (0, -1)]

    for motion, grows in (("growing", True), ("shrinking", False), ("appearing", True), ("disappearing", False)):
        first, last = drawn(motion)
        assert (last > 3 * first) is grows and (first > 3 * last) is not grows
