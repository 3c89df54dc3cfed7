"""Ingestion: what a folder holds, what is written about it, encoding without Ray, and the whole on a real Ray."""

from __future__ import annotations

import io
import json
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
from ace_core.manifest import Manifest
from ace_core.media.isolate import PIECE, IsolatedDecoder
from ace_core.settings_file import load_settings
from ace_store import Store
from pipelines.captions import read_captions
from pipelines.encode import EncodeItems, KnownEmbeddings, questions
from pipelines.progress import Reporter
from pipelines.sources import Listing, list_corpus
from tests.corpora import (
    FATAL,
    fatal_decoders,
    sample,
    write_clip,
    write_mixed_corpus,
    write_picture,
    write_shard,
    write_tone,
)

LIMITS = LimitSettings()
AUDIO = MediaEncoderSettings(kind="log-mel", batch_size=4)


def _list(folder: Path, captions: str | None = None) -> Listing:
    return list_corpus(CorpusSettings(path=str(folder), captions=captions))


def _by_uri(listing: Listing) -> dict[str, dict]:
    return {row["uri"]: row for row in listing.items.to_pylist()}


# -- what a folder holds -----------------------------------------------------------------------------------------


def test_media_are_found_by_suffix_and_by_their_first_bytes(tmp_path: Path) -> None:
    write_picture(tmp_path / "deep" / "er" / "a.PNG", "red", "square")
    write_tone(tmp_path / "b.wav", 440)
    write_tone(tmp_path / "c.flac", 440)
    (tmp_path / "c.flac").rename(tmp_path / "no-suffix")
    write_picture(tmp_path / ".hidden" / "x.png", "red", "square")
    write_picture(tmp_path / "_trash.png", "red", "square")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    rows = _by_uri(_list(tmp_path))
    assert {uri: row["modality"] for uri, row in rows.items()} == {
        "deep/er/a.PNG": "image", "b.wav": "audio", "no-suffix": "audio",
    }  # fmt: skip
    assert rows["no-suffix"]["mime"] == "audio/flac"
    assert rows["b.wav"]["mime"] == "audio/wav" and rows["b.wav"]["bytes"] > 1000


def test_a_folder_that_links_lead_to_counts_once(tmp_path: Path) -> None:
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    for picture in (corpus / "z" / "a.png", corpus / ".kept" / "b.png", other / "c.png"):
        write_picture(picture, "red", "square")
    (corpus / "z" / "up").symlink_to("..")  # a link back up: forty copies of everything, if it is followed
    (corpus / "again").symlink_to("z")
    (corpus / "kept").symlink_to(".kept")
    (other / "back").symlink_to(corpus)
    assert list(_by_uri(_list(corpus))) == ["kept/b.png", "z/a.png"]
    assert "links" not in _list(corpus).summary
    (corpus / "more").symlink_to(other)
    (corpus / "one.png").symlink_to(other / "c.png")
    (corpus / "two.png").symlink_to("z/a.png")
    listing = _list(corpus)
    assert list(_by_uri(listing)) == ["kept/b.png", "more/c.png", "one.png", "two.png", "z/a.png"]
    assert "2 behind links that lead out of the folder" in listing.summary and "(more/c.png, ...)" in listing.summary
    (corpus / "captions.jsonl").write_text('{"path": "z/a.png", "caption": "x"}\n{"path": "two.png", "caption": "y"}')
    assert "links" not in list_corpus(CorpusSettings(path=str(corpus), listed_only=True)).summary


def test_media_behind_links_are_counted_whatever_they_are_in(tmp_path: Path) -> None:
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    write_picture(corpus / "a.png", "red", "square")
    write_picture(other / "b.png", "red", "square")
    (other / "b.png").rename(other / "no-suffix")
    (other / "notes.txt").write_text("x")
    (corpus / "more").symlink_to(other)
    assert "1 behind a link that leads out of the folder" in _list(corpus).summary
    write_shard(other / "0.tar", [*sample("0", b"x", "png", "one"), *sample("1", b"x", "png", "two")])
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").symlink_to(other / "0.tar")
    assert _list(tmp_path / "shards").summary.endswith("never shown by the server (0.tar)")
    assert "; 2 behind links that lead out of the folder" in _list(tmp_path / "shards").summary


def test_files_of_kinds_that_are_not_read_are_counted(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", "red", "square")
    (tmp_path / "a.txt").write_text("a square")
    assert _list(tmp_path).summary == "found 1 image, 1 of them with captions"
    for name in ("IMG_1.HEIC", "IMG_2.heic", "b.{x}", "noted"):
        (tmp_path / name).write_bytes(b"x")
    assert _list(tmp_path).summary.endswith("; files of other kinds left out (2 .heic, 1 .{x}, 1 no suffix)")


def test_a_corpus_that_is_not_where_it_is_said_to_be_names_the_one_of_the_store(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    with store.scratch() as part:
        store.upload_part(part, Manifest(kind="features", id="0", settings={"corpus_root": "/media/photos"}))
    store.set_latest("features", "0")
    with pytest.raises(CorpusError, match="does not exist") as error:
        list_corpus(CorpusSettings(path=str(tmp_path / "corpus")), store)
    assert "made of /media/photos" in error.value.remedy


def test_unusable_folders_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist") as error:
        _list(tmp_path / "nowhere")
    assert "corpus.path" in error.value.remedy
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="is empty"):
        _list(tmp_path / "empty")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.docx").write_text("x")
    with pytest.raises(CorpusError, match=r"1 files here \(1 \.docx\), and none of a known kind") as error:
        _list(tmp_path / "text")
    assert ".jpg" in error.value.remedy
    with pytest.raises(CorpusError, match="is a file"):
        _list(tmp_path / "text" / "a.docx")


# -- what is written about it ------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        write_picture(tmp_path / "pictures" / f"{name}.png", "red", "square")
    return tmp_path


@pytest.mark.parametrize("divider", [",", ";", "\t"])
def test_spreadsheets_divide_columns_as_they_like(three: Path, divider: str) -> None:
    rows = [
        ("file", "caption", "year"),
        ("pictures/a.png", '"one; two, three"', "2001"),
        ("pictures/b.png", "four", "7"),
    ]
    (three / "captions.csv").write_text("\r\n".join(divider.join(row) for row in rows), encoding="utf-8-sig")
    found = _by_uri(_list(three))
    assert found["pictures/a.png"]["captions"] == ["one; two, three"]
    assert json.loads(found["pictures/b.png"]["attributes"]) == {"year": 7}


@pytest.mark.parametrize(
    "header",
    [
        'file;caption;"size, cm"', "sep=;\nfile;caption;size", "\n  \nfile;caption;size", "File;Caption;size",
        'SEP=;\n"FILE";"caption";"size\nin, cm, or, so"',
    ],
)  # fmt: skip
def test_headers_are_read_as_spreadsheets_write_them(three: Path, header: str) -> None:
    text = f"{header}\npictures/a.png;a square, red;7\npictures/b.png;2001;8\n"
    (three / "captions.csv").write_text(text.replace("\n", "\r\n"), encoding="utf-8-sig")
    found = _by_uri(_list(three))
    assert [found[f"pictures/{n}.png"]["captions"] for n in "ab"] == [["a square, red"], ["2001"]]
    assert list(json.loads(found["pictures/b.png"]["attributes"]).values()) == [8]


def test_captions_in_a_column_of_another_name_are_asked_for(three: Path) -> None:
    (three / "captions.csv").write_text("file,year,title\npictures/a.png,2001,a square\n")
    assert "if they are in 'title', say so with corpus.caption_columns" in _list(three).summary
    wrong = list_corpus(CorpusSettings(path=str(three), caption_columns=("titel",)))
    assert "captions are looked for as titel: if they are in 'title'" in wrong.summary
    named = list_corpus(CorpusSettings(path=str(three), caption_columns=("title",)))
    assert named.summary == "found 3 images, 1 of them with captions (captions.csv)"


def test_a_captions_file_of_a_kind_that_is_not_read_is_said(three: Path) -> None:
    (three / "captions.json").write_text('[{"file": "pictures/a.png", "caption": "a square"}]')
    assert "; captions.json is not read: captions are in captions.jsonl, captions.csv" in _list(three).summary
    write_picture(three / "captions.png", "red", "square")  # now it is said about that picture
    assert "not read" not in _list(three).summary
    (three / "captions.png").unlink()
    (three / "captions.csv").write_text("file,caption\npictures/a.png,a square\n")
    assert "not read" not in _list(three).summary


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_captions_files_of_every_kind_say_the_same(three: Path, kind: str) -> None:
    rows = [
        {"file_name": "pictures/a.png", "caption": "one, first", "year": 1999, "night": True, "item_id": "A"},
        {"file_name": "pictures/a.png", "caption": "one, second", "year": 1999, "night": True, "item_id": "A"},
        {"file_name": "pictures/b.png", "caption": "two", "year": 2003, "night": False, "item_id": "B"},
    ]
    path = three / f"captions.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(r) for r in rows))
    elif kind == "csv":
        lines = [
            f'{r["file_name"]},"{r["caption"]}",{r["year"]},{str(r["night"]).lower()},{r["item_id"]}' for r in rows
        ]
        path.write_text("file_name,caption,year,night,item_id\n" + "\n".join(lines) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    listing = _list(three)
    found = {row["item_id"]: (row["captions"], json.loads(row["attributes"])) for row in listing.items.to_pylist()}
    assert found == {
        "A": (["one, first", "one, second"], {"year": 1999, "night": True}),
        "B": (["two"], {"year": 2003, "night": False}),
        "pictures/c.png": ([], {}),
    }
    assert listing.errors.num_rows == 0
    assert "2 of them with captions" in listing.summary


def test_sidecar_files_describe_their_item(three: Path) -> None:
    (three / "pictures" / "a.txt").write_text("first line\n\n  second   line \n")
    (three / "pictures" / "b.json").write_text(json.dumps({"caption": "from json", "licence": "CC0"}))
    (three / "pictures" / "c.json").write_text("{not json")
    rows = _by_uri(_list(three))
    assert rows["pictures/a.png"]["captions"] == ["first line", "second line"]
    assert rows["pictures/b.png"]["captions"] == ["from json"]
    assert json.loads(rows["pictures/b.png"]["attributes"]) == {"licence": "CC0"}
    assert rows["pictures/c.png"]["captions"] == []


def test_captions_of_absent_files_become_error_rows(three: Path) -> None:
    rows = [{"path": "pictures/a.png", "captions": ["x"]}, {"path": "pictures/gone.png", "captions": ["y"]}]
    (three / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    listing = _list(three)
    assert listing.items.num_rows == 3
    (error,) = listing.errors.to_pylist()
    assert (error["uri"], error["cause"], error["modality"]) == ("pictures/gone.png", "absent", "image")


def test_paths_are_understood_in_several_forms(three: Path) -> None:
    rows = [
        {"path": str(three / "pictures" / "a.png"), "captions": ["absolute"]},
        {"path": "./pictures/b.png", "captions": ["dotted"]},
        {"path": "c.png", "captions": ["name only"]},
    ]
    (three / "told.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = _by_uri(_list(three, "told.jsonl"))
    assert [found[f"pictures/{n}.png"]["captions"] for n in "abc"] == [["absolute"], ["dotted"], ["name only"]]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("captions.jsonl", '{"path": "pictures/a.png"}\n{oops', "line 2 is not a JSON object"),
        ("captions.jsonl", '{"title": "x"}', r"row 1 does not name a media file \(its columns: title\)"),
        ("captions.jsonl", '{"path": "elsewhere/a1.png", "caption": "x"}', "none of the 1 files"),
        ("captions.csv", "path,caption\na,b,c,d\n", "cannot be read"),
        ("captions.parquet", "not parquet", "cannot be read"),
    ],
)
def test_bad_captions_files_stop_with_the_place(three: Path, name: str, content: str, said: str) -> None:
    (three / name).write_text(content)
    with pytest.raises(CorpusError, match=said) as error:
        _list(three)
    assert error.value.remedy


def test_a_captions_file_that_is_not_there(three: Path) -> None:
    with pytest.raises(CorpusError, match="cannot be read"):
        _list(three, "nowhere.jsonl")


def test_captions_are_cleaned_and_not_repeated() -> None:
    data = b'{"path": "a", "captions": [" two  words ", "two words", ""], "text": "more"}'
    assert read_captions(data, "c.jsonl")["a"].captions == ["two words", "more"]


def test_items_with_one_id_are_not_both_taken(three: Path) -> None:
    rows = [{"path": f"pictures/{n}.png", "item_id": "same"} for n in "ab"]
    (three / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    listing = _list(three)
    assert listing.items.num_rows == 2 and listing.errors.column("cause").to_pylist() == ["duplicate-id"]


def test_the_digest_follows_files_and_captions(three: Path) -> None:
    first = _list(three).digest()
    assert _list(three).digest() == first
    (three / "pictures" / "a.txt").write_text("a caption")
    told = _list(three).digest()
    assert told != first
    os.utime(three / "pictures" / "b.png", (1, 1))
    assert _list(three).digest() not in (first, told)


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

    listed = _list(tmp_path).items.slice(0, 1)
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
