"""Autoscaling: replicas go from one to several on a step of load, over the nodes of a cluster, and back."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from ray import serve
from ray.serve.schema import ReplicaState

from ace_core.config import ServeSettings, Settings
from benchmarks.measure import table
from benchmarks.serving_load import closed_loop
from serve import app

_USERS = 12
_MAX_BATCH = 4
_LIMIT_SECONDS = 120.0


class Watch(threading.Thread):
    """Writes down how many replicas run, whenever that changes.

    Attributes:
        changes: (monotonic seconds, running replicas).
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self.changes: list[tuple[float, int]] = [(time.monotonic(), 1)]

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


def measure(store: Path, *, most: int, scale_down_seconds: float) -> dict[str, float]:
    """A step of load from nothing to 12 users, and back to nothing; ``most`` replicas, on as many nodes."""
    chosen = ServeSettings(
        port=0, replicas=1, max_replicas=most, max_batch=_MAX_BATCH, scale_down_seconds=scale_down_seconds
    )
    address = app.run(Settings(store=str(store), serve=chosen), blocking=False, on_ready=lambda _: None)
    watch = Watch()
    watch.start()
    began = time.monotonic()
    load = closed_loop(address, _USERS, _LIMIT_SECONDS, until=lambda: watch.now == most)
    stopped = time.monotonic()
    watch.wait_for(1)
    watch.end()
    app.stop()
    rows = [(f"{at - began:.1f}", running) for at, running in watch.changes]
    title = f"replicas on {most} nodes; {_USERS} users from 0 to {stopped - began:.1f} s, then none"
    table(title, ("second", "replicas"), rows)
    return {
        "scale_up_seconds": watch.first(most, began),
        "scale_down_seconds": watch.first(1, stopped),
        "scale_non_200_429": float(load.unexplained),
    }
