"""What an embedded Ray is told before it starts."""

from __future__ import annotations

import os

_DEFAULTS = {
    # Threads that wait shall sleep: spinning ones make a fit ten times slower as soon as anything else runs here.
    "OMP_WAIT_POLICY": "PASSIVE",
    # It listens on this machine only; a token file left by another cluster must not lock it out.
    "RAY_AUTH_MODE": "disabled",
    # Whoever runs ACE did not ask to report to Ray's makers. (A cluster is its owner's to decide about.)
    "RAY_USAGE_STATS_ENABLED": "0",
}


def set_defaults() -> None:
    """Set the environment that an embedded Ray reads, but for what the user has set."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
