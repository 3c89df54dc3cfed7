"""Autoscaling: replicas go from one to several on a step of load, over the nodes of a cluster, and back."""

from __future__ import annotations

import threading
import time

from ray import serve
from ray.serve.schema import ReplicaState

from benchmarks.measure import table
from benchmarks.serving_load import closed_loop
from benchmarks.serving_server import Server
from serve import app

_USERS = 6
_LIMIT_SECONDS = 120.0


class Watch(threading.Thread):
    """Writes down how many replicas run, whenever that changes.

    Attributes:
        changes: (monotonic seconds, running replicas).
    """

    def __init__(self, running: int = 1) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self.changes: list[tuple[float, int]] = [(time.monotonic(), running)]

    def run(self) -> None:
        while not self._ended.wait(0.25):
            searcher = serve.status().applications[app.APP_NAME].deployments["Searcher"]
            running = searcher.replica_states.get(ReplicaState.RUNNING, 0)
            if running != self.now:
                self.changes.append((time.monotonic(), running))

    @property
    def now(self) -> int:
        return self.changes[-1][1]

    def wait_for(self, count: int) -> None:
        end = time.monotonic() + _LIMIT_SECONDS
        while self.now != count and time.monotonic() < end:
            time.sleep(0.1)

    def end(self) -> None:
        self._ended.set()
        self.join()

    def first(self, count: int, since: float) -> float:
        """Seconds from ``since`` until ``count`` replicas ran; NaN when that never came."""
        return next((at - since for at, running in self.changes if at > since and running == count), float("nan"))


def up(server: Server, most: int) -> dict[str, float]:
    """A step of load from nothing to six users, until ``most`` replicas run, on as many nodes."""
    server.scale(1, most)
    watch = Watch()
    watch.start()
    began = time.monotonic()
    load = closed_loop(server.address, _USERS, _LIMIT_SECONDS, until=lambda: watch.now == most)
    watch.end()
    _print(f"replicas on {most} nodes, {_USERS} users from 0 s on", watch, began)
    return {"scale_up_seconds": watch.first(most, began), "scale_non_200_429": float(load.unexplained)}


def down(server: Server, most: int, seconds: float) -> dict[str, float]:
    """No load any more: replicas that were not needed for ``seconds`` go."""
    server.scale(1, most, down_seconds=seconds)
    watch = Watch(most)
    watch.start()
    began = time.monotonic()
    watch.wait_for(1)
    watch.end()
    _print(f"replicas without load, not needed for {seconds:g} s", watch, began)
    return {"scale_down_seconds": watch.first(1, began)}


def _print(title: str, watch: Watch, began: float) -> None:
    table(title, ("second", "replicas"), [(f"{max(0.0, at - began):.1f}", running) for at, running in watch.changes])
