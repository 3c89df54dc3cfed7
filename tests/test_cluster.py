"""Work handed to actors on a real Ray: every row comes back once, whatever dies on the way."""

from __future__ import annotations

import atexit
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ace_core.config import ComputeSettings
from ace_core.errors import AceError, ModelError, SettingsError
from pipelines.cluster import MAX_DEATHS, Pool, cut, encoder_pool, ensure_ray, map_rows, worker_pool

pytestmark = pytest.mark.ray
POOL = Pool(count=2, threads=1, gpus=0)


class Doubles:
    """Doubles numbers. Dies on the number 30 as often as ``deaths`` says, without a word, as a decoder would."""

    def __init__(self, folder: str, deaths: int, refuse: bool = False) -> None:
        if refuse:
            raise ModelError("the model is not there", where="a/path", remedy="Download it.")
        self._folder, self._deaths = Path(folder), deaths

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for number in batch["number"].tolist():
            if number == 30 and len(list(self._folder.iterdir())) < self._deaths:
                (self._folder / os.urandom(4).hex()).touch()
                os._exit(1)
        return {"row": batch["row"], "doubled": 2 * batch["number"]}


def _table(count: int = 64) -> pa.Table:
    return pa.table({"row": np.arange(count), "number": np.arange(count)})


def test_batches_get_smaller_towards_the_end() -> None:
    sizes = [batch.num_rows for batch in cut(_table(1000), 32, 2)]
    assert sizes[:20] == [32] * 20 and sizes == sorted(sizes, reverse=True) and sum(sizes) == 1000
    assert sizes[-2] == 4  # an eighth
    work = _table(9).append_column("kind", pa.array(list("abbbbbbab")))
    batches = cut(work, {"b": 4, "a": 1}, 1)
    assert [b.column("number").to_pylist() for b in batches] == [[1, 2, 3, 4], [5, 6], [8], [0], [7]]


def test_every_row_comes_back_once_though_actors_die(ray_cluster: None, tmp_path: Path) -> None:
    results = list(map_rows(_table(), Doubles, POOL, 4, (str(tmp_path),), {"deaths": 2}))
    rows = np.concatenate([r["row"] for r in results])
    assert sorted(rows.tolist()) == list(range(64))
    np.testing.assert_array_equal(np.concatenate([r["doubled"] for r in results]), 2 * rows)
    assert len(list(tmp_path.iterdir())) == 2  # it did die twice


def test_actors_that_keep_dying_end_the_job_with_a_remedy(ray_cluster: None, tmp_path: Path) -> None:
    deadly = pa.table({"row": [0], "number": [30]})
    with pytest.raises(AceError, match=f"workers died {MAX_DEATHS + 1} times in a row") as error:
        list(map_rows(deadly, Doubles, POOL, 4, (str(tmp_path),), {"deaths": 99}))
    assert "compute.encoders" in error.value.remedy


def test_what_the_class_raises_arrives_as_it_was(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the model is not there") as error:
        list(map_rows(_table(), Doubles, POOL, 4, (str(tmp_path),), {"deaths": 0, "refuse": True}))
    assert (type(error.value), error.value.where, error.value.remedy) == (ModelError, "a/path", "Download it.")


def test_pools_follow_the_cluster_and_the_settings(ray_cluster: None) -> None:
    assert encoder_pool(ComputeSettings(), most=100) == Pool(2, 1, 0)  # 4 CPUs, two of them spare
    assert encoder_pool(ComputeSettings(), most=1) == Pool(1, 1, 0)
    assert encoder_pool(ComputeSettings(encoders=1, threads=3), most=9) == Pool(1, 3, 0)
    assert worker_pool(ComputeSettings()) == Pool(1, 2, 0)
    assert worker_pool(ComputeSettings(workers=2)) == Pool(2, 1, 0)
    assert worker_pool(ComputeSettings(workers=2, threads=2)) == Pool(2, 2, 0)


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (ComputeSettings(encoders=4), "4 encoders x 1 threads need 4 CPUs and 1 must stay free; Ray has 4"),
        (ComputeSettings(encoders=1, gpus_per_worker=1), "need 1 GPUs; Ray has 0"),
    ],
)
def test_encoders_that_cannot_be_started_are_refused(ray_cluster: None, compute: ComputeSettings, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        encoder_pool(compute, most=100)


def test_workers_that_cannot_be_started_are_refused(ray_cluster: None) -> None:
    with pytest.raises(SettingsError, match="5 workers x 1 threads need 5 CPUs; Ray has 4"):
        worker_pool(ComputeSettings(workers=5, threads=1))


def test_an_embedded_ray_leaves_other_clusters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an address Ray would join whatever cluster somebody started on this machine."""
    import ray

    asked: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda address=None, **_: asked.append(address))
    monkeypatch.setattr(atexit, "register", lambda function: None)
    ensure_ray(ComputeSettings())
    ensure_ray(ComputeSettings(address="10.0.0.1:6379"))
    assert asked == ["local", "10.0.0.1:6379"]


def test_an_embedded_ray_reports_to_nobody_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    ensure_ray(ComputeSettings(address="10.0.0.1:6379"))
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ  # a cluster's owner decides
    ensure_ray(ComputeSettings())
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    ensure_ray(ComputeSettings())
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
