"""What the manifests under deploy/ may say: names and types of fields of the KubeRay v1 API (RayJob, RayService and the
RayCluster in them) and of a Kubernetes pod, restated from their published definitions as far as they are used.
Other keys are refused, as a strict API server refuses them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, StringConstraints

Quantity = Annotated[str, StringConstraints(strict=True, pattern=r"^[0-9]+(\.[0-9]+)?([KMGTPE]i|[numkMGTPE])?$")]
Name = Annotated[str, StringConstraints(strict=True, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Metadata(Strict):
    name: Name
    namespace: Name | None = None
    labels: dict[str, StrictStr] = {}
    annotations: dict[str, StrictStr] = {}


class Reference(Strict):
    name: Name
    optional: StrictBool = False


class EnvFrom(Strict):
    secretRef: Reference | None = None
    configMapRef: Reference | None = None


class Variable(Strict):
    name: StrictStr
    value: StrictStr


class Mount(Strict):
    name: Name
    mountPath: StrictStr
    readOnly: StrictBool = False


class Resources(Strict):
    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}


class Container(Strict):
    name: Name
    image: StrictStr
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    resources: Resources = Resources()
    env: list[Variable] = []
    envFrom: list[EnvFrom] = []
    volumeMounts: list[Mount] = []


class ConfigMapSource(Strict):
    name: Name


class SecretSource(Strict):
    secretName: Name


class Volume(Strict):
    name: Name
    configMap: ConfigMapSource | None = None
    secret: SecretSource | None = None


class PodSpec(Strict):
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume] = []
    serviceAccountName: Name | None = None


class PodTemplate(Strict):
    spec: PodSpec


class HeadGroup(Strict):
    rayStartParams: dict[str, StrictStr] = {}
    template: PodTemplate


class WorkerGroup(HeadGroup):
    groupName: Name
    replicas: StrictInt = 0
    minReplicas: StrictInt
    maxReplicas: StrictInt


class AutoscalerOptions(Strict):
    idleTimeoutSeconds: StrictInt | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None


class RayCluster(Strict):
    rayVersion: StrictStr
    enableInTreeAutoscaling: StrictBool = False
    autoscalerOptions: AutoscalerOptions | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = []


class RayJobSpec(Strict):
    entrypoint: StrictStr
    runtimeEnvYAML: StrictStr | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode"] = "K8sJobMode"
    backoffLimit: StrictInt = 0
    activeDeadlineSeconds: StrictInt | None = None
    shutdownAfterJobFinishes: StrictBool = False
    ttlSecondsAfterFinished: StrictInt = 0
    rayClusterSpec: RayCluster


class RayServiceSpec(Strict):
    serveConfigV2: StrictStr
    rayClusterConfig: RayCluster


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class RayService(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


class ConfigMap(Strict):
    apiVersion: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: dict[str, StrictStr]


KINDS: dict[str, type[Strict]] = {"RayJob": RayJob, "RayService": RayService, "ConfigMap": ConfigMap}
