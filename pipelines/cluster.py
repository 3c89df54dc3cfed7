"""Ray, started the same way by every stage: the cluster at ``compute.address``, or an embedded one on this machine."""

from __future__ import annotations

import atexit
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ace_core import embedded_ray, errors
from ace_core.config import ComputeSettings
from ace_core.errors import AceError, MediaError, SettingsError

if TYPE_CHECKING:
    from ray.data import Dataset

# On an embedded Ray, two logical CPUs more than the machine has: Ray's own coordinating tasks (reads, controllers)
# ask for CPUs that they hardly use, and a pipeline whose actors hold all of them never ends.
SPARE_CPUS = 2
SUSPECTS = 8  # batches an actor that are tried row by row when actors keep dying
_SMALLEST = 8  # a batch near the end has an eighth of the rows of a full one at least
MAX_DEATHS = 3  # times that actors may die with nothing done in between


def ensure_ray(compute: ComputeSettings) -> None:
    """Connect to Ray, or start an embedded one, unless this process has one already.

    Raises:
        SettingsError: there is no cluster at ``compute.address``.
    """
    # A short interval costs nothing on one machine, and every report of a fit waits for one.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2" if compute.address is None else "2")
    if compute.address is None:
        embedded_ray.set_defaults()
    import ray

    if not ray.is_initialized():
        try:
            if compute.address is None:
                ray.init(
                    address="local",  # not a cluster that somebody else runs on this machine
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


def worker_logs() -> str:
    """Where what workers (replicas, too) log is on this machine, once Ray is there."""
    import ray

    context: Any = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)
    return f"{context.address_info['session_dir']}/logs/worker-*.err"


def _quiet_data() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Pool:
    """Workers that are alike: how many, and the CPU threads and GPUs of each."""

    count: int
    threads: int
    gpus: float

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


def encoder_pool(compute: ComputeSettings, most: int) -> Pool:
    """Encoder actors, at most ``most``: as many as are asked for, or as the cluster has room for.

    Raises:
        SettingsError: the cluster can never start them.
    """
    import ray

    have = ray.cluster_resources()
    threads = compute.threads or 1
    count = compute.encoders
    if count is None:
        count = int(max(have.get("CPU", 0) - SPARE_CPUS, 1) // threads)
        if compute.gpus_per_worker:
            count = min(count, int(have.get("GPU", 0) / compute.gpus_per_worker))
    pool = Pool(min(max(1, count), most), threads, compute.gpus_per_worker)
    # One CPU stays free: a pipeline whose actors hold all CPUs hangs, so refuse it here.
    _check_budget("encoders", pool, spare=1)
    return pool


def worker_pool(compute: ComputeSettings) -> Pool:
    """Training workers; by default each takes the threads that a node has for it.

    Raises:
        SettingsError: the cluster can never start them.
    """
    import ray

    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    share = int((min(nodes, default=1) - SPARE_CPUS) // -(-compute.workers // max(1, len(nodes))))
    pool = Pool(compute.workers, compute.threads or max(1, share), compute.gpus_per_worker)
    _check_budget("workers", pool, spare=0)
    return pool


def _check_budget(what: str, pool: Pool, *, spare: int) -> None:
    import ray

    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    if pool.count * pool.threads + spare > cpus:
        free = f" and {spare} must stay free" if spare else ""
        asked = pool.count * pool.threads
        raise SettingsError(
            f"{pool.count} {what} x {pool.threads} threads need {asked} CPUs{free}; Ray has {cpus:g}",
            where=f"compute.{what}, compute.threads",
            remedy="Ask for fewer, or give Ray more CPUs.",
        )
    if pool.count * pool.gpus > gpus:
        raise SettingsError(
            f"{pool.count} {what} x {pool.gpus:g} GPUs need {pool.count * pool.gpus:g} GPUs; Ray has {gpus:g}",
            where=f"compute.{what}, compute.gpus_per_worker",
            remedy="Ask for fewer, or set compute.gpus_per_worker to 0 to run on CPUs.",
        )


Lost = Callable[[np.ndarray, str], dict[str, np.ndarray]]


def map_rows(
    work: pa.Table,
    transform: type,
    pool: Pool,
    batch_size: int | Mapping[str, int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    lost: Lost | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Map a class over the batches of a table on Ray Data, in a pool of actors that each hold one instance of it.

    When actors die (a lost node, no memory), what has not come back is given to new ones, so that every row comes back
    exactly once. Ray's own way, restarting without end, would never end on an input that kills its worker. When they
    die again, and ``lost`` is given, the rows in front are tried one by one: one that kills two actors is answered
    with what ``lost`` says, and the others go on.

    Args:
        work: has a column ``row`` 0..n-1, which ``transform`` must pass through (more than once if it likes).
        batch_size: rows that a call gets; by ``kind`` where ``work`` has a column of that name, and no call gets two
            kinds.
        args, kwargs: of the class.
        lost: rows (n,) and a reason to the result for them; None where no row may be lost.

    Raises:
        AceError: what the class raised, or that its actors keep dying.
    """
    from ray.data.read_api import from_blocks
    from ray.exceptions import RayTaskError

    left = np.ones(work.num_rows, bool)
    deaths, died = 0, False
    while left.any():
        before = int(left.sum())
        # A block is a batch: the pool stays busy to the end, and results come steadily.
        blocks = cut(work.filter(pa.array(left)), batch_size, pool.count)
        actors = replace(pool, count=min(pool.count, len(blocks)))
        # Not from_arrow, which starts a worker process to ask it how long each table is.
        dataset = _on_actors(from_blocks(blocks), actors, (transform, args, kwargs))
        try:
            for result in dataset.iter_batches(batch_size=None, batch_format="numpy"):
                if _REFUSED in result:
                    raise _unpacked(result[_REFUSED][0])
                left[result["row"]] = False
                yield result
        except AceError:
            raise
        except Exception as e:
            causes = list(_causes(e))
            begun = not any(getattr(c, "actor_init_failed", False) for c in causes)
            if isinstance(e, RayTaskError) or not begun or not any(isinstance(c, _deadly()) for c in causes):
                reraise(e)
            deaths = deaths + 1 if int(left.sum()) == before else 1
            died_before, died = died, True
            if lost is not None and died_before:
                suspects = pa.concat_tables(
                    cut(work.filter(pa.array(left)), batch_size, pool.count)[: SUSPECTS * actors.count]
                )
                for result in _one_by_one(suspects, pool, (transform, args, kwargs), lost):
                    left[result["row"]] = False
                    yield result
                deaths = 0
            if deaths > MAX_DEATHS:
                raise AceError(
                    f"workers died {deaths} times in a row without finishing anything ({type(e).__name__})",
                    where=f"{transform.__name__}, {int(left.sum()):,} of {work.num_rows:,} rows left",
                    remedy="Most often memory ran out: lower compute.encoders or the batch size, and run it again.",
                ) from None


def cut(work: pa.Table, batch_size: int | Mapping[str, int], workers: int) -> list[pa.Table]:
    """The batches of :func:`map_rows`, in order: the last ones smaller, so that no worker waits long for another."""
    if not isinstance(batch_size, int):
        kinds = [work.filter(pc.equal(work.column("kind"), kind)) for kind in batch_size]
        return [batch for rows, size in zip(kinds, batch_size.values()) for batch in cut(rows, size, workers)]
    batches, first = [], 0
    while first < work.num_rows:
        share = -(-(work.num_rows - first) // (2 * workers))
        batches.append(work.slice(first, max(min(batch_size, share), -(-batch_size // _SMALLEST))))
        first += batches[-1].num_rows
    return batches


def _one_by_one(rows: pa.Table, pool: Pool, made_of: tuple[Any, ...], lost: Lost) -> Iterator[dict[str, np.ndarray]]:
    """Rows one at a time on one actor, another one after each death; a row that two of them die on is lost.

    Raises:
        AceError: several rows in a row were lost, so it is not the rows.
    """
    import ray

    actor_class = ray.remote(num_cpus=pool.threads, num_gpus=pool.gpus, max_restarts=0)(_OnActor)
    actor: Any = None
    in_a_row = 0
    for number in range(rows.num_rows):
        one = rows.slice(number, 1)
        batch = {name: one.column(name).to_numpy() for name in one.column_names}
        reason = ""
        for _ in range(2):
            actor = actor or actor_class.remote(*made_of)
            try:
                result = ray.get(actor.run.remote(batch))
            except _deadly() as e:
                actor, reason = None, type(e).__name__
                continue
            if _REFUSED in result:
                raise _unpacked(result[_REFUSED][0])
            in_a_row = 0
            yield result
            break
        else:
            in_a_row += 1
            if in_a_row > MAX_DEATHS:
                raise AceError(
                    f"{in_a_row} rows one after the other killed the workers that had them ({reason})",
                    where=made_of[0].__name__,
                    remedy="Then it is not the rows: most often memory ran out, or a library is broken. Lower "
                    "compute.encoders, or try the encoder by itself.",
                )
            yield lost(batch["row"], reason)


def _deadly() -> tuple[type[BaseException], ...]:
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,
    )


_REFUSED = "refused"  # column that carries an error of ours: Ray passes only the text of exceptions on


class _OnActor:
    """Holds an instance of a class. An :class:`AceError` of a call is what it answers; one of the constructor is what
    every call does."""

    def __init__(self, transform: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._refused: str | None = None
        try:
            self._instance = transform(*args, **kwargs)
        except AceError as e:
            self._refused = _packed(e)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.run(batch)

    def run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._refused is not None:
            return {_REFUSED: np.array([self._refused])}
        try:
            result: dict[str, np.ndarray] = self._instance(batch)
        except AceError as e:
            return {_REFUSED: np.array([_packed(e)])}
        return result


def _packed(error: AceError) -> str:
    return json.dumps([type(error).__name__, error.found, error.where, error.remedy])


def _unpacked(packed: str) -> AceError:
    name, found, where, remedy = json.loads(packed)
    kind: type[AceError] = getattr(errors, name)
    return kind(found, where=where, remedy=remedy)


def _on_actors(dataset: Dataset, pool: Pool, args: tuple[Any, ...]) -> Dataset:
    from ray.data import ActorPoolStrategy

    with warnings.catch_warnings():
        # Ray has no other name for these limits yet.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        return dataset.map_batches(
            _OnActor,
            fn_constructor_args=args,
            batch_size=None,
            # One actor is enough to go on with: after losing a node there may be no room for all of them.
            compute=ActorPoolStrategy(min_size=1, max_size=pool.count, initial_size=pool.count),
            num_cpus=pool.threads,
            num_gpus=pool.gpus or None,
            max_restarts=0,
            max_task_retries=0,
        )


def reraise(error: BaseException) -> NoReturn:
    """Raise the :class:`AceError` that a worker raised and Ray wrapped, or that says that its disk is full; anything
    else as it came."""
    for one in _causes(error):
        if isinstance(one, AceError):
            raise _plain_copy(one) from None
        if isinstance(one, OSError) and errors.is_full(one):
            raise errors.storage_error(one) from None
    raise error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and everything that it came from, in all the ways that Ray wraps one in another."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        one = queue.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        queue += [getattr(one, "cause", None), one.__cause__, one.__context__]
        queue += list(getattr(one, "worker_failures", {}).values())


def _plain_copy(error: AceError) -> AceError:
    # Ray raises a class made on the fly that is both its own error and ours; people should see ours only.
    if isinstance(error, MediaError):
        return MediaError(error.cause, error.found, where=error.where, remedy=error.remedy)
    kind = next(k for k in type(error).__mro__ if issubclass(k, AceError) and k.__module__ == AceError.__module__)
    return kind(error.found, where=error.where, remedy=error.remedy)
