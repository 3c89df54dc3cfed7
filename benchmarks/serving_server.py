"""The server that all phases measure: started once, its scale changed where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve

from ace_core.config import ServeSettings, Settings
from benchmarks.serving_rival import EitherSearcher
from serve import app


class Server:
    """One application of Ray Serve; starting it takes longer than most of what is measured.

    Attributes:
        address: where it listens.
    """

    def __init__(self, store: Path, *, replicas: int, proxies: bool) -> None:
        """Start it.

        Args:
            proxies: whether Ray Serve's proxies are to listen, or the ingress itself.
        """
        self._settings = Settings(
            store=str(store),
            serve=ServeSettings(port=0, proxies=proxies, replicas=replicas, max_replicas=replicas, watch_seconds=0.5),
        )
        self.address = app.run(self._settings, blocking=False, on_ready=lambda _: None, make=_lasting)

    def scale(self, least: int, most: int, *, down_seconds: float = 60.0) -> None:
        """Keep between ``least`` and ``most`` replicas from now on; those that run stay as they are."""
        chosen = {"replicas": least, "max_replicas": most, "scale_down_seconds": down_seconds}
        settings = self._settings.model_copy(update={"serve": self._settings.serve.model_copy(update=chosen)})
        serve.run(_lasting(settings, node=app.own_node(settings)), name=app.APP_NAME, route_prefix="/")


def _lasting(settings: Settings, *, node: str | None) -> serve.Application:
    """The application under one version, so that deploying it again changes its scale and replaces nothing."""
    made = app.assemble(settings, EitherSearcher, node=node)
    ingress: Any = made._bound_deployment
    for deployment in (ingress, ingress.init_args[1]._bound_deployment):
        deployment._version = "benchmark"
    return made
