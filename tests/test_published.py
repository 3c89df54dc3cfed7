"""The paper's six benchmarks in miniature: each in its published layout, read, ingested, and one of them measured."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from ace_core.config import CorpusSettings
from ace_core.errors import CorpusError
from ace_core.items import Modality
from ace_core.settings_file import load_settings
from benchmarks import paper
from benchmarks.published import PUBLISHED, PublishedItem, PublishedSet, load_published
from pipelines.sources import list_corpus
from tests.corpora import COLOURS, SHAPES, write_clip, write_picture, write_tone
from tests.world import SMALL, World

SPLITS = ("train",) * 4 + ("val", "test")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        csv.writer(f).writerows([header, *rows])


def karpathy(folder: Path, name: str, pictures: int = 12) -> None:
    """COCO lies in two folders named by ``filepath``, and trains on ``restval`` too; Flickr30K lies in one."""
    images = []
    for i in range(pictures):
        colour, shape = list(COLOURS)[i % 4], SHAPES[i // 4 % 4]
        split = SPLITS[i % 6]
        image = {"filename": f"{1000 + i}.jpg", "imgid": i, "split": split}
        place = "flickr30k-images"
        if name == "coco":
            place = "val2014" if i % 2 else "train2014"
            image |= {"filepath": place, "filename": f"COCO_{place}_{i:012d}.jpg", "cocoid": i}
            image["split"] = "restval" if i % 6 == 3 else split
        write_picture(folder / place / str(image["filename"]), colour, shape, shift=i // 16)
        texts = [f" A {colour} {shape}, number {i}.", f"{shape} {i} in {colour}", f"Picture {i}: {colour} {shape}"]
        image["sentences"] = [{"raw": t, "tokens": t.lower().split(), "imgid": i, "sentid": 3 * i} for t in texts]
        images.append(image)
    (folder / f"dataset_{name}.json").write_text(json.dumps({"dataset": name, "images": images}))


def clotho(folder: Path) -> None:
    header = ("file_name", *(f"caption_{i}" for i in range(1, 6)))
    for part in ("development", "validation", "evaluation"):
        names = [f"{part[0]} rain {i}.wav" for i in range(2)] + ["Same name.wav"]
        write_csv(
            folder / f"clotho_captions_{part}.csv",
            header,
            [(n, *(f"{part}, {n}, said {i} times" for i in range(1, 6))) for n in names],
        )
        for i, name in enumerate(names):
            write_tone(folder / f"clotho_audio_{part}/{part}" / name, 220 * (1 + i), 0.2)


def audiocaps(folder: Path) -> None:
    header = ("audiocap_id", "youtube_id", "start_time", "caption")
    for number, split in enumerate(("train", "val", "test")):
        rows = []
        for i in range(3):
            for said in range(1 if split == "train" else 5):
                rows.append(
                    (1000 * number + 10 * i + said, f"_{split}-{i}", 30 * i, f"{split} noise {i}, heard {said}")
                )
        write_csv(folder / f"dataset/{split}.csv", header, rows)
    write_tone(folder / "audio/train/_train-0.wav", 220, 0.2)
    write_tone(folder / "audio/train/Y_train-1.wav", 330, 0.2)
    write_tone(folder / "audio/train/_train-2_60.wav", 440, 0.2)
    write_tone(folder / "audio/val/1000.wav", 550, 0.2)  # by the id of its first caption
    write_tone(folder / "audio/test/_test-0_0_10000.flac", 660, 0.2)
    write_tone(folder / "audio/test/_test-1.wav", 770, 0.2)


def msrvtt(folder: Path) -> None:
    trained, tested = [f"video{i}" for i in range(4)], ["video7010", "video7011"]
    sentences = [
        {"caption": f"somebody does {v} the {n}th way", "video_id": v, "sen_id": n}
        for v in (*trained, *tested)
        for n in range(3)
    ]
    (folder / "MSRVTT_data.json").write_text(json.dumps({"info": {}, "videos": [], "sentences": sentences}))
    write_csv(folder / "MSRVTT_train.9k.csv", ("video_id",), [(v,) for v in trained])
    rows = [(f"ret{i}", f"msr{v[5:]}", v, f"{v}, the one query") for i, v in enumerate(tested)]
    write_csv(folder / "MSRVTT_JSFUSION_test.csv", ("key", "vid_key", "video_id", "sentence"), rows)
    for i, video in enumerate((*trained, *tested)):
        write_clip(folder / f"videos/all/{video}.mp4", list(COLOURS)[i % 4], to_right=i % 2 == 0)


def msvd(folder: Path) -> None:
    clips = {"train": ["-4wsuPCjDBc_5_15", "_UqmgHKdntU_0_10"], "val": ["mv89psg6zh4_33_46"], "test": ["a-b_c_1_2"]}
    lines = ["# Microsoft Research Video Description Corpus", "#", ""]
    for split, names in clips.items():
        (folder / f"{split}_list.txt").write_text("".join(f"{n}\n" for n in names))
        for name in names:
            lines += [f"{name} a {split} clip is played", f"{name} someone plays {name}"]
            write_clip(folder / f"YouTubeClips/{name}.avi", "red", to_right=split == "train")
    (folder / "AllVideoDescriptions.txt").write_text("\n".join(lines) + "\n")


WRITERS: dict[str, Callable[[Path], None]] = {
    "flickr30k": lambda folder: karpathy(folder, "flickr30k"),
    "coco": lambda folder: karpathy(folder, "coco"),
    "clotho": clotho,
    "audiocaps": audiocaps,
    "msrvtt": msrvtt,
    "msvd": msvd,
}
COUNTS = {  # train, val, test
    "flickr30k": (8, 2, 2),
    "coco": (8, 2, 2),
    "clotho": (3, 3, 3),
    "audiocaps": (3, 1, 2),
    "msrvtt": (3, 1, 2),
    "msvd": (2, 1, 1),
}


def written(name: str, folder: Path) -> PublishedSet:
    folder.mkdir(exist_ok=True)
    WRITERS[name](folder)
    return load_published(name, folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_layout_becomes_a_corpus_with_its_splits(name: str, tmp_path: Path) -> None:
    published = written(name, tmp_path / "data")
    counts = Counter(item.split for item in published.items)
    assert tuple(counts[s] for s in ("train", "val", "test")) == COUNTS[name]
    write_picture(tmp_path / "data/stray.png", "red", "bar")  # belongs to no split, and stays outside
    published.write_captions(tmp_path / "captions.jsonl")
    listing = list_corpus(
        CorpusSettings(path=str(tmp_path / "data"), captions=str(tmp_path / "captions.jsonl"), listed_only=True)
    )
    assert listing.errors.num_rows == 0
    rows = {row["uri"]: row for row in listing.items.to_pylist()}
    assert set(rows) == {item.path for item in published.items}
    for item in published.items:
        row = rows[item.path]
        assert row["captions"] == [" ".join(c.split()) for c in item.captions] and item.captions
        assert json.loads(row["attributes"]) == {"split": item.split}
        assert Modality(row["modality"]) is published.modality


def test_details_of_the_layouts(tmp_path: Path) -> None:
    sets = {name: written(name, tmp_path / name) for name in PUBLISHED}
    by_path = {name: {item.path: item for item in s.items} for name, s in sets.items()}
    assert by_path["coco"]["val2014/COCO_val2014_000000000003.jpg"].split == "train"  # restval
    # One name in three splits: each its own file.
    same = [item for item in sets["clotho"].items if item.path.endswith("Same name.wav")]
    assert {item.path.split("/")[1]: item.split for item in same} == {
        "development": "train",
        "validation": "val",
        "evaluation": "test",
    }
    assert sets["audiocaps"].missing == {"val": 2, "test": 1}
    assert len(by_path["audiocaps"]["audio/test/_test-1.wav"].captions) == 5
    assert by_path["msrvtt"]["videos/all/video7010.mp4"].captions == ("video7010, the one query",)
    assert len(by_path["msrvtt"]["videos/all/video0.mp4"].captions) == 3
    assert by_path["msvd"]["YouTubeClips/a-b_c_1_2.avi"].captions[0] == "a test clip is played"


def test_some_of_a_set_are_evenly_spread_over_each_split(tmp_path: Path) -> None:
    published = written("flickr30k", tmp_path)
    some = published.some(3)
    assert [item.path for item in some.of("train")] == [item.path for item in published.of("train")[::3]]
    assert some.of("test") == published.of("test") and some.of("val") == published.of("val")
    assert published.some(100).of("train") == published.of("train")


def test_the_descriptions_of_msvd_may_be_the_original_table(tmp_path: Path) -> None:
    published = written("msvd", tmp_path)
    (tmp_path / "AllVideoDescriptions.txt").unlink()
    header = ("VideoID", "Start", "End", "WorkerID", "Source", "AnnotationTime", "Language", "Description")
    rows = []
    for item in published.items:
        clip, start, end = Path(item.path).stem.rsplit("_", 2)
        rows += [(clip, start, end, 1, "clean", 9, "English", c) for c in item.captions]
        rows.append((clip, start, end, 1, "clean", 9, "German", "ein Film"))
    write_csv(tmp_path / "video_corpus.csv", header, rows)
    assert load_published("msvd", tmp_path).items == published.items


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        load_published("coco", tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"dataset_coco\.json"):
        load_published("coco", tmp_path)
    (tmp_path / "dataset_coco.json").write_text('{"images": [{"filename": "a.jpg"}]}')
    with pytest.raises(CorpusError, match="not as published"):
        load_published("coco", tmp_path)
    karpathy(tmp_path, "coco")
    for path in tmp_path.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(CorpusError, match="none of the 12 files"):
        load_published("coco", tmp_path)


@pytest.mark.ray
def test_what_is_measured(world: World) -> None:
    items = [PublishedItem(row["path"], tuple(row["captions"]), row["split"]) for row in world.rows]
    items.append(PublishedItem("images/undecodable.png", ("a caption that nothing answers",), "test"))
    published = PublishedSet("flickr30k", Modality.IMAGE, world.corpus, tuple(items), {"test": 2})
    rows, figures = paper.measure(published, world.settings, world.store, queries=500)
    tested = [row for row in world.rows if row["split"] == "test"]
    gallery = {"unseen_test": len(tested), "unseen_all": 64, "seen_all": 64}
    methods = ("dual tower, exact", "ACE, one-shot")
    assert [row[0] for row in rows] == [f"{where}: {m}" for where in gallery for m in methods]
    assert figures["missing"] == {"test": 2} and figures["ingested"] == 64
    for name, result in figures["tables"].items():
        where = name.partition(":")[0]
        assert result["gallery"] == gallery[where]
        if where != "seen_all":  # every caption of every test item that is there
            assert result["queries"] == sum(len(row["captions"]) for row in tested)
        assert 0 <= result["recall_1"]["value"] <= result["recall_10"]["value"] <= 1
    assert figures["tables"]["unseen_test: ACE, one-shot"]["recall_10"]["value"] == 1  # fewer than ten items
    _, few = paper.measure(published, world.settings, world.store, queries=4)
    assert few["tables"]["unseen_all: ACE, one-shot"]["queries"] <= 4


@pytest.mark.ray
@pytest.mark.slow
def test_one_command_measures_a_set(ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    karpathy(tmp_path / "data", "flickr30k", pictures=36)
    changes = [part for change in SMALL for part in ("--set", change)]
    folders = ["--data", str(tmp_path / "data"), "--store", str(tmp_path / "store")]
    figures_file = tmp_path / "figures.json"
    paper.main(["--dataset", "flickr30k", *folders, "--quick", "--json", str(figures_file), *changes])
    assert "81.8" in capsys.readouterr().out  # the paper's own figure stands beside
    figures = json.loads(figures_file.read_text())
    tables = figures["tables"]
    gallery = {"unseen_test": 6, "unseen_all": 36, "seen_all": 36}
    assert set(tables) == {f"{where}: {m}" for where in gallery for m in ("dual tower, exact", "ACE, one-shot")}
    for name, result in tables.items():
        assert result["gallery"] == gallery[name.partition(":")[0]]
    assert tables["unseen_test: ACE, one-shot"]["queries"] == 18
    assert tables["unseen_test: ACE, one-shot"]["recall_10"]["value"] == 1  # six items
    settings = load_settings(None, (f"store={tmp_path / 'store'}",))
    assert Path(settings.store, "CURRENT").exists()
    assert figures["unseen_all_r10_ratio_interval"][0] <= figures["unseen_all_r10_ratio"]
