"""``ingot status``: a cluster at one glance: its nodes by type, what runs on them, how far that is, what it costs."""

from __future__ import annotations

import argparse
import collections
import contextlib
import re
import time
from dataclasses import dataclass

from jobs.job_server import Door, JobServer, add_door, job_server
from jobs.settings import SettingsError
from jobs.submitted import described_short, submitted, table


def main(arguments: list[str]) -> int:
    """The command line of ``ingot status``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="ingot status",
        description="What a cluster runs, where, how far it is and what it costs. Prices are the notes in the "
        "cluster's file, such as `# price: g6e.12xlarge 10.49 USD/h on demand, ~4.60 spot, seen 2026-11`.",
        allow_abbrev=False,
    )
    add_door(parser)
    parser.add_argument(
        "--prices", metavar="FILE", help="a cluster's YAML to take prices from, when it is reached with --address"
    )
    known = parser.parse_args(arguments)
    door = Door(known.address, known.cluster)
    tariff = Tariff(known.prices or known.cluster)
    with job_server(door) as server:
        try:
            print("\n".join(status(server, tariff)))
        except ConnectionError as error:
            raise SettingsError(f"the cluster does not tell what it does: {error}") from None
    return 0


class Tariff:
    """What a node costs an hour, by the notes in a cluster's file.

    Raises:
        SettingsError: there is no such file, or a note in it cannot be read.
    """

    def __init__(self, path: str | None) -> None:
        self.cluster = None
        if path is not None:
            from jobs.cluster import check  # Ray's schemas, which take a while

            self.cluster, _ = check(path)

    def hourly(self, node: Node) -> float | None:
        """USD; None when no note speaks of such a node."""
        from jobs.cluster import hourly_price

        for kind in self.cluster.kinds if self.cluster else ():
            if kind.name == node.kind or (kind.head and node.head):
                price = self.cluster.price(kind)
                return hourly_price(price, kind.market) if price else None
        return None

    def seen(self) -> str:
        """Year and month of the oldest note, "" without notes."""
        return min((price.seen for price in self.cluster.prices.values()), default="") if self.cluster else ""


@dataclass
class Node:
    """A node that is alive.

    Attributes:
        id: Ray's.
        kind: node type of the cluster's file.
        head: whether it is the head.
        started: Unix time.
        cpus: cores in use, and all.
        gpus: GPUs in use, and all.
    """

    id: str
    kind: str
    head: bool
    started: float
    cpus: tuple[float, float]
    gpus: tuple[float, float]


def nodes(server: JobServer) -> list[Node]:
    """The nodes of a cluster that are alive, the head first.

    Raises:
        ConnectionError: the dashboard does not answer.
    """
    found = []
    for node in server.nodes():
        labels, head = node.get("labels") or {}, bool(node.get("isHeadNode"))
        kind = "head" if head else node.get("nodeTypeName") or labels.get("ray.io/node-group") or "worker"
        used = {name: float(amount) for amount, name in re.findall(r"([\d.]+)/[\d.]+ (CPU|GPU)\b", node["used"])}
        there = node.get("resourcesTotal") or {}
        cpus, gpus = ((used.get(name, 0.0), float(there.get(name, 0))) for name in ("CPU", "GPU"))
        found.append(Node(node["nodeId"], kind, head, float(node.get("startTimeMs") or 0) / 1000, cpus, gpus))
    return found


def status(server: JobServer, tariff: Tariff) -> list[str]:
    """All there is to tell, as lines.

    Raises:
        ConnectionError: the dashboard does not answer.
        SettingsError: the job server does not.
    """
    there = nodes(server)
    lines = [*_nodes(there, tariff), ""]
    with contextlib.suppress(ConnectionError):
        if waits := server.waiting():
            lines += [f"waits: {waits}", ""]
    jobs = submitted(server)
    running = [job for job in jobs if not job.status.is_terminal()]
    places = _places(server, {node.id: node.kind for node in there}) if running else {}
    for job in running:
        lines += described_short(server, job)
        lines += [f"  on         {', '.join(places[job.job_id])}"] if job.job_id in places else []
    if not running:
        last = f"; the last one was {jobs[0].submission_id}, {jobs[0].status.value}" if jobs else ""
        lines.append(f"no job runs{last}")
    return [*lines, "", *_costs(there, tariff)]


def _nodes(there: list[Node], tariff: Tariff) -> list[str]:
    rows = [["NODES", "TYPE", "CPUS IN USE", "GPUS IN USE", "USD/H EACH"]]
    for kind in dict.fromkeys(node.kind for node in there):
        same = [node for node in there if node.kind == kind]
        price = tariff.hourly(same[0])
        rows.append(
            [
                str(len(same)),
                kind,
                *(
                    f"{sum(used for used, _ in amounts):g} of {sum(all_ for _, all_ in amounts):g}"
                    for amounts in ([node.cpus for node in same], [node.gpus for node in same])
                ),
                "" if price is None else f"{price:.2f}",
            ]
        )
    return table(rows)


def _places(server: JobServer, kinds: dict[str, str]) -> dict[str, list[str]]:
    """What each Ray job runs on which type of node, such as ``2 RayTrainWorker on gpu-spot``.

    Only what reserves cores or GPUs is named; the rest are the helpers of Ray's libraries.
    """
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for what, state, name in (("actors", "ALIVE", "class_name"), ("tasks", "RUNNING", "name")):
        filters = {"filter_keys": "state", "filter_predicates": "=", "filter_values": state}
        listed = server.get(f"/api/v0/{what}", detail=True, limit=10000, **filters).json()
        for row in listed["data"]["result"]["result"]:
            works = any(name.startswith(("CPU", "GPU")) for name in row.get("required_resources") or {})
            if row.get("type", "NORMAL_TASK") == "NORMAL_TASK" and works:
                counts[row["job_id"]][row[name].rsplit(".")[-1], kinds.get(row["node_id"], "a lost node")] += 1
    return {
        job: [f"{number} {name} on {kind}" for (name, kind), number in sorted(counter.items())]
        for job, counter in counts.items()
    }


def _costs(there: list[Node], tariff: Tariff) -> list[str]:
    if tariff.cluster is None:
        return []
    prices = [(node, tariff.hourly(node)) for node in there]
    hourly = sum(price for _, price in prices if price is not None)
    spent = sum(price * (time.time() - node.started) / 3600 for node, price in prices if price is not None)
    unknown = sorted({node.kind for node, price in prices if price is None})
    seen = f", seen {tariff.seen()}" if tariff.seen() else ""
    rate = f"costs {hourly:.2f} USD/h, {spent:.2f} USD since these nodes started"
    lines = [f"{rate}; without disks and traffic, by the notes in {tariff.cluster.path}{seen}"]
    lines = lines if len(unknown) < len({node.kind for node in there}) else []
    return lines + ([f"no price is noted for {', '.join(unknown)}"] if unknown else [])
