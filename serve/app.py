"""The Ray Serve application: an ingress that speaks HTTP, and the decoding replicas behind it.

``ace serve`` calls :func:`run`. For a cluster, :func:`build` is the application builder that Ray's own commands take:

    serve run serve.app:build store=s3://bucket/store
    serve build serve.app:app                             (takes no builder: with default settings)
    serve deploy deploy/serve.yaml
"""

# No `from __future__ import annotations` here: Ray Serve reads the type of the argument of build() from its signature,
# and would hand over unchecked settings if that were a string.
import asyncio
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions, ProxyLocation
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from ace_core import embedded_ray
from ace_core.config import ServeSettings, Settings
from ace_core.errors import SettingsError, StoreError
from ace_store.store import Store
from serve.auth import read_keys
from serve.bundles import PER_REPLICA, Bundles
from serve.calls import ExampleCall, Overloaded, Refusal, ReplicaState, Reply, TextCall, Unavailable
from serve.http import build_http
from serve.replica import BATCHES, LightSettings, Searcher

APP_NAME = "ace"
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_TRIES = 3
# Ray Serve gives a replica's code and its router event loops of their own, in case they block the main one. Nothing
# here does (models and files have threads), so one loop does for all, and no search hops between threads.
ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
_log = logging.getLogger("ace.serve")


class ReplicaBackend:
    """The replicas behind a deployment handle. A replica that dies while it answers is replaced by another's answer."""

    def __init__(self, handle: DeploymentHandle, max_batch: int) -> None:
        # Naming a method makes another handle: once is enough.
        self._search, self._probe, self._state = handle.search, handle.probe, handle.state
        self._bundles = Bundles(self._send, most=max_batch)

    async def search(self, call: TextCall | ExampleCall) -> Reply | Refusal:
        if isinstance(call, TextCall):
            return await self._bundles.ask(call)
        return (await self._send((call,)))[0]  # alone: a text shall not wait while a file is decoded

    async def _send(self, calls: tuple[TextCall | ExampleCall, ...]) -> Sequence[Reply | Refusal]:
        answers: Sequence[Reply | Refusal] = await self._ask(lambda: self._search.remote(calls))
        return answers

    async def probe(self) -> ReplicaState:
        answer = await self._ask(self._probe.remote)
        if isinstance(answer, Refusal):
            raise Unavailable(answer.found)
        return answer

    async def state(self) -> ReplicaState:
        return await self._ask(self._state.remote)

    async def _ask(self, send: Callable[[], Any]) -> Any:
        for attempt in range(_TRIES):
            response = send()
            try:
                return await response
            except BackPressureError:
                raise Overloaded from None
            except asyncio.CancelledError:
                response.cancel()  # nobody waits for it any more: it leaves its batch
                raise
            except (RayActorError, DeploymentUnavailableError) as e:
                # Searching changes nothing, so it is safe to ask again. The caller's deadline ends the waiting.
                _log.warning("a replica was lost while it answered: %s", type(e).__name__)
                await asyncio.sleep(0.1 * 2**attempt)
        raise Unavailable("the replicas were lost while they answered")


@serve.ingress()
class Ingress:
    """Speaks HTTP: keys, limits, the API and the page. Holds no model.

    It is asked through Ray Serve's proxies or, with ``listens``, on a socket of its own at ``serve.host`` and ``port``.
    """

    def __init__(self, settings: Settings, searcher: DeploymentHandle, listens: bool = False) -> None:
        self._settings = settings
        self._searcher = searcher
        self._listens = listens

    def __serve_build_asgi_app__(self) -> FastAPI:
        name = serve.get_replica_context().replica_id.unique_id
        backend = ReplicaBackend(self._searcher, self._settings.serve.max_batch)
        return build_http(self._settings, backend, ingress=name, listens=self._listens)


def build(settings: Settings) -> serve.Application:
    """The application for these settings (from ``ace serve``, or the ``args`` of a Serve configuration file).

    Raises:
        SettingsError: the key file cannot be used.
    """
    return assemble(settings)


def __getattr__(name: str) -> serve.Application:
    """``app``, the application with default settings: made when it is asked for, not at import time."""
    if name == "app":
        return build(Settings())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def assemble(settings: Settings, replica: type[Searcher] = Searcher, *, node: str | None = None) -> serve.Application:
    """The application with another class of replica (a rival behind the same ingress, in the benchmarks).

    Args:
        node: IP address of a node of the cluster where the ingress is to listen by itself; None leaves that to Ray
            Serve's proxies.

    Raises:
        SettingsError: the key file cannot be used.
    """
    chosen = settings.serve
    if chosen.keys_file is not None:
        # Refused here, where somebody looks, rather than in the log of a replica.
        read_keys(Path(chosen.keys_file))
    searcher = serve.deployment(
        name="Searcher",
        max_ongoing_requests=BATCHES * chosen.max_batch,
        max_queued_requests=chosen.max_queued,
        user_config=LightSettings(
            max_batch=chosen.max_batch,
            batch_wait_seconds=chosen.batch_wait_seconds,
            watch_seconds=chosen.watch_seconds,
        ).model_dump(),
        ray_actor_options={
            "num_cpus": chosen.threads if not chosen.gpus else 1,
            "num_gpus": chosen.gpus,
            "runtime_env": {"env_vars": ONE_LOOP},
        },
        graceful_shutdown_timeout_s=10,
        health_check_period_s=1,  # a dead replica is replaced when a check finds it
        logging_config=LoggingConfig(enable_access_log=False),  # who asked what is the ingress's to log
        **_scaling(chosen),
    )(replica)
    device = "cuda" if chosen.gpus else "cpu"
    ingress = serve.deployment(
        name="Ingress",
        # The ingress admits and refuses by itself, with a problem document; Serve's own limit must not come first.
        # Where so much comes that it does, a proxy refuses without asking the ingress, which is cheap.
        max_ongoing_requests=2 * chosen.max_queued + 100,
        max_queued_requests=chosen.max_queued,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=2),
        ray_actor_options={
            # Where it has to run on one node, it must fit there: a head node may offer no CPUs at all.
            "num_cpus": 0.5 if node is None else 0,
            "resources": {} if node is None else {f"node:{node}": 0.001},
            "runtime_env": {"env_vars": ONE_LOOP},
        },
        graceful_shutdown_timeout_s=10,
        health_check_period_s=1,
    )(Ingress)
    return ingress.bind(settings, searcher.bind(settings, device), node is not None)


def _scaling(chosen: ServeSettings) -> dict[str, Any]:
    if chosen.max_replicas == chosen.replicas:
        return {"num_replicas": chosen.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=chosen.replicas,
            max_replicas=chosen.max_replicas,
            # Bundles: so many each when there is nearly always one to decode and one that waits.
            target_ongoing_requests=0.75 * PER_REPLICA,
            upscale_delay_s=1,
            downscale_delay_s=chosen.scale_down_seconds,
            metrics_interval_s=0.5,
            look_back_period_s=2,
        )
    }


def run(
    settings: Settings,
    blocking: bool = True,
    *,
    on_ready: Callable[[str], None] = print,
    on_stop: Callable[[], None] = lambda: None,
    ready_seconds: float = 180,
    make: Callable[..., serve.Application] | None = None,
) -> str:
    """Start the server and wait until a replica has answered.

    Args:
        blocking: serve until interrupted; otherwise return as soon as it answers.
        on_ready: called with the server's address.
        on_stop: called when it was told to stop (blocking only), before it does, which takes some seconds.
        ready_seconds: how long it may take to start.
        make: makes the application in place of :func:`assemble`; called with the settings and its ``node``.

    Returns:
        The server's address.

    Raises:
        SettingsError: the port is taken, or the server would be open to the network without keys.
        StoreError: nothing is published, or the server did not start in time.
    """
    chosen = settings.serve
    if chosen.host not in _LOCAL_HOSTS and chosen.keys_file is None:
        raise SettingsError(
            f"serve.host {chosen.host} opens the server to the network, and it has no keys",
            where="serve.keys_file",
            remedy="Make a key with `python -m serve.auth read NAME >> keys.txt` and set serve.keys_file to the file.",
        )
    if Store.open(settings.store).current().snapshot is None:
        raise StoreError("nothing has been published here", where=settings.store, remedy="Run `ace publish` first.")
    with _bound(chosen.host, chosen.port) as probe:
        port = probe.getsockname()[1]
        if chosen.proxies or sys.platform != "linux":
            probe.close()  # two sockets at one port, of which one listens, are a custom of Linux
        address = _start(settings.model_copy(update={"serve": chosen.model_copy(update={"port": port})}), make)
        _wait_until_ready(address, ready_seconds)
    on_ready(address)
    if blocking:
        _wait_for_the_end()
        on_stop()
        stop(ray_too=settings.compute.address is None)
    return address


def _start(settings: Settings, make: Callable[..., serve.Application] | None) -> str:
    """Start Ray unless it runs, and the application; its address."""
    chosen = settings.serve
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what it says at the start, on_ready says better
    if settings.compute.address is None:
        embedded_ray.set_defaults()
    if not ray.is_initialized():
        ray.init(address=settings.compute.address or "local", include_dashboard=False, log_to_driver=False)
    serve.start(
        http_options=HTTPOptions(host=chosen.host, port=chosen.port, request_timeout_s=chosen.request_seconds + 5),
        proxy_location=ProxyLocation.HeadOnly if chosen.proxies else ProxyLocation.Disabled,
    )
    serve.run((make or assemble)(settings, node=own_node(settings)), name=APP_NAME, route_prefix="/")
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(chosen.host, chosen.host)
    return f"http://[{shown}]:{chosen.port}" if ":" in shown else f"http://{shown}:{chosen.port}"


def own_node(settings: Settings) -> str | None:
    """The node of this process, for the ingress to listen on; None where Ray Serve's proxies are to."""
    return None if settings.serve.proxies else ray.util.get_node_ip_address()


def _wait_for_the_end() -> None:
    """Until Ctrl-C, or SIGTERM as service managers and containers send it."""
    ended = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        ended.wait()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def stop(*, ray_too: bool = False) -> None:
    """End the application, and Serve with its proxies unless something else runs on it.

    Args:
        ray_too: leave Ray as well, which ends with this process if it was started in it. (Serve then goes with it.
            Asked to shut down, Serve's controller kills itself, and Ray prints that as an error.)
    """
    serve.delete(APP_NAME)
    if ray_too:
        ray.shutdown()
    elif not serve.status().applications:
        serve.shutdown()


def _bound(host: str, port: int) -> socket.socket:
    """A socket at ``port``, or at a free one for 0, that does not listen. As long as it is open, Linux gives the port
    to nobody who takes any, as Ray's processes do in the seconds until the ingress listens there. (It may meanwhile.)

    Raises:
        SettingsError: something else listens there.
    """
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((host, port))
    except OSError as e:
        probe.close()
        raise SettingsError(
            f"port {port} of {host} cannot be used ({e.strerror})",
            where="serve.port",
            remedy="Choose another with --set serve.port=8001, or 0 for a free one.",
        ) from None
    return probe


def _wait_until_ready(address: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    detail = "no answer"
    while time.monotonic() < end:
        try:
            answer = httpx.get(f"{address}/readyz", timeout=10)
            if answer.status_code == 200:
                return
            detail = answer.json().get("detail", detail)
        except (httpx.HTTPError, ValueError) as e:
            detail = type(e).__name__
        time.sleep(0.2)
    raise StoreError(
        f"the server did not become ready in {seconds:g} s ({detail})", where=address, remedy="See Ray's logs."
    )
