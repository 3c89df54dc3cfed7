"""Ray, started the same way by every stage: the cluster at ``compute.address``, or an embedded one on this machine."""

from __future__ import annotations

import atexit
import logging
import os
from typing import NoReturn

from ace_core.config import ComputeSettings
from ace_core.errors import AceError, MediaError, SettingsError

# On an embedded Ray, two logical CPUs more than the machine has: Ray's own coordinating tasks (reads, controllers)
# ask for CPUs that they hardly use, and a pipeline whose actors hold all of them never ends.
SPARE_CPUS = 2


def ensure_ray(compute: ComputeSettings) -> None:
    """Connect to Ray, or start an embedded one, unless this process has one already.

    Raises:
        SettingsError: there is no cluster at ``compute.address``.
    """
    # A short interval costs nothing on one machine, and every report of a fit waits for one.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2" if compute.address is None else "2")
    if compute.address is None:
        # An embedded Ray listens on this machine only; a token file left by another cluster must not lock it out.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    if not ray.is_initialized():
        try:
            if compute.address is None:
                ray.init(
                    num_cpus=(os.cpu_count() or 1) + SPARE_CPUS,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
                atexit.register(ray.shutdown)
            else:
                ray.init(address=compute.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as e:
            raise SettingsError(
                f"cannot reach Ray ({e})",
                where=f"compute.address {compute.address or 'embedded'}",
                remedy="Check the address, or leave compute.address out to run on this machine.",
            ) from None
    _quiet_data()


def _quiet_data() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.ERROR)


def encoder_count(compute: ComputeSettings) -> int:
    """How many encoder actors to run, checked against what the cluster has.

    Raises:
        SettingsError: the cluster has not the CPUs or GPUs for them.
    """
    import ray

    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    fit = int(max(cpus - SPARE_CPUS, 1) // compute.threads)
    if compute.gpus_per_worker:
        fit = min(fit, int(gpus // compute.gpus_per_worker))
    count = compute.encoders or max(1, fit)
    # One CPU stays free: a pipeline whose actors hold all CPUs hangs, so refuse it here.
    check_budget("encoders", count, compute, spare=1)
    return count


def check_budget(what: str, count: int, compute: ComputeSettings, *, spare: int = 0) -> None:
    """Refuse a job that the cluster can never start.

    Raises:
        SettingsError: says what is asked for and what there is.
    """
    import ray

    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    asked_cpus, asked_gpus = count * compute.threads, count * compute.gpus_per_worker
    if asked_cpus + spare > cpus:
        free = f" and {spare} must stay free" if spare else ""
        raise SettingsError(
            f"{count} {what} x {compute.threads} threads need {asked_cpus} CPUs{free}; Ray has {cpus:g}",
            where=f"compute.{what}, compute.threads",
            remedy="Ask for fewer, or give Ray more CPUs.",
        )
    if asked_gpus > gpus:
        raise SettingsError(
            f"{count} {what} x {compute.gpus_per_worker:g} GPUs need {asked_gpus:g} GPUs; Ray has {gpus:g}",
            where=f"compute.{what}, compute.gpus_per_worker",
            remedy="Ask for fewer, or set compute.gpus_per_worker to 0 to run on CPUs.",
        )


def reraise(error: BaseException) -> NoReturn:
    """Raise the :class:`AceError` that a worker raised and Ray wrapped; anything else as it came."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        one = queue.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, AceError):
            raise _plain_copy(one) from None
        queue += [getattr(one, "cause", None), one.__cause__, one.__context__]
        queue += list(getattr(one, "worker_failures", {}).values())
    raise error


def _plain_copy(error: AceError) -> AceError:
    # Ray raises a class made on the fly that is both its own error and ours; people should see ours only.
    if isinstance(error, MediaError):
        return MediaError(error.cause, error.found, where=error.where, remedy=error.remedy)
    kind = next(k for k in type(error).__mro__ if issubclass(k, AceError) and k.__module__ == AceError.__module__)
    return kind(error.found, where=error.where, remedy=error.remedy)
