"""What the jobs of a recipe need of a cluster, whether it has that, and what an hour of each costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import yaml

from jobs.cluster_file import ClusterFile, NodeKind
from jobs.settings import SettingsError
from pipelines import storage

_SPREADS = ("curate", "tokenizer", "tokenize")  # over as many CPU nodes as there are


@dataclass
class Need:
    """What one job of a recipe needs at the same time."""

    job: str
    settings: Any
    workers: int
    cpus: float
    """Of each worker."""
    gpus: float = 0.0
    """Of each worker."""
    least: int = 1
    """Workers with which it makes do."""
    spreads: bool = False
    """Takes more nodes when there are some."""
    paths: list[tuple[str, str]] = field(default_factory=list)
    """Settings that name files, and what they say."""


@dataclass
class Plan:
    """The nodes on which a job runs, and what they cost."""

    need: Need
    kind: NodeKind | None
    nodes: int
    fallback: NodeKind | None = None


def needs(recipe: str, only: list[str] | None, gpus: bool) -> list[Need]:
    """What the jobs of a recipe need.

    Args:
        recipe: a recipe with a section for each job.
        only: jobs to look at; None: all that have a section.
        gpus: whether there can be GPUs, for jobs that take what they find.

    Raises:
        SettingsError: the recipe has no sections, or one of them is refused.
    """
    from jobs import cli
    from jobs.settings import checked

    with open(recipe, encoding="utf-8") as file:
        content = yaml.safe_load(file)
    # What is left out needs no node of its own.
    placed = [job for job in cli.JOBS if job not in ("demo", "flow", "report")]
    sections = [job for job in placed if isinstance(content, dict) and job in content]
    if not sections or set(content) - set(cli.JOBS) - {"workspace"}:
        raise SettingsError(f"{recipe}: a recipe to check a cluster with has a section for each job, such as pretrain")
    wanted = sections if only is None else [job for name in only for job in (cli.FLOW if name == "flow" else (name,))]
    out = []
    for job in wanted:
        if job not in sections and job not in cli.FLOW:
            continue
        try:
            settings = cli.parse(job, ["--config", recipe])
        except SystemExit:
            raise SettingsError(f"{recipe}: the section {job} is refused; see above") from None
        try:
            checked(settings)
        except SettingsError as error:
            raise SettingsError(f"{recipe}: {job}: {error}") from None
        out.append(_need(job, settings, gpus=gpus))
    return out


def _need(job: str, settings: Any, *, gpus: bool) -> Need:
    training = settings.pretrain if job in ("tune", "ladder") else settings
    paths = [("workspace", settings.workspace)]
    paths += [(f"sources.{n}.path", source.path) for n, source in enumerate(getattr(settings, "sources", None) or [])
              if getattr(source, "path", None)]  # fmt: skip
    paths += [(name, value) for name in ("data_dir", "output") if (value := getattr(settings, name, None))]
    if job in ("pretrain", "tune", "ladder"):
        on_gpu = training.device == "gpu" or (training.device == "auto" and gpus)
        at_once = (settings.concurrent_trials if job == "tune" else settings.concurrent if job == "ladder" else 1) or 1
        workers, least = training.workers * at_once, training.fewest_workers()
        need = Need(job, settings, workers, training.cpus_per_worker, least=least)
        need.gpus = training.gpus_per_worker if on_gpu else 0.0
    else:
        device = getattr(settings, "device", "cpu")
        taken = float(device == "gpu" or (device == "auto" and gpus))
        copies = (settings.workers or 1) if job == "evaluate" else 1
        need = Need(job, settings, copies, 1.0, taken, spreads=job in _SPREADS)
    need.paths = paths
    return need


def plan(cluster: ClusterFile, need: Need) -> Plan:
    """Where a job would run; notes it as an error where the cluster has no room for it.

    What a job takes at once goes to machines of one type, spot ones and the same on demand together: the one whose
    kinds have the highest priority among those with room.
    """
    workers = cluster.workers()
    if not workers:  # one machine, whose size is not known
        return Plan(need, next((kind for kind in cluster.kinds if kind.head), None), 1)
    if any(kind.gpus is None or kind.cpus is None for kind in workers):
        cluster.note(workers[0].where, "Ray counts cores and GPUs on the machines: whether jobs fit is not checked")
        return Plan(need, workers[0], 0)
    pools: dict[str, list[NodeKind]] = {}
    for kind in workers:
        if _fit(kind, need) and (need.gpus or not kind.gpus or not any(not other.gpus for other in workers)):
            pools.setdefault(kind.machine if kind.accelerator else _pool(kind), []).append(kind)
    whole = cluster.most_workers
    room = {
        name: min(sum(kind.most for kind in kinds), whole if whole is not None else math.inf) * _fit(kinds[0], need)
        for name, kinds in pools.items()
    }
    enough = [name for name in pools if room[name] >= need.workers]
    if not enough:
        _too_small(cluster, need, max(room.values(), default=0))
        return Plan(need, None, 0)
    best = max(enough, key=lambda name: max(kind.priority for kind in pools[name]))
    kinds = sorted(pools[best], key=lambda kind: -kind.priority)
    nodes = sum(kind.most for kind in kinds) if need.spreads else math.ceil(need.workers / _fit(kinds[0], need))
    nodes = max(nodes, sum(kind.least for kind in kinds))
    _within_a_node(cluster, need, kinds[0])
    return Plan(need, kinds[0], int(min(nodes, whole if whole is not None else nodes)), kinds[1] if kinds[1:] else None)


def _pool(kind: NodeKind) -> str:
    """Kinds of Kubernetes name no machine: groups of the same size are taken for the same."""
    return f"{kind.cpus:g} CPU, {kind.gpus} GPU"


def _fit(kind: NodeKind, need: Need) -> int:
    """Workers of a job that fit on a node."""
    by_cpu = kind.cpus // need.cpus if need.cpus else math.inf
    by_gpu = kind.gpus // need.gpus if need.gpus else math.inf
    fits = min(by_cpu, by_gpu)
    return 1 if fits == math.inf else int(fits)


def _too_small(cluster: ClusterFile, need: Need, room: float) -> None:
    unit = f"{need.gpus:g} GPU and {need.cpus:g} CPU" if need.gpus else f"{need.cpus:g} CPU"
    text = f"{need.job} needs {need.workers} workers with {unit} each; machines of one type have room for {room:g}"
    where = ("available_node_types",) if ("available_node_types",) in cluster.lines[0] else ()
    if room >= need.least:
        cluster.note(where, f"{text}; it starts with them (min_workers is {need.least})")
    else:
        cluster.error(where, text)


def _within_a_node(cluster: ClusterFile, need: Need, kind: NodeKind) -> None:
    training = getattr(need.settings, "pretrain", need.settings)
    parts = getattr(getattr(training, "parallelism", None), "tensor_parallel", 1)
    if need.gpus and parts > (kind.gpus or 0):
        text = f"{need.job}: tensor_parallel {parts} spans nodes of {kind.gpus} GPUs, at the network's speed"
        cluster.note(kind.where, text)


def check_storage(cluster: ClusterFile, need: Need) -> None:
    """Note files that not every node can reach."""
    if cluster.nodes() == 1:
        return
    for setting, uri in need.paths:
        scheme = uri.partition("://")[0] if storage.is_remote(uri) else ""
        if scheme and scheme not in ("s3", "gs", "gcs", "http", "https"):
            cluster.error((), f"{need.job}: {setting} is {uri}; jobs know s3:// and gs://, or a file system's path")
        if storage.is_remote(uri):
            continue
        path = uri.removeprefix("file://")
        mounts = [mount.rstrip("/") for mount in cluster.shared]
        if not any(path == mount or path.startswith(f"{mount}/") for mount in mounts):
            told = f"below {' or '.join(mounts)}, which all of them mount" if mounts else (
                "the path of a file system that all of them mount, said in a line `# shared: PATH`")  # fmt: skip
            text = f"{need.job}: {setting} is {uri!r}, a path of each node's own; give s3://…, gs://… or {told}"
            cluster.error((), text)
