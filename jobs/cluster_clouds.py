"""What each cloud, or a list of machines, asks of a file of ``ray up``, as far as it can be known without asking it."""

from __future__ import annotations

import functools
import ipaddress
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from jobs.cluster_file import ClusterFile, NodeKind, Where
from jobs.machine_types import machine

COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
SMALLEST_DISK = 100  # GB: the image, PyTorch with CUDA, and room for Ray to spill


def check(cluster: ClusterFile, config: dict[str, Any], prepared: dict[str, Any]) -> None:
    """Note what is wrong with the nodes of a file that Ray accepts, and what kinds there are.

    Args:
        cluster: the file.
        config: its content.
        prepared: the same as Ray fills it in.
    """
    provider = config["provider"]["type"]
    if provider == "local":
        _machines(cluster, config)
        return
    _cloud = {"aws": _aws, "gcp": _google, "azure": _azure}[provider]
    _network(cluster, config, provider)
    commands = [command for key in COMMANDS for command in config.get(key) or []]
    for path in cluster.shared:
        if not any(re.search(r"\bmount\b", command) and path in command for command in commands):
            cluster.error((), f"# shared: {path}: no command mounts it on the nodes")
    head = prepared["head_node_type"]
    for name, node in prepared["available_node_types"].items():
        where = ("available_node_types", name)
        held, market = _cloud(cluster, (*where, "node_config"), node["node_config"])
        if not held:
            continue
        kind = _kind(cluster, where, node, held, provider)
        kind.market = market
        kind.head = name == head
        if kind.head:
            kind.least = kind.most = 1
        cluster.kinds.append(kind)
    _pools(cluster, config, provider)


def _kind(cluster: ClusterFile, where: Where, node: dict[str, Any], type_name: str, provider: str) -> NodeKind:
    """A kind of node, whose resources have to be what its machine has."""
    resources, held = node["resources"], machine(type_name)
    name = str(where[-1])
    kind = NodeKind(
        name, type_name, node["min_workers"], node["max_workers"], resources.get("CPU"), resources.get("GPU"),
        priority=node.get("priority", 0), where=where,
    )  # fmt: skip
    if min(node["min_workers"], node["max_workers"]) < 0:
        cluster.error((*where, "min_workers"), "and max_workers have to be 0 or more")
    if node["min_workers"] > node["max_workers"]:
        cluster.error((*where, "min_workers"), f"is above max_workers, {node['max_workers']}")
    if held is None:
        if kind.cpus is None:
            text = f"CPU and GPU have to be said: what {type_name} has is not known here"
            (cluster.error if provider != "aws" else cluster.note)((*where, "resources"), text)
        kind.gpus = kind.gpus or 0
        return kind
    kind.accelerator, kind.memory = held.accelerator, held.memory
    if provider == "aws":  # Ray asks AWS what the machine has
        kind.cpus = held.cpus if kind.cpus is None else kind.cpus
        kind.gpus = held.gpus if kind.gpus is None else kind.gpus
    if kind.cpus is None:
        cluster.error((*where, "resources"), f"CPU is missing; {type_name} has {held.cpus}")
    elif kind.cpus > held.cpus:
        cluster.error((*where, "resources", "CPU"), f"is {kind.cpus}, but {type_name} has {held.cpus}")
    if (kind.gpus or 0) != held.gpus:
        cluster.error((*where, "resources", "GPU"), f"is {kind.gpus or 0}, but {type_name} has {held.gpus}")
    for resource in resources:
        if resource.startswith("accelerator_type:") and resource.partition(":")[2] != held.accelerator:
            text = f"{type_name} has {held.accelerator or 'no GPU'}"
            cluster.error((*where, "resources", resource), text)
    if resources.get("memory", 0) > held.memory * 2**30:
        text = f"is {resources['memory']} bytes, but {type_name} has {held.memory:g} GiB"
        cluster.error((*where, "resources", "memory"), text)
    kind.gpus = kind.gpus or 0
    return kind


def _pools(cluster: ClusterFile, config: dict[str, Any], provider: str) -> None:
    """What holds between kinds of nodes: a head that does no work, spot with a way out, one GPU at a time."""
    for kind in cluster.kinds:
        if kind.head and kind.cpus:
            text = "the head offers CPUs: a job that fills its memory takes the cluster down; set CPU: 0"
            cluster.note((*kind.where, "resources"), text)
        if not kind.head and kind.least:
            cluster.note((*kind.where, "min_workers"), f"{kind.least} nodes stay, and cost, when there is no work")
        fallback = [other for other in cluster.workers() if other.machine == kind.machine and other.market != "spot"]
        if kind.market == "spot" and kind.most and not fallback:
            cluster.note(kind.where, "when no spot machine can be had, nothing takes its place")
        if kind.market == "spot" and any(other.priority >= kind.priority for other in fallback):
            cluster.error((*kind.where, "priority"), "has to be above that of the same machine on demand")
    working = [kind for kind in cluster.workers() if kind.gpus]
    if len(machines := sorted({kind.machine for kind in working})) > 1:
        text = f"nodes with unlike GPUs may start for one run, at the speed of the slowest: {', '.join(machines)}"
        cluster.note(("available_node_types",), text)
    starts = " ".join(config.get("worker_start_ray_commands", []))
    watched = re.search(rf"jobs\.spot_watch\b.*--cloud[= ]{provider}\b", starts)
    if any(kind.market == "spot" for kind in cluster.workers()) and not watched:
        text = f"no `python -m jobs.spot_watch --cloud {provider}`: spot machines go without a last checkpoint"
        cluster.note(("worker_start_ray_commands",), text)
    heads = " ".join(config.get("head_start_ray_commands", []))
    if any(kind.priority for kind in cluster.kinds) and "RAY_enable_autoscaler_v2=1" not in heads:
        text = "RAY_enable_autoscaler_v2=1 is missing: the older autoscaler knows no priorities, nor timeouts of a kind"
        cluster.error(("head_start_ray_commands",), text)
    if "--autoscaling-config" not in heads:
        text = "--autoscaling-config=~/ray_bootstrap_config.yaml is missing: no node would ever be added"
        cluster.error(("head_start_ray_commands",), text)


def _network(cluster: ClusterFile, config: dict[str, Any], provider: str) -> None:
    """No node with an address outside, and no port open to others than named networks."""
    settings = config["provider"]
    if not settings.get("use_internal_ips"):
        cluster.error(("provider",), "use_internal_ips: true is missing: nodes would get addresses outside")
    if settings.get("use_external_head_ip"):
        text = "gives the head an address outside, and Ray's rule for it lets ssh in from anywhere"
        cluster.error(("provider", "use_external_head_ip"), text)
    if settings.get("cache_stopped_nodes", provider != "gcp"):
        text = "cache_stopped_nodes: false is missing: stopped nodes would go on paying for their disks"
        cluster.error(("provider",), text)
    if provider == "aws":
        for name, node in config["available_node_types"].items():
            if not node["node_config"].get("SecurityGroupIds"):
                text = "SecurityGroupIds is missing: the group that Ray would make lets ssh in from everywhere"
                cluster.error(("available_node_types", name, "node_config"), text)


def _disk(cluster: ClusterFile, where: Where, size: Any) -> None:
    if not isinstance(size, int) or size < SMALLEST_DISK:
        text = f"a disk of {size if size else 'the default number of'} GB is too small; take {SMALLEST_DISK} or more"
        cluster.error(where, text)


def _aws(cluster: ClusterFile, where: Where, node: dict[str, Any]) -> tuple[str, str]:
    """A node's request as the EC2 client would take it, and what is missing to make it safe."""
    if not _like_run_instances(cluster, where, node):
        return "", "on demand"
    name = node.get("InstanceType", "")
    if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
        text = "MetadataOptions.HttpTokens has to be `required`: without, a download could ask for credentials"
        cluster.error(where, text)
    if "IamInstanceProfile" not in node:
        cluster.error(where, "IamInstanceProfile is missing: the node could not reach the bucket")
    disks = [disk.get("Ebs", {}) for disk in node.get("BlockDeviceMappings", [])]
    _disk(cluster, where, max((disk.get("VolumeSize", 0) for disk in disks), default=0))
    if not all(disk.get("Encrypted") for disk in disks):
        cluster.error((*where, "BlockDeviceMappings"), "disks have to be encrypted (Ebs.Encrypted: true)")
    for interface in node.get("NetworkInterfaces", []):
        if interface.get("AssociatePublicIpAddress"):
            cluster.error((*where, "NetworkInterfaces"), "gives the node an address outside")
    return name, "spot" if node.get("InstanceMarketOptions", {}).get("MarketType") == "spot" else "on demand"


def _like_run_instances(cluster: ClusterFile, where: Where, node: dict[str, Any]) -> bool:
    """Whether every field is where it belongs, and of its type, as far as can be told."""
    try:
        from botocore.validate import ParamValidator

        shape = _run_instances()
    except ImportError:
        cluster.note(where[:1], "boto3 is not installed (pip install 'ingot[aws]'): fields of EC2 are not checked")
        return True
    report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node}, shape)
    for line in report.generate_report().splitlines():
        cluster.error(where, f"EC2 would refuse it: {line}")
    for path, value, allowed in _not_in_enum(node, shape):
        near = [known for known in allowed if known.partition(".")[0] == str(value).partition(".")[0]][:8]
        hint = f"; there are {', '.join(near or allowed[:8])}, …"
        cluster.error((*where, *path), f"EC2 knows no {value!r}{hint}")
    return not report.has_errors()


@functools.cache
def _run_instances() -> Any:
    """What the request that starts a machine may hold, as botocore knows it."""
    from botocore.session import get_session

    return get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _not_in_enum(value: Any, shape: Any) -> Iterator[tuple[Where, Any, list[str]]]:
    """Values that botocore's shape enumerates and that are not among them, which its validator lets pass."""
    if shape.type_name == "structure" and isinstance(value, dict):
        for key, inner in value.items():
            if key in shape.members:
                for path, found, allowed in _not_in_enum(inner, shape.members[key]):
                    yield (key, *path), found, allowed
    elif shape.type_name == "list" and isinstance(value, list):
        for number, inner in enumerate(value):
            for path, found, allowed in _not_in_enum(inner, shape.member):
                yield (number, *path), found, allowed
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield (), value, shape.enum


def _fields(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


_TEXT, _FLAG = {"type": "string"}, {"type": "boolean"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}


def _all(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


# What nodes are usually made of, for when Google's client, which holds the whole description, is not installed.
_USUAL_INSTANCE = _fields(
    machineType=_TEXT, minCpuPlatform=_TEXT, description=_TEXT, canIpForward=_FLAG, labels=_TEXTS,
    disks=_all(_fields(boot=_FLAG, autoDelete=_FLAG, type={"enum": ["PERSISTENT", "SCRATCH"]}, deviceName=_TEXT,
                       interface=_TEXT, mode=_TEXT, source=_TEXT, diskSizeGb={"type": ["integer", "string"]},
                       initializeParams=_fields(diskSizeGb={"type": ["integer", "string"]}, diskType=_TEXT,
                                                sourceImage=_TEXT, labels=_TEXTS))),
    networkInterfaces=_all(_fields(network=_TEXT, subnetwork=_TEXT, nicType=_TEXT, stackType=_TEXT,
                                   accessConfigs={"type": "array"}, aliasIpRanges={"type": "array"})),
    scheduling=_fields(provisioningModel={"enum": ["SPOT", "STANDARD", "FLEX_START", "RESERVATION_BOUND"]},
                       instanceTerminationAction={"enum": ["DELETE", "STOP"]}, preemptible=_FLAG,
                       onHostMaintenance={"enum": ["MIGRATE", "TERMINATE"]}, automaticRestart=_FLAG,
                       maxRunDuration={"type": "object"}),
    metadata=_fields(items=_all(_fields(key=_TEXT, value=_TEXT))), tags=_fields(items=_all(_TEXT)),
    serviceAccounts=_all(_fields(email=_TEXT, scopes=_all(_TEXT))),
    guestAccelerators=_all(_fields(acceleratorType=_TEXT, acceleratorCount={"type": "integer"})),
    shieldedInstanceConfig=_fields(enableSecureBoot=_FLAG, enableVtpm=_FLAG, enableIntegrityMonitoring=_FLAG),
    reservationAffinity={"type": "object"}, resourcePolicies=_all(_TEXT), networkPerformanceConfig={"type": "object"},
    confidentialInstanceConfig={"type": "object"}, advancedMachineFeatures={"type": "object"},
)  # fmt: skip


def _google(cluster: ClusterFile, where: Where, node: dict[str, Any]) -> tuple[str, str]:
    """A node's fields against Compute Engine's, and what would make it fail or open it."""
    import jsonschema

    schema = _compute_engine()
    if schema is None:
        text = "Google's client is not installed (pip install 'ingot[gcp]'): only the usual fields are known"
        cluster.note(where[:1], text)
    fields = {key: value for key, value in node.items() if key != "sourceInstanceTemplate"}
    refused = list(jsonschema.Draft7Validator(schema or _USUAL_INSTANCE).iter_errors(fields))
    for error in refused:
        cluster.error((*where, *error.absolute_path), f"Compute Engine would refuse it: {error.message[:200]}")
    if refused:
        return "", "on demand"
    name = node.get("machineType", "").rpartition("/")[2]
    if not name:
        cluster.error(where, "machineType is missing")
    interfaces = node.get("networkInterfaces")
    if not interfaces or any("accessConfigs" in interface for interface in interfaces):
        text = "networkInterfaces without accessConfigs have to be given: Ray's own give the node an address outside"
        cluster.error(where, text)
    disks = [disk.get("initializeParams", {}) for disk in node.get("disks", [])]
    _disk(cluster, where, max((int(disk.get("diskSizeGb", 0)) for disk in disks), default=0))
    zone = cluster.documents[0]["provider"]["availability_zone"]
    for number, disk in enumerate(disks):
        if (found := re.match(r"(?:.*/)?zones/([^/]+)/", str(disk.get("diskType", "")))) and found[1] != zone:
            text = f"the disk is of zone {found[1]}, the nodes are in {zone}"
            cluster.error((*where, "disks", number, "initializeParams", "diskType"), text)
    if cluster.documents[0].get("head_node_type") != where[1] and not node.get("serviceAccounts"):
        cluster.error(where, "serviceAccounts is missing: Ray gives one to the head only, and workers need the bucket")
    scheduling = node.get("scheduling", {})
    held = machine(name)
    if held and held.gpus and scheduling.get("onHostMaintenance") != "TERMINATE":
        cluster.error((*where, "scheduling"), "onHostMaintenance has to be TERMINATE for machines with GPUs")
    spot = scheduling.get("provisioningModel") == "SPOT" or scheduling.get("preemptible")
    if spot and scheduling.get("automaticRestart", True):
        cluster.error((*where, "scheduling"), "automaticRestart has to be false for spot machines")
    return name, "spot" if spot else "on demand"


@functools.cache
def _compute_engine() -> dict[str, Any] | None:
    """Google's description of an instance, which its client brings, as JSON Schema; None without the client."""
    try:
        import googleapiclient
    except ImportError:
        return None
    folder = os.path.dirname(googleapiclient.__file__)
    with open(os.path.join(folder, "discovery_cache", "documents", "compute.v1.json"), encoding="utf-8") as file:
        document = json.load(file)
    definitions = {name: _json_schema(schema) for name, schema in document["schemas"].items()}
    return {"definitions": definitions, "$ref": "#/definitions/Instance"}


def _json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return {"$ref": f"#/definitions/{schema['$ref']}"}
    out = {key: schema[key] for key in ("type", "enum") if key in schema and schema[key] != "any"}
    if out.get("type") == "string" and schema.get("format") in ("int64", "uint64"):
        out["type"] = ["string", "integer"]  # 64 bits do not fit into JSON's numbers, but YAML's are taken
    others = schema.get("additionalProperties")
    if "properties" in schema:
        out["properties"] = {name: _json_schema(field) for name, field in schema["properties"].items()}
        out["additionalProperties"] = _json_schema(others) if others else False
    elif others:
        out["additionalProperties"] = _json_schema(others)
    if "items" in schema:
        out["items"] = _json_schema(schema["items"])
    return out


def _azure(cluster: ClusterFile, where: Where, node: dict[str, Any]) -> tuple[str, str]:
    """A node's parameters against Ray's own template of a virtual machine."""
    from ray.autoscaler import _private

    for key in set(node) - {"azure_arm_parameters", "tags"}:
        cluster.error((*where, key), "Ray reads only azure_arm_parameters and tags for a node of Azure")
    path = os.path.join(os.path.dirname(_private.__file__), "_azure", "azure-vm-template.json")
    with open(path, encoding="utf-8") as file:
        template = json.load(file)["parameters"]
    filled_in = {"vmName", "vmTags", "vmCount", "provisionPublicIp", "msi", "nsg", "subnet", "zones"}
    filled_in |= {"adminUsername", "publicKey"}
    known = {
        **{key: value["type"] for key, value in template.items() if key not in filled_in},
        "availability_zone": "string",
    }
    types = {"string": str, "securestring": str, "int": int, "bool": bool, "object": dict, "array": list}
    parameters, where = node.get("azure_arm_parameters"), (*where, "azure_arm_parameters")
    if not isinstance(parameters, dict):
        cluster.error(where, "has to say what the machine is: vmSize and an image")
        return "", "on demand"
    before = len(cluster.problems)
    for key, value in parameters.items():
        if key not in known:
            cluster.error((*where, key), f"Ray's template has no such parameter; there are {', '.join(sorted(known))}")
        elif type(value) is not types[known[key]]:
            cluster.error((*where, key), f"is {value!r}; it has to be of type {known[key]}")
    if len(cluster.problems) > before:
        return "", "on demand"
    name = parameters.get("vmSize", "")
    if not name:
        cluster.error(where, "vmSize is missing")
    image = {"imagePublisher", "imageOffer", "imageSku", "imageVersion"}
    if not parameters.get("imageId") and not image <= set(parameters):
        cluster.error(where, "an image is missing: imageId, or imagePublisher, imageOffer, imageSku and imageVersion")
    if (priority := parameters.get("priority", "Regular")) not in ("Regular", "Spot"):
        cluster.error((*where, "priority"), f"is {priority!r}; it has to be Regular or Spot")
    if (eviction := parameters.get("evictionPolicy", "Delete")) != "Delete":
        cluster.error((*where, "evictionPolicy"), f"is {eviction!r}: evicted machines would pay for their disks")
    _disk(cluster, where, parameters.get("osDiskSize"))
    return name, "spot" if priority == "Spot" else "on demand"


def _machines(cluster: ClusterFile, config: dict[str, Any]) -> None:
    """The machines of a list."""
    head, workers = config["provider"]["head_ip"], config["provider"]["worker_ips"]
    for number, address in enumerate([head, *workers]):
        where = ("provider", "worker_ips", number - 1) if number else ("provider", "head_ip")
        text = address if isinstance(address, str) else ""
        if not re.fullmatch(r"[\w.:-]+", text):
            cluster.error(where, f"{address!r} is neither an address nor a name")
        elif re.fullmatch(r"[\d.]+|.*:.*", text):
            try:
                ipaddress.ip_address(text)
            except ValueError as error:
                cluster.error(where, f"is no address: {error}")
    for address in {str(address) for address in [head, *workers] if [head, *workers].count(address) > 1}:
        cluster.error(("provider", "worker_ips"), f"{address} is there twice")
    if workers and str(head) in ("127.0.0.1", "localhost", "::1"):
        text = f"is {head}, where the other machines would look for the head on themselves"
        cluster.error(("provider", "head_ip"), text)
    most, least = config.get("max_workers", len(workers)), config.get("min_workers", len(workers))
    if max(most, least) > len(workers):
        cluster.error(
            ("max_workers" if most > len(workers) else "min_workers",), f"is above the {len(workers)} worker_ips"
        )
    starts = config.get("head_start_ray_commands") or []
    loopback = any("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0" in command for command in starts)
    if not workers and not loopback:
        text = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 is missing: a machine alone needs no ports beyond the loopback"
        cluster.note(("head_start_ray_commands",), text)
    if workers and loopback:
        text = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 keeps Ray on the loopback, where the other machines cannot reach it"
        cluster.error(("head_start_ray_commands",), text)
    idle = next((c for c in starts if "ray start" in c and re.search(r"--num-cpus[= ]0\b", c)), None)
    cluster.kinds.append(
        NodeKind(
            "head", "head", 1, 1, 0 if idle else None, 0 if idle else None, head=True, where=("provider", "head_ip")
        )
    )
    if workers:
        cluster.kinds.append(NodeKind("machine", "machine", least, most, None, None, where=("provider", "worker_ips")))
