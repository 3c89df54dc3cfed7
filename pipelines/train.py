"""Runs a fit on Ray Train: one to n workers, checkpoints in the store, progress back to the terminal.

A fit is a function of :class:`FitContext` that leaves its model in a folder. This module gives it a process group
(gloo on CPUs, NCCL on GPUs), brings its checkpoints to ``runs/<kind>-<id>`` in the store, and resumes from there:
after a lost worker, and when the same command is run again after the driver was killed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ace_core.config import Settings
from ace_core.errors import AceError, StoreError
from ace_core.manifest import Manifest, PartKind, fingerprint
from ace_core.snapshot import ModelKind
from ace_store import Store
from pipelines.cluster import ensure_ray, reraise, worker_pool
from pipelines.progress import Reporter, Step

STATE_NAME = "state.safetensors"
DONE_NAME = "done.json"
MODEL_NAME = "model"
POLL_SECONDS = 0.3


@dataclass(frozen=True)
class FitContext:
    """What a fit gets on every worker.

    Attributes:
        inputs: ids of the parts it reads, by kind.
        collective: the group of workers.
        hooks: progress, checkpoints and the state to resume from, for the loops of ``ace_core``.
        device: "cpu" or "cuda:N".
        folder: an empty local folder; worker 0 leaves the model here, the other workers' is thrown away.
    """

    settings: Settings
    store: Store
    inputs: dict[str, str]
    collective: Any
    hooks: Any
    device: str
    folder: Path


Fit = Callable[[FitContext], dict[str, Any]]


def fit_part(
    kind: ModelKind,
    fit: Fit,
    inputs: dict[str, str],
    chosen: dict[str, Any],
    settings: Settings,
    store: Store,
    reporter: Reporter,
    say: Callable[[dict[str, Any]], str],
) -> Manifest:
    """What every fit stage does: fit the part unless the store has it, and make it the latest.

    Args:
        fit: a function of a module.
        inputs: ids of the parts it reads, by kind.
        chosen: settings that change the model, beside the seed and the split, which all of them follow.
        say: one sentence about the figures of a fit.
    """
    chosen = chosen | {"split": settings.split.model_dump(), "seed": settings.compute.seed}
    part_id = fingerprint(kind, inputs, chosen)
    manifest = store.find(kind, part_id)
    if manifest is None:
        with (
            store.making(kind),
            run_fit(kind, part_id, fit, inputs, settings, store, reporter) as (folder, metrics),
        ):
            manifest = store.upload_part(
                folder, Manifest(kind=kind, id=part_id, inputs=inputs, settings=chosen, metrics=metrics)
            )
        reporter.say(f"{kind} {part_id}: {say(metrics)}")
    else:
        reporter.say(f"{kind} {part_id}: nothing changed, nothing to do")
    store.set_latest(kind, part_id)
    return manifest


@contextmanager
def run_fit(
    kind: PartKind, part_id: str, fit: Fit, inputs: dict[str, str], settings: Settings, store: Store, reporter: Reporter
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Run ``fit`` (a function of a module) on Ray Train; gives a local folder with the model, and the figures.

    Raises:
        AceError: what the fit raised.
    """
    ensure_ray(settings.compute)
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    pool = worker_pool(settings.compute)
    board: Any = ray.remote(num_cpus=0)(_Board).remote()  # type: ignore[attr-defined]
    name = f"{kind}-{part_id}"
    local = store.local is not None

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ctrl-C stays what it is elsewhere: Ray's handler ends the process without a word, even after the fit."""

    trainer = Trainer(
        _on_worker,
        train_loop_config={
            "fit": fit,
            "inputs": inputs,
            "settings": settings.model_dump(mode="json"),
            "store": store.uri,
            "threads": pool.threads,
            "board": board,
        },
        scaling_config=ScalingConfig(
            num_workers=pool.count,
            use_gpu=bool(pool.gpus),
            resources_per_worker={"CPU": pool.threads} | ({"GPU": pool.gpus} if pool.gpus else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=store.path("runs"),
            storage_filesystem=None if local else store.filesystem,
            failure_config=FailureConfig(max_failures=settings.compute.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    with reporter.step(f"fit {kind}", 0, "steps") as step, _watching(board, step):
        try:
            result = trainer.fit()
        except Exception as e:
            reraise(e)
    failed: AceError | None = ray.get(board.failure.remote())
    if failed is not None:
        store.delete(f"runs/{name}")
        raise failed
    if result.checkpoint is None:
        raise StoreError(f"the fit of the {kind} left no model", where=store.path("runs", name), remedy="Run it again.")
    with store.scratch() as folder:
        model = folder / MODEL_NAME
        result.checkpoint.to_directory(str(folder))
        yield model, json.loads((folder / DONE_NAME).read_text())
    store.delete(f"runs/{name}")


class _Board:
    """Carries progress, and the error of a fit that must not be tried again, from the workers to the driver."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._failure: AceError | None = None

    def report(self, progress: Any) -> None:
        self._progress = progress

    def progress(self) -> Any:
        return self._progress

    def fail(self, error: AceError) -> None:
        self._failure = error

    def failure(self) -> AceError | None:
        return self._failure


@contextmanager
def _watching(board: Any, step: Step) -> Iterator[None]:
    import ray

    stop = threading.Event()

    def look() -> None:
        progress = ray.get(board.progress.remote(), timeout=10)
        if progress is not None:
            figures = ", ".join(f"{k} {v:.4g}" for k, v in progress.metrics.items())
            step.update(
                progress.step, f"{progress.stage}: {figures}" if figures else progress.stage, total=progress.total
            )

    def loop() -> None:
        while not stop.wait(POLL_SECONDS):
            try:
                look()
            except ray.exceptions.GetTimeoutError:
                continue  # a busy machine: look again
            except Exception:  # progress is a courtesy: a board that is gone must not fail the fit
                return

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
        with suppress(ray.exceptions.GetTimeoutError):
            look()
    finally:
        stop.set()
        thread.join()


def _on_worker(config: dict[str, Any]) -> None:
    """The training loop of one worker."""
    import ray
    import torch
    from ray import train
    from ray.train import Checkpoint
    from ray.train.torch import get_device

    from ace_core.collective import LocalCollective, TorchCollective

    torch.set_num_threads(config["threads"])
    world = train.get_context().get_world_size()
    collective = TorchCollective() if world > 1 else LocalCollective()
    first = collective.rank == 0
    with tempfile.TemporaryDirectory(prefix="ace-fit-") as temporary:
        home = Path(temporary)
        resume = _resume(train.get_checkpoint(), home)
        if not (home / DONE_NAME).exists():
            (home / MODEL_NAME).mkdir()
            context = FitContext(
                settings=Settings.model_validate(config["settings"]),
                store=Store.open(config["store"]),
                inputs=config["inputs"],
                collective=collective,
                hooks=_hooks(collective, config["board"] if first else None, resume),
                device=str(get_device()),
                folder=home / MODEL_NAME,
            )
            try:
                metrics = config["fit"](context)
            except AceError as e:  # bad input stays bad: say so instead of trying again
                ray.get(config["board"].fail.remote(e))
                return
            (home / DONE_NAME).write_text(json.dumps(metrics))
        train.report({}, checkpoint=Checkpoint.from_directory(str(home)) if first else None)


def _resume(checkpoint: Any, home: Path) -> dict[str, Any] | None:
    """The state in a checkpoint. That of a fit which ended is copied to ``home``, to be handed over again."""
    if checkpoint is None:
        return None
    from safetensors.torch import load_file

    with checkpoint.as_directory() as folder:
        if (Path(folder) / DONE_NAME).exists():
            shutil.copytree(folder, home, dirs_exist_ok=True)
            return None
        return load_file(str(Path(folder) / STATE_NAME))


def _hooks(collective: Any, board: Any, resume: dict[str, Any] | None) -> Any:
    """Hooks of one worker.

    Every worker must call ``ray.train.report`` together, but only worker 0 knows when a checkpoint is due. It keeps the
    state, and the next progress call, which all workers make at the same step, agrees on it and reports.
    """
    import torch
    from ray import train
    from ray.train import Checkpoint
    from safetensors.torch import save_file

    from ace_core.fitting import FitHooks, Progress

    pending: list[dict[str, torch.Tensor]] = []

    def on_progress(progress: Progress) -> None:
        if board is not None:
            board.report.remote(progress)
        if not float(collective.all_reduce(torch.tensor([float(len(pending))]))[0]):
            return
        with tempfile.TemporaryDirectory(prefix="ace-state-") as folder:
            checkpoint = None
            if pending:
                save_file({k: v.contiguous() for k, v in pending.pop().items()}, str(Path(folder) / STATE_NAME))
                checkpoint = Checkpoint.from_directory(folder)
            train.report({}, checkpoint=checkpoint)

    def save_checkpoint(state: dict[str, torch.Tensor]) -> None:
        pending[:] = [state]

    return replace(FitHooks(), on_progress=on_progress, save_checkpoint=save_checkpoint, resume=resume)
