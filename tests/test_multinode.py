"""A Ray cluster of several nodes (each a real raylet with its workers) takes a corpus the whole way with its store on a
real S3 server (moto's, which pip installs), and loses a node while media are encoded.

In a process of its own: a session has one Ray, and this one is another.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ace_core.features import read_errors, read_features
from ace_core.retriever import Retriever
from ace_store import Store
from tests.corpora import write_tone
from tests.world import SMALL

_DRIVER = """
import json, sys, threading, time
import ray
from ray.cluster_utils import Cluster
from ace_core.settings_file import load_settings
from ace_store import Store
from pipelines.fit_aligner import fit_aligner_stage
from pipelines.fit_generator import fit_generator_stage
from pipelines.fit_quantizer import fit_quantizer_stage
from pipelines.ingest import ingest
from pipelines.progress import Reporter
from pipelines.publish import publish_stage

settings = load_settings(None, tuple(sys.argv[1:]))
store, quiet = Store.open(settings.store), Reporter(quiet=True)
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=2)
doomed = cluster.add_node(num_cpus=2)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
killed = []

def shards() -> int:
    files = store.listing("features", recursive=True)
    return sum("/shards/" in f.path and f.path.endswith(".json") for f in files)

def kill() -> None:
    while (count := shards()) < 3:
        time.sleep(0.05)
    killed.append(count)
    cluster.remove_node(doomed, allow_graceful=False)

killer = threading.Thread(target=kill, daemon=True)
killer.start()
manifest = ingest(settings, store, quiet)
killer.join(60)
for _ in range(300):  # the head notices a lost node after a while
    alive = sum(node["Alive"] for node in ray.nodes())
    if alive == 2:
        break
    time.sleep(0.1)
for stage in (fit_aligner_stage, fit_quantizer_stage, fit_generator_stage):
    stage(settings, store, quiet)
snapshot = publish_stage(settings, store, quiet)
print(json.dumps({"id": manifest.id, "killed_after": killed, "alive": alive, "snapshot": snapshot.id}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow  # chaos: how long Ray takes to notice depends on the machine
@pytest.mark.timeout(1200)
def test_a_node_is_killed_on_the_way_from_media_to_a_snapshot(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    rows = []
    for i in range(160):
        write_tone(tmp_path / "corpus" / f"{i:03d}.flac", 200 + i, seconds=4)
        rows.append({"path": f"{i:03d}.flac", "captions": [f"a tone of {200 + i} hertz"]})
    (tmp_path / "corpus" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "corpus" / "000.flac").write_bytes(b"junk")
    place = f"s3://bucket/{tmp_path.name}{s3}"
    options = [
        f"corpus.path={tmp_path / 'corpus'}", f"store={place}", *SMALL, "corpus.shard_items=4",
        "encoders.audio.batch_size=4",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", _DRIVER, *options], capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said["alive"] == 2 and 3 <= said["killed_after"][0] < 40  # it was in the middle of the work
    store = Store.open(place)
    folder = store.path("features", said["id"])
    ids = read_features(folder, store.filesystem).items.column("item_id").to_pylist()
    assert ids == [f"{i:03d}.flac" for i in range(1, 160)]  # none lost, none twice
    assert read_errors(folder, store.filesystem).column("item_id").to_pylist() == ["000.flac"]
    retriever = Retriever.open(store.mirror())
    assert retriever.snapshot.id == said["snapshot"] and len(retriever.snapshot) == 159
    assert len(retriever.search(["a tone of 300 hertz"], k=5)[0]) == 5
