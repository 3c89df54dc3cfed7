"""What a folder holds, and what is written about it: media, captions files, sidecars, links."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ace_core.config import CorpusSettings
from ace_core.errors import CorpusError
from ace_core.manifest import Manifest
from ace_store import Store
from pipelines.captions import read_captions
from pipelines.sources import Listing, list_corpus
from tests.corpora import (
    sample,
    write_picture,
    write_shard,
    write_tone,
)


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


def test_accents_may_be_written_in_two_ways(tmp_path: Path) -> None:
    """A corpus that was packed on macOS has letters and accents apart; a table typed elsewhere has them in one."""
    write_picture(tmp_path / "été" / unicodedata.normalize("NFD", "forêt.png"), "red", "square")
    composed = unicodedata.normalize("NFC", "été/forêt.png")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": composed, "caption": "a forest"}))
    (row,) = _list(tmp_path).items.to_pylist()
    assert row["captions"] == ["a forest"] and unicodedata.normalize("NFC", row["uri"]) == composed != row["uri"]


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
