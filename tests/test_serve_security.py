"""Who may ask for what, what is opened, and what a browser is told: every route with no, a wrong and a right key."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from ace_core.config import ServeSettings, Settings
from ace_core.errors import SettingsError, StoreError
from ace_store.location import open_location
from serve import media
from serve.auth import KeyRing, main, new_key, read_keys
from serve.gate import PUBLIC_PATHS
from serve.http import build_http
from tests.serving_world import WordBackend, WorldItem, draw_corpus, publish

# Every route, a request to it, and who may make it. A new route fails the test below until it is listed here.
ROUTES = {
    ("GET", "/"): ("/", "public"),
    ("GET", "/healthz"): ("/healthz", "public"),
    ("GET", "/readyz"): ("/readyz", "public"),
    ("GET", "/openapi.json"): ("/openapi.json", "public"),
    ("POST", "/v1/search"): ("/v1/search", "read"),
    ("POST", "/v1/search/by-example"): ("/v1/search/by-example", "read"),
    ("GET", "/v1/items/{item_id:path}"): ("/v1/items/red-circle", "read"),
    ("GET", "/media/{item_id:path}"): ("/media/red-circle", "read"),
    ("HEAD", "/media/{item_id:path}"): ("/media/red-circle", "read"),
    ("GET", "/thumb/{item_id:path}"): ("/thumb/red-circle", "read"),
    ("HEAD", "/thumb/{item_id:path}"): ("/thumb/red-circle", "read"),
    ("GET", "/v1/clusters/{name}"): ("/v1/clusters/image", "read"),
    ("GET", "/v1/snapshot"): ("/v1/snapshot", "read"),
    ("GET", "/metrics"): ("/metrics", "read"),
    ("POST", "/v1/admin/current"): ("/v1/admin/current", "admin"),
}
BODIES = {
    "/v1/search": {"text": "red"},
    "/v1/search/by-example": {"item_id": "red-circle"},
    "/v1/admin/current": {"snapshot": "first"},
}


@dataclass(frozen=True)
class Guarded:
    http: TestClient
    read: str
    admin: str
    keys_file: Path
    store: Path
    corpus: Path
    items: list[WorldItem]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[WorldItem]]:
    """Store, corpus folder and items."""
    folder = tmp_path_factory.mktemp("world")
    items = draw_corpus(folder / "corpus")
    publish(folder / "store", folder / "corpus", items)
    return folder / "store", folder / "corpus", items


@pytest.fixture
def guarded(tmp_path: Path, world: tuple[Path, Path, list[WorldItem]]) -> Iterator[Guarded]:
    read, read_line = new_key("read", "website")
    admin, admin_line = new_key("admin", "the operators")
    keys_file = tmp_path / "keys.txt"
    keys_file.write_text(f"# keys of the test\n\n{read_line}\n{admin_line}\n")
    settings = Settings(store=str(world[0]), serve=ServeSettings(keys_file=str(keys_file), watch_seconds=0.05))
    with TestClient(build_http(settings, WordBackend(settings.store))) as http:
        assert http.get("/readyz").status_code == 200
        yield Guarded(http, read, admin, keys_file, *world)


def _ask(guarded: Guarded, method: str, path: str, key: str | None):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return guarded.http.request(method, path, headers=headers, json=BODIES.get(path))


def test_every_route_is_listed(guarded: Guarded) -> None:
    served = {
        (method, route.path)
        for route in guarded.http.app.routes
        for method in route.methods
        if method != "HEAD" or (method, route.path) in ROUTES
    }
    assert served == set(ROUTES)
    assert {path for (_, path), (_, who) in ROUTES.items() if who == "public"} == PUBLIC_PATHS


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("key", ["none", "wrong", "read", "admin"])
def test_every_route_with_every_key(guarded: Guarded, route: tuple[str, str], key: str) -> None:
    path, who = ROUTES[route]
    secret = {"none": None, "wrong": "ace_" + "x" * 43, "read": guarded.read, "admin": guarded.admin}[key]
    answer = _ask(guarded, route[0], path, secret)
    if who == "public" or key == "admin" or (key == "read" and who == "read"):
        assert answer.status_code in (200, 202), answer.text
    elif key == "read":
        assert answer.status_code == 403
    else:
        assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("header", ["Basic {}", "{}", "Bearer", "Bearer  ", "bearer {}x", "Bearer {} {}"])
def test_only_a_whole_bearer_key_counts(guarded: Guarded, header: str) -> None:
    headers = {"Authorization": header.format(guarded.read, guarded.read)}
    assert guarded.http.get("/v1/snapshot", headers=headers).status_code == 401


def test_paths_that_do_not_exist_need_a_key_too(guarded: Guarded) -> None:
    for path in ("/v1/nothing", "/metrics/", "//v1/snapshot", "/V1/SNAPSHOT", "/docs"):
        assert guarded.http.get(path, follow_redirects=False).status_code == 401


def test_a_route_prefix_opens_nothing(guarded: Guarded) -> None:
    """Behind a prefix the router sees the path without it, so the gate has to decide by that one."""
    behind = TestClient(guarded.http.app, root_path="/ace")
    key = {"Authorization": f"Bearer {guarded.read}"}
    assert behind.get("/ace/v1/snapshot").status_code == 401
    assert behind.get("/ace/v1/snapshot", headers=key).status_code == 200
    assert behind.post("/ace/v1/admin/current", json={"snapshot": "first"}, headers=key).status_code == 403
    assert behind.get("/ace/healthz").status_code == 200


def test_without_keys_nobody_is_an_admin(guarded: Guarded) -> None:
    settings = Settings(store=str(guarded.store))
    with TestClient(build_http(settings, WordBackend(settings.store))) as http:
        assert http.get("/readyz").status_code == 200
        assert http.get("/v1/snapshot").status_code == 200
        assert http.post("/v1/admin/current", json={"snapshot": "first"}).status_code == 403


def test_an_admin_can_roll_back(guarded: Guarded) -> None:
    publish(guarded.store, guarded.corpus, guarded.items[:5], snapshot_id="second")
    headers = {"Authorization": f"Bearer {guarded.admin}"}
    answer = guarded.http.post("/v1/admin/current", json={"snapshot": "first"}, headers=headers)
    assert answer.status_code == 202 and answer.json() == {"snapshot": "first", "previous": "second"}
    assert WordBackend(str(guarded.store))._snapshot().id == "first"
    for name, status in (("third", 404), ("../first", 422), ("", 422)):
        answer = guarded.http.post("/v1/admin/current", json={"snapshot": name}, headers=headers)
        assert answer.status_code == status


# -- before the body ---------------------------------------------------------------------------------------------


def _send_body(app, path: str, headers: dict[str, str], chunks: list[bytes]) -> tuple[int, int]:
    """POST chunk by chunk; returns the status and how many chunks the server took."""

    async def send() -> tuple[int, int]:
        taken, statuses = 0, []

        async def receive() -> dict:
            nonlocal taken
            body = chunks[taken] if taken < len(chunks) else b""
            taken += 1
            return {"type": "http.request", "body": body, "more_body": taken < len(chunks)}

        async def note(message: dict) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(),
            "query_string": b"", "root_path": "", "scheme": "http", "server": ("ace", 80), "client": ("me", 1),
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        }  # fmt: skip
        await app(scope, receive, note)
        return statuses[0], taken

    return anyio.run(send)


def test_the_key_is_checked_before_the_body_is_read(guarded: Guarded) -> None:
    for path in ("/v1/search", "/v1/search/by-example", "/v1/admin/current"):
        status, taken = _send_body(guarded.http.app, path, {"Content-Type": "application/json"}, [b"x"] * 10)
        assert (status, taken) == (401, 0)


def test_bodies_over_the_limit_are_refused(guarded: Guarded) -> None:
    key = {"Authorization": f"Bearer {guarded.read}", "Content-Type": "application/json"}
    declared = _send_body(guarded.http.app, "/v1/search", {**key, "Content-Length": "1000001"}, [b"x"] * 10)
    assert declared == (413, 0)
    chunks = [b" " * 100_000] * 30
    status, taken = _send_body(guarded.http.app, "/v1/search", key, chunks)
    assert status == 413 and taken == 11  # it stops at the first byte too many
    status, taken = _send_body(guarded.http.app, "/v1/search/by-example", key, [b" " * 1_000_000] * 30)
    assert status == 413 and taken == 21
    answer = guarded.http.post("/v1/search", content=b" " * 1_000_001, headers=key)
    assert answer.status_code == 413 and answer.json()["title"] == "too large"


# -- media -------------------------------------------------------------------------------------------------------


def test_signed_addresses_open_media_and_nothing_else(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"Authorization": f"Bearer {guarded.read}"}
    url = guarded.http.get("/v1/items/red-circle", headers=key).json()["media_url"]
    assert guarded.http.get(url).status_code == 200
    assert guarded.http.get(url.replace("red-circle", "red-square")).status_code == 401
    assert guarded.http.get(re.sub("signature=.", "signature=Z", url)).status_code == 401
    assert guarded.http.get(re.sub(r"expires=\d+", "expires=99999999999", url)).status_code == 401
    assert guarded.http.get(url.replace("/media/", "/v1/items/")).status_code == 401
    assert guarded.http.get("/media/red-circle?expires=x&signature=").status_code == 401
    small = guarded.http.get("/v1/items/red-circle", headers=key).json()["thumb_url"]
    assert guarded.http.get(small).status_code == guarded.http.get(f"{small}&size=512").status_code == 200
    assert guarded.http.get(small.replace("/thumb/", "/media/")).status_code == 401
    later = time.time() + 3 * 3600
    monkeypatch.setattr(time, "time", lambda: later)
    assert guarded.http.get(url).status_code == 401


def test_a_changed_key_file_takes_effect_and_a_broken_one_does_not(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr("serve.auth.time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    ring = KeyRing(guarded.keys_file)
    fresh, line = new_key("read", "fresh")
    assert ring.role_of(f"Bearer {guarded.read}") == "read" and ring.role_of(f"Bearer {fresh}") is None
    signed = ring.sign("/media/a").partition("?")[2]
    expires, signature = (part.partition("=")[2] for part in signed.split("&"))
    guarded.keys_file.write_text(line + "\n")
    assert ring.role_of(f"Bearer {fresh}") is None  # it is not looked at for every request
    now += 1.1
    assert ring.role_of(f"Bearer {fresh}") == "read"
    assert ring.role_of(f"Bearer {guarded.read}") is None
    assert not ring.signed("/media/a", expires, signature)  # addresses signed under the old keys are revoked
    guarded.keys_file.write_text("nonsense\n")
    now += 1.1
    assert ring.role_of(f"Bearer {fresh}") == "read" and "not read again" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "# none\n", "read a\n", "owner a " + "0" * 64, "read a " + "0" * 63, "read a zz"])
def test_a_key_file_that_is_not_one_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(text)
    with pytest.raises(SettingsError) as refused:
        read_keys(path)
    assert refused.value.remedy and "0000" not in str(refused.value)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_keys(tmp_path / "none.txt")


def test_keys_are_made_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["read", "my site"]) == 0
    out, err = capsys.readouterr()
    path = tmp_path / "keys.txt"
    path.write_text(out)
    secret = err.strip().rpartition(" ")[2]
    assert secret not in out and KeyRing(path).role_of(f"Bearer {secret}") == "read"
    assert main(["owner", "x"]) == 2


@pytest.mark.parametrize(
    "uri",
    [
        "../secret.txt", "pictures/../../secret.txt", "/etc/passwd", "file:///etc/passwd", "http://example.com/a.png",
        "s3://bucket/key", "link-out", "folder-out/secret.txt", "", ".", "pictures", "pictures/\0", "~/a", "b.png",
    ],
)  # fmt: skip
def test_the_resolver_refuses_escapes(tmp_path: Path, uri: str) -> None:
    root = tmp_path / "corpus"
    (root / "pictures").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    (root / "link-out").symlink_to(tmp_path / "secret.txt")
    (root / "folder-out").symlink_to(tmp_path)
    with pytest.raises(StoreError):
        media.resolve(str(root), uri)


def test_the_resolver_takes_every_way_of_naming_a_file_below(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    (root / "a b").mkdir(parents=True)
    (root / "a b" / "é?.png").write_bytes(b"12345")
    (root / "inside").symlink_to(root / "a b")
    name = "a b/é?.png"
    for folder in (str(root), f"{root}/", f"file://{root}"):
        for uri in (name, f"./{name}", f"{root}/{name}", f"file://{root}/{name}", "inside/é?.png"):
            assert media.resolve(folder, uri).size == 5
    before = media.resolve(str(root), name).etag
    (root / name).write_bytes(b"123456")
    assert media.resolve(str(root), name).etag != before


def test_the_resolver_stays_below_its_prefix_on_s3(s3: str) -> None:
    bucket = open_location(f"s3://bucket{s3}")
    for key in ("corpus/a/b.png", "corpus-2/secret.png", "secret.png"):
        with bucket.filesystem.open_output_stream(bucket.path(key)) as f:
            f.write(b"12345678")
    root = f"s3://bucket/corpus{s3}"
    for uri in ("a/b.png", "s3://bucket/corpus/a/b.png"):
        file = media.resolve(root, uri)
        assert file.size == 8
        with file.filesystem.open_input_file(file.path) as f:
            assert f.read() == b"12345678"
    for uri in (
        "../secret.png",
        "s3://bucket/secret.png",
        "s3://bucket/corpus-2/secret.png",
        "s3://other/a",
        "/a",
        "a",
    ):
        with pytest.raises(StoreError):
            media.resolve(root, uri)


def test_only_media_types_are_named_to_the_browser(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    items = [i for i in draw_corpus(corpus) if i.item_id == "red-circle"]
    publish(tmp_path / "store", corpus, items)
    for mime, served in (("text/html", "application/octet-stream"), ("image/svg+xml", "image/svg+xml")):
        answer = media.respond(media.resolve(str(corpus), items[0].uri), mime, Headers(), head=True)
        assert answer.headers["content-type"] == served and "sandbox" in answer.headers["content-security-policy"]


def test_headers_keep_a_browser_from_guessing(guarded: Guarded) -> None:
    page = guarded.http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "sha256-" in policy
    for answer in (page, guarded.http.get("/v1/snapshot"), guarded.http.get("/healthz")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
    # The page may run its own script and no other: no handler in an attribute, nothing from elsewhere.
    assert not re.search(r"\son\w+=\"|<script src|https?://(?!www\.w3\.org)", page.text)
    assert guarded.http.get("/", headers={"If-None-Match": page.headers["etag"]}).status_code == 304
