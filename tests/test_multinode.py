"""A Ray cluster of several nodes (each a real raylet with its workers), one of which is killed while media are encoded.

In a process of its own: a session has one Ray, and this one is another.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ace_core.features import read_errors, read_features
from tests.corpora import write_tone

_DRIVER = """
import json, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from ace_core.config import load_settings
from ace_store import Store
from pipelines.ingest import ingest
from pipelines.progress import Reporter

settings = load_settings(None, tuple(sys.argv[1:]))
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=2)
doomed = cluster.add_node(num_cpus=2)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
killed = []

def kill() -> None:
    while len(list(Path(settings.store).glob("features/*/shards/*.json"))) < 3:
        time.sleep(0.02)
    killed.append(len(list(Path(settings.store).glob("features/*/shards/*.json"))))
    cluster.remove_node(doomed, allow_graceful=False)

killer = threading.Thread(target=kill, daemon=True)
killer.start()
manifest = ingest(settings, Store.open(settings.store), Reporter(quiet=True))
killer.join(60)
for _ in range(300):  # the head notices a lost node after a while
    alive = sum(node["Alive"] for node in ray.nodes())
    if alive == 2:
        break
    time.sleep(0.1)
print(json.dumps({"id": manifest.id, "killed_after": killed, "alive": alive, "metrics": manifest.metrics}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow  # chaos: how long Ray takes to notice depends on the machine
@pytest.mark.timeout(300)
def test_a_node_is_killed_while_media_are_encoded(tmp_path: Path) -> None:
    for i in range(160):
        write_tone(tmp_path / "corpus" / f"{i:03d}.flac", 200 + i, seconds=4)
    (tmp_path / "corpus" / "000.flac").write_bytes(b"junk")
    options = [
        f"corpus.path={tmp_path / 'corpus'}", f"store={tmp_path / 'store'}", "corpus.shard_items=4",
        "encoders.audio.batch_size=4", "compute.encoders=4",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", _DRIVER, *options], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said["alive"] == 2 and 3 <= said["killed_after"][0] < 40  # it was in the middle of the work
    folder = tmp_path / "store" / "features" / said["id"]
    ids = read_features(folder).items.column("item_id").to_pylist()
    assert ids == [f"{i:03d}.flac" for i in range(1, 160)]
    assert read_errors(folder).column("item_id").to_pylist() == ["000.flac"]
