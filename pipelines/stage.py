"""Run a stage once: a folder of Parquet parts that a manifest closes.

A stage cuts its input into units (a file, a group of files, a part of the stage before). Each unit becomes one part,
written whole by one Ray Data task, and leaves a receipt with its counts. A stage that was killed finds the receipts and
goes on with the units that lack one; the manifest, written last, says which settings and which inputs made the folder,
so that a second run redoes nothing and a changed setting redoes the stage.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines import statistics, storage
from pipelines.documents import SCHEMA, SET_ASIDE_SCHEMA
from pipelines.progress import Progress

log = logging.getLogger("ingot")

MANIFEST = "manifest.json"
_RECEIPTS = "_receipts"
_UNFINISHED = "_unfinished.json"
_IN_FLIGHT = 2000  # units whose tasks are waiting or running: enough to make a cluster grow
_TELL_EVERY = 32_000_000  # bytes read between two words of a unit's progress


class Output(NamedTuple):
    """What a unit's work yields, batch by batch.

    Attributes:
        kept: rows for the part.
        set_aside: rows of SET_ASIDE_SCHEMA with the reason they went, or None.
        documents_in: records read to make this batch.
        bytes_in: bytes of them.
        counts: further numbers, added up into the part's entry of the manifest.
        statistics: what pipelines.statistics knows to add up, for the stage's entry of the manifest.
    """

    kept: pa.Table
    set_aside: pa.Table | None
    documents_in: int
    bytes_in: int
    counts: Mapping[str, int] | None = None
    statistics: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Unit:
    """One task's share of a stage.

    Attributes:
        name: file name of its part, without the extension.
        arguments: keyword arguments of the stage's work function.
        labels: facts copied into the part's entry of the manifest.
        size: bytes that its work is expected to count as read, for the time that is left.
    """

    name: str
    arguments: dict[str, Any]
    labels: dict[str, Any] = field(default_factory=dict)
    size: int = 0


@dataclass(frozen=True)
class Stage:
    """A folder, and everything that decides what has to be in it.

    Attributes:
        name: the stage's name in logs and errors.
        folder: URI of its folder.
        settings: everything that changes the output (a dataclass or a plain mapping).
        inputs: fingerprints of what it reads, by name.
        version: raised when the code of the stage changes what it writes.
    """

    name: str
    folder: str
    settings: Any
    inputs: dict[str, str]
    version: int = 1

    @property
    def plain_settings(self) -> dict[str, Any]:
        """The settings as they stand in the manifest."""
        return json.loads(json.dumps(_plain(self.settings)))

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides the output; equal fingerprints mean equal output."""
        parts = [self.name, self.version, self.plain_settings, self.inputs]
        return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())

    def finished(self) -> dict[str, Any] | None:
        """The manifest when the folder holds this stage's output, else None; says why a finished folder is stale."""
        manifest = read_manifest(self.folder)
        if manifest is None:
            return None
        if manifest["fingerprint"] == self.fingerprint:
            return manifest
        log.info("%s: redone, because %s", self.name, "; ".join(self._changes(manifest)) or "its code changed")
        return None

    def _changes(self, manifest: Mapping[str, Any]) -> Iterator[str]:
        before, now = _flat(manifest.get("settings", {})), _flat(self.plain_settings)
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                yield f"{key} changed from {before.get(key)!r} to {now.get(key)!r}"
        for name in sorted(manifest.get("inputs", {}).keys() | self.inputs.keys()):
            if manifest.get("inputs", {}).get(name) != self.inputs.get(name):
                yield f"its input {name} changed"

    def begin(self) -> None:
        """Make the folder ready: empty, unless it holds an unfinished run of the very same stage."""
        marker = storage.join(self.folder, _UNFINISHED)
        same = storage.exists(marker) and storage.read_json(marker) == self.fingerprint
        if not same:
            if storage.exists(marker):
                log.warning("%s: an unfinished run with other settings or inputs is deleted", self.name)
            # The manifest goes first: a kill in the middle must not leave one that vouches for parts that are gone.
            storage.delete(storage.join(self.folder, MANIFEST))
            storage.delete(self.folder)
            storage.write_json(marker, self.fingerprint)

    def publish(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Close the folder with its manifest; ``manifest`` holds what is special to the stage."""
        whole = {
            "stage": self.name,
            "fingerprint": self.fingerprint,
            "settings": self.plain_settings,
            "inputs": self.inputs,
            "version": ingot_version(),
            "created": time.time(),
            **manifest,
        }
        storage.write_json(storage.join(self.folder, MANIFEST), whole)
        storage.delete(storage.join(self.folder, _RECEIPTS))
        storage.delete(storage.join(self.folder, _UNFINISHED))
        storage.delete_unfinished(self.folder)
        return whole


def ingot_version() -> str:
    """Version of the installed package, or ``source`` when it runs from a shipped working directory."""
    try:
        return version("ingot")
    except PackageNotFoundError:
        return "source"


def read_manifest(folder: str) -> dict[str, Any] | None:
    """The manifest of a finished folder, or None."""
    return storage.json_if_there(storage.join(folder, MANIFEST))


def require_manifest(folder: str, job: str) -> dict[str, Any]:
    """The manifest of a folder that another job has to have finished.

    Raises:
        FileNotFoundError: it is not there; the message says which job makes it.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"{folder}: no manifest.json, so nothing finished is there; run `ingot {job}` first")
    return manifest


def part_uris(folder: str, manifest: Mapping[str, Any]) -> list[str]:
    """URIs of a finished stage's parts, in order."""
    return [storage.join(folder, part["file"]) for part in manifest["parts"]]


def read_part(uri: str, rows: int = 1024, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A part's rows as tables of at most ``rows`` rows, and of at most what its writer held at a time.

    The work functions write their batches, bounded in bytes, as row groups; reading one at a time keeps that bound.
    """
    file = storage.open_parquet(uri)
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
            yield pa.Table.from_batches([batch])


def text_bytes(table: pa.Table) -> int:
    """UTF-8 bytes of the ``text`` column."""
    return pc.sum(pc.binary_length(table["text"])).as_py() or 0


def run_stage(
    stage: Stage,
    units: list[Unit],
    work: Callable[..., Iterable[Output]],
    *,
    schema: pa.Schema = SCHEMA,
    set_aside_share: float = 1.0,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run ``work`` over all units that are not done yet, and close the folder.

    Args:
        stage: folder, settings and inputs.
        units: the stage's input in order; the manifest lists the parts in the same order.
        work: called in a Ray task as ``work(**unit.arguments)``; yields Output batches in order.
        schema: of the parts.
        set_aside_share: share of the set-aside rows that is stored; the counts are always those of all.
        extra: further entries of the manifest.

    Returns:
        The manifest.
    """
    started = time.monotonic()
    stage.begin()
    receipts = {name: receipt for name, receipt in _receipts(stage.folder).items() if name in {u.name for u in units}}
    pending = [unit for unit in units if unit.name not in receipts]
    if receipts:
        log.info("%s: goes on, %d of %d units were done before", stage.name, len(receipts), len(units))
    progress = Progress(stage.name, {unit.name: unit.size for unit in pending}, len(receipts))
    for state in for_each(pending, _Task(stage.folder, work, schema, set_aside_share)):
        finished = "file" in state
        if finished:
            receipts[state["name"]] = state
        progress.step(state["name"], state["documents_in"], state["bytes_in"], finished=finished)
    done = [receipts[unit.name] for unit in units]
    totals: dict[str, Any] = {"set_aside": {}, "statistics": {}, "counts": {}}
    for receipt in done:
        statistics.add(totals, {name: receipt.get(name, {}) for name in totals})
    manifest = stage.publish(
        {
            "seconds": time.monotonic() - started,
            "parts": [r["labels"] | r["counts"] | {k: r[k] for k in ("file", "documents", "bytes")} for r in done],
            "documents_in": sum(r["documents_in"] for r in done),
            "bytes_in": sum(r["bytes_in"] for r in done),
            "documents_out": sum(r["documents"] for r in done),
            "bytes_out": sum(r["bytes"] for r in done),
            "set_aside": dict(sorted(totals["set_aside"].items(), key=lambda item: -item[1]["documents"])),
            "statistics": totals["statistics"],
            "counts": totals["counts"],
            **(extra or {}),
        }
    )
    progress.finish(f"{manifest['documents_out']:,} of {manifest['documents_in']:,} documents kept")
    reasons = [f"{reason} {counts['documents']:,}" for reason, counts in manifest["set_aside"].items()]
    if reasons:
        others = f" and {len(reasons) - 5} other reasons" if len(reasons) > 5 else ""
        where = storage.join(stage.folder, "set-aside")
        log.info("%s: set aside in %s: %s%s", stage.name, where, ", ".join(reasons[:5]), others)
    if manifest["documents_in"] and not manifest["documents_out"]:
        log.warning("%s: kept none of %s documents", stage.name, f"{manifest['documents_in']:,}")
    return manifest


def for_each(
    units: list[Unit], task: Callable[[Unit], dict[str, Any] | Iterator[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """Run ``task`` for every unit, one Ray task a unit, and yield its results as they come.

    A task that is a generator gives several; what it yields before its end comes while it still runs. It has to yield
    the same when it is repeated, since Ray passes over those that came before a worker was lost. Units are tasks of
    their own rather than rows of a data set: they read and write files, so that there is nothing to stream between
    operators, and a stage of a data set takes a second to start and a core to watch over.
    """
    if not units:
        return
    import ray

    def run(unit: Unit) -> Iterator[dict[str, Any]]:
        result = task(unit)
        for state in [result] if isinstance(result, dict) else result:  # noqa: UP028
            yield state  # Ray sends into the generator, which the iterator of a list does not take

    remote = ray.remote(num_cpus=1, max_retries=-1)(run).options(num_returns="streaming")
    waiting = iter(units)
    running = {}
    for unit in itertools.islice(waiting, _IN_FLIGHT):
        generator = remote.remote(unit)
        running[generator] = unit
    while running:
        ready, _ = ray.wait(list(running), num_returns=1, fetch_local=False)
        for generator in ready:
            try:
                yield ray.get(next(generator))
            except StopIteration:
                del running[generator]
                for unit in itertools.islice(waiting, 1):
                    running[remote.remote(unit)] = unit


class _Task:
    """What runs in the cluster for one unit: writes its part, its set-aside rows, and last the receipt."""

    def __init__(self, folder: str, work: Callable[..., Iterable[Output]], schema: pa.Schema, share: float) -> None:
        self.folder, self.work, self.schema, self.share = folder, work, schema, share

    def __call__(self, unit: Unit) -> Iterator[dict[str, Any]]:
        file = f"{unit.name}.parquet"
        total: dict[str, Any] = {"documents": 0, "bytes": 0, "documents_in": 0, "bytes_in": 0}
        total |= {"set_aside": {}, "counts": {}, "statistics": {}}
        told = 0
        with (
            storage.parquet_writer(storage.join(self.folder, file), self.schema) as kept,
            _lazy_writer(storage.join(self.folder, "set-aside", file)) as aside,
        ):
            for output in self.work(**unit.arguments):
                statistics.add(total, self._counted(output))
                if output.kept.num_rows:
                    kept.write_table(output.kept)
                if output.set_aside is not None and output.set_aside.num_rows:
                    aside(_sample(output.set_aside, self.share))
                if total["bytes_in"] - told >= _TELL_EVERY:  # by what was read, not by time: see for_each
                    told = total["bytes_in"]
                    yield {"name": unit.name, "documents_in": total["documents_in"], "bytes_in": told}
        receipt = {"name": unit.name, "file": file, "labels": unit.labels, **total}
        storage.write_json(storage.join(self.folder, _RECEIPTS, f"{unit.name}.json"), receipt)
        yield receipt

    def _counted(self, output: Output) -> dict[str, Any]:
        counted: dict[str, Any] = {
            "documents": output.kept.num_rows,
            "documents_in": output.documents_in,
            "bytes_in": output.bytes_in,
            "counts": output.counts or {},
            "statistics": dict(output.statistics or {}),
        }
        if self.schema.equals(SCHEMA):
            counted["bytes"] = text_bytes(output.kept)
            counted["statistics"]["documents"] = statistics.of_documents(output.kept)
        if output.set_aside is not None and output.set_aside.num_rows:
            counted["set_aside"] = _reasons(output.set_aside)
        return counted


class _lazy_writer:  # noqa: N801 (used as a context manager function)
    """A writer of set-aside rows that makes no file when there are none."""

    def __init__(self, uri: str) -> None:
        self.uri, self.manager, self.writer = uri, None, None

    def __enter__(self) -> Callable[[pa.Table], None]:
        return self.write

    def write(self, table: pa.Table) -> None:
        if self.writer is None:
            self.manager = storage.parquet_writer(self.uri, SET_ASIDE_SCHEMA)
            self.writer = self.manager.__enter__()
        self.writer.write_table(table)

    def __exit__(self, *error: object) -> None:
        if self.manager is not None:
            self.manager.__exit__(*error)


def _reasons(table: pa.Table) -> dict[str, dict[str, int]]:
    sizes = pc.fill_null(pc.binary_length(table["text"]), 0)
    plain = pa.table({"reason": table["reason"], "bytes": sizes})
    grouped = plain.group_by("reason").aggregate([("bytes", "sum"), ("bytes", "count")])
    return {row["reason"]: {"documents": row["bytes_count"], "bytes": row["bytes_sum"]} for row in grouped.to_pylist()}


def _sample(table: pa.Table, share: float) -> pa.Table:
    """The rows to store: chosen by their id, so that a repeated run stores the same; records without one all stay."""
    if share >= 1:
        return table
    limit = int(share * 2**32)
    return table.filter(
        pa.array([not i or xxhash.xxh32_intdigest(i.encode()) < limit for i in table["id"].to_pylist()])
    )


def _receipts(folder: str) -> dict[str, dict[str, Any]]:
    where = storage.join(folder, _RECEIPTS)
    if not storage.exists(where):
        return {}
    try:
        files = storage.list_files(where)
    except FileNotFoundError:
        return {}
    return {receipt["name"]: receipt for receipt in (storage.read_json(file.uri) for file in files)}


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) else value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
