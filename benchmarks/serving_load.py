"""Load on a server: users in a closed loop, or arrivals at a fixed rate; what was answered, and whose CPU it took.

The generator runs on the machine that it measures. It speaks bare HTTP/1.1 over kept connections, which costs a tenth
of what a client library does, and says what it cost all the same.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil

_WORDS = """
red green blue small large old new wooden metal quiet loud slow fast bright dark round square apple car dog cat bird
tree house river piano guitar drum bell rain wind fire street door window child woman man boat train
""".split()  # noqa: SIM905
_ANSWER_SECONDS = 60.0
ROLES = ("clients", "proxy", "ingress", "replicas")
_ROLES = {"Searcher": "replicas", "Ingress": "ingress", "ProxyActor": "proxy"}


def text_of(rng: np.random.Generator) -> str:
    """Five words; hardly ever the same twice."""
    return " ".join(rng.choice(_WORDS, 5))


@dataclass
class Load:
    """What a load got.

    Attributes:
        seconds: time of each answered search (status 200).
        ended: when each of those was answered, monotonic seconds.
        statuses: of all searches; 0 for no answer at all.
        details: what the first answer of each other status said.
        wall: seconds that it lasted.
        cpu: CPU seconds spent meanwhile, by process.
        late: how far the generator itself fell behind its arrivals at most, in seconds.
    """

    seconds: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    details: dict[int, str] = field(default_factory=dict)
    wall: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    late: float = 0.0

    def quantile(self, q: float) -> float:
        """Milliseconds; NaN when nothing was answered."""
        return float(np.quantile(self.seconds, q) * 1000) if self.seconds else float("nan")

    @property
    def throughput(self) -> float:
        """Searches answered with 200, a second."""
        return len(self.seconds) / self.wall

    @property
    def cpu_each(self) -> list[float]:
        """CPU milliseconds of a request, whatever became of it, by :data:`ROLES`."""
        requests = max(1, sum(self.statuses.values()))
        return [1000 * self.cpu.get(role, 0.0) / requests for role in ROLES]

    @property
    def unexplained(self) -> int:
        """Searches answered neither 200 nor 429."""
        return sum(count for status, count in self.statuses.items() if status not in (200, 429))


class Connections:
    """Kept connections to one server."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body; raises OSError, EOFError, ValueError or TimeoutError where there is no answer."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        try:
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            async with asyncio.timeout(_ANSWER_SECONDS):
                status, length, keep = _head(await reader.readuntil(b"\r\n\r\n"))
                answer = await (_chunks(reader) if length is None else reader.readexactly(length))
        except BaseException:
            writer.close()
            raise
        if keep:
            self._idle.append((reader, writer))
        else:
            writer.close()
        return status, answer

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    """A body in chunks, as Ray Serve's proxy sends its own refusals."""
    body = b""
    while size := int(await reader.readline(), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return body


def _head(head: bytes) -> tuple[int, int | None, bool]:
    """Status, length of the body (None: in chunks), and whether the connection stays."""
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = int(headers["content-length"]) if "content-length" in headers else None
    return int(first.split()[1]), length, headers.get("connection", "").lower() != "close"


Texts = str | list[str]
Seen = Callable[[list[str], dict], None]  # the texts of a search, and the answer


async def _one(to: Connections, texts: Texts, load: Load, seen: Seen | None) -> int:
    body = json.dumps({"text": texts, "k": 10}).encode()
    started = time.perf_counter()
    try:
        status, answer = await to.post("/v1/search", body)
    except (OSError, EOFError, ValueError, TimeoutError):
        status, answer = 0, b""
    load.statuses[status] += 1
    if status == 200:
        load.seconds.append(time.perf_counter() - started)
        load.ended.append(time.monotonic())
        if seen is not None:
            seen([texts] if isinstance(texts, str) else texts, json.loads(answer))
    elif status not in load.details:
        load.details[status] = _detail(answer)
    return status


def _detail(answer: bytes) -> str:
    """What a problem document says."""
    try:
        return str(json.loads(answer)["detail"])
    except (ValueError, KeyError, TypeError):
        return "no answer" if not answer else answer[:80].decode("utf-8", "replace")


def closed_loop(
    address: str,
    users: int,
    duration: float,
    *,
    texts: Callable[[np.random.Generator], Texts] = text_of,
    seen: Seen | None = None,
    until: Callable[[], bool] = lambda: False,
) -> Load:
    """``users`` ask one search after another; who is told to come back, or is not answered, waits a moment.

    Args:
        texts: what to ask for.
        seen: called with every answer.
        until: ends the load before ``duration`` is over.
    """

    async def run(load: Load, to: Connections) -> None:
        end = time.perf_counter() + duration

        async def user(number: int) -> None:
            rng = np.random.default_rng(number)
            while time.perf_counter() < end and not until():
                if await _one(to, texts(rng), load, seen) != 200:
                    await asyncio.sleep(0.3)

        await asyncio.gather(*(user(n) for n in range(users)))

    return _measured(address, run)


def open_loop(address: str, rate: float, duration: float) -> Load:
    """Searches arrive ``rate`` times a second, whether the ones before are answered or not."""

    async def run(load: Load, to: Connections) -> None:
        rng = np.random.default_rng(0)
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for n in range(int(rate * duration)):
                wait = started + n / rate - time.perf_counter()
                load.late = max(load.late, -wait)
                await asyncio.sleep(max(0.0, wait))
                group.create_task(_one(to, text_of(rng), load, None))

    return _measured(address, run)


def _measured(address: str, run: Callable[[Load, Connections], Awaitable[None]]) -> Load:
    async def measured() -> Load:
        load, to = Load(), Connections(address)
        with _cpu(load):
            started = time.perf_counter()
            await run(load, to)
            load.wall = time.perf_counter() - started
        to.close()
        return load

    return asyncio.run(measured())


# -- processes -----------------------------------------------------------------------------------------------------


def processes(role: str | None = None) -> dict[int, str]:
    """The server's processes among the children of this one: pid to role ("replicas", "ingress", "proxy")."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        try:
            name = " ".join(child.cmdline())
        except psutil.Error:  # it ended meanwhile
            continue
        for mark, its_role in _ROLES.items():
            if name.startswith("ray::") and mark in name and role in (None, its_role):
                found[child.pid] = its_role
    return found


def starting(pid: int) -> bool:
    """Whether a replica still loads (or is gone)."""
    try:
        name = " ".join(psutil.Process(pid).cmdline())
        return "__init__" in name or "initialize_and_get_metadata" in name
    except psutil.Error:
        return True


def memory(role: str) -> float:
    """Resident megabytes of a role's processes together."""
    total = 0.0
    for pid in processes(role):
        try:
            total += psutil.Process(pid).memory_info().rss / 1e6
        except psutil.Error:
            continue
    return total


def _cpu_seconds() -> dict[int, tuple[str, float]]:
    out = {psutil.Process().pid: ("clients", time.process_time())}
    for pid, role in processes().items():
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error:
            continue
        out[pid] = (role, times.user + times.system)
    return out


@contextmanager
def _cpu(load: Load) -> Iterator[None]:
    before = _cpu_seconds()
    yield
    spent: Counter[str] = Counter()
    for pid, (role, seconds) in _cpu_seconds().items():
        spent[role] += seconds - before.get(pid, ("", 0.0))[1]  # type: ignore[assignment]
    load.cpu = dict(spent)


def batches(address: str) -> list[tuple[str, int]]:
    """Histogram of queries decoded together: (up to, batches)."""
    rows, before = [], 0.0
    for line in httpx.get(f"{address}/metrics").text.splitlines():
        if line.startswith("ace_batch_queries_bucket"):
            label, value = line.partition('le="')[2].partition('"')[0], float(line.split()[-1])
            if value > before:
                rows.append((label, int(value - before)))
            before = value
    return rows
