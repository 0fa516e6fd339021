"""The last stage over the documents: how often each source appears, and a global shuffle.

A source of weight 2.5 has every document twice and half of them, chosen by a hash of their ids, a third time. The order
of the corpus is that of a hash of seed, id and copy: it depends on nothing else, neither on the number of workers nor
on how the documents were spread over files before.

The shuffle is a radix sort over files. Each task of the first pass reads some input parts, a bounded number of bytes at
a time, and writes one file in which the documents lie by the range of their hash; each output part then gathers its
range from all files and sorts it. With more output parts than a file has ranges, further passes split the ranges again,
so that what is read in one piece never gets small. Each file and each part is written whole by one task, and is not
written again after a kill. Ray Data's hash shuffle was the alternative: it keeps what it has shuffled in the memory and
spill files of the running cluster, so that a killed driver would start from nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines import storage
from pipelines.documents import SCHEMA, copy_id
from pipelines.progress import Progress
from pipelines.stage import Output, Stage, Unit, for_each, part_uris, read_part, run_stage, text_bytes

log = logging.getLogger("ingot")

RANGES = 256
"""Most ranges that a file of the shuffle is split into."""

_BATCH_DOCUMENTS = 512
_BATCH_BYTES = 16_000_000
_KEYED = pa.schema([*SCHEMA, ("key", pa.uint64())])


@dataclass
class MixSettings:
    """How the documents of all sources come together; how often each appears is the source's weight."""

    enabled: bool = True
    """Whether the stage runs."""
    shuffle: bool = True
    """Whether the documents of all sources are shuffled; otherwise they stay in the order of the sources."""
    seed: int = 0
    """Of the order, and of the choice of documents where a weight is no whole number."""
    part_bytes: int = 128_000_000
    """About how many bytes of text an output part of the shuffle has; a task holds some two or three times as much."""

    def validate(self) -> None:
        """Raises ValueError for parts that hold nothing."""
        if self.part_bytes < 1:
            raise ValueError(f"part_bytes is {self.part_bytes}, must be at least 1")


def mix(
    folder: str, corpus: str, manifest: dict[str, Any], settings: MixSettings, weights: dict[str, float]
) -> dict[str, Any]:
    """Write the mixed corpus; skipped when it is there.

    Args:
        folder: where it goes.
        corpus: folder of the stage before.
        manifest: its manifest.
        settings: order and size of parts.
        weights: how often the documents of each source appear, by the source's name; 1 for those not named.

    Returns:
        The manifest: ``documents_in`` counts the documents before they were repeated or left out, ``sources_in`` does
        so by source, ``statistics`` has what each source has now. Shuffled parts have no kind or source.
    """
    weights = {name: float(weight) for name, weight in sorted(weights.items()) if weight != 1}
    stage = Stage("mix", folder, {**asdict(settings), "weights": weights}, {manifest["stage"]: manifest["fingerprint"]})
    passes = storage.join(folder, "_shuffle")
    if finished := stage.finished():
        log.info("mix: up to date, nothing to do")
        storage.delete(passes)  # a run that was killed at its very end left it
        return finished
    inputs = _Held(part_uris(corpus, manifest), [part["bytes"] for part in manifest["parts"]])
    if settings.shuffle:
        stage.begin()
        units, work = _shuffle(passes, inputs, _size_after(manifest, weights), settings, weights), _gather
    else:
        units, work = [], _weigh
        for i, part in enumerate(manifest["parts"]):
            labels = {name: part[name] for name in ("source",) if name in part}
            arguments = {"part": inputs.files[i], "seed": settings.seed, "weights": weights}
            units.append(Unit(f"part-{i:05d}", arguments, labels, part["bytes"]))
    before = {
        "documents_in": manifest["documents_out"],
        "bytes_in": manifest["bytes_out"],
        "sources_in": _sources(manifest),
    }
    done = run_stage(stage, units, work, extra=before)
    storage.delete(passes)
    for name, counts in _sources(manifest).items():
        now = _sources(done).get(name, {"documents": 0})["documents"]
        log.info("mix: %s appears with %s documents, it had %s", name, f"{now:,}", f"{counts['documents']:,}")
    return done


def _sources(manifest: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Documents and bytes of a stage's output by source."""
    return manifest.get("statistics", {}).get("documents", {}).get("sources", {})


def _size_after(manifest: dict[str, Any], weights: dict[str, float]) -> int:
    """Bytes of text that the mix will have, but for chance."""
    counted = _sources(manifest).items()
    return int(manifest["bytes_out"] + sum(had["bytes"] * (weights.get(name, 1.0) - 1) for name, had in counted))


# weights


def repeated(table: pa.Table, seed: int, weights: dict[str, float]) -> pa.Table:
    """Each document as often as its source's weight says, copies next to it, with the ``key`` of their places."""
    ids, sources = table["id"].to_pylist(), table["source"].to_pylist()
    rows: list[int] = []
    names: list[str] = []
    keys: list[int] = []
    for row, (document, source) in enumerate(zip(ids, sources, strict=True)):
        weight = weights.get(source, 1.0)
        copies = math.floor(weight)
        if weight > copies and _hash("copy", seed, document) < (weight - copies) * 2**64:
            copies += 1
        for copy in range(copies):
            rows.append(row)
            names.append(copy_id(document, copy))
            keys.append(_hash("order", seed, names[-1]))
    taken = table if rows == list(range(len(ids))) else table.take(pa.array(rows, pa.int64()))
    columns = [pa.array(names, pa.string()), *taken.select(SCHEMA.names[1:]).columns, pa.array(keys, pa.uint64())]
    return pa.table(columns, schema=_KEYED)


def _hash(use: str, seed: int, document: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{use}\0{seed}\0{document}".encode())


def _repeated_parts(parts: list[str], seed: int, weights: dict[str, float]) -> Iterator[pa.Table]:
    rows = max(1, int(_BATCH_DOCUMENTS / max([1.0, *weights.values()])))  # as many after as without weights
    for part in parts:
        for table in read_part(part, rows=rows):
            yield repeated(table, seed, weights)


def _weigh(part: str, seed: int, weights: dict[str, float]) -> Iterator[Output]:
    """Work of the stage without a shuffle."""
    for table in _repeated_parts([part], seed, weights):
        batch = table.drop_columns("key")
        yield Output(batch, None, batch.num_rows, text_bytes(batch))


def _runs(sizes: np.ndarray) -> Iterator[slice]:
    """Runs of documents of bounded number and bytes, in order."""
    ends = np.cumsum(sizes, dtype=np.int64)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        end = int(np.searchsorted(ends, before + _BATCH_BYTES, side="right"))
        end = min(max(end, start + 1), start + _BATCH_DOCUMENTS)
        yield slice(start, end)
        start = end


# shuffle


class _Held(NamedTuple):
    """Where the documents of some output parts lie.

    Attributes:
        files: corpus parts, or files that a pass wrote.
        sizes: bytes of text that each has of them.
        range: which range of the files holds them; None: the files are corpus parts and hold nothing else.
        ranges: how many ranges the files have.
    """

    files: list[str]
    sizes: list[int]
    range: int | None = None
    ranges: int = 1


def spans(parts: int) -> list[int]:
    """How many output parts a range of each pass stands for; in the last pass it is one."""
    found = [math.ceil(parts / RANGES)]
    while found[-1] > 1:
        found.append(math.ceil(found[-1] / RANGES))
    return found


def _shuffle(folder: str, inputs: _Held, size: int, settings: MixSettings, weights: dict[str, float]) -> list[Unit]:
    """Run the passes; returns the units that gather the output parts."""
    parts = max(1, round(size / settings.part_bytes))
    held, width = {0: inputs}, parts  # by the first output part; each entry is of so many parts
    for number, span in enumerate(spans(parts)):
        ranges = math.ceil(width / span)
        units: list[Unit] = []
        written: dict[int, list[str]] = {}
        for first, there in held.items():
            written[first] = []
            for i, (low, high) in enumerate(_groups(there.sizes, settings.part_bytes)):
                name = f"{number}-{first:06d}-{i:06d}"
                read = there._replace(files=there.files[low:high], sizes=[])
                arguments = {"read": read, "first": first, "span": span, "ranges": ranges}
                units.append(Unit(name, arguments, {}, sum(there.sizes[low:high])))
                written[first].append(name)
        sizes = _run_pass(folder, number, units, _Pass(folder, parts, settings, weights))
        held = {
            part: _Held([_file(folder, name) for name in names], [sizes[name] // ranges for name in names], r, ranges)
            for first, names in written.items()
            for r, part in enumerate(range(first, min(first + width, parts), span))
        }
        if number:  # what the pass before wrote lies in the files of this one
            storage.delete(storage.join(folder, str(number - 1)))
        width = span
    return [Unit(f"part-{part:05d}", {"read": there}, {}, sum(there.sizes)) for part, there in sorted(held.items())]


def _file(folder: str, name: str) -> str:
    return storage.join(folder, name.partition("-")[0], f"{name}.arrow")


def _groups(sizes: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Runs of files that have about ``limit`` bytes together."""
    low = total = 0
    for i, size in enumerate(sizes):
        total += size
        if total >= limit or i + 1 == len(sizes):
            yield low, i + 1
            low, total = i + 1, 0


def _run_pass(folder: str, number: int, units: list[Unit], task: _Pass) -> dict[str, int]:
    """Write the files of a pass that are not there yet; returns the bytes of text in each by name."""
    receipts = storage.join(folder, f"receipts-{number}")
    done: dict[str, int] = {}
    if storage.exists(receipts):
        done = {storage.file_name(f.uri).removesuffix(".json"): storage.read_json(f.uri) for f in _files(receipts)}
    pending = [unit for unit in units if unit.name not in done]
    progress = Progress(f"mix, pass {number + 1}", {unit.name: unit.size for unit in pending}, len(done))
    for state in for_each(pending, task):
        if state["finished"]:
            done[state["name"]] = state["bytes"]
        progress.step(state["name"], state["documents"], state["bytes"], finished=state["finished"])
    return done


def _files(folder: str) -> list[storage.FileInfo]:
    try:
        return storage.list_files(folder)
    except FileNotFoundError:  # an empty folder
        return []


class _Pass:
    """A task of a pass: documents into a file by ranges of their keys; record batch b belongs to range b % ranges."""

    def __init__(self, folder: str, parts: int, settings: MixSettings, weights: dict[str, float]) -> None:
        self.folder, self.parts, self.settings, self.weights = folder, parts, settings, weights

    def __call__(self, unit: Unit) -> Iterator[dict[str, Any]]:
        read, first, span, ranges = (unit.arguments[name] for name in ("read", "first", "span", "ranges"))
        if read.range is None:
            tables = _repeated_parts(read.files, self.settings.seed, self.weights)
        else:
            tables = _read_range(read)
        waiting: list[pa.Table] = []
        size = documents = total = 0
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with (
            storage.open_output(_file(self.folder, unit.name)) as out,
            pa.ipc.new_file(out, _KEYED, options=options) as writer,
        ):

            def write() -> None:
                table = pa.concat_tables(waiting or [_KEYED.empty_table()]).combine_chunks()
                waiting.clear()
                place = (_part_of(table["key"].to_numpy(), self.parts) - first) // span
                order = np.argsort(place, kind="stable")
                bounds = np.searchsorted(place[order], np.arange(ranges + 1))
                for low, high in pairwise(bounds):
                    writer.write_batch(_record_batch(table.take(pa.array(order[low:high]))))

            for table in tables:
                waiting.append(table)
                documents += table.num_rows
                size += text_bytes(table)
                if size >= self.settings.part_bytes:
                    write()
                    total, size = total + size, 0
                yield {"name": unit.name, "documents": documents, "bytes": total + size, "finished": False}
            write()
            total += size
        receipts = storage.join(self.folder, f"receipts-{unit.name.partition('-')[0]}")
        storage.write_json(storage.join(receipts, f"{unit.name}.json"), total)
        yield {"name": unit.name, "documents": documents, "bytes": total, "finished": True}


def _part_of(keys: np.ndarray, parts: int) -> np.ndarray:
    """The output part of each key: equal ranges of the 64-bit hashes, in order."""
    return ((keys >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)).astype(np.int64)


def _record_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], _KEYED)


def _read_range(read: _Held) -> Iterator[pa.Table]:
    for file in read.files:
        with storage.open_input(file) as source, pa.ipc.open_file(source) as reader:
            for batch in range(read.range or 0, reader.num_record_batches, read.ranges):
                yield pa.Table.from_batches([reader.get_batch(batch)])


def _gather(read: _Held) -> Iterator[Output]:
    """Work of the stage: the documents of an output part from all files, in the order of their keys."""
    table = pa.concat_tables([_KEYED.empty_table(), *_read_range(read)]).combine_chunks()
    order = pc.sort_indices(table, sort_keys=[("key", "ascending"), ("id", "ascending")]).to_numpy()
    sizes = pc.fill_null(pc.binary_length(table["text"]), 0).to_numpy()
    for run in _runs(sizes[order]):
        batch = table.take(pa.array(order[run])).drop_columns("key")
        yield Output(batch, None, batch.num_rows, text_bytes(batch))
