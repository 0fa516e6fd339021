"""``ingot cluster check FILE``: what is wrong with a cluster's YAML, found without asking any cloud, and what it costs.

Files of ``ray up`` (AWS, Google Cloud, Azure, machines over ssh) and of Kubernetes (KubeRay's RayCluster and RayJob,
Kueue's queues, what belongs to them). With a recipe, the cluster is held against what its jobs need.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import sys
import tomllib

from jobs import cluster_kubernetes, cluster_launcher
from jobs.cluster_file import ClusterFile, NodeKind, Price, read
from jobs.cluster_recipe import Plan, check_storage, needs, plan
from jobs.settings import SettingsError

# What our files say until somebody puts in their own.
_PLACEHOLDERS = r"your-project|your-bucket|sg-your-group|youraccount|registry\.example\.com|0{8}-0{4}-0{4}-0{4}-0{12}"


def main(arguments: list[str]) -> int:
    """The command line of ``ingot cluster``. Returns the exit status: 0 nothing is wrong, 2 something is."""
    parser = argparse.ArgumentParser(
        prog="ingot cluster",
        description="Check a cluster's YAML before anything is started: Ray's or KubeRay's own schema, unknown "
        "settings, machine types and their GPUs, versions, who gets in, prices; with a recipe, whether its jobs fit "
        "and can reach their files, and what an hour of each costs.",
    )
    parser.add_argument("action", choices=["check"], help="what to do")
    parser.add_argument("file", nargs="+", metavar="FILE", help="such as cluster/aws.yaml or cluster/kubernetes/*.yaml")
    parser.add_argument("--config", metavar="RECIPE", help="recipe whose jobs the cluster is to run")
    chosen = parser.parse_args(arguments)
    wrong = 0
    for path in chosen.file:
        try:
            cluster, plans = check(path, chosen.config)
        except FileNotFoundError as error:
            print(f"error: {error.filename}: there is no such file", file=sys.stderr)
            wrong += 1
            continue
        except SettingsError as error:
            print(f"error: {error}", file=sys.stderr)
            wrong += 1
            continue
        print("\n".join([*report(cluster, plans), ""]))
        wrong += any(problem.fatal for problem in cluster.problems)
    return 2 if wrong else 0


def check(path: str, recipe: str | None = None) -> tuple[ClusterFile, list[Plan]]:
    """Check a cluster's YAML.

    Args:
        path: the file.
        recipe: a recipe whose jobs it is to run.

    Returns:
        The file with its kinds of nodes and with what was found about it, and where each job of the recipe would run.

    Raises:
        SettingsError: the file cannot be read, or the recipe is refused.
    """
    cluster = read(path)
    kubernetes = any("kind" in document for document in cluster.documents)
    (cluster_kubernetes if kubernetes else cluster_launcher).check(cluster, _needed(cluster))
    _priced(cluster)
    _still_to_set(cluster)
    plans = []
    # A file that is wrong, or has no Ray cluster, has no nodes to plan with.
    if recipe and cluster.kinds and not any(problem.fatal for problem in cluster.problems):
        for need in needs(recipe, cluster.jobs, any(kind.gpus for kind in cluster.workers())):
            check_storage(cluster, need)
            plans.append(plan(cluster, need))
    return cluster, plans


def _needed(cluster: ClusterFile) -> dict[str, str]:
    """The versions that pyproject.toml pins, which this machine has to have too."""
    requirements, ingot = _project()
    pin = next(text for text in requirements if text.startswith("ray["))
    version = pin.partition("==")[2].split(";")[0].strip()
    if (here := importlib.metadata.version("ray")) != version:
        cluster.error((), f"Ray {here} is installed here, but Ingot needs {version}: submitting would be refused")
    return {
        "ray": version,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "ingot": ingot,
    }


def _project() -> tuple[list[str], str]:
    """What this program needs, and its version: the checkout's word before that of what is installed."""
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "pyproject.toml")
    if os.path.isfile(path):
        with open(path, "rb") as file:
            project = tomllib.load(file)["project"]
        return project["dependencies"], project["version"]
    return importlib.metadata.requires("ingot") or [], importlib.metadata.version("ingot")


def _priced(cluster: ClusterFile) -> None:
    """Every kind of node that a cloud would bill has a price, and every price a node."""
    if cluster.title.startswith("local"):  # the machines are there whether Ray uses them or not
        return
    for kind in cluster.kinds:
        price = cluster.price(kind)
        if price is None:
            text = f"no price: a line `# price: {kind.machine} 1.23 USD/h on demand, seen YYYY-MM` is missing"
            cluster.error(kind.where, text)
        elif kind.market == "spot" and price.spot is None:
            cluster.error(
                kind.where, f"the price of {kind.machine} says nothing about spot: `…, ~0.45 spot, seen YYYY-MM`"
            )
    known = {name for kind in cluster.kinds for name in (kind.machine, kind.name)}
    for name in set(cluster.prices) - known if cluster.kinds else ():
        cluster.note((), f"there is a price for {name}, but no such machine")


def _still_to_set(cluster: ClusterFile) -> None:
    """What is meant to be replaced; comments aside."""
    said = "\n".join(line.partition(" #")[0] for line in cluster.text.splitlines() if not line.lstrip().startswith("#"))
    if found := sorted(set(re.findall(_PLACEHOLDERS, said))):
        cluster.note((), f"still to be replaced by your own: {', '.join(found)}")


def report(cluster: ClusterFile, plans: list[Plan]) -> list[str]:
    """What there is to say about a checked file, as lines of text: problems, nodes, costs."""
    errors = [problem for problem in cluster.problems if problem.fatal]
    lines = [f"{cluster.path}: {cluster.title}"]
    for problem in sorted(cluster.problems, key=lambda problem: (not problem.fatal, problem.line)):
        place = f"{problem.place}: " if problem.place else ""
        lines.append(f"  {'error' if problem.fatal else 'note '}  line {problem.line}: {place}{problem.text}")
    if cluster.kinds:
        rows = [("node type", "machine", "CPU", "GPU", "nodes", "market", "USD/h a node")]
        rows += [_row(cluster, kind) for kind in cluster.kinds]
        lines += ["", *_table(rows)]
    if plans:
        rows = [("job", "needs", "nodes", "USD/h", "else")]
        rows += [_cost_row(cluster, plan) for plan in plans]
        seen = min(price.seen for price in cluster.prices.values()) if cluster.prices else ""
        lines += ["", *_table(rows)]
        if seen:
            lines.append(f"  with the head, without disks and traffic; prices as noted in the file, oldest of {seen}")
    lines += ["", f"  {len(errors)} error{'s' * (len(errors) > 1)}" if errors else "  nothing wrong"]
    return lines


def _row(cluster: ClusterFile, kind: NodeKind) -> tuple[str, ...]:
    price = cluster.price(kind)
    gpus = f"{kind.gpus} {kind.accelerator}".strip() if kind.gpus else "-"
    cost = "-"
    if price:
        cost = {"spot": f"~{price.spot:.2f}" if price.spot else "?", "on demand": f"{price.on_demand:.2f}"}.get(
            kind.market, f"~{price.spot or price.on_demand:.2f} to {price.on_demand:.2f}"
        )
    counted = kind.cpus is not None
    return (
        kind.name,
        kind.machine if kind.machine != kind.name else "-",
        f"{kind.cpus:g}" if counted else "?",
        gpus if counted else "?",
        "1" if kind.head else "off" if not kind.most else f"{kind.least} to {kind.most}",
        kind.market if price else "-",
        cost,
    )


def _cost_row(cluster: ClusterFile, plan: Plan) -> tuple[str, ...]:
    need = plan.need
    unit = f"{need.gpus:g} GPU, {need.cpus:g} CPU" if need.gpus else f"{need.cpus:g} CPU"
    text = f"{need.workers} x {unit}" if not need.spreads else "CPUs, as many as there are"
    together = {"tune": "concurrent_trials", "ladder": "concurrent"}.get(need.job, "")
    if together and not getattr(need.settings, together):
        text = f"a {'trial' if need.job == 'tune' else 'rung'}: {text}"
    if plan.kind is None:
        return need.job, text, "no room", "-", "-"
    if not plan.nodes or plan.kind.head:
        return need.job, text, plan.kind.name, "-", "-"
    first, second = _hourly(cluster, plan.kind, plan.nodes), ""
    if plan.fallback is not None:
        second = f"{plan.fallback.name}: {_hourly(cluster, plan.fallback, plan.nodes)}"
    return need.job, text, f"{'up to ' if need.spreads else ''}{plan.nodes} x {plan.kind.name}", first, second or "-"


def _hourly(cluster: ClusterFile, kind: NodeKind, nodes: int) -> str:
    """What nodes of a kind and the head cost an hour."""
    head = next((cluster.price(other) for other in cluster.kinds if other.head), None)
    price = cluster.price(kind)
    if price is None:
        return "-"
    rest = head.on_demand if head else 0.0
    cheap, dear = (price.spot or price.on_demand) * nodes + rest, price.on_demand * nodes + rest
    return {"spot": f"~{cheap:.2f}", "on demand": f"{dear:.2f}"}.get(kind.market, f"~{cheap:.2f} to {dear:.2f}")


def hourly_price(price: Price, market: str) -> float:
    """What a node costs an hour, USD; of a market that is not known, the dearer."""
    return price.spot if market == "spot" and price.spot is not None else price.on_demand


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
