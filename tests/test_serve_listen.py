"""The ingress's own socket: requests that do not arrive, clients that leave, and a port that is taken again at once."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ace_core.config import ServeSettings, Settings
from serve.app import ReplicaBackend, _bound
from serve.calls import Options, TextCall
from serve.http import build_http
from serve.listen import listening
from tests.ports import held_ports
from tests.serving_world import WordBackend, draw_corpus, publish

_WAIT = 60.0
_SEARCH = json.dumps({"text": "a red circle", "k": 3}).encode()


class SlowBackend(WordBackend):
    """Says when a search began, and whether it was cancelled."""

    def __init__(self, store: str) -> None:
        super().__init__(store)
        self.began, self.cancelled = asyncio.Event(), asyncio.Event()

    async def search(self, call: Any) -> Any:
        self.began.set()
        try:
            await asyncio.sleep(_WAIT)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("listen")
    publish(folder / "store", folder / "corpus", draw_corpus(folder / "corpus"))
    return folder / "store"


@asynccontextmanager
async def _server(
    store: Path, backend: WordBackend, *, port: int = 0, body_seconds: float = _WAIT, max_queued: int = 8
) -> AsyncIterator[int]:
    chosen = ServeSettings(request_seconds=_WAIT, max_queued=max_queued)
    app = build_http(Settings(store=str(store), serve=chosen), backend)
    async with app.router.lifespan_context(app), listening(app, "127.0.0.1", port, body_seconds=body_seconds) as taken:
        yield taken


def _head(length: int, path: str = "/v1/search", method: str = "POST") -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, str, bytes]:
    """Status, head and body of the next answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
    return int(head.split()[1]), head, await reader.readexactly(length)


async def _ask(port: int, request: bytes) -> tuple[int, bytes]:
    """Status and body of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    status, _, body = await _answer(reader)
    writer.close()
    return status, body


def _run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(_WAIT):
            await test()

    asyncio.run(limited())


def test_it_answers_and_leaves_its_port_free(store: Path) -> None:
    async def test() -> None:
        with _bound("127.0.0.1", 0) as kept:
            port = kept.getsockname()[1]
            if sys.platform != "linux":  # there nobody else shall get the port meanwhile
                kept.close()
            await in_turn(port)

    async def in_turn(port: int) -> None:
        async with _server(store, WordBackend(str(store)), port=port):
            status, body = await _ask(port, _head(len(_SEARCH)) + _SEARCH)
            assert status == 200 and json.loads(body)["results"][0]["hits"]
            # A connection that the server closes keeps the port busy for a bare bind.
            idle = await asyncio.open_connection("127.0.0.1", port)
        assert await idle[0].read() == b""
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)
        async with _server(store, WordBackend(str(store)), port=port) as again:
            assert again == port and (await _ask(port, _head(0, "/healthz", "GET")))[0] == 200
            with pytest.raises(OSError):
                async with _server(store, WordBackend(str(store)), port=port):
                    raise AssertionError("two servers on one port")

    _run(test)


def test_a_search_whose_client_left_is_cancelled_and_counted(store: Path) -> None:
    async def test() -> None:
        backend = SlowBackend(str(store))
        async with _server(store, backend) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(_head(len(_SEARCH)) + _SEARCH)
            await backend.began.wait()
            assert not backend.cancelled.is_set()
            writer.close()
            await backend.cancelled.wait()
            while 499.0 not in (counts := await _statuses(port)):
                await asyncio.sleep(0.02)
            assert counts[499.0] == 1 and 500.0 not in counts

    _run(test)


async def _statuses(port: int) -> dict[float, float]:
    """Answered requests by status, from the metrics."""
    _, body = await _ask(port, _head(0, "/metrics", "GET"))
    families = {f.name: f for f in text_string_to_metric_families(body.decode())}
    return {float(s.labels["status"]): s.value for s in families["ace_requests"].samples if s.name.endswith("_total")}


class _Response:
    """What a deployment handle gives: never done, and may be cancelled."""

    def __init__(self) -> None:
        self.cancelled = False
        self.asked = asyncio.Event()

    def __await__(self) -> Generator[Any, None, None]:
        self.asked.set()
        yield from asyncio.sleep(_WAIT).__await__()

    def cancel(self) -> None:
        self.cancelled = True


def test_a_search_that_nobody_waits_for_is_cancelled_at_its_replica() -> None:
    async def test() -> None:
        response = _Response()
        method = SimpleNamespace(remote=lambda *_: response)
        handle = SimpleNamespace(search=method, probe=method, state=method)
        backend = ReplicaBackend(handle, max_batch=16)  # type: ignore[arg-type]
        searching = asyncio.create_task(backend.search(TextCall(("a",), Options(k=1), 0.0)))
        await response.asked.wait()
        searching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await searching
        assert response.cancelled

    _run(test)


def test_refused_requests_keep_their_connection_unless_much_would_be_sent(store: Path) -> None:
    async def test() -> None:
        backend = SlowBackend(str(store))
        async with _server(store, backend, max_queued=1) as port:
            _, busy = await asyncio.open_connection("127.0.0.1", port)
            busy.write(_head(len(_SEARCH)) + _SEARCH)
            await backend.began.wait()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for request, expected in (
                (_head(len(_SEARCH)) + _SEARCH, 429),
                (_head(len(_SEARCH)) + _SEARCH, 429),
                (_head(0, "/healthz", "GET"), 200),
            ):
                writer.write(request)
                status, head, _ = await _answer(reader)
                assert status == expected and "connection: close" not in head
            writer.write(_head(30_000_000, "/v1/search/by-example"))
            status, head, _ = await _answer(reader)
            assert status == 413 and "connection: close" in head
            assert await reader.read() == b""
            busy.close()

    _run(test)


def test_a_request_that_does_not_arrive_is_given_up(store: Path) -> None:
    async def test() -> None:
        backend = WordBackend(str(store))
        async with _server(store, backend, body_seconds=0.2) as port:
            status, body = await _ask(port, _head(len(_SEARCH)) + _SEARCH[:5])
            assert status == 408 and json.loads(body)["detail"] == "the request did not arrive within 0.2 s"
            assert not backend.calls
            assert (await _ask(port, _head(len(_SEARCH)) + _SEARCH))[0] == 200

    _run(test)


def test_a_held_port_is_given_to_nobody_and_can_be_listened_on() -> None:
    """What tests that start servers of their own rely on."""
    with held_ports(2) as (first, second):
        assert first != second
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", first))
        for host in ("127.0.0.1", "0.0.0.0"):
            with socket.create_server((host, first)), socket.create_connection(("127.0.0.1", first), timeout=30):
                pass
    with socket.socket() as other:
        other.bind(("127.0.0.1", second))
