"""The manifests under deploy/ are what KubeRay, Ray Serve and ACE each accept, and agree with each other."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import ValidationError
from typer.core import TyperGroup

from ace_core.config import Settings
from ace_core.settings_file import load_settings
from pipelines import cli
from tests.kuberay import KINDS, PodSpec, RayCluster

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
FILES = ("rayjob.yaml", "rayservice.yaml")


def _documents(name: str) -> dict[str, dict[str, Any]]:
    return {d["kind"]: d for d in yaml.safe_load_all((DEPLOY / name).read_text())}


def _clusters() -> list[RayCluster]:
    job = KINDS["RayJob"].model_validate(_documents("rayjob.yaml")["RayJob"])
    service = KINDS["RayService"].model_validate(_documents("rayservice.yaml")["RayService"])
    return [job.spec.rayClusterSpec, service.spec.rayClusterConfig]  # type: ignore[attr-defined]


def _pods(cluster: RayCluster) -> list[PodSpec]:
    return [g.template.spec for g in (cluster.headGroupSpec, *cluster.workerGroupSpecs)]


@pytest.mark.parametrize("name", FILES)
def test_every_document_is_of_its_kind(name: str) -> None:
    for kind, document in _documents(name).items():
        KINDS[kind].model_validate(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "entrypont"), "x"),
        (("spec", "shutdownAfterJobFinishes"), "yes"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers"), []),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
    ],
)
def test_mistakes_are_refused(path: tuple[str, ...], value: object) -> None:
    document = _documents("rayjob.yaml")["RayJob"]
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ValidationError):
        KINDS["RayJob"].model_validate(document)


def test_volumes_images_and_versions_agree() -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    version = yaml.safe_load(f"v: {(ROOT / 'pyproject.toml').read_text().split('version = ')[1].split()[0]}")["v"]
    assert f"BASE=rayproject/ray:{pinned[1]}-py311" in (DEPLOY / "Dockerfile").read_text()
    for cluster in _clusters():
        assert cluster.rayVersion == pinned[1]
        assert cluster.headGroupSpec.rayStartParams["num-cpus"] == "0"
        assert all(g.minReplicas <= g.replicas <= g.maxReplicas for g in cluster.workerGroupSpecs)
        for pod in _pods(cluster):
            volumes = {v.name for v in pod.volumes}
            for container in pod.containers:
                assert {m.name for m in container.volumeMounts} <= volumes
                assert container.image == f"ace:{version}"
                assert container.resources.requests == container.resources.limits  # what Ray is told is what it has


def test_the_job_runs_commands_that_exist_on_settings_that_are_accepted(tmp_path: Path) -> None:
    documents = _documents("rayjob.yaml")
    path = tmp_path / "ace.yaml"
    path.write_text(documents["ConfigMap"]["data"]["ace.yaml"])
    assert load_settings(path).compute.address == "auto" and "://" in load_settings(path).store
    shell = shlex.split(documents["RayJob"]["spec"]["entrypoint"])
    assert shell[:2] == ["bash", "-c"]
    commands = [shlex.split(line) for line in shell[2].split("&&")]
    assert [c[1:-2] for c in commands] == [["ingest"], ["fit", "all"], ["publish"]]
    mount = documents["RayJob"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    for words in commands:
        assert words[0] == "ace" and words[-1] == mount["volumeMounts"][0]["mountPath"] + "/ace.yaml"
        command: Any = typer.main.get_command(cli.app)
        context, rest = command.make_context("ace", words[1:]), words[1:]
        while isinstance(command, TyperGroup):
            name, command, rest = command.resolve_command(context, rest)
            context = command.make_context(name, list(rest), parent=context)
        assert context.params["config"] == Path(words[-1])


def test_serve_and_ace_accept_the_service() -> None:
    from ray.serve.schema import ServeDeploySchema

    document = _documents("rayservice.yaml")["RayService"]["spec"]
    config = yaml.safe_load(document["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    settings = Settings.model_validate(config["applications"][0]["args"])
    assert config["http_options"]["host"] == "0.0.0.0" and settings.serve.keys_file is not None  # open only with keys
    for pod in _pods(_clusters()[1]):
        mounted = {m.mountPath for c in pod.containers for m in c.volumeMounts}
        assert str(Path(settings.serve.keys_file).parent) in mounted
