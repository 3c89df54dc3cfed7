"""Twice what the server can do: everything answered at once or refused at once, and memory that stays."""

from __future__ import annotations

import threading
import time

from benchmarks.measure import table
from benchmarks.serving_load import ROLES, Load, memory, open_loop

_ROLES = ("replicas", "ingress", "proxy")


class MemoryLog(threading.Thread):
    """Resident megabytes of the server's processes, looked at every two seconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self.samples: list[dict[str, float]] = []

    def run(self) -> None:
        while not self._ended.wait(2.0 if self.samples else 0.0):
            self.samples.append({role: memory(role) for role in _ROLES})

    def end(self) -> None:
        self._ended.set()
        self.join()

    def growth(self) -> float:
        """Megabytes from the first third's median to the last third's, all processes together."""
        totals = [sum(sample.values()) for sample in self.samples]
        third = max(1, len(totals) // 3)
        return sorted(totals[-third:])[third // 2] - sorted(totals[:third])[third // 2]


def measure(address: str, capacity: float, seconds: float) -> dict[str, float]:
    """Arrivals at half of ``capacity`` (searches a second), then at twice as many as it, for ``seconds``."""
    unloaded = open_loop(address, capacity / 2, max(2.0, seconds / 3))
    time.sleep(1)
    log = MemoryLog()
    log.start()
    over = open_loop(address, 2 * capacity, seconds)
    log.end()
    table(
        f"arrivals at a rate, {seconds:.0f} s of overload",
        ("rate", "a second", "p50 ms", "p95 ms", "p99 ms", "200/s", "429", "other", "late s"),
        [_row("half of capacity", capacity / 2, unloaded), _row("twice capacity", 2 * capacity, over)],
    )
    rows = [(role, *(log.samples[n][role] for n in (0, len(log.samples) // 2, -1))) for role in _ROLES]
    table("resident MB during the overload", ("process", "first", "middle", "last"), rows)
    spent = [("half of capacity", *unloaded.cpu_each), ("twice capacity", *over.cpu_each)]
    table("CPU ms of a request, refused or not", ("rate", *ROLES), spent)
    for status, said in (unloaded.details | over.details).items():
        print(f"  {status}: {said}")
    return {
        "unloaded_p99_ms": unloaded.quantile(0.99),
        "overload_p99_ms": over.quantile(0.99),
        "overload_p99_ratio": over.quantile(0.99) / unloaded.quantile(0.99),
        "overload_non_200_429": float(unloaded.unexplained + over.unexplained),
        "overload_answered_per_second": over.throughput,
        "overload_memory_growth_mb": log.growth(),
    }


def _row(name: str, rate: float, load: Load) -> tuple:
    times = (load.quantile(q) for q in (0.5, 0.95, 0.99))
    return name, rate, *times, load.throughput, load.statuses[429], load.unexplained, load.late
