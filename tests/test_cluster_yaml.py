"""cluster.yaml is accepted by Ray's own schema, and keeps Ray's ports private."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load(CLUSTER.read_text())


def _validate(config: dict) -> dict:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_accepts_cluster_yaml(cluster: dict) -> None:
    prepared = _validate(cluster)
    assert set(prepared["available_node_types"]) == {"head", "cpu", "gpu"}
    assert (
        sum(t.get("max_workers", 0) for n, t in cluster["available_node_types"].items() if n != "head")
        <= cluster["max_workers"]
    )


def test_ray_refuses_a_misspelt_key(cluster: dict) -> None:
    cluster["idle_timeout_minute"] = 3
    with pytest.raises(Exception, match="idle_timeout_minute"):
        _validate(cluster)


def test_ray_is_bound_privately_and_asks_for_a_token(cluster: dict) -> None:
    head, worker = cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    assert "RAY_AUTH_MODE=token" in head and "RAY_AUTH_MODE=token" in worker
    assert cluster["provider"]["use_internal_ips"] is True
