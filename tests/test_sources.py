"""Corpora that are no folder of media: tar shards and tables, on a disk, on S3 and on fsspec's file systems."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from ace_core.attributes import matching, typed_attributes
from ace_core.config import CorpusSettings
from ace_core.errors import CorpusError, StoreError
from ace_core.features import read_errors, read_features
from ace_core.settings_file import load_settings
from ace_store import Address, ItemReader, Store, open_location
from pipelines.ingest import ingest
from pipelines.progress import Reporter
from pipelines.sources import Listing, list_corpus
from pipelines.sources.webdataset import WebDatasetSource
from serve import media
from tests.corpora import sample, tone_bytes, write_picture, write_shard


def _list(path: object, **settings: Any) -> Listing:
    return list_corpus(CorpusSettings(path=str(path), **settings))


def _rows(listing: Listing) -> dict[str, dict]:
    return {row["item_id"]: row for row in listing.items.to_pylist()}


def _png(level: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (24, 24), (level, 40, 40)).save(out, "PNG")
    return out.getvalue()


def _put(uri: str, files: dict[str, bytes]) -> None:
    place = open_location(uri)
    for name, data in files.items():
        with place.filesystem.open_output_stream(place.path(name)) as f:
            f.write(data)


# -- webdataset --------------------------------------------------------------------------------------------------


def _shards(folder: Path) -> dict[str, bytes]:
    """Two shards as img2dataset writes them; returns the media by item id."""
    media_of = {}
    for shard in range(2):
        members = []
        for i in range(3):
            key, data = f"{shard}{i:04d}", _png(40 * i + shard)
            members += sample(key, data, "png", f"picture {key}", width=24 + i, score=0.5 * i, url=f"http://x/{key}")
            media_of[f"{shard:05d}/{key}"] = data
        write_shard(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        pq.write_table(pa.table({"key": ["x"]}), folder / f"{shard:05d}.parquet")
    return media_of


def test_what_img2dataset_wrote_is_read_as_it_is(tmp_path: Path) -> None:
    media_of = _shards(tmp_path)
    listing = _list(tmp_path)
    assert listing.summary == "found 6 images in a webdataset of 2 shards, 6 of them with captions"
    rows = _rows(listing)
    assert list(rows) == list(media_of)  # in the order in which they are in the shards
    reader = ItemReader(listing.location)
    for item_id, row in rows.items():
        assert reader.read(row["uri"]) == media_of[item_id] and row["bytes"] == len(media_of[item_id])
        assert row["captions"] == [f"picture {item_id[6:]}"] and row["mime"] == "image/png"
    attributes = typed_attributes([row["attributes"] for row in rows.values()])
    kinds = {field.name: str(field.type) for field in attributes.type}
    assert kinds == {"width": "int64", "score": "double", "url": "string", "status": "string"}
    assert matching(attributes, {"width": {"gte": 25}, "score": {"lt": 0.9}}).sum() == 2
    assert listing.errors.num_rows == 0


@pytest.mark.parametrize("place", ["s3", "memory", "local"])
def test_shards_are_read_by_ranges_wherever_they_are(tmp_path: Path, s3: str, place: str) -> None:
    media_of = _shards(tmp_path / "local")
    uri = {"s3": f"s3://bucket/{tmp_path.name}-wds{s3}", "memory": f"memory://{tmp_path.name}"}.get(place)
    if uri is not None:
        if place == "memory":
            fsspec.filesystem("memory").makedirs(tmp_path.name)
        _put(uri, {p.name: p.read_bytes() for p in (tmp_path / "local").iterdir()})
    listing = _list(uri or tmp_path / "local")
    reader = ItemReader(listing.location)
    assert {item_id: reader.read(row["uri"]) for item_id, row in _rows(listing).items()} == media_of


def test_one_shard_is_a_corpus_and_odd_members_are_no_trouble(tmp_path: Path) -> None:
    long_name = "deep/" + "x" * 150
    write_shard(
        tmp_path / "one.tar",
        [
            ("./a.jpg", _png(1)), ("./a.flac", tone_bytes(440)), ("a.json", b"{broken"), ("._a.jpg", b"resource fork"),
            ("notes.pdf", b"%PDF"), (f"{long_name}.seg.png", _png(2)), ("b.png", _png(3)),
            ("b.json", b'{"item_id": "chosen"}'), ("b.png", _png(4)),
        ],
    )  # fmt: skip
    listing = _list(tmp_path / "one.tar")
    assert set(_rows(listing)) == {"one/a.jpg", "one/a.flac", f"one/{long_name}", "chosen.png"}
    assert listing.errors.column("cause").to_pylist() == ["duplicate-id"]
    assert "found 3 images and 1 sound in a webdataset of 1 shard," in listing.summary


def test_a_damaged_shard_costs_what_is_damaged(tmp_path: Path) -> None:
    media_of = _shards(tmp_path)
    whole = (tmp_path / "00000.tar").read_bytes()
    last = [row for row in _list(tmp_path).items.to_pylist() if row["item_id"].startswith("00000")][-1]
    offset, size = Address.parse(last["uri"]).span or (0, 0)
    (tmp_path / "00000.tar").write_bytes(whole[: offset + size // 2])  # within the last picture
    listing = _list(tmp_path)
    assert set(_rows(listing)) == set(media_of) - {last["item_id"]}
    assert {(e["item_id"], e["cause"]) for e in listing.errors.to_pylist()} == {
        ("00000", "truncated"), (last["item_id"], "truncated"),
    }  # fmt: skip
    damaged = bytearray(whole)
    damaged[offset - tarfile.BLOCKSIZE : offset] = b"\xff" * tarfile.BLOCKSIZE  # its header
    (tmp_path / "00000.tar").write_bytes(damaged)
    listing = _list(tmp_path)
    assert set(_rows(listing)) == set(media_of) - {last["item_id"]}
    assert [(e["item_id"], e["cause"]) for e in listing.errors.to_pylist()] == [("00000", "corrupt")]
    (tmp_path / "00000.tar").write_bytes(b"not a tar at all")
    assert len(_list(tmp_path).items) == 3


def test_shards_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(CorpusError, match=r"a\.tar\.gz is a compressed tar") as error:
        _list(tmp_path)
    assert "Unpack" in error.value.remedy
    write_shard(tmp_path / "text" / "0.tar", [("a.txt", b"words")])
    with pytest.raises(CorpusError, match="no media in these 1 tar shards"):
        _list(tmp_path / "text")
    with pytest.raises(CorpusError, match="no table here"):
        _list(tmp_path / "text", format="table")


def test_media_beside_shards_make_a_folder_unless_told_otherwise(tmp_path: Path) -> None:
    _shards(tmp_path)
    write_picture(tmp_path / "preview.png", "red", "square")
    listing = _list(tmp_path)
    assert "found 1 image" in listing.summary and "2 tar files left aside" in listing.summary
    assert len(_list(tmp_path, format="webdataset").items) == 6


def test_an_unchanged_shard_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _shards(tmp_path / "corpus")
    store, settings = Store.open(tmp_path / "store"), CorpusSettings(path=str(tmp_path / "corpus"))
    read: list[str] = []
    shard = WebDatasetSource._shard
    monkeypatch.setattr(
        WebDatasetSource, "_shard", lambda self, name, info: read.append(name) or shard(self, name, info)
    )
    first = list_corpus(settings, store)
    again = list_corpus(settings, store)
    assert sorted(read) == ["00000.tar", "00001.tar"]
    assert again.items.equals(first.items) and again.digest() == first.digest()
    write_shard(tmp_path / "corpus" / "00001.tar", sample("1", _png(9), "png", "another"))
    assert len(list_corpus(settings, store).items) == 4 and read[2:] == ["00001.tar"]
    assert len(list((tmp_path / "store" / "listings").glob("*/*.parquet"))) == 2  # the old one is gone


# -- tables ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        write_picture(tmp_path / "media" / f"{name}.png", "red", "square")
    return tmp_path


def _write_table(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(str(v) for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_a_table_of_uris_is_a_corpus(pictures: Path, kind: str) -> None:
    rows = [
        {"uri": "media/a.png", "caption": "first", "year": 1999, "rating": 4.5},
        {"uri": f"{pictures}/media/b.png", "caption": "second", "year": 2003, "rating": 2.0},
        {"uri": "media/a.png", "caption": "first again", "year": 1999, "rating": 4.5},
        {"uri": "media/gone.png", "caption": "third", "year": 2004, "rating": 1.0},
    ]
    table = pictures / f"items.{kind}"
    _write_table(table, rows)
    listing = _list(table)
    assert listing.summary == f"found 2 images in a table of 4 rows (items.{kind}), 2 of them with captions"
    found = _rows(listing)
    assert found["media/a.png"]["captions"] == ["first", "first again"]
    assert json.loads(found["media/b.png"]["attributes"]) == {"year": 2003, "rating": 2.0}
    assert found["media/a.png"]["bytes"] == (pictures / "media/a.png").stat().st_size
    assert [(e["item_id"], e["cause"]) for e in listing.errors.to_pylist()] == [("media/gone.png", "absent")]
    assert ItemReader(listing.location).read("media/a.png") == (pictures / "media/a.png").read_bytes()


def test_columns_are_named_in_the_settings(pictures: Path) -> None:
    rows = [{"where": "media/a.png", "description": "words", "sku": 17, "caption": "not this"}]
    _write_table(pictures / "t.jsonl", rows)
    with pytest.raises(CorpusError, match="row 1 does not name a media file") as error:
        _list(pictures / "t.jsonl")
    assert "corpus.media_column" in error.value.remedy
    listing = _list(pictures / "t.jsonl", media_column="where", caption_columns=("description",), id_column="sku")
    (row,) = listing.items.to_pylist()
    assert (row["item_id"], row["captions"]) == ("17", ["words"])
    assert json.loads(row["attributes"]) == {"caption": "not this"}


def test_media_outside_of_the_tables_folder_must_be_allowed(pictures: Path, tmp_path: Path) -> None:
    table = tmp_path / "tables" / "t.jsonl"
    table.parent.mkdir()
    rows = [{"path": f"{pictures}/media/{n}.png"} for n in "ab"] + [{"path": "/etc/passwd.png"}]
    _write_table(table, rows[:2])
    with pytest.raises(CorpusError, match="not one of the 2 uris lies below") as error:
        _list(table)
    assert f"corpus.root={pictures}/media" in error.value.remedy
    _write_table(table, [*rows, {"path": "../escape.png"}, {"path": None}])
    listing = _list(table, root=str(pictures / "media"))
    assert set(_rows(listing)) == {"a.png", "b.png"}
    assert listing.root == str(pictures / "media")
    assert sorted(listing.errors.column("cause").to_pylist()) == ["absent", "outside", "outside"]


def test_a_table_on_s3_names_media_on_s3(s3: str, tmp_path: Path) -> None:
    base = f"s3://bucket/{tmp_path.name}"
    rows = [{"url": f"{base}/media/{i}.png", "caption": f"number {i}"} for i in range(20)] + [{"url": "media/gone.png"}]
    table = "".join(json.dumps(row) + "\n" for row in rows).encode()
    _put(base + s3, {"t.jsonl": table, **{f"media/{i}.png": _png(i) for i in range(20)}})
    listing = _list(f"{base}/t.jsonl{s3}")
    assert len(listing.items) == 20 and listing.errors.column("cause").to_pylist() == ["absent"]
    assert ItemReader(listing.location).read("media/7.png") == _png(7)


def _table_of_bytes(folder: Path) -> list[bytes]:
    """Hugging Face's layout and a plain column of bytes, in row groups of four; returns the media in order."""
    folder.mkdir()
    pictures = [_png(i) for i in range(10)]
    cells = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(pictures)]
    labels = pa.array([i % 3 for i in range(10)])
    pq.write_table(pa.table({"image": cells, "label": labels}), folder / "a.parquet", row_group_size=4)
    sounds: list[bytes | None] = [tone_bytes(300 + i) for i in range(3)] + [None, b"of no known kind"]
    ids = [f"s{i}" for i in range(5)]
    pq.write_table(pa.table({"item_id": ids, "clip": sounds, "text": ids}), folder / "b.parquet", row_group_size=4)
    return pictures + [s for s in sounds[:3] if s]


def test_a_table_of_bytes_is_a_corpus(tmp_path: Path) -> None:
    data = _table_of_bytes(tmp_path / "t")
    listing = _list(tmp_path / "t")
    rows = listing.items.to_pylist()
    assert [row["item_id"] for row in rows] == [*(f"a/{i}" for i in range(10)), "s0", "s1", "s2"]
    assert [json.loads(r["attributes"]) for r in rows[:2]] == [{"label": 0}, {"label": 1}]
    assert rows[10]["captions"] == ["s0"] and rows[10]["mime"] == "audio/flac" and rows[10]["bytes"] == len(data[10])
    assert [(e["item_id"], e["cause"]) for e in listing.errors.to_pylist()] == [("s3", "empty"), ("s4", "unknown-kind")]
    reader = ItemReader(listing.location)
    order = [*range(13), *np.random.default_rng(0).permutation(13)]  # forwards, then from anywhere to anywhere
    assert all(reader.read(rows[i]["uri"]) == data[i] for i in order)
    for uri in ("a.parquet#row=10,image", "a.parquet#row=1,other", "a.parquet#row=1,label", "b.parquet#row=3,clip"):
        with pytest.raises(OSError):
            reader.read(uri)


def test_tables_that_do_not_belong_together_are_refused(pictures: Path) -> None:
    folder = pictures / "tables"
    _table_of_bytes(folder)
    _write_table(folder / "c.jsonl", [{"path": "x.png"}])
    with pytest.raises(CorpusError, match=r"some tables hold media \(2\), others name files \(1\)"):
        _list(folder)
    (folder / "c.jsonl").unlink()
    (folder / "d.parquet").write_bytes(b"junk")
    with pytest.raises(CorpusError, match="the table cannot be read"):
        _list(folder)


# -- what is served of them --------------------------------------------------------------------------------------


def test_addresses_are_read_as_they_are_written() -> None:
    for address in (Address("a b/c#d.png"), Address("0.tar", span=(512, 7)), Address("t.parquet", cell=(3, "a,b c#%"))):
        assert Address.parse(str(address)) == address


def _get(file: media.MediaFile, **headers: str) -> tuple[int, bytes]:
    answer = media.respond(file, "image/png", Headers(headers), head=False)
    got = TestClient(answer).get("/")
    return got.status_code, got.content


def test_items_in_shards_and_tables_are_served_whole_and_in_ranges(tmp_path: Path) -> None:
    media_of = _shards(tmp_path / "wds")
    cells = _table_of_bytes(tmp_path / "t")
    shards, tables = _list(tmp_path / "wds"), _list(tmp_path / "t")
    wanted = [(shards, row["uri"], media_of[row["item_id"]]) for row in shards.items.to_pylist()]
    wanted += [(tables, row["uri"], data) for row, data in zip(tables.items.to_pylist(), cells)]
    tags = set()
    for listing, uri, data in wanted:
        file = media.resolve(listing.root, uri)
        assert _get(file) == (200, data)
        assert _get(file, range="bytes=5-20") == (206, data[5:21])
        assert _get(file, range="bytes=-4") == (206, data[-4:])
        tags.add(file.etag)
    assert len(tags) == len(wanted)


@pytest.mark.parametrize(
    "uri",
    [
        "../secret#bytes=0,3", "/etc/passwd#bytes=0,3", "00000.tar#bytes=0,999999999", "link.tar#bytes=0,3",
        "../t.parquet#row=0,image", "00000.tar#row=0,image", "gone.parquet#row=0,image",
    ],
)  # fmt: skip
def test_the_resolver_refuses_escapes_by_parts(tmp_path: Path, uri: str) -> None:
    _shards(tmp_path / "corpus")
    (tmp_path / "secret").write_text("secret")
    pq.write_table(pa.table({"image": [b"secret"]}), tmp_path / "t.parquet")
    (tmp_path / "corpus" / "link.tar").symlink_to(tmp_path / "secret")
    with pytest.raises(StoreError):
        media.resolve(str(tmp_path / "corpus"), uri)


# -- the whole, on Ray -------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_webdataset_on_s3_that_changes(ray_cluster: None, s3: str, tmp_path: Path) -> None:
    def shard(name: str, tones: range, extra: list[tuple[str, bytes]]) -> None:
        members = [m for i in tones for m in sample(f"{i:03d}", tone_bytes(200 + 20 * i), "flac", f"tone {i}", pitch=i)]
        write_shard(tmp_path / name, members + extra)
        _put(corpus, {name: (tmp_path / name).read_bytes()})

    corpus = f"s3://bucket/{tmp_path.name}/corpus{s3}"
    shard("0.tar", range(4), [("bad.flac", b"junk"), ("bad.txt", b"never heard")])
    shard("1.tar", range(4, 8), [])
    settings = load_settings(None, (f"corpus.path={corpus}", f"store={tmp_path / 'store'}"))
    store = Store.open(settings.store)
    first = ingest(settings, store, Reporter(quiet=True))
    folder = store.path("features", first.id)
    features = read_features(folder)
    assert features.items.column("item_id").to_pylist() == [f"{i // 4}/{i:03d}" for i in range(8)]
    assert json.loads(features.items.column("attributes")[5].as_py())["pitch"] == 5
    (error,) = read_errors(folder).to_pylist()
    assert (error["item_id"], error["cause"]) == ("0/bad", "not-audio")
    assert ingest(settings, store, Reporter(quiet=True)).id == first.id

    # A shard is written again (one item is new, one gone, the others at other places), and one is added.
    shard("1.tar", range(5, 9), [])
    shard("2.tar", range(9, 10), [])
    again = ingest(settings, store, Reporter(quiet=True))
    assert again.metrics["items"] == {"audio": 9} and again.metrics["reused"] == {"audio": 7}
    assert again.metrics["disappeared"] == 1
    old = dict(zip(features.items.column("item_id").to_pylist(), next(iter(features.embeddings.values()))))
    now = read_features(store.path("features", again.id))
    new = dict(zip(now.items.column("item_id").to_pylist(), next(iter(now.embeddings.values()))))
    assert set(new) == set(old) - {"1/004"} | {"1/008", "2/009"}
    assert all(np.array_equal(new[i], old[i]) for i in set(old) & set(new))


def test_a_table_of_bytes_gives_the_vectors_of_the_same_files(in_process: None, tmp_path: Path) -> None:
    data = [tone_bytes(200 + 10 * i) for i in range(30)]
    data[7] = b"fLaC and then nothing"
    for corpus in ("table", "folder"):
        (tmp_path / corpus).mkdir()
    for i, one in enumerate(data):
        (tmp_path / "folder" / f"{i:02d}.flac").write_bytes(one)
    columns = {"audio": data, "caption": [f"tone {i}" for i in range(30)], "even": [i % 2 == 0 for i in range(30)]}
    pq.write_table(pa.table(columns), tmp_path / "table" / "t.parquet", row_group_size=16)
    vectors = []
    for corpus in ("table", "folder"):
        options = ("encoders.audio.batch_size=4", "compute.encoders=2", f"store={tmp_path / 'store' / corpus}")
        settings = load_settings(None, (f"corpus.path={tmp_path / corpus}", *options))
        store = Store.open(settings.store)
        manifest = ingest(settings, store, Reporter(quiet=True))
        assert manifest.metrics["errors"] == {"truncated": 1} and manifest.metrics["items"] == {"audio": 29}
        features = read_features(store.path("features", manifest.id))
        hashes = features.items.column("content_hash").to_pylist()
        vectors.append(dict(zip(hashes, next(iter(features.embeddings.values())))))
    assert len(vectors[0]) == 29
    assert all(np.array_equal(vector, vectors[1][key]) for key, vector in vectors[0].items())
