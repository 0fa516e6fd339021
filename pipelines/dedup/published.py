"""What documents are compared by (a hash or a signature), in files beside the corpus.

While a search runs, every part has such a file, which a search that was killed finds again. A finished search
publishes them as a *set*: a folder with the fingerprints of the corpus, each with the id of the document that stands
for it there, and ``set.json``, written last, which says how they were made. A later corpus is deduplicated against any
number of sets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from pipelines import storage
from pipelines.dedup import collect, column, for_parts, keep
from pipelines.documents import InputError
from pipelines.stage import read_part

FOLDER = "fingerprints"
"""Name of the folder in which a stage of a corpus publishes its set."""

_SET = "set.json"
_IDENTITY = b"ingot"
_ROWS = 512  # documents whose fingerprints are made at a time


@dataclass(frozen=True)
class Scheme:
    """How fingerprints are made.

    Attributes:
        kind: of dedup stage, ``exact`` or ``near``.
        settings: all that decides a fingerprint; sets agree in it or cannot be compared.
        width: bytes of a fingerprint.
    """

    kind: str
    settings: Mapping[str, Any]
    width: int


def to_binary(values: np.ndarray) -> pa.Array:
    """Rows of an array, (documents, values), as fixed-size binary values."""
    values = np.ascontiguousarray(values)
    size = values.itemsize * values.shape[1]
    return pa.Array.from_buffers(pa.binary(size), len(values), [None, pa.py_buffer(values)])


def from_binary(values: pa.ChunkedArray | pa.Array, dtype: str) -> np.ndarray:
    """The way back: (documents, values) of ``dtype``."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    width = values.type.byte_width
    data = np.frombuffer(values.buffers()[1], np.uint8)
    return data[values.offset * width : (values.offset + len(values)) * width].view(dtype).reshape(len(values), -1)


def marked(schema: pa.Schema, part: str, how: Any) -> pa.Schema:
    """A schema whose metadata says of which file, of which size and age, and ``how`` something was made."""
    info = storage.list_files(part)[0]
    return schema.with_metadata({_IDENTITY: json.dumps([how, *info], sort_keys=True).encode()})


def is_current(uri: str, schema: pa.Schema) -> bool:
    """Whether a file is there that was made of the same part in the same way as ``schema`` says."""
    if not storage.exists(uri):
        return False
    with storage.open_parquet(uri) as file:
        return (file.schema_arrow.metadata or {}).get(_IDENTITY) == schema.metadata[_IDENTITY]


def fingerprints(
    part: str,
    uri: str,
    scheme: Scheme,
    policy: tuple[str, str | None],
    make: Callable[[pa.Table], np.ndarray],
) -> Iterator[tuple[np.ndarray, pa.Array]]:
    """Ranks and fingerprints of a part's documents, in order and batch by batch.

    They are read from the part's file of fingerprints if that was made of the same part in the same way, else made
    and written there, with the ids. The batches are the same either way, since a task that Ray repeats has to yield
    what it yielded before.

    Args:
        part: URI of a corpus part.
        uri: of its file.
        scheme: of the fingerprints.
        policy: of the ranks: keep and score_field.
        make: fingerprints of documents, (documents, values).
    """
    schema = marked(
        pa.schema([("id", pa.string()), ("rank", pa.float64()), ("fingerprint", pa.binary(scheme.width))]),
        part,
        [scheme.settings, policy],
    )
    if is_current(uri, schema):
        for table in read_part(uri, _ROWS, ["rank", "fingerprint"]):  # a row group is a batch that was made
            yield column(table, "rank"), table["fingerprint"].combine_chunks()
        return
    with storage.parquet_writer(uri, schema, compression="none") as out:
        for batch in read_part(part, _ROWS, ["id", "text", *keep.columns(policy[0])]):
            ranks, made = keep.ranks(batch, *policy), to_binary(make(batch))
            out.write_table(pa.table([batch["id"].cast(pa.string()), ranks, made], schema))
            yield ranks, made


def read_published(uri: str) -> Iterator[tuple[np.ndarray, pa.Array]]:
    """The same of a file of a published set, whose documents come before all others."""
    with storage.open_parquet(uri) as file:
        for batch in file.iter_batches(columns=["fingerprint"], batch_size=8192):
            yield np.full(len(batch), -np.inf), batch["fingerprint"]


def set_files(against: list[str], scheme: Scheme) -> list[str]:
    """The files of published sets, in order.

    Args:
        against: folders of sets, or of corpora that have one.
        scheme: which theirs has to be.

    Raises:
        InputError: a folder holds no set, or one whose fingerprints were made in another way.
    """
    files = []
    for entry in against:
        folder, found = _open_set(entry, scheme.kind)
        for name, value in scheme.settings.items():
            if found["settings"].get(name) != value:
                raise InputError(
                    f"against: {entry}: its fingerprints were made with {name} {found['settings'].get(name)}, "
                    f"this search has {value}; they cannot be compared. Use the settings of that set, or leave it out"
                )
        files += [storage.join(folder, name) for name in found["files"]]
    return files


def set_contents(against: list[str], kind: str) -> dict[str, str]:
    """A hash of the content of each published set, which a stage that compares with them counts among its inputs."""
    return {entry: _open_set(entry, kind)[1]["content"] for entry in against}


def _open_set(entry: str, kind: str) -> tuple[str, dict[str, Any]]:
    for folder in (entry, storage.join(entry, FOLDER), storage.join(entry, kind, FOLDER)):
        where = storage.join(folder, _SET)
        if storage.exists(where):
            found = storage.read_json(where)
            if found["kind"] != kind:
                raise InputError(
                    f"against: {entry} holds {found['kind']} fingerprints, the {kind} search needs its own"
                )
            return folder, found
    raise InputError(
        f"against: {entry} is neither a folder with a published {_SET} nor a corpus with {kind}/{FOLDER}/{_SET}"
    )


def refuse_own(against: list[str], kind: str, folder: str) -> None:
    """Make sure that a corpus is not compared with its own set, which it is about to replace.

    Args:
        against: folders of sets, or of corpora that have one.
        kind: of dedup stage, ``exact`` or ``near``.
        folder: where the corpus publishes its set.

    Raises:
        InputError: an entry stands for that folder, or holds no set of the kind.
    """
    if any(storage.absolute(_open_set(entry, kind)[0]) == storage.absolute(folder) for entry in against):
        raise InputError(f"against: {folder} is where this corpus publishes its own fingerprints")


def publish(
    folder: str, scheme: Scheme, files: list[str], duplicates: str, *, dropped: bool, against: list[str]
) -> None:
    """Publish the fingerprints of a corpus as a set; ``folder`` is emptied first.

    Args:
        folder: of the set.
        scheme: of the fingerprints.
        files: those of all parts.
        duplicates: folder that says which documents are dropped.
        dropped: whether dropped documents leave their fingerprint, under the id of the one that stays, so that what is
            like them is found although it is less like that one.
        against: the folders that the search compared with.

    Raises:
        InputError: the folder is one that the corpus was compared with.
    """
    refuse_own(against, scheme.kind, folder)
    storage.delete(folder)
    schema = pa.schema([("id", pa.string()), ("fingerprint", pa.binary(scheme.width))])

    def write(index: int, uri: str) -> Iterator[pa.Table]:
        name = storage.file_name(uri)
        gone, stays = np.empty(0, np.int64), []
        if storage.exists(storage.join(duplicates, name)):
            with storage.open_parquet(storage.join(duplicates, name)) as listed:
                table = listed.read(["row", "duplicate_of"]).sort_by("row")
            gone, stays = column(table, "row"), table["duplicate_of"].to_pylist()
        content, row = xxhash.xxh3_128(), 0
        with (
            storage.open_parquet(uri) as file,
            storage.parquet_writer(storage.join(folder, name), schema, compression="none") as out,
        ):
            for batch in file.iter_batches(columns=["id", "fingerprint"], batch_size=8192):
                ids = batch["id"].to_pylist()
                low, high = np.searchsorted(gone, (row, row + len(ids)))
                at = gone[low:high] - row
                for i, other in zip(at.tolist(), stays[low:high], strict=True):
                    ids[i] = other
                row += len(ids)
                table = pa.table([pa.array(ids, pa.string()), batch["fingerprint"]], schema)
                if not dropped:
                    table = table.filter(pa.array(~np.isin(np.arange(len(ids)), at)))
                content.update("\n".join(map(str, table["id"].to_pylist())).encode())
                content.update(from_binary(table["fingerprint"], "u1").tobytes())
                out.write_table(table)
        yield pa.table({"index": [index], "content": [content.hexdigest()]})

    written = collect(for_parts(files, write)).sort_by("index") if files else pa.table({"content": []})
    storage.write_json(
        storage.join(folder, _SET),
        {
            "kind": scheme.kind,
            "settings": dict(scheme.settings),
            "content": xxhash.xxh3_128_hexdigest("".join(written["content"].to_pylist()).encode()),
            "files": [storage.file_name(uri) for uri in files],
        },
    )
