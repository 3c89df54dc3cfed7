"""Faults under load: replicas killed, snapshots switched, the store gone, a damaged snapshot published.

Every answer is checked. It names its snapshot, and has to be what the bare retriever finds there for the same texts.
The second snapshot lacks every other item of the first, so that an answer from both at once cannot pass.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from ace_core.retriever import Retriever
from ace_core.snapshot import Snapshot, write_snapshot
from ace_store.store import Store
from benchmarks.measure import table
from benchmarks.serving_load import Load, closed_loop, processes, starting, text_of
from benchmarks.serving_server import Server

_K = 10
_TEXTS = 40
_SWITCHES = (0.03, 0.09, 0.15, 0.21, 0.27, 0.33, 0.84, 0.88, 0.92, 0.96)  # as shares of the time
_FIRST_KILL = 1.0  # seconds after the load begins
_SEEN_SECONDS = 2.0
_TOLERANCE = 1e-3  # scores of one text differ a little with the batch that it was computed in
_HALF, _DAMAGED = "every-other", "damaged"


def add_snapshots(store: Path, whole: str) -> None:
    """Write the snapshot without every other item, and a damaged one."""
    opened = Snapshot.open(store, whole, verify=False)
    gone = np.arange(0, len(opened.segments[0]), 2)
    for name in (_HALF, _DAMAGED):
        folder = store / "snapshots" / name
        if (folder / "manifest.json").exists():
            continue
        manifest = opened.manifest.model_copy(update={"id": name, "removed": len(gone)})
        write_snapshot(folder, manifest, {opened.segments[0].manifest.id: gone})
    damaged = store / "snapshots" / _DAMAGED / "tombstones.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")


@dataclass
class Judge:
    """Compares answers with what each snapshot has to answer.

    Attributes:
        expected: by snapshot and text, the best items (more than are asked for) with their scores, best first.
        verdicts: answers by verdict: ``right``, ``wrong``, ``mixed``.
    """

    expected: dict[str, dict[str, list[tuple[str, float]]]]
    verdicts: Counter[str]

    @classmethod
    def of(cls, store: Path, whole: str) -> Judge:
        """Write the snapshots that :func:`measure` changes to, and find out what they have to answer."""
        add_snapshots(store, whole)
        rng = np.random.default_rng(5)
        texts = [text_of(rng) for _ in range(_TEXTS)]
        expected: dict[str, dict[str, list[tuple[str, float]]]] = {}
        for name in (whole, _HALF):
            retriever = Retriever.open(store, name, verify=False)
            answers = [retriever.search([text], k=2 * _K)[0] for text in texts]
            expected[name] = {t: [(h.item_id, h.score) for h in hits] for t, hits in zip(texts, answers)}
        return cls(expected, Counter())

    def see(self, texts: Sequence[str], answer: dict) -> None:
        """Judge one answer to a search for some texts."""
        named = answer["snapshot"]
        results = [[(h["item_id"], h["score"]) for h in r["hits"]] for r in answer["results"]]
        asked = [r["query"] for r in answer["results"]]
        if asked == list(texts) and self._agrees(named, texts, results):
            self.verdicts["right"] += 1
        elif any(self._agrees(o, [t], [r]) for o in self.expected if o != named for t, r in zip(texts, results)):
            self.verdicts["mixed"] += 1
        else:
            self.verdicts["wrong"] += 1

    def _agrees(self, snapshot: str, texts: Sequence[str], results: Sequence[list[tuple[str, float]]]) -> bool:
        if snapshot not in self.expected or len(texts) != len(results):
            return False
        for text, hits in zip(texts, results):
            best = self.expected[snapshot][text]
            score_of = dict(best)
            if len(hits) != _K or any(abs(s - score_of.get(i, np.inf)) > _TOLERANCE for i, s in hits):
                return False
            missing = [score for item, score in best if item not in dict(hits)]
            if missing and missing[0] > hits[-1][1] + _TOLERANCE:
                return False
        return True


class Chaos(threading.Thread):
    """Does the damage while the load runs, and then waits until the server is whole again.

    Attributes:
        done: True when it is.
        events: what was done, with monotonic seconds.
    """

    def __init__(self, address: str, store: Path, whole: str, seconds: float, kill_every: float, replicas: int) -> None:
        super().__init__(daemon=True)
        self._address, self._store, self._whole = address, store, whole
        self._seconds, self._kill_every, self.replicas = seconds, kill_every, replicas
        self.done = False
        self.events: list[tuple[str, float]] = []
        self.recovery = float("nan")
        self.said = False

    def run(self) -> None:
        try:
            self._damage()
            self._recover()
        finally:
            self.done = True

    def _damage(self) -> None:
        plan = [(at, self._kill) for at in np.arange(_FIRST_KILL, self._seconds, self._kill_every)]
        # All of them before the store goes, and after the damaged snapshot is gone.
        plan += [(self._seconds * at, self._switch) for at in _SWITCHES]
        plan += [(self._seconds * 0.42, self._hide), (self._seconds * 0.52, self._show)]
        plan += [(self._seconds * 0.68, self._publish_damaged), (self._seconds * 0.78, self._publish_whole)]
        started = time.monotonic()
        for at, action in sorted(plan, key=lambda pair: pair[0]):
            time.sleep(max(0.0, started + at - time.monotonic()))
            action()
        time.sleep(max(0.0, started + self._seconds - time.monotonic()))

    def _note(self, what: str) -> None:
        self.events.append((what, time.monotonic()))

    def _kill(self) -> None:
        # One that answers: what is still starting would otherwise never get to it.
        alive = sorted(pid for pid in processes("replicas") if not starting(pid))
        if alive:
            os.kill(alive[0], signal.SIGKILL)
        left = len(alive) - 1
        self._note(f"replica killed, {left} left up" if alive else "no replica up that could be killed")

    def _publish(self, name: str, what: str) -> None:
        if self._hidden.exists():  # whoever publishes cannot reach it either
            return
        store = Store.open(self._store)
        store.move_current(name, store.current())
        self._note(what)

    def _switch(self) -> None:
        now_whole = sum(what == "snapshot published or rolled back" for what, _ in self.events) % 2 == 0
        self._publish(_HALF if now_whole else self._whole, "snapshot published or rolled back")

    def _publish_damaged(self) -> None:
        self._publish(_DAMAGED, "damaged snapshot published")

    def _publish_whole(self) -> None:
        self.said = self._snapshot().get("refused") is not None
        self._publish(self._whole, "rolled back from the damaged one")

    @property
    def _hidden(self) -> Path:
        return self._store.with_name(self._store.name + ".away")

    def _hide(self) -> None:
        self._store.rename(self._hidden)
        self._note("store away")

    def _show(self) -> None:
        self._hidden.rename(self._store)
        self._note("store back")

    def _snapshot(self) -> dict:
        try:
            return httpx.get(f"{self._address}/v1/snapshot", timeout=10).json()
        except (httpx.HTTPError, ValueError):
            return {}

    def _recover(self) -> None:
        """From the last kill, until as many replicas as before have answered from the snapshot that is published."""
        self._publish(self._whole, "last snapshot published")
        began = max(at for what, at in self.events if what.startswith("replica killed"))
        while time.monotonic() < began + 120:
            time.sleep(0.2)
            now = time.monotonic()
            # The killed one is among those that were seen until it is seen no more.
            seen = [r for r in self._snapshot().get("replicas", []) if r["seen_seconds_ago"] < _SEEN_SECONDS]
            if (
                now - began > _SEEN_SECONDS
                and len(seen) == self.replicas
                and {r["snapshot"] for r in seen} == {self._whole}
            ):
                self.recovery = now - began
                return


def measure(
    server: Server, judge: Judge, store: Path, whole: str, seconds: float, kill_every: float, *, replicas: int
) -> dict[str, float]:
    """All faults during ``seconds`` of load; prints what was answered and what was done."""
    server.scale(replicas, replicas)
    texts = list(judge.expected[whole])
    chaos = Chaos(server.address, store, whole, seconds, kill_every, replicas)
    chaos.start()
    load = closed_loop(
        server.address,
        4,
        seconds + 150,
        texts=lambda rng: [str(t) for t in rng.choice(texts, 2, replace=False)],
        seen=judge.see,
        until=lambda: chaos.done,
    )
    chaos.join()
    _print(load, judge, chaos)
    return {
        "fault_wrong_answers": float(judge.verdicts["wrong"]),
        "fault_mixed_snapshot": float(judge.verdicts["mixed"]),
        "fault_right_answers": float(judge.verdicts["right"]),
        "fault_non_200_429": float(load.unexplained),
        "fault_longest_silence_seconds": _longest_silence(load),
        "recovery_seconds": chaos.recovery,
    }


def _longest_silence(load: Load) -> float:
    return float(np.diff(sorted(load.ended)).max(initial=0.0))


def _print(load: Load, judge: Judge, chaos: Chaos) -> None:
    done = Counter(what for what, _ in chaos.events)
    table(f"faults during {load.wall:.0f} s of load, {chaos.replicas} replicas", ("event", "times"), list(done.items()))
    print(f"  the refusal of the damaged snapshot was said: {'yes' if chaos.said else 'no'}")
    rows = [(f"{status} {load.details.get(status, '')}".strip(), n) for status, n in sorted(load.statuses.items())]
    table("answers by status", ("status", "searches"), rows)
    table("answers checked", ("verdict", "answers"), list(judge.verdicts.items()))
