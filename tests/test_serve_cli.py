"""Ray's own commands on a real Ray with a dashboard: `serve build`, `serve deploy` of the shipped file, `serve run`.

In processes of their own, with ports and folders of their own: nothing else on the machine is touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
import yaml

from ace_core.config import ServeSettings
from serve.client import Client
from tests.ports import held_ports
from tests.tiny_store import TinyStore

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A head node of its own: where Ray and its dashboard listen, and a port for Serve."""

    address: str
    dashboard: str
    port: int
    environment: dict[str, str]

    def serve(self, *arguments: str) -> str:
        """A `serve` command, which has to succeed; its output."""
        done = subprocess.run(
            [BIN / "serve", *arguments], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def _wait_for(condition: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.3)


def _answers(url: str) -> int:
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.HTTPError:
        return 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    tiny = TinyStore(tmp_path_factory.mktemp("store"))
    tiny.segment("main", 0, 60)
    tiny.publish("first", ["main"])
    return tiny.path


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with held_ports(5) as ports:
        yield from _head(*ports)


def _head(gcs: int, dashboard: int, agent: int, client: int, port: int) -> Iterator[Head]:
    folder = tempfile.mkdtemp(prefix="ray")  # sockets lie below: its name has to be short
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    node = subprocess.Popen(
        [
            BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}", f"--temp-dir={folder}", "--num-cpus=4",
            "--object-store-memory=200000000", "--disable-usage-stats",
        ],
        env={k: v for k, v in environment.items() if k != "RAY_ADDRESS"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        _wait_for(lambda: _answers(f"http://127.0.0.1:{dashboard}/api/version") == 200)
        yield Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", port, environment)
    finally:
        node.send_signal(signal.SIGTERM)  # it ends what it started
        try:
            node.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _shipped(store: Path, port: int) -> dict:
    """The shipped file for this store and port."""
    config = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"]["store"] = str(store)
    return config


def test_build_names_both_deployments(head: Head, tmp_path: Path) -> None:
    head.serve("build", "serve.app:app", "-o", str(tmp_path / "built.yaml"))
    [application] = yaml.safe_load((tmp_path / "built.yaml").read_text())["applications"]
    assert application["import_path"] == "serve.app:app"
    deployments = {d["name"]: d for d in application["deployments"]}
    assert set(deployments) == {"Searcher", "Ingress"}
    assert deployments["Searcher"]["max_queued_requests"] == ServeSettings().max_queued


def test_the_shipped_file_deploys_scales_and_changes_in_place(head: Head, store: Path, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    config = _shipped(store, head.port)
    path.write_text(yaml.safe_dump(config))
    head.serve("deploy", str(path), "-a", head.dashboard)
    address = f"http://127.0.0.1:{head.port}"
    _wait_for(lambda: _answers(f"{address}/readyz") == 200)
    with Client(address, attempts=8) as ace:
        assert ace.search("thing number 7", k=3).results[0].hits
        replica = ace.snapshot().replicas[0].replica
        status = yaml.safe_load(head.serve("status", "-a", head.dashboard))
        assert status["applications"]["ace"]["status"] == "RUNNING"
        details = httpx.get(f"{head.dashboard}/api/serve/applications/").json()
        searcher = details["applications"]["ace"]["deployments"]["Searcher"]["deployment_config"]
        wanted = config["applications"][0]["args"]["serve"]
        assert searcher["autoscaling_config"]["max_replicas"] == wanted["max_replicas"] == 4
        assert searcher["autoscaling_config"]["min_replicas"] == wanted["replicas"] == 1
        assert searcher["max_queued_requests"] == wanted["max_queued"]
        # A light change reaches the replica where it is: it takes as long as the change says, and is the same one.
        light = config["applications"][0]["deployments"][0]["user_config"]
        light["batch_wait_seconds"] = 1.5
        path.write_text(yaml.safe_dump(config))
        head.serve("deploy", str(path), "-a", head.dashboard)

        def slower() -> bool:
            started = time.monotonic()
            ace.search("x", k=1)
            return time.monotonic() - started >= 1.5

        _wait_for(slower)
        assert {r.replica for r in ace.snapshot().replicas} == {replica}


def test_a_wrong_key_in_the_file_is_refused(head: Head, store: Path, tmp_path: Path) -> None:
    config = _shipped(store, head.port)
    config["applications"][0]["args"]["serve"]["max_replica"] = 3
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    head.serve("deploy", str(tmp_path / "serve.yaml"), "-a", head.dashboard)

    def status() -> dict:
        return yaml.safe_load(head.serve("status", "-a", head.dashboard))["applications"]["ace"]

    _wait_for(lambda: status()["status"] == "DEPLOY_FAILED")
    assert "max_replica" in status()["message"]


def test_run_takes_settings_as_arguments(head: Head, store: Path) -> None:
    run = subprocess.Popen(
        [BIN / "serve", "run", "serve.app:build", f"store={store}", "--name=ace"],
        cwd=ROOT,
        env=head.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(lambda: _answers(f"http://127.0.0.1:{head.port}/readyz") == 200)
        with Client(f"http://127.0.0.1:{head.port}", attempts=8) as ace:
            assert ace.search("thing number 7", k=3).snapshot == "first"
    finally:
        run.send_signal(signal.SIGINT)
        run.wait(120)
