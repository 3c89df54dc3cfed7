"""What `ace publish` takes: time, memory and disk for 1 and 10 million items, on the path that users take.

The store is made here (one caption, three attributes and a 64-wide feature an item, in shards of 2,048 as `ace ingest`
writes them; models of the default sizes), and published by a process of its own with its own embedded Ray. Counted is
the memory of that process and all of Ray's (proportional set size), less what they take before they begin. The rival
is the bare loop on one thread: read a shard, align, assign identifiers, keep nothing. Of several sizes, growth is the
memory that each further item takes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import publish_store
from benchmarks.measure import table, write_figures

READY = "ready"
_SAMPLE_SECONDS = 0.25
_BARE_SHARDS = 10


def publish(path: Path, encoders: int) -> None:
    """What the child process does: everything is loaded first, then `ready`, then the stage."""
    from ace_core.settings_file import load_settings
    from ace_store import Store
    from pipelines.cluster import ensure_ray
    from pipelines.progress import Reporter
    from pipelines.publish import publish_stage, verify_snapshot

    options = (f"store={path}", f"compute.encoders={encoders}", "compute.threads=1")
    settings = load_settings(None, options)
    store = Store.open(settings.store)
    ensure_ray(settings.compute)
    print(READY, flush=True)
    sys.stdin.readline()
    begin = time.monotonic()
    snapshot = publish_stage(settings, store, Reporter())
    seconds = time.monotonic() - begin
    begin = time.monotonic()
    verify_snapshot(store, snapshot.id)
    print(f"figures {seconds} {time.monotonic() - begin}", flush=True)


class MemoryWatch:
    """The proportional set size, in bytes, of a process and all its descendants: first and largest."""

    def __init__(self, pid: int) -> None:
        self.first = self.peak = _tree_bytes(pid)
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, _tree_bytes(self._pid))

    def stop(self) -> None:
        """No more samples."""
        self._stop.set()
        self._thread.join()


def _tree_bytes(root: int) -> int:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    family = {root}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(_own_bytes(pid) for pid in family)


def _own_bytes(pid: int) -> int:
    """Anonymous and shared memory; pages of files that are only mapped can be dropped at any time."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    fields = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return 1024 * (fields.get("Pss_Anon", 0) + fields.get("Pss_Shmem", 0))


def bare(path: Path) -> float:
    """Seconds a million items of the loop that only computes."""
    from ace_store import Store
    from pipelines.assign import AssignIdentifiers, feature_files

    store = Store.open(path)
    features = store.latest("features")
    ids = {"aligner": features.id, "quantizer": features.id}
    worker = AssignIdentifiers(str(path), ids, stored=True, threads=1)
    files = feature_files(features)[: _BARE_SHARDS + 1]
    paths = [store.path("features", features.id, name) for name in files]
    worker.assign(paths[0], None, b"", b"")
    begin = time.perf_counter()
    rows = sum(worker.assign(p, None, b"", b"").rows.num_rows for p in paths[1:])
    return (time.perf_counter() - begin) / rows * 1e6


def measure(folder: Path, items: int, encoders: int) -> dict[str, float]:
    """Figures of one size."""
    path = folder / f"store-{items}"
    begin = time.monotonic()
    store = publish_store.build(path, items)
    print(f"{items:,} items: features written in {time.monotonic() - begin:.0f} s", flush=True)
    figures: dict[str, float] = {"bare_loop_seconds_per_million": bare(path)}
    command = [sys.executable, "-m", "benchmarks.publish", "--stage", str(path), "--encoders", str(encoders)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin and child.stdout
        while (line := child.stdout.readline()).strip() != READY:
            if not line:
                raise SystemExit("the publishing process ended before it began")
        watch = MemoryWatch(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        said = child.stdout.read().split()
        watch.stop()
    if child.returncode or "figures" not in said:
        raise SystemExit(f"publishing failed with {child.returncode}")
    seconds, verify = (float(x) for x in said[said.index("figures") + 1 :][:2])
    snapshot = store.snapshot(store.published())
    segment = store.find("segment", snapshot.segments[0].id)
    assert segment is not None
    figures["publish_seconds_per_million"] = seconds / items * 1e6
    figures["verify_seconds_per_million"] = verify / items * 1e6
    figures["publish_peak_bytes_per_item"] = (watch.peak - watch.first) / items
    figures["process_tree_peak_bytes"] = watch.peak
    figures["publish_disk_bytes_per_item"] = sum(f.bytes for f in segment.files.values()) / items
    for name, entry in segment.files.items():
        figures[f"disk_bytes_per_item.{name.split('.')[0]}"] = entry.bytes / items
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, action="append", help="sizes (default 1,000,000 and 10,000,000)")
    parser.add_argument("--quick", action="store_true", help="100,000 items")
    parser.add_argument("--encoders", type=int, default=os.cpu_count() or 1, help="workers with one thread each")
    parser.add_argument("--folder", type=Path, help="where the stores are made (10M items: some 15 GB)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--stage", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        publish(args.stage, args.encoders)
        return
    sizes = [100_000] if args.quick else args.items or [1_000_000, 10_000_000]
    print(f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}; {args.encoders} workers of one thread")
    figures: dict[str, Any] = {}
    rows = []
    before: tuple[int, float] | None = None
    for items in sizes:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="ace-publish-") as folder:
            measured = measure(Path(folder), items, args.encoders)
        if before is not None:  # what libraries take is the same for both
            grown = measured["process_tree_peak_bytes"] - before[1]
            measured["publish_growth_bytes_per_item"] = grown / (items - before[0])
        before = items, measured["process_tree_peak_bytes"]
        rows += [(f"{items:,}", name, round(value, 2)) for name, value in measured.items()]
        figures |= {f"{name}_{items}": value for name, value in measured.items()}
        figures |= measured  # plain names: the largest
        table("publishing", ("items", "figure", "value"), rows)
        write_figures(args.json, figures)


if __name__ == "__main__":
    main()
