"""Checks Kubernetes files for KubeRay, first against its own definitions with unknown fields refused."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from jobs.cluster_file import ClusterFile, NodeKind, Where

_GPU = "nvidia.com/gpu"
_QUEUE = "kueue.x-k8s.io/queue-name"
_UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_VERSIONS = {
    "RayCluster": "ray.io/v1", "RayJob": "ray.io/v1", "Namespace": "v1", "ServiceAccount": "v1", "Service": "v1",
    "ConfigMap": "v1", "Secret": "v1", "PersistentVolumeClaim": "v1", "Deployment": "apps/v1",
    "NetworkPolicy": "networking.k8s.io/v1", "ResourceFlavor": "kueue.x-k8s.io/v1beta1",
    "ClusterQueue": "kueue.x-k8s.io/v1beta1", "LocalQueue": "kueue.x-k8s.io/v1beta1",
}  # fmt: skip


def check(cluster: ClusterFile, needed: dict[str, str]) -> None:
    """Note what is wrong with a file of Kubernetes objects, and the kinds of nodes of a Ray cluster in it.

    Args:
        cluster: the file; gets problems, kinds and a title.
        needed: versions that all pods have to run, by name: ray, ingot.
    """
    import jsonschema

    cluster.title = "Kubernetes: " + ", ".join(str(document.get("kind")) for document in cluster.documents)
    sound = {}
    for number, document in enumerate(cluster.documents):
        kind = document.get("kind")
        if not isinstance(kind, str):
            cluster.error(("kind",), f"is {kind!r}; it has to be one of {', '.join(_VERSIONS)}", number)
            continue
        if kind not in _VERSIONS:
            ours = str(document.get("apiVersion")).partition("/")[0] in ("ray.io", "kueue.x-k8s.io", "None")
            text = f"{kind} is not known here, and not checked; there are {', '.join(_VERSIONS)}"
            (cluster.error if ours else cluster.note)(("kind",), text, number)
            continue
        if document.get("apiVersion") != _VERSIONS[kind]:
            cluster.error(("apiVersion",), f"has to be {_VERSIONS[kind]} for a {kind}", number)
        problems = list(jsonschema.Draft7Validator(_schema(kind)).iter_errors(document))
        for problem in problems:
            cluster.error(tuple(problem.absolute_path), f"{kind} would be refused: {problem.message[:200]}", number)
        if problems:  # what follows takes everything to be where it belongs
            continue
        sound[number] = document
        for where, pod in _pods(document):
            _pod(cluster, where, pod, number)
        if kind == "RayCluster":
            _ray(cluster, ("spec",), document["spec"], number, needed)
        elif kind == "NetworkPolicy":
            _policy(cluster, document["spec"], number)
        elif kind == "RayJob":
            _job(cluster, document, number)
            if "rayClusterSpec" in document["spec"]:
                _ray(cluster, ("spec", "rayClusterSpec"), document["spec"]["rayClusterSpec"], number, needed)
    _queued(cluster, sound)


@functools.cache
def _schema(kind: str) -> dict[str, Any]:
    """JSON Schema of a kind of object: KubeRay's definitions, and parts of them for Kubernetes' own objects."""
    with open(os.path.join(os.path.dirname(__file__), "schemas", "kuberay.json"), encoding="utf-8") as file:
        definitions = json.load(file)["$defs"]

    def resolved(part: dict[str, Any]) -> dict[str, Any]:
        return resolved(definitions[part["$ref"].rpartition("/")[2]]) if "$ref" in part else part

    def at(*path: str) -> dict[str, Any]:
        part = definitions["RayCluster"]
        for name in ("properties", "spec", "properties", *path):
            part = resolved(part)[name]
        return part

    def fields(**properties: Any) -> dict[str, Any]:
        return {"type": "object", "properties": properties, "additionalProperties": False}

    text, texts = {"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}
    anything = {"type": "object"}
    number = {"type": "integer", "minimum": 0}
    selector = fields(matchLabels=texts, matchExpressions={"type": "array"})
    pod = at("headGroupSpec", "properties", "template")
    # KubeRay's definitions leave to Kubernetes what Kubernetes has always refused.
    resolved(pod)["required"] = ["spec"]
    resolved(at("headGroupSpec", "properties", "template", "properties", "spec", "properties", "containers"))[
        "minItems"
    ] = 1
    name = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?$"}
    metadata = {**fields(name=name, namespace=name, labels=texts, annotations=texts), "required": ["name"]}
    volumes = ("headGroupSpec", "properties", "template", "properties", "spec", "properties", "volumes")
    claim = at(*volumes, "items", "properties", "ephemeral", "properties", "volumeClaimTemplate", "properties", "spec")
    service = at("headGroupSpec", "properties", "headService", "properties", "spec")
    quota = fields(name=text, nominalQuota={"type": ["string", "integer"]}, borrowingLimit=text, lendingLimit=text)
    flavor = {**fields(name=text, resources={"type": "array", "items": quota}), "required": ["name", "resources"]}
    group = fields(
        coveredResources={"type": "array", "items": text}, flavors={"type": "array", "minItems": 1, "items": flavor}
    )
    bodies = {
        "Namespace": {},
        "ServiceAccount": {"automountServiceAccountToken": {"type": "boolean"}, "imagePullSecrets": {"type": "array"}},
        "Service": {"spec": service},
        "ConfigMap": {"data": texts, "immutable": {"type": "boolean"}},
        "Secret": {"data": texts, "stringData": texts, "type": text},
        "PersistentVolumeClaim": {"spec": claim},
        "Deployment": {
            "spec": fields(replicas=number, selector=selector, template=pod, revisionHistoryLimit=number,
                           strategy=fields(type={"enum": ["Recreate", "RollingUpdate"]}, rollingUpdate=anything)),
        },
        "NetworkPolicy": {
            "spec": fields(podSelector=selector,
                           policyTypes={"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
                           ingress=at("networkPolicy", "properties", "head", "properties", "ingressRules"),
                           egress=at("networkPolicy", "properties", "head", "properties", "egressRules")),
        },
        "ResourceFlavor": {
            "spec": fields(nodeLabels=texts, nodeTaints={"type": "array"}, topologyName=text,
                           tolerations=at("headGroupSpec", "properties", "template", "properties", "spec", "properties",
                                          "tolerations")),
        },
        "ClusterQueue": {
            "spec": fields(namespaceSelector=selector, resourceGroups={"type": "array", "items": group}, cohort=text,
                           queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]}, stopPolicy=text,
                           flavorFungibility=fields(whenCanBorrow=text, whenCanPreempt=text), fairSharing=anything,
                           preemption=fields(reclaimWithinCohort=text, withinClusterQueue=text,
                                             borrowWithinCohort=anything),
                           admissionChecks={"type": "array", "items": text}, admissionChecksStrategy=anything),
        },
        "LocalQueue": {"spec": fields(clusterQueue=text, stopPolicy=text, fairSharing=anything)},
    }  # fmt: skip
    if kind not in bodies:
        definitions[kind]["properties"]["metadata"] = metadata
        return {"$ref": f"#/$defs/{kind}", "$defs": definitions}
    whole = fields(apiVersion=text, kind=text, metadata=metadata, **bodies[kind])
    whole["required"] = ["metadata", *(["spec"] if "spec" in bodies[kind] else [])]
    return {**whole, "$defs": definitions}


def _policy(cluster: ClusterFile, spec: dict[str, Any], number: int) -> None:
    """A policy that lets everybody in is none."""
    for place, rule in enumerate(spec.get("ingress") or []):
        where = ("spec", "ingress", place)
        if not rule.get("from"):
            cluster.error(where, "says not from whom (`from`), and so lets everybody in", number)
        for peer in rule.get("from") or []:
            everywhere = peer.get("namespaceSelector") == {} and not peer.get("podSelector")
            block = str(peer.get("ipBlock", {}).get("cidr", ""))
            if everywhere or block.endswith("/0"):
                cluster.error(where, f"lets {block or 'the pods of all namespaces'} in", number)


def _pods(value: Any, where: Where = ()) -> Iterator[tuple[Where, dict[str, Any]]]:
    """Every pod's spec within a document: what has containers."""
    if isinstance(value, dict):
        if isinstance(value.get("containers"), list):
            yield where, value
            return
        for key, inner in value.items():
            yield from _pods(inner, (*where, key))
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _pods(inner, (*where, position))


def _pod(cluster: ClusterFile, where: Where, pod: dict[str, Any], number: int) -> None:
    """Nothing of the node's in a pod, volumes that exist, limits that are kept."""
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            cluster.error((*where, key), "gives the pod the node's own: take it out", number)
    volumes = {volume.get("name"): volume for volume in pod.get("volumes") or []}
    for position, volume in enumerate(volumes.values()):
        if "hostPath" in volume:
            text = "hostPath is a folder of one node: other pods see another, and it opens the node"
            cluster.error((*where, "volumes", position), text, number)
    user = pod.get("securityContext") or {}
    for position, container in enumerate(pod["containers"]):
        here = (*where, "containers", position)
        context = container.get("securityContext") or {}
        if context.get("privileged") or context.get("allowPrivilegeEscalation", True):
            text = "securityContext.allowPrivilegeEscalation: false is missing, or the container is privileged"
            cluster.error((*here, "securityContext"), text, number)
        if not (context.get("runAsNonRoot") or user.get("runAsNonRoot")):
            cluster.error(here, "securityContext.runAsNonRoot: true is missing, here or of the pod", number)
        for mount in container.get("volumeMounts") or []:
            if mount.get("name") not in volumes:
                cluster.error((*here, "volumeMounts"), f"the pod has no volume {mount.get('name')!r}", number)
        resources = container.get("resources") or {}
        requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
        for name in ("memory", _GPU):
            if requests.get(name) != limits.get(name):
                text = f"{name}: request {requests.get(name)} and limit {limits.get(name)} have to be equal"
                cluster.error((*here, "resources"), text, number)
        for volume in volumes.values():
            empty = volume.get("emptyDir") or {}
            if empty.get("medium") == "Memory" and _quantity(empty.get("sizeLimit", 0)) > _quantity(
                limits.get("memory", 0)
            ):
                cluster.error(here, f"volume {volume['name']} in memory is larger than the memory limit", number)


def _quantity(text: Any) -> float:
    """A quantity of Kubernetes, such as 500m, 4 or 16Gi, as a number; nan for what is none."""
    found = re.fullmatch(r"([\d.]+)([A-Za-z]{0,2})", str(text))
    if not found or (found[2] and found[2] not in _UNITS):
        return float("nan")
    return float(found[1]) * _UNITS.get(found[2], 1)


def _ray(cluster: ClusterFile, where: Where, spec: dict[str, Any], number: int, needed: dict[str, str]) -> None:
    """A Ray cluster: versions, who gets in, what its groups hold."""
    if spec.get("rayVersion") != needed["ray"]:
        text = f"is {spec.get('rayVersion')}, but Ingot needs Ray {needed['ray']}"
        cluster.error((*where, "rayVersion"), text, number)
    _closed(cluster, where, spec, number)
    if str(spec["headGroupSpec"].get("rayStartParams", {}).get("num-cpus")) != "0":
        text = 'num-cpus: "0" is missing: a job that fills the head\'s memory would take the cluster down'
        cluster.error((*where, "headGroupSpec", "rayStartParams"), text, number)
    scales = bool(spec.get("enableInTreeAutoscaling"))
    if scales and spec.get("autoscalerOptions", {}).get("version") != "v2":
        text = "version: v2 is missing: the older autoscaler knows no priorities, nor idle timeouts of a group"
        cluster.error((*where, "autoscalerOptions"), text, number)
    if (faults := spec.get("gcsFaultToleranceOptions")) is not None:
        redis = faults.get("backend", "redis") == "redis"
        if redis and not (faults.get("redisAddress") and faults.get("redisPassword", {}).get("valueFrom")):
            text = "redisAddress and redisPassword.valueFrom are needed"
            cluster.error((*where, "gcsFaultToleranceOptions"), text, number)
    groups = [((*where, "headGroupSpec"), {"groupName": "head", **spec["headGroupSpec"]})]
    groups += [((*where, "workerGroupSpecs", i), group) for i, group in enumerate(spec.get("workerGroupSpecs") or [])]
    names = [group["groupName"] for _, group in groups]
    for name in {name for name in names if names.count(name) > 1}:
        cluster.error((*where, "workerGroupSpecs"), f"there are two groups called {name}", number)
    mounts: list[dict[str, str]] = []
    for place, group in groups:
        _group(cluster, place, group, number, scales=scales)
        mounts.append(dict(_claims(group["template"]["spec"])))
    images = {group["template"]["spec"]["containers"][0].get("image", "") for _, group in groups}
    _images(cluster, where, images, number, needed)
    _shared(cluster, where, mounts, number)


def _closed(cluster: ClusterFile, where: Where, spec: dict[str, Any], number: int) -> None:
    """Nobody without the token, and no way in from outside of Kubernetes."""
    if spec.get("authOptions", {}).get("mode") != "token":
        text = "mode: token is missing: whoever reaches the head could run code on every node"
        cluster.error((*where, "authOptions"), text, number)
    head = spec["headGroupSpec"]
    service = head.get("headService", {}).get("spec", {}).get("type", head.get("serviceType", "ClusterIP"))
    if service != "ClusterIP":
        text = f"is {service}, which opens the head outside of Kubernetes; take ClusterIP and `kubectl port-forward`"
        cluster.error((*where, "headGroupSpec", "serviceType"), text, number)
    if head.get("enableIngress"):
        cluster.error((*where, "headGroupSpec", "enableIngress"), "opens the dashboard outside of Kubernetes", number)


def _images(cluster: ClusterFile, where: Where, images: set[str], number: int, needed: dict[str, str]) -> None:
    """One image for all pods, of the versions that are needed here."""
    if len(images) > 1:
        cluster.error(where, f"pods run unlike images: {', '.join(sorted(images))}", number)
    for image in images:
        found = re.search(r"(?:^|/)(ingot|ray(?:-ml)?):v?(\d+(?:\.\d+)+)", image)
        if found and found[2] != needed["ingot" if found[1] == "ingot" else "ray"]:
            version = f"{'Ingot' if found[1] == 'ingot' else 'Ray'} {needed['ingot' if found[1] == 'ingot' else 'ray']}"
            cluster.error(where, f"image {image}: here it is {version}", number)
        if ":" not in image.rpartition("/")[2] or image.endswith(":latest"):
            cluster.error(where, f"image {image} names no version: pods of one cluster could run unlike ones", number)


def _group(cluster: ClusterFile, where: Where, group: dict[str, Any], number: int, *, scales: bool) -> None:
    """The pods of a group as a kind of node."""
    head, name, pod = group["groupName"] == "head", group["groupName"], group["template"]["spec"]
    container = pod["containers"][0]
    limits = (container.get("resources") or {}).get("limits") or {}
    pod_path = (*where, "template", "spec")
    least, most, now = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1), group.get("replicas", 0)
    if head:
        least = most = now = 1
    elif not least <= now <= most:
        cluster.error(where, f"replicas {now} is not between minReplicas {least} and maxReplicas {most}", number)
    elif not scales and now == 0:
        cluster.error(where, "has 0 replicas, and without enableInTreeAutoscaling nothing adds any", number)
    if scales and not head and "maxReplicas" not in group:
        cluster.error(where, "maxReplicas is missing: nothing would bound the cost", number)
    if not head and scales and least:
        cluster.note((*where, "minReplicas"), f"{least} pods stay, and cost, when there is no work", number)
    for resource in ("cpu", "memory"):
        if resource not in limits or _quantity(limits[resource]) != _quantity(limits[resource]):
            text = f"limits.{resource} has to be given: it is what Ray takes the node to have"
            cluster.error((*pod_path, "containers", 0, "resources"), text, number)
            return
    if scales and pod.get("restartPolicy") != "Never":
        text = "has to be Never: autoscaler v2 takes a container that restarts for another node"
        cluster.error((*pod_path, "restartPolicy"), text, number)
    gpus = int(_quantity(limits.get(_GPU, 0)))
    for key, resource in (("num-cpus", limits["cpu"]), ("num-gpus", gpus)):
        said = (group.get("rayStartParams") or {}).get(key)
        if said is not None and not head and float(said) > _quantity(resource):
            text = f"{key} is {said}, but the container's limit is {resource}"
            cluster.error((*where, "rayStartParams"), text, number)
    _ready(cluster, pod_path, pod, number, gpus=gpus, head=head)
    selector = pod.get("nodeSelector") or {}
    machine = selector.get("node.kubernetes.io/instance-type", name)
    market = "spot" if "spot" in name or "spot" in json.dumps(selector).lower() else "on demand"
    if not head and market == "on demand" and any("spot" in json.dumps(t) for t in pod.get("tolerations") or []):
        market = "either" if "on-demand" not in name else market
    cluster.kinds.append(
        NodeKind(
            name, machine, least, most, 0 if head else _quantity(limits["cpu"]), 0 if head else gpus,
            memory=_quantity(limits["memory"]) / 2**30, market=market, head=head, priority=group.get("priority", 0),
            where=where,
        )
    )  # fmt: skip


def _ready(cluster: ClusterFile, where: Where, pod: dict[str, Any], number: int, *, gpus: int, head: bool) -> None:
    """What GPUs ask of a pod, and what it does when it is told to go."""
    container = pod["containers"][0]
    mounts = {mount["mountPath"] for mount in container.get("volumeMounts") or []}
    if gpus and "/dev/shm" not in mounts:  # noqa: S108
        text = "no volume in memory is mounted for shared memory: what it has otherwise, 64 MB, is too little for NCCL"
        cluster.error((*where, "containers", 0), text, number)
    if gpus and not any(toleration.get("key") == _GPU for toleration in pod.get("tolerations") or []):
        cluster.note(where, f"no toleration of {_GPU}: nodes with GPUs often refuse pods without one", number)
    stop = json.dumps(container.get("lifecycle", {}).get("preStop", {}))
    if not head and not re.search(r"drain", stop):
        text = "lifecycle.preStop drains nothing: a pod that is told to go takes its work with it"
        cluster.note((*where, "containers", 0), text, number)
    waits = [float(seconds) for seconds in re.findall(r"sleep (\d+)", stop)]
    if waits and sum(waits) >= (grace := pod.get("terminationGracePeriodSeconds", 30)):
        text = f"is {grace} s, less than preStop waits ({sum(waits):g} s)"
        cluster.error((*where, "terminationGracePeriodSeconds"), text, number)


def _claims(pod: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Where a pod's first container mounts claims, and which."""
    claims = {
        volume["name"]: volume["persistentVolumeClaim"]["claimName"]
        for volume in pod.get("volumes") or []
        if "persistentVolumeClaim" in volume
    }
    for mount in pod["containers"][0].get("volumeMounts") or []:
        if mount["name"] in claims:
            yield mount["mountPath"], claims[mount["name"]]


def _shared(cluster: ClusterFile, where: Where, mounts: list[dict[str, str]], number: int) -> None:
    """Folders that all pods mount from the same claim, which has to let several nodes write."""
    modes = {
        (document.get("metadata") or {}).get("name"): (document.get("spec") or {}).get("accessModes", [])
        for document in cluster.documents
        if document.get("kind") == "PersistentVolumeClaim"
    }
    for path, claim in set(mounts[0].items()):
        if any(others.get(path) != claim for others in mounts):
            cluster.error(where, f"not all pods mount the claim {claim} at {path}", number)
        elif claim in modes and "ReadWriteMany" not in modes[claim]:
            cluster.error(where, f"the claim {claim} is not ReadWriteMany: other nodes cannot mount it", number)
        else:
            cluster.shared.append(path)


def _job(cluster: ClusterFile, document: dict[str, Any], number: int) -> None:
    """A job: it runs Ingot, ends its cluster, and can be queued."""
    from jobs.cli import JOBS

    spec = document["spec"]
    names = re.findall(r"(?:-m jobs|\bingot) ([a-z]+)", spec.get("entrypoint", ""))
    for name in names or [""]:
        if name not in JOBS:
            cluster.error(("spec", "entrypoint"), f"runs no job of Ingot; there are {', '.join(JOBS)}", number)
    cluster.jobs = [*(cluster.jobs or []), *names]
    modes = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    if spec.get("submissionMode", modes[0]) not in modes:
        cluster.error(("spec", "submissionMode"), f"has to be one of {', '.join(modes)}", number)
    if not spec.get("shutdownAfterJobFinishes") and "clusterSelector" not in spec:
        cluster.error(("spec",), "shutdownAfterJobFinishes: true is missing: the cluster would stay, and cost", number)
    if _QUEUE not in (document["metadata"].get("labels") or {}):
        return
    if "clusterSelector" in spec:
        cluster.error(("spec", "clusterSelector"), "Kueue queues no job on a cluster that is there already", number)
    elif "rayClusterSpec" not in spec:
        cluster.error(("spec",), "rayClusterSpec is missing: Kueue queues a job with a cluster of its own", number)
    elif spec["rayClusterSpec"].get("enableInTreeAutoscaling"):
        where = ("spec", "rayClusterSpec", "enableInTreeAutoscaling")
        cluster.error(where, "Kueue admits a job as a whole: its pods cannot come and go", number)
    elif len(spec["rayClusterSpec"].get("workerGroupSpecs") or []) > 7:
        cluster.error(("spec", "rayClusterSpec", "workerGroupSpecs"), "Kueue takes at most 7 groups", number)


def _queued(cluster: ClusterFile, documents: dict[int, dict[str, Any]]) -> None:
    """Kueue's objects name each other."""
    by_kind: dict[str, set[str]] = {}
    for document in documents.values():
        by_kind.setdefault(document["kind"], set()).add(document["metadata"]["name"])
    for number, document in documents.items():
        if document.get("kind") == "ClusterQueue" and "ResourceFlavor" in by_kind:
            for place, group in enumerate((document.get("spec") or {}).get("resourceGroups") or []):
                where = ("spec", "resourceGroups", place)
                for flavor in group.get("flavors") or []:
                    if flavor.get("name") not in by_kind["ResourceFlavor"]:
                        cluster.error(where, f"there is no ResourceFlavor {flavor.get('name')}", number)
                    resources = [resource.get("name") for resource in flavor.get("resources") or []]
                    if resources != group.get("coveredResources"):
                        text = (
                            f"flavor {flavor.get('name')} has to list {', '.join(group.get('coveredResources') or [])}"
                        )
                        cluster.error(where, text, number)
        if document.get("kind") == "LocalQueue" and "ClusterQueue" in by_kind:
            name = (document.get("spec") or {}).get("clusterQueue")
            if name not in by_kind["ClusterQueue"]:
                cluster.error(("spec", "clusterQueue"), f"there is no ClusterQueue {name}", number)
