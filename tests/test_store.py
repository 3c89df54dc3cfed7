"""The store, on a local disk and on a real S3 server."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ace_core.errors import StoreError
from ace_core.manifest import MANIFEST_NAME, Manifest
from ace_store import Store, open_location
from ace_store.current import Current
from ace_store.store import take_place


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "local":
        return Store.open(tmp_path / "store")
    options = request.getfixturevalue("s3")
    return Store.open(f"s3://bucket/{tmp_path.name}{options}", cache=tmp_path / "cache")


def _part(store: Store, part_id: str, text: str = "hello") -> Manifest:
    with store.scratch() as folder:
        part = folder / "part"
        (part / "inner").mkdir(parents=True)
        (part / "inner" / "data.txt").write_text(text)
        return store.upload_part(part, Manifest(kind="aligner", id=part_id, metrics={"loss": 1.5}))


def test_json_is_written_whole_and_read_back(store: Store) -> None:
    assert store.read_json("a/b.json") is None
    store.write_json("a/b.json", {"x": 1})
    store.write_json("a/b.json", {"x": [2, "é"]})
    assert store.read_json("a/b.json") == {"x": [2, "é"]}
    assert [i.base_name for i in store.listing("a")] == ["b.json"]  # no temporary file stays


def test_a_part_is_found_listed_and_mirrored(store: Store) -> None:
    manifest = _part(store, "one")
    assert manifest.files["inner/data.txt"].bytes == 5
    assert store.find("aligner", "one") == manifest
    assert store.find("aligner", "two") is None
    folder = store.local_copy("aligner", "one")
    assert (folder / "inner" / "data.txt").read_text() == "hello"
    assert json.loads((folder / MANIFEST_NAME).read_text())["id"] == "one"
    with pytest.raises(StoreError, match="there is no quantizer one"):
        store.local_copy("quantizer", "one")


def test_latest_names_the_stage_that_makes_it(store: Store) -> None:
    with pytest.raises(StoreError, match="ace fit aligner"):
        store.latest("aligner")
    _part(store, "one")
    _part(store, "two")
    store.set_latest("aligner", "two")
    assert store.latest("aligner").id == "two"
    assert {m.id for m in store.parts("aligner")} == {"one", "two"}


def test_an_unfinished_part_does_not_exist_and_is_replaced(store: Store) -> None:
    store.write_bytes("aligner/one/inner/old.txt", b"left behind by a killed run")
    assert store.find("aligner", "one") is None
    assert store.parts("aligner") == []
    _part(store, "one")
    assert "inner/old.txt" not in store.find("aligner", "one").files  # type: ignore[union-attr]


def test_a_part_that_was_finished_meanwhile_stays(tmp_path: Path) -> None:
    """Of two that make the same part the first may have published it, and a snapshot names its manifest's hash."""
    store = Store.open(tmp_path / "store")
    first = _part(store, "one")
    _part(store, "one", "other")
    assert store.find("aligner", "one") == first
    assert (store.local_copy("aligner", "one") / "inner" / "data.txt").read_text() == "hello"


def test_a_deleted_part_is_gone(store: Store) -> None:
    _part(store, "one")
    store.local_copy("aligner", "one")
    store.delete_part("aligner", "one")
    assert store.find("aligner", "one") is None
    with pytest.raises(StoreError):
        store.local_copy("aligner", "one")


def test_current_moves_only_from_where_it_was_seen(store: Store) -> None:
    nothing = store.current()
    assert nothing == Current(None, None)
    store.move_current("first", nothing)
    seen = store.current()
    assert seen.snapshot == "first"
    with pytest.raises(StoreError, match="another publisher"):
        store.move_current("second", nothing)  # believed that nothing was published
    store.move_current("second", seen)
    with pytest.raises(StoreError, match="another publisher"):
        store.move_current("third", seen)  # saw the first
    assert store.current().snapshot == "second"


def test_a_store_that_cannot_be_written_says_so_whatever_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(tmp_path / "store")
    _part(store, "one")
    seen = store.current()

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("tempfile.mkdtemp", "ace_store.store.move_current", "pathlib.Path.open"):
        monkeypatch.setattr(name, refused)
    monkeypatch.setattr(store, "filesystem", SimpleNamespace(get_file_info=store.filesystem.get_file_info))
    store.filesystem.delete_file = refused
    for attempt in (
        lambda: _part(store, "two"),
        lambda: store.move_current("x", seen),
        lambda: store.delete_part("aligner", "one"),
        lambda: store.making("texts").__enter__(),
    ):
        with pytest.raises(StoreError, match=r"the store cannot be used .*Read-only"):
            attempt()


def test_of_many_publishers_one_wins(store: Store) -> None:
    seen = store.current()
    barrier = threading.Barrier(6)
    won: list[str] = []

    def publish(name: str) -> None:
        barrier.wait()
        try:
            store.move_current(name, seen)
            won.append(name)
        except StoreError:
            pass

    threads = [threading.Thread(target=publish, args=(f"s{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.current().snapshot == won[0]


def test_a_store_of_another_version_is_refused(store: Store) -> None:
    store.write_json("STORE.json", {"format_version": 99})
    with pytest.raises(StoreError, match="version 99") as error:
        Store.open(store.uri, cache=store._cache)
    assert "another --store" in error.value.remedy


def test_a_damaged_current_says_what_to_do(store: Store) -> None:
    store.write_bytes("CURRENT", b"{}")
    with pytest.raises(StoreError, match="ace rollback"):
        store.current()


def test_a_store_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="a file, not a folder"):
        Store.open(tmp_path / "file")


def test_opening_a_store_writes_nothing(tmp_path: Path) -> None:
    Store.open(tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_missing_bucket_is_a_store_error(s3: str) -> None:
    store = Store.open(f"s3://no-such-bucket/x{s3}")
    with pytest.raises(StoreError, match="cannot be used"):
        store.write_json("a.json", {})


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://b/x", "3 characters"),
        ("s3://bucket/x?endpoint=1", "unknown S3 option 'endpoint'"),
        ("nothing-like-this://x/y", "no file system"),
    ],
)
def test_bad_addresses_are_refused(uri: str, said: str) -> None:
    with pytest.raises(StoreError, match=said):
        open_location(uri)


def test_s3_endpoint_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, s3: str, tmp_path: Path) -> None:
    written = Store.open(f"s3://bucket/{tmp_path.name}{s3}")
    written.write_json("a.json", {"x": 1})
    host = s3.partition("endpoint_override=")[2].partition("&")[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    assert Store.open(f"s3://bucket/{tmp_path.name}").read_json("a.json") == {"x": 1}


_MIRROR = """
import sys, time
from pathlib import Path
from ace_store import Store
uri, cache, start = sys.argv[1:]
store = Store.open(uri, cache=Path(cache))
while time.time() < float(start):  # both at once
    pass
for number in range(8):
    folder = store.local_copy("aligner", f"part{number}")
    assert (folder / "inner" / "data.txt").read_text() == "hello", folder
print("whole")
"""


def test_two_processes_mirror_the_same_parts(tmp_path: Path, s3: str) -> None:
    uri, cache = f"s3://bucket/{tmp_path.name}{s3}", tmp_path / "cache"
    store = Store.open(uri, cache=tmp_path / "mine")
    for number in range(8):
        _part(store, f"part{number}")
    command = [sys.executable, "-c", _MIRROR, uri, str(cache), str(time.time() + 4)]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate(timeout=120)[0].strip() for p in others] == ["whole", "whole"]
    assert not [p.name for p in (cache / "aligner").iterdir() if p.name.startswith(".")]


def test_a_mirror_gives_way_to_a_faster_one_and_replaces_a_deleted_one(tmp_path: Path) -> None:
    for name, text in (("first", "1"), ("second", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST_NAME).write_text(text)
    home = tmp_path / "home"
    take_place(tmp_path / "first", home)
    take_place(tmp_path / "second", home)
    assert (home / MANIFEST_NAME).read_text() == "1"
    (home / MANIFEST_NAME).rename(home / "left over")
    take_place(tmp_path / "second", home)
    assert [p.name for p in home.iterdir()] == [MANIFEST_NAME]


def test_a_part_that_was_made_again_is_mirrored_again(tmp_path: Path, s3: str) -> None:
    """Elsewhere `ace gc` deleted it, and its stage made it again: the same id, another manifest, perhaps other files. A
    server with the old mirror would refuse every snapshot that names it."""
    uri = f"s3://bucket/{tmp_path.name}{s3}"
    elsewhere, server = Store.open(uri, cache=tmp_path / "theirs"), Store.open(uri, cache=tmp_path / "mine")
    _part(elsewhere, "one", "before")
    assert (server.local_copy("aligner", "one") / "inner" / "data.txt").read_text() == "before"
    elsewhere.delete_part("aligner", "one")
    again = _part(elsewhere, "one", "after")
    folder = server.local_copy("aligner", "one")
    assert (folder / "inner" / "data.txt").read_text() == "after"
    assert json.loads((folder / MANIFEST_NAME).read_text())["created_at"] == again.created_at
    assert [p.name for p in folder.parent.iterdir()] == ["one"]


def test_mirrors_of_deleted_parts_go_with_the_next_snapshot(tmp_path: Path, s3: str) -> None:
    uri = f"s3://bucket/{tmp_path.name}{s3}"
    elsewhere, server = Store.open(uri, cache=tmp_path / "theirs"), Store.open(uri, cache=tmp_path / "mine")
    for name in ("one", "two"):
        _part(elsewhere, name)
        server.local_copy("aligner", name)
    elsewhere.delete_part("aligner", "one")
    building = tmp_path / "mine" / "aligner" / ".mirror-of-another-process"
    building.mkdir()
    with pytest.raises(StoreError, match="there is no snapshot none"):
        server.mirror("none")
    assert {p.name for p in (tmp_path / "mine" / "aligner").iterdir()} == {"two", building.name}


def test_looking_for_deleted_parts_costs_one_question_a_kind(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that followed a year of `ace add` has hundreds of mirrors, and asks at every change."""
    store = Store.open(f"s3://bucket/{tmp_path.name}{s3}", cache=tmp_path / "cache")
    for name in ("one", "two", "three"):
        _part(store, name)
        store.local_copy("aligner", name)
    asked: list[str] = []
    exists, listing = store.exists, store.listing
    monkeypatch.setattr(store, "exists", lambda name: asked.append(name) or exists(name))
    monkeypatch.setattr(store, "listing", lambda name, **options: asked.append(name) or listing(name, **options))
    with pytest.raises(StoreError, match="there is no snapshot none"):
        store.mirror("none")
    assert asked == ["aligner"]
    assert {p.name for p in (tmp_path / "cache" / "aligner").iterdir()} == {"one", "two", "three"}


def test_current_is_exclusive_on_a_file_system_that_can_create_exclusively(tmp_path: Path) -> None:
    """fsspec's memory:// keeps to mode="create"."""
    import fsspec

    store = Store.open(f"memory://{tmp_path.name}", cache=tmp_path / "cache")
    seen = store.current()
    assert store.move_current("one", seen) is True
    with pytest.raises(StoreError, match="another publisher moved CURRENT"):
        store.move_current("two", seen)
    lock = store.path(".CURRENT.lock")
    fsspec.filesystem("memory").pipe_file(lock, b"")
    with pytest.raises(StoreError, match="is moving CURRENT"):
        store.move_current("two", store.current())
    fsspec.filesystem("memory").rm_file(lock)
    assert store.move_current("two", store.current()) is True
    assert store.current().snapshot == "two" and not store.exists(".CURRENT.lock")


def test_current_says_where_nothing_keeps_two_publishers_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    plain = MemoryFileSystem.pipe_file
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda fs, path, data, mode="overwrite": plain(fs, path, data))
    store = Store.open(f"memory://{tmp_path.name}", cache=tmp_path / "cache")
    assert store.move_current("one", store.current()) is False
    assert store.current().snapshot == "one" and not store.exists(".CURRENT.lock")
    with pytest.raises(StoreError, match="another publisher moved CURRENT"):  # seen before the write, at least
        store.move_current("two", Current(None, None))


def test_one_process_at_a_time_makes_parts_of_a_kind(tmp_path: Path) -> None:
    """Two would write into each other's files. A killed one holds nothing; another kind is another matter."""
    script = (
        "import sys, time\nfrom ace_store import Store\n"
        "with Store.open(sys.argv[1]).making('features'):\n    print('holds it', flush=True)\n    time.sleep(60)\n"
    )
    store = Store.open(tmp_path / "store")
    other = subprocess.Popen([sys.executable, "-c", script, store.uri], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "holds it\n"
    said = r"another command is making features in this store.*then run this one again"
    with pytest.raises(StoreError, match=said), store.making("features"):
        pass
    with store.making("segment"):
        pass
    other.kill()
    other.communicate()
    with store.making("features"):
        assert store.parts("features") == []
