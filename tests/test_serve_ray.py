"""The server on Ray Serve with a real (untrained) snapshot: batching, snapshots that change, a replica that dies."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
import ray
import torch
import yaml
from ray import serve as ray_serve

from ace_core.config import ServeSettings, Settings
from ace_core.errors import SettingsError, StoreError
from serve import app as serve_app
from serve.bundles import PER_REPLICA
from serve.client import Client
from serve.replica import LightSettings, Searcher
from tests.tiny_store import TinyStore

pytestmark = pytest.mark.ray


class Watched(Searcher):
    """A replica that also says what its process was started with."""

    async def loops_of_its_own(self) -> tuple[bool, bool]:
        """Whether Ray Serve runs its code, and its router, outside the main event loop."""
        from ray.serve._private import constants

        return (
            constants.RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD,
            constants.RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP,
        )


@dataclass(frozen=True)
class Served:
    address: str
    tiny: TinyStore
    settings: Settings


@pytest.fixture(scope="module")
def served(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    torch.set_num_threads(1)
    tiny = TinyStore(tmp_path_factory.mktemp("store"))
    tiny.segment("main", 0, 240)
    tiny.segment("delta", 240, 60)
    tiny.publish("first", ["main"])
    chosen = ServeSettings(port=0, watch_seconds=0.2, batch_wait_seconds=0.05, max_queued=64, request_seconds=120)
    settings = Settings(store=str(tiny.path), serve=chosen)
    addresses: list[str] = []
    make = partial(serve_app.assemble, replica=Watched)
    address = serve_app.run(settings, blocking=False, on_ready=addresses.append, make=make)
    assert addresses == [address]
    yield Served(address, tiny, settings)
    serve_app.stop()


def _wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def test_nothing_stands_between_a_user_and_the_ingress(served: Served) -> None:
    """No proxy, no event loop more than there must be, and no address but the one that was asked for."""
    port = int(served.address.rpartition(":")[2])
    [socket] = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
    assert socket.laddr.ip == "127.0.0.1"
    assert "Ingress" in psutil.Process(socket.pid).cmdline()[0]
    assert not ray_serve.status().proxies
    searcher = ray_serve.get_deployment_handle("Searcher", serve_app.APP_NAME)
    assert searcher.loops_of_its_own.remote().result() == (False, False)


def test_search_batches_and_reports(served: Served) -> None:
    with Client(served.address) as ace, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda n: ace.search(f"thing number {n}", k=3), range(48)))
        assert all(len(a.results[0].hits) == 3 and a.snapshot == "first" for a in answers)
        # What came in one batch with others is what comes alone.
        for n in (0, 7, 23):
            alone = ace.search(f"thing number {n}", k=3).results[0].hits
            assert [h.item_id for h in alone] == [h.item_id for h in answers[n].results[0].hits]
        assert ace.search_by_example("item-0007", k=3).results[0].hits
        snapshot = ace.snapshot()
        assert len(snapshot.replicas) == 1 and {f.name for f in snapshot.facets} == {"number", "parity"}
        metrics = httpx.get(f"{served.address}/metrics").text
    count, total = (
        float(next(line for line in metrics.splitlines() if line.startswith(f"ace_batch_queries_{what}{{")).split()[-1])
        for what in ("count", "sum")
    )
    assert total / count > 1.5, "requests that wait together are decoded together"
    assert "Search" in httpx.get(served.address).text


def test_another_snapshot_is_taken_without_a_failed_or_mixed_answer(served: Served) -> None:
    filters = {"number": {"gte": 240}}
    answers: list[tuple[str, int]] = []
    stop = threading.Event()

    def ask() -> None:
        with Client(served.address, attempts=1) as ace:
            while not stop.is_set():
                found = ace.search("x", k=5, filters=filters)
                answers.append((found.snapshot, len(found.results[0].hits)))

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        try:
            for name, segments in (("second", ["main", "delta"]), ("first", ["main"])):
                served.tiny.publish(name, segments)
                _wait_for(lambda name=name: answers and answers[-1][0] == name)
        finally:
            stop.set()
        for future in asking:
            future.result()
    assert set(answers) == {("first", 0), ("second", 5)}


def test_a_damaged_snapshot_is_refused_and_said(served: Served) -> None:
    served.tiny.segment("damaged", 0, 60)
    path: Path = served.tiny.path / "segments" / "damaged" / "identifiers.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # before it is published: a replica looks at once
    served.tiny.publish("damaged", ["damaged"])
    with Client(served.address) as ace:
        _wait_for(lambda: ace.snapshot().refused is not None)
        assert ace.snapshot().snapshot == "first" and ace.search("x", k=3).results[0].hits
        metrics = httpx.get(f"{served.address}/metrics").text
        assert 'snapshot="damaged"} 1.0' in metrics
        served.tiny.publish("first", ["main"])
        _wait_for(lambda: ace.snapshot().refused is None)


def test_a_replica_that_is_killed_is_replaced(served: Served) -> None:
    with Client(served.address, attempts=8, timeout=130) as ace:
        before = ace.snapshot().replicas[0].replica
        [actor] = [a for a in ray.util.list_named_actors(all_namespaces=True) if before in a["name"]]
        ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
        assert ace.search("x", k=3).results[0].hits
        _wait_for(lambda: any(r.replica != before for r in ace.snapshot().replicas))


def test_an_ingress_that_is_killed_listens_again(served: Served) -> None:
    [actor] = [a for a in ray.util.list_named_actors(all_namespaces=True) if "#Ingress#" in a["name"]]
    before = actor["name"].rpartition("#")[2]
    with httpx.Client(base_url=served.address, timeout=30) as kept:  # its connection holds the port as long as it may
        assert kept.get("/readyz").status_code == 200 and before in kept.get("/metrics").text
        ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))

        def another_answers() -> bool:
            try:
                return kept.get("/readyz").status_code == 200 and before not in kept.get("/metrics").text
            except httpx.TransportError:
                return False

        _wait_for(another_answers)


def test_light_settings_change_in_place(served: Served) -> None:
    with Client(served.address) as ace:

        def seconds() -> float:
            started = time.monotonic()
            ace.search("x", k=1)
            return time.monotonic() - started

        searcher = ray_serve.get_deployment_handle("Searcher", serve_app.APP_NAME)
        searcher.reconfigure.remote({"max_batch": 4, "batch_wait_seconds": 1.5, "watch_seconds": 0.2}).result()
        assert seconds() >= 1.5
        searcher.reconfigure.remote({"max_batch": 4, "batch_wait_seconds": 0.0, "watch_seconds": 0.2}).result()
        _wait_for(lambda: seconds() < 1.4)  # as none could before
        with pytest.raises(Exception, match="max_batches"):
            searcher.reconfigure.remote({"max_batches": 4}).result()


@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 4), (2, 3)])
def test_the_settings_scale_the_replicas(tmp_path: Path, least: int, most: int) -> None:
    chosen = ServeSettings(replicas=least, max_replicas=most, max_batch=12, scale_down_seconds=7, max_queued=33)
    ingress = serve_app.build(Settings(store=str(tmp_path), serve=chosen))._bound_deployment
    searcher = ingress.init_args[1]._bound_deployment
    for deployment in (ingress, searcher):
        assert deployment.ray_actor_options["runtime_env"]["env_vars"] == serve_app.ONE_LOOP
    config = searcher._deployment_config
    assert searcher.name == "Searcher" and config.max_queued_requests == 33
    assert config.max_ongoing_requests >= 2 * 12  # or batches would starve
    scaling = config.autoscaling_config
    if least == most:
        assert scaling is None and config.num_replicas == least
    else:
        assert scaling is not None
        assert (scaling.min_replicas, scaling.max_replicas, scaling.downscale_delay_s) == (least, most, 7)
        assert 1 < scaling.target_ongoing_requests < PER_REPLICA  # nearly always one that waits


def test_an_ingress_that_listens_runs_on_the_node_of_whoever_started_it(served: Served) -> None:
    own = serve_app.own_node(served.settings)
    assert own in {node["NodeManagerAddress"] for node in ray.nodes()}
    pinned = serve_app.assemble(served.settings, node=own)._bound_deployment
    assert pinned.ray_actor_options["resources"] == {f"node:{own}": 0.001}
    assert pinned.ray_actor_options["num_cpus"] == 0 and pinned.init_args[2]  # it listens
    behind = served.settings.model_copy(update={"serve": ServeSettings(proxies=True)})
    assert serve_app.own_node(behind) is None
    anywhere = serve_app.build(behind)._bound_deployment
    assert not anywhere.ray_actor_options["resources"] and not anywhere.init_args[2]


def test_the_ingress_needs_no_model() -> None:
    """What its process imports: models would cost it seconds at the start, and memory."""
    code = "import sys, serve.app, serve.http; print(sorted({'torch', 'numba', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_cannot_start_says_why(served: Served, tmp_path: Path) -> None:
    port = int(served.address.rpartition(":")[2])
    taken = served.settings.model_copy(update={"serve": ServeSettings(port=port)})
    with pytest.raises(SettingsError, match="port"):
        serve_app.run(taken, blocking=False)
    open_to_all = served.settings.model_copy(update={"serve": ServeSettings(host="0.0.0.0", port=0)})
    with pytest.raises(SettingsError, match="keys_file"):
        serve_app.run(open_to_all, blocking=False)
    with pytest.raises(StoreError, match="ace publish"):
        serve_app.run(Settings(store=str(tmp_path)), blocking=False)
    with pytest.raises(SettingsError, match="key file"):
        serve_app.build(Settings(serve=ServeSettings(keys_file=str(tmp_path / "none"))))


def test_the_shipped_serve_configuration_is_a_good_one() -> None:
    from ray.serve.schema import ServeDeploySchema

    path = Path(__file__).parent.parent / "deploy" / "serve.yaml"
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    [application] = config.applications
    assert application.import_path == "serve.app:build"
    Settings.model_validate(application.args)
    [searcher] = application.deployments
    LightSettings.model_validate(searcher.user_config)
    assert config.http_options.host == "127.0.0.1"
