"""A cluster's YAML as `ingot cluster check` and `ingot status` read it: documents, lines, notes, kinds of nodes.

Two notes stand in comments, since neither Ray nor Kubernetes has a field for them: what a machine costs, by its type or
by the name of its kind of node, and where every node mounts the same file system:

    # price: g6e.12xlarge 10.49 USD/h on demand, ~4.60 spot, seen 2026-11
    # shared: /mnt/ingot
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from jobs.settings import SettingsError

Where = tuple[str | int, ...]
"""A place in a document: keys and positions from its root."""

_PRICE = re.compile(
    r"(?P<name>\S+) (?P<on_demand>\d+(?:\.\d+)?) USD/h on demand(?:, ~?(?P<spot>\d+(?:\.\d+)?) spot)?, "
    r"seen (?P<seen>\d{4}-(?:0[1-9]|1[0-2]))"
)


@dataclass(frozen=True)
class Price:
    """What a machine costs an hour, USD."""

    on_demand: float
    spot: float | None
    seen: str
    """Year and month."""


@dataclass
class NodeKind:
    """A kind of node that a cluster has, or brings up when there is work."""

    name: str
    machine: str
    """Its machine type; the kind's own name where the file does not say."""
    least: int
    most: int
    cpus: float | None
    """For work, per node; None: Ray finds out on the machine. So for the others."""
    gpus: int | None
    memory: float | None = None
    """GiB."""
    accelerator: str = ""
    market: str = "on demand"
    """On demand or spot; "either" where whoever adds the node decides."""
    head: bool = False
    priority: int = 0
    where: Where = ()


@dataclass
class Problem:
    """Something that is wrong, or worth knowing."""

    line: int
    place: str
    text: str
    fatal: bool = True


@dataclass
class ClusterFile:
    """A file, read, and what was found about it."""

    path: str
    text: str
    documents: list[Any]
    lines: list[dict[Where, int]]
    """Of each document: the line of every key and item."""
    prices: dict[str, Price]
    shared: list[str]
    """Folders that every node mounts."""
    problems: list[Problem] = field(default_factory=list)
    kinds: list[NodeKind] = field(default_factory=list)
    most_workers: int | None = None
    """Workers of all kinds together."""
    jobs: list[str] | None = None
    """Jobs that the file itself starts; None: any may come."""
    title: str = ""

    def error(self, where: Where, text: str, document: int = 0) -> None:
        """Note what has to be put right."""
        self._add(where, text, document, fatal=True)

    def note(self, where: Where, text: str, document: int = 0) -> None:
        """Note what is worth knowing."""
        self._add(where, text, document, fatal=False)

    def _add(self, where: Where, text: str, document: int, *, fatal: bool) -> None:
        known = next((where[:n] for n in range(len(where), -1, -1) if where[:n] in self.lines[document]), ())
        problem = Problem(self.lines[document].get(known, 1), ".".join(map(str, where)), text, fatal)
        if problem not in self.problems:  # parts that YAML repeats (`*name`) are wrong once
            self.problems.append(problem)

    def price(self, kind: NodeKind) -> Price | None:
        """What a kind of node costs, if the file says."""
        return self.prices.get(kind.machine) or self.prices.get(kind.name)

    def workers(self) -> list[NodeKind]:
        """Kinds of nodes other than the head that may exist at all."""
        return [kind for kind in self.kinds if not kind.head and kind.most > 0]

    def nodes(self) -> int:
        """Nodes that there may be at most, the head among them."""
        workers = sum(kind.most for kind in self.workers())
        return 1 + min(workers, self.most_workers if self.most_workers is not None else workers)


def read(path: str) -> ClusterFile:
    """Read a cluster's YAML.

    Raises:
        SettingsError: it is no YAML, says a key twice, or has a note that cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        text = file.read()
    loader = yaml.SafeLoader(text)
    documents, lines = [], []
    try:
        while loader.check_node():
            node = loader.get_node()
            lines.append(dict(_lines(node, (), path)))
            documents.append(loader.construct_document(node))
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from None
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise SettingsError(f"{path}: a cluster is a mapping of settings, or several separated by ---")
    return ClusterFile(path, text, documents, lines, prices(text, path), _comments(text, "shared"))


def prices(text: str, path: str = "") -> dict[str, Price]:
    """The price notes in a file's text, by machine type or kind of node.

    Raises:
        SettingsError: one of them cannot be read, or there are two for the same machine.
    """
    out: dict[str, Price] = {}
    for note in _comments(text, "price"):
        found = _PRICE.fullmatch(note)
        if not found:
            form = "MACHINE 1.23 USD/h on demand[, ~0.45 spot], seen YYYY-MM"
            raise SettingsError(f"{path}: `# price: {note}` cannot be read; it has to be `# price: {form}`")
        if found["name"] in out:
            raise SettingsError(f"{path}: there are two prices for {found['name']}")
        out[found["name"]] = Price(
            float(found["on_demand"]), float(found["spot"]) if found["spot"] else None, found["seen"]
        )
    return out


def _comments(text: str, name: str) -> list[str]:
    return [note.strip() for note in re.findall(rf"^\s*# {name}:(.*)$", text, re.MULTILINE)]


def _lines(node: yaml.Node, where: Where, path: str) -> Iterator[tuple[Where, int]]:
    """The line of everything below a node; YAML's reader would take the last of equal keys in silence."""
    yield where, node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _lines(item, (*where, number), path)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                place = ".".join(map(str, (*where, key.value)))
                raise SettingsError(f"{path}:{key.start_mark.line + 1}: {place} is said twice")
            seen.add(key.value)
            yield (*where, key.value), key.start_mark.line + 1
            for inner, line in _lines(value, (*where, key.value), path):
                if inner != (*where, key.value):
                    yield inner, line
