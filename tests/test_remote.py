"""`ace --address`: the same command as a Ray job on another cluster, with its output, its exit code and its errors."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from ace_core.errors import AceError
from ace_core.settings_file import load_settings
from pipelines import cli, remote
from pipelines.remote import run_as_job
from tests.ports import held_ports


class FakeClient:
    """A cluster that runs nothing: notes what it was given, and ends as it was told to."""

    def __init__(self, status: str = "SUCCEEDED", code: int | None = 0, fault: BaseException | None = None) -> None:
        self.info = SimpleNamespace(status=status, driver_exit_code=code, message="it says")
        self.fault = fault
        self.given: dict[str, Any] = {}

    def submit_job(self, *, entrypoint: str, runtime_env: dict[str, Any]) -> str:
        folder = Path(runtime_env["working_dir"])
        self.given = {"line": entrypoint, "modules": runtime_env["py_modules"]}
        self.given |= {"files": sorted(p.name for p in folder.iterdir())}
        self.given["settings"] = yaml.safe_load((folder / "ace.yaml").read_text())
        return "job-1"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "one\n"
        if self.fault:
            raise self.fault
        yield "two\n"

    def get_job_status(self, job: str) -> str:
        return str(self.info.status)

    def get_job_info(self, job: str) -> SimpleNamespace:
        return self.info


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    client = FakeClient()
    monkeypatch.setattr(remote, "_connect", lambda address: client)
    return client


def test_the_same_command_runs_there_with_the_settings_of_here(
    fake: FakeClient, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("aligner: {dim: 48}\n")
    monkeypatch.chdir(tmp_path)
    words = "search a&b -k 3 -m audio --where colour=red --where size=2 --json -c mine.yaml -s corpus.path=media"
    assert cli.main(["--address", "http://head:8265", *words.split(), "--store", "s3://bucket/ace"]) == 0
    assert fake.given["line"] == (
        "python3 -m pipelines.cli search --config ace.yaml -k 3 --modality audio --where colour=red --where size=2 "
        "--json -- 'a&b'"
    )
    settings = fake.given["settings"]
    assert settings["aligner"]["dim"] == 48 and settings["compute"]["address"] == "auto"
    assert settings["store"] == "s3://bucket/ace" and settings["corpus"]["path"] == str(tmp_path / "media")
    load_settings(None, (f"store={settings['store']}",))  # what travels is what `ace settings` knows
    assert fake.given["files"] == ["ace.yaml"]
    assert all((Path(p) / "__init__.py").is_file() for p in fake.given["modules"])
    assert capsys.readouterr().out == "one\ntwo\n"


def test_groups_of_commands_and_refusals(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--address", "http://head:8265", "fit", "all"]) == 0
    assert fake.given["line"] == "python3 -m pipelines.cli fit all --config ace.yaml"
    assert "all nodes" in capsys.readouterr().err  # a folder is no place that a cluster shares by itself
    for words, said in ((["demo"], "does not run as a job"), (["ingest", "--nosuch"], "No such option")):
        fake.given.clear()
        assert cli.main(["--address", "http://head:8265", *words]) == 2
        assert said in capsys.readouterr().err and not fake.given


def test_exit_codes_come_back() -> None:
    settings = load_settings(None, ("store=s3://bucket/ace",))
    for code, seen in ((3, 3), (-9, 137)):
        assert run_as_job("a", "line", settings, print, client=FakeClient("FAILED", code)) == seen
    with pytest.raises(AceError, match="ended as stopped"):
        run_as_job("a", "line", settings, print, client=FakeClient("STOPPED", None))
    broken = FakeClient(fault=RuntimeError("the connection broke"))
    assert run_as_job("a", "line", settings, print, client=broken) == 0


def test_ctrl_c_says_how_to_follow_and_how_to_stop() -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        settings = load_settings(None, ("store=s3://bucket/ace",))
        run_as_job("http://h:1", "line", settings, said.append, client=FakeClient(fault=KeyboardInterrupt()))
    assert "ray job logs --follow --address http://h:1 job-1" in said[-1]
    assert "ray job stop --address http://h:1 job-1" in said[-1]


def test_no_cluster_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:  # and nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert cli.main(["--address", f"http://127.0.0.1:{port}", "status"]) == 2
        assert cli.main(["--address", f"127.0.0.1:{port}", "status"]) == 2
    assert "does not take the job" in capsys.readouterr().err


@pytest.fixture
def head() -> Iterator[str]:
    """A real cluster of one node, in processes of its own that end with the one that is started here."""
    with (
        held_ports(4) as (port, dashboard, client, agent),
        tempfile.TemporaryDirectory(prefix="ace-ray-", ignore_cleanup_errors=True) as folder,
    ):
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}",
            f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}",
            f"--temp-dir={folder}", "--num-cpus=4", "--object-store-memory=200000000", "--disable-usage-stats",
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # the jobs' python3
        log = Path(folder) / "start.log"
        with log.open("w") as out:
            started = subprocess.Popen(
                command, env=environment, stdout=out, stderr=out, cwd=folder, start_new_session=True
            )
        try:
            address = f"http://127.0.0.1:{dashboard}"
            _wait_for_jobs(address, started, log)
            yield address
        finally:
            started.send_signal(signal.SIGTERM)
            try:
                started.wait(30)
            except subprocess.TimeoutExpired:
                started.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)  # of its own session: whatever did not end with it


def _wait_for_jobs(address: str, started: subprocess.Popen[bytes], log: Path) -> None:
    import httpx

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert started.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"{address}/api/jobs/", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise AssertionError(log.read_text()[-3000:])


@pytest.mark.ray
@pytest.mark.slow  # a cluster of its own, and three jobs on it
@pytest.mark.timeout(400)
def test_stages_run_as_jobs_of_a_real_cluster(head: str, tmp_path: Path) -> None:
    from tests.corpora import write_tone

    for i in range(12):
        write_tone(tmp_path / "corpus" / f"{i:02d}.flac", 200 + 20 * i, seconds=1)
    options = [
        "-s",
        f"corpus.path={tmp_path / 'corpus'}",
        "--store",
        str(tmp_path / "store"),
        "-s",
        "compute.encoders=1",
    ]
    environment = dict(os.environ) | {"RAY_AUTH_MODE": "disabled"}

    def ace(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines.cli", "--address", head, *words, *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path)

    done = ace("ingest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 sounds" in done.stdout  # said there, shown here
    assert len(list((tmp_path / "store" / "features").glob("*/audio/*.parquet"))) >= 1
    failed = ace("publish")  # nothing was fitted: the same error and the same exit code as here
    assert failed.returncode not in (0, None) and "ace fit" in failed.stdout + failed.stderr
    again = ace("ingest")
    assert again.returncode == 0 and "nothing to do" in again.stdout
