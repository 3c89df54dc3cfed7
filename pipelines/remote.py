"""``ace --address http://head:8265 COMMAND``: the command runs on the head of a cluster, as a Ray job.

What travels: this code (four packages, uploaded once, for Ray names a package by the hash of its content) and the
settings, resolved here and written into a working directory of one file. Media, models and the store must be where the
cluster reaches them.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ace_core.config import Settings
from ace_core.errors import AceError, SettingsError
from pipelines.options import CONFIG_NAME

PACKAGES = ("ace_core", "ace_store", "pipelines", "serve")
SETTINGS_OPTIONS = ("config", "changes", "store")  # replaced by the file that travels
REFUSED = {
    "demo": "Run it on this machine; a cluster takes your own corpus.",
    "serve": "Use `serve deploy deploy/serve.yaml`, or deploy/rayservice.yaml on Kubernetes.",
    "settings": "It needs no cluster.",
}
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
Say = Callable[[str], None]


def job_settings(settings: Settings) -> Settings:
    """The settings as they hold on the cluster: the job joins the Ray that it runs on."""
    compute = settings.compute.model_copy(update={"address": "auto"})
    return settings.model_copy(update={"compute": compute})


def entrypoint(names: Sequence[str], command: Any, values: Mapping[str, Any]) -> str:
    """The job's command line: the same command with the same options, its settings from the file that travels.

    Args:
        names: of the command ("fit", "all").
        command: as click holds it.
        values: of its parameters, by name.

    Raises:
        SettingsError: the command is not one for a cluster.
    """
    if (name := " ".join(names)) in REFUSED or "changes" not in values:
        raise SettingsError(
            f"`ace {name}` does not run as a job",
            where="--address",
            remedy=REFUSED.get(name, "Leave --address out."),
        )
    options, positional = ["--config", CONFIG_NAME], []
    for parameter in command.params:
        value = values.get(parameter.name)
        if parameter.name in SETTINGS_OPTIONS or value is None or value is False:
            continue
        many = [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
        if parameter.param_type_name == "argument":
            positional += many
        elif value is True:
            options.append(parameter.opts[0])
        else:
            options += [word for one in many for word in (parameter.opts[0], one)]
    words = ["python3", "-m", "pipelines.cli", *names, *options, *(["--", *positional] if positional else [])]
    return shlex.join(words)


def run_as_job(address: str, line: str, settings: Settings, say: Say, *, client: Any = None) -> int:
    """Submit a command, follow its output to the end, and return its exit code.

    Args:
        address: of the cluster's dashboard, for example ``http://head:8265``.
        line: see :func:`entrypoint`.
        client: instead of a new ``JobSubmissionClient``.

    Raises:
        SettingsError: there is no cluster, or it refuses.
        AceError: the job ended without its command having run to an end.
    """
    if "://" not in settings.store:
        say(f"the store is the folder {settings.store}: it must be one that all nodes of the cluster share")
    client = client or _connect(address)
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="ace-job-") as folder:
        text = yaml.safe_dump(job_settings(settings).model_dump(mode="json"), sort_keys=False)
        (Path(folder) / CONFIG_NAME).write_text(text)
        environment = {
            "working_dir": folder,
            "py_modules": [str(root / name) for name in PACKAGES],
            "excludes": ["**/__pycache__"],
        }
        try:
            job = client.submit_job(entrypoint=line, runtime_env=environment)
        except (RuntimeError, ValueError, OSError) as e:
            raise _refused(address, e) from None
    say(f"job {job} on {address}: {line}")
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        say(
            f"the job goes on without this terminal\n"
            f"  follow it: ray job logs --follow --address {address} {job}\n"
            f"  stop it:   ray job stop --address {address} {job}"
        )
        raise
    return _exit_code(client.get_job_info(job), job, address)


def _connect(address: str) -> Any:
    if not address.startswith(("http://", "https://")):  # Ray would look for a cluster's other port, and not tell
        raise SettingsError(
            f"{address!r} is not the address of a dashboard", where="--address", remedy="Write http://HEAD:8265."
        )
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise _refused(address, e) from None


def _refused(address: str, error: Exception) -> SettingsError:
    return SettingsError(
        f"the cluster does not take the job ({error})",
        where=f"--address {address}",
        remedy="Give the address of its dashboard (http://HEAD:8265), and RAY_AUTH_MODE=token if it asks for a token.",
    )


async def _follow(client: Any, job: str) -> None:
    """Print what the job prints, until it has ended."""
    try:
        async for lines in client.tail_job_logs(job):
            sys.stdout.write(lines)
            sys.stdout.flush()
    except RuntimeError:
        pass  # the connection broke: the job is asked itself, below
    while str(client.get_job_status(job)) not in ENDED:
        await asyncio.sleep(0.2)


def _exit_code(info: Any, job: str, address: str) -> int:
    if str(info.status) == "SUCCEEDED":
        return 0
    if info.driver_exit_code:
        return int(info.driver_exit_code) if info.driver_exit_code > 0 else 128 - int(info.driver_exit_code)
    raise AceError(
        f"job {job} ended as {str(info.status).lower()} ({info.message})",
        where=address,
        remedy=f"`ray job logs --address {address} {job}` has what it said; the same command goes on from there.",
    )
