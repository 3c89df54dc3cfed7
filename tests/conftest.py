"""Shared fixtures: one Ray for the whole session."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.world", "tests.serving_http", "tests.browsing"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # waiting threads sleep: spinning ones stall everything on a busy machine
# For the S3 server below, and for Ray's workers, which inherit them.
os.environ |= {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}

# The same examples in every run, however slow the machine: a new one must not stop a change that has nothing to do with
# it. `--hypothesis-profile=default` draws new ones.
settings.register_profile(
    "ace", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("ace")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Unseeded draws depend on no test before: alone, in any order and in the whole suite they are the same."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (transformers draws from it)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray on this machine; four logical CPUs, so that small machines do not deadlock."""
    import ray

    ray.init(
        address="local",  # not a cluster that something else runs on this machine
        num_cpus=4,
        object_store_memory=500_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ingestion without Ray: its transform is called in this process, batch by batch."""
    from pipelines.cluster import Pool, cut

    def map_rows(work, transform, pool, batch_size, args, kwargs, *, lost=None):  # type: ignore[no-untyped-def]
        instance = transform(*args, **kwargs)
        for batch in cut(work, batch_size, pool.count):
            yield instance({name: batch.column(name).to_numpy(zero_copy_only=False) for name in batch.column_names})

    monkeypatch.setattr("pipelines.ingest.ensure_ray", lambda compute: None)
    monkeypatch.setattr("pipelines.ingest.encoder_pool", lambda compute, most: Pool(1, 1, 0))
    monkeypatch.setattr("pipelines.ingest.map_rows", map_rows)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A real S3 server (moto's) with a bucket called ``bucket``: the options to put behind ``s3://bucket/...``."""
    import boto3
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    # S3 looks at a condition and writes in one step; moto in two, between which another thread may write.
    put, one_at_a_time = S3Response.put_object, threading.Lock()

    def put_object(self):  # type: ignore[no-untyped-def]
        with one_at_a_time:
            return put(self)

    S3Response.put_object = put_object  # type: ignore[method-assign]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="bucket")
    yield f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()
    S3Response.put_object = put  # type: ignore[method-assign]
