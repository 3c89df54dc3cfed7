"""What killed runs leave in a store, and that ``ace gc`` takes away what is old of it and nothing else."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

from ace_core.manifest import Manifest
from ace_store import Store
from pipelines.keep import gc_stage
from pipelines.progress import Reporter


def _file(path: Path, hours_old: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    then = time.time() - 3600 * hours_old
    for one in (path, path.parent):
        os.utime(one, (then, then))


def test_gc_takes_what_killed_runs_left_behind_once_it_is_old(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    root = tmp_path / "store"
    with store.scratch() as folder:
        (folder / "part").mkdir()
        store.upload_part(folder / "part", Manifest(kind="aligner", id="whole"))
    store.set_latest("aligner", "whole")
    _file(root / "runs" / "generator-old" / "state", 30)
    _file(root / "runs" / "generator-young" / "state", 2)
    _file(root / "features" / "unfinished-old" / "a.parquet", 30)
    _file(root / "features" / "unfinished-young" / "a.parquet", 2)
    _file(root / ".building-old" / "x", 30)
    quiet, day = Reporter(quiet=True), timedelta(hours=24)
    doomed = [".building-old", "features/unfinished-old", "runs/generator-old"]
    assert sorted(gc_stage(store, quiet, keep=1, min_age=day, dry_run=True)) == doomed
    assert all((root / name).exists() for name in doomed)
    assert sorted(gc_stage(store, quiet, keep=1, min_age=day, dry_run=False)) == doomed
    assert not any((root / name).exists() for name in doomed)
    assert (root / "runs" / "generator-young" / "state").exists()
    assert (root / "features" / "unfinished-young" / "a.parquet").exists()
    assert store.latest("aligner").id == "whole"
    assert gc_stage(store, quiet, keep=1, min_age=day, dry_run=False) == []
