"""Documents to packed token shards, split by document into training and validation.

Two passes, each in parallel and each going on after a kill: every part of the corpus is encoded, which says how many
tokens it has; then, since every document's place is known, every shard is filled from the parts that reach into it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines import storage
from pipelines.documents import InputError, original_id
from pipelines.progress import Progress
from pipelines.shards import DOCUMENTS_SCHEMA, shard_name, token_dtype, write_shard
from pipelines.stage import Output, Stage, Unit, for_each, part_uris, read_part, run_stage
from pipelines.tokenizer import Tokenizer

log = logging.getLogger("ingot")

SPLITS = ("train", "validation")
ENCODED_TOGETHER = 256  # documents: few enough that strings and ids stay in the core's caches
PACKED_TOGETHER = 1 << 24  # tokens that whole documents are packed from at a time: all of them are in memory


@dataclass
class TokenizeSettings:
    """How documents become token shards."""

    validation_share: float = 0.005
    """Share of the documents, chosen by a hash of their id, that is kept for validation."""
    block: int = 4096
    """Tokens in a row of a shard."""
    shard_tokens: int = 67_108_864
    """Tokens in a shard, a multiple of 32 blocks."""
    packing: Literal["concatenate", "whole_documents"] = "concatenate"
    """One document after another, for any sequence length; or packed so that no sequence cuts one that fits into it."""
    sequence_length: int | None = None
    """For whole_documents: the sequence length that training will use; null otherwise."""

    def validate(self) -> None:
        """Raise ValueError for what cannot work."""
        if not 0 < self.validation_share < 1:
            raise ValueError(f"tokenize.validation_share is {self.validation_share}; it has to lie between 0 and 1")
        if self.block < 1 or self.shard_tokens < 1 or self.shard_tokens % (32 * self.block):
            raise ValueError(
                f"tokenize.shard_tokens is {self.shard_tokens}; "
                f"it has to be a multiple of 32 * block = {32 * self.block}"
            )
        if self.packing not in ("concatenate", "whole_documents"):
            raise ValueError(f"tokenize.packing is {self.packing!r}; it has to be concatenate or whole_documents")
        if self.packing == "concatenate" and self.sequence_length is not None:
            raise ValueError(
                f"tokenize.sequence_length is {self.sequence_length}, but with packing concatenate training can use "
                "any; leave it null, or choose packing whole_documents"
            )
        if self.packing == "whole_documents" and (self.sequence_length is None or self.sequence_length < 1):
            raise ValueError(
                f"tokenize.sequence_length is {self.sequence_length}; packing whole_documents needs the length of the "
                "sequences that training will use"
            )


def tokenize(
    tokens: str, corpus: str, corpus_manifest: dict[str, Any], tokenizer: str, settings: TokenizeSettings
) -> dict[str, dict[str, Any]]:
    """Encode a corpus stage and publish ``tokens/train`` and ``tokens/validation``; skipped when they are there.

    Args:
        tokens: the ``tokens`` folder.
        corpus: folder of the corpus stage.
        corpus_manifest: its manifest.
        tokenizer: folder of the tokenizer.
        settings: split, block and shard sizes.

    Returns:
        The two splits' manifests.

    Raises:
        ValueError: a split ends up empty.
    """
    settings.validate()
    tokenizer_manifest = storage.read_json(storage.join(tokenizer, "manifest.json"))
    inputs = {"corpus": corpus_manifest["fingerprint"], "tokenizer": tokenizer_manifest["fingerprint"]}
    stages = {s: Stage(f"tokens/{s}", storage.join(tokens, s), settings, inputs) for s in SPLITS}
    finished = {split: stage.finished() for split, stage in stages.items()}
    encoded_folder = storage.join(tokens, "_encoded")
    if all(finished.values()):
        log.info("tokens: up to date, nothing to do")
        storage.delete(encoded_folder)  # a run that was killed at its very end left it
        return finished

    packed = {name: getattr(settings, name) for name in ("validation_share", "sequence_length")}
    encode = Stage("encode", encoded_folder, packed, inputs, version=2)
    encoded = encode.finished() or run_stage(
        encode,
        [
            Unit(
                part["file"].removesuffix(".parquet"),
                {"part": uri, "tokenizer": tokenizer, "made": inputs["tokenizer"], **encode.settings},
            )
            for part, uri in zip(corpus_manifest["parts"], part_uris(corpus, corpus_manifest), strict=True)
        ],
        _encode,
        schema=_encoded_schema(tokenizer_manifest["vocab_size"]),
    )
    for split in SPLITS:
        if not sum(part.get(f"{split}_tokens", 0) for part in encoded["parts"]):
            raise InputError(
                f"{corpus}: no document of {corpus_manifest['documents_out']:,} fell into the {split} split at "
                f"tokenize.validation_share {settings.validation_share}; choose another share or add documents"
            )
    manifests = {
        split: finished[split] or _pack(stages[split], split, encoded_folder, encoded, tokenizer, settings)
        for split in SPLITS
    }
    storage.delete(encoded_folder)  # everything in it lies in the shards now
    return manifests


def _encoded_schema(vocab_size: int) -> pa.Schema:
    return pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("url", pa.string()),
            ("validation", pa.bool_()),
            ("length", pa.int64()),  # tokens without the padding behind them
            ("tokens", pa.large_list(pa.from_numpy_dtype(token_dtype(vocab_size)))),
        ]
    )


@functools.cache
def _tokenizer(folder: str, made: str) -> Tokenizer:
    """The tokenizer, loaded once a process; ``made``, its manifest's fingerprint, tells it from an earlier one."""
    os.environ["FASTOKENS_BPE_THREADS"] = "1"  # every task has one core; Ray runs as many tasks as there are
    return Tokenizer.load(folder)


def is_validation(document: str, share: float) -> bool:
    """Whether the document with this id belongs to the validation split; copies of one document lie in the same."""
    return xxhash.xxh32_intdigest(f"split\0{original_id(document)}".encode()) < share * 2**32


def _encode(
    part: str, tokenizer: str, made: str, validation_share: float, sequence_length: int | None
) -> Iterator[Output]:
    """Work of the encode stage: a corpus part to its documents' tokens, each ended by ``<|endoftext|>``.

    With a sequence length, they come packed into sequences; documents are gathered for that, as many as fill a window.
    """
    encoder = _tokenizer(tokenizer, made)
    window: list[pa.Table] = []
    n_window = 0
    columns = ["id", "text", "source", "url"]
    for number, table in enumerate(read_part(part, rows=ENCODED_TOGETHER, columns=columns)):
        if number == 0:
            encoder.check_batch([text[:2000] for text in table["text"].slice(0, 16).to_pylist()])
        encoded, sizes = encode_table(table, encoder, validation_share)
        counts = _counts(encoded, sizes)
        if sequence_length is None:
            yield Output(encoded, None, table.num_rows, int(sizes.sum()), counts)
            continue
        yield Output(encoded.slice(0, 0), None, table.num_rows, int(sizes.sum()), counts)
        window.append(encoded)
        n_window += sum(counts[f"{split}_tokens"] for split in SPLITS)
        if n_window >= PACKED_TOGETHER:
            yield from _packed(window, sequence_length + 1, encoder.pad_id)
            window, n_window = [], 0
    if window:
        yield from _packed(window, sequence_length + 1, encoder.pad_id)


def encode_table(table: pa.Table, encoder: Tokenizer, validation_share: float) -> tuple[pa.Table, np.ndarray]:
    """The tokens of a table of documents, as rows of the encode stage's schema, and the bytes of each text."""
    from pipelines.packing import put_ends

    schema = _encoded_schema(encoder.vocab_size)
    ids, starts = encoder.encode_batch(table["text"].to_pylist())
    tokens = np.empty(len(ids) + table.num_rows, token_dtype(encoder.vocab_size))
    put_ends(ids, starts, encoder.eot_id, tokens)
    starts = starts + np.arange(len(starts))
    validation = [is_validation(document, validation_share) for document in table["id"].to_pylist()]
    column = pa.LargeListArray.from_arrays(pa.array(starts), pa.array(tokens))
    kept = [table["id"], table["source"], table["url"], pa.array(validation, pa.bool_()), pa.array(np.diff(starts))]
    return pa.table([*kept, column], schema=schema), pc.binary_length(table["text"]).to_numpy()


def _counts(encoded: pa.Table, sizes: np.ndarray) -> dict[str, int]:
    held_out = encoded["validation"].to_numpy()
    counts = {}
    for split, mine in zip(SPLITS, (~held_out, held_out), strict=True):
        counts[f"{split}_documents"] = int(mine.sum())
        counts[f"{split}_tokens"] = int(encoded["length"].to_numpy()[mine].sum())
        counts[f"{split}_bytes"] = int(sizes[mine].sum())
    return counts


def _packed(window: list[pa.Table], width: int, pad_id: int) -> Iterator[Output]:
    """The documents of a window packed into sequences of ``width`` tokens, each split for itself."""
    from pipelines.packing import pack, put_pieces

    together = pa.concat_tables(window)
    for held_out, split in enumerate(SPLITS):
        mine = together.filter(pc.equal(together["validation"], bool(held_out))).combine_chunks()
        if not mine.num_rows:
            continue
        column = mine["tokens"].chunk(0)
        ids, starts = column.flatten().to_numpy(), np.asarray(column.offsets) - column.offsets[0].as_py()
        pieces = pack(np.diff(starts), width)
        tokens = np.empty(int((pieces.length + pieces.padding).sum()), ids.dtype)
        put_pieces(ids, starts[pieces.document] + pieces.start, pieces.length, pieces.padding, pad_id, tokens)
        ends = np.concatenate([[0], np.cumsum(pieces.length + pieces.padding)])
        table = mine.select(["id", "source", "url", "validation"]).take(pa.array(pieces.document))
        columns = [*table.columns, pa.array(pieces.length), pa.LargeListArray.from_arrays(ends, pa.array(tokens))]
        padding = int(pieces.padding.sum())
        yield Output(
            pa.table(columns, schema=mine.schema), None, 0, 0,
            {f"{split}_tokens": padding, f"{split}_padding": padding},
        )  # fmt: skip


def _pack(
    stage: Stage,
    split: str,
    encoded_folder: str,
    encoded: dict[str, Any],
    tokenizer: str,
    settings: TokenizeSettings,
) -> dict[str, Any]:
    """Fill the shards of one split and publish it."""
    stage.begin()
    counts = [part.get(f"{split}_tokens", 0) for part in encoded["parts"]]
    ends = np.cumsum(counts)
    total = int(ends[-1])
    uris = part_uris(encoded_folder, encoded)
    encoder = _tokenizer(tokenizer, stage.inputs["tokenizer"])
    units = []
    for index in range(-(-total // settings.shard_tokens)):
        start = index * settings.shard_tokens
        end = min(start + settings.shard_tokens, total)
        reach = [
            (uris[i], int(ends[i]) - counts[i])
            for i in range(len(uris))
            if ends[i] > start and ends[i] - counts[i] < end
        ]
        units.append(Unit(shard_name(index), {"parts": reach, "start": start, "end": end}))
    todo = [unit for unit in units if not storage.exists(storage.join(stage.folder, unit.name))]
    width = token_dtype(encoder.vocab_size).itemsize
    sizes = {unit.name: width * (unit.arguments["end"] - unit.arguments["start"]) for unit in todo}
    progress = Progress(stage.name, sizes, len(units) - len(todo))
    fill = functools.partial(
        _fill, stage.folder, split == "validation", settings.block, encoder.pad_id, token_dtype(encoder.vocab_size).name
    )
    for result in for_each(todo, fill):
        progress.step(result["name"], result["documents"], result["bytes"], finished=True)
    manifest = stage.publish(
        {
            "tokens": total,
            "documents": sum(part.get(f"{split}_documents", 0) for part in encoded["parts"]),
            "bytes": sum(part.get(f"{split}_bytes", 0) for part in encoded["parts"]),
            "vocab_size": encoder.vocab_size,
            "dtype": token_dtype(encoder.vocab_size).name,
            "pad_id": encoder.pad_id,
            "padding": sum(part.get(f"{split}_padding", 0) for part in encoded["parts"]),
            "tokenizer": stage.inputs["tokenizer"],
            "shards": [unit.name for unit in units],
            **{k: v for k, v in asdict(settings).items() if k in ("block", "shard_tokens", "sequence_length")},
        }
    )
    progress.finish(f"{total:,} tokens in {len(units)} shards")
    return manifest


def _fill(folder: str, validation: bool, block: int, pad_id: int, dtype: str, unit: Unit) -> dict[str, Any]:
    """Write one shard: the split's tokens ``[start, end)``; the shard file, written last, is its own receipt."""
    start, end = unit.arguments["start"], unit.arguments["end"]
    tokens = np.empty(end - start, dtype)
    n_documents = 0
    with storage.parquet_writer(storage.join(folder, "documents", unit.name), DOCUMENTS_SCHEMA) as writer:
        for uri, first in unit.arguments["parts"]:
            at = first
            for table in read_part(uri):
                mine = table.filter(pc.equal(table["validation"], validation)).combine_chunks()
                if not mine.num_rows:
                    continue
                column = mine["tokens"].chunk(0)
                values = column.flatten().to_numpy()
                offsets = np.asarray(column.offsets) - column.offsets[0].as_py()
                low, high = max(start - at, 0), min(end - at, len(values))
                if low < high:
                    tokens[at + low - start : at + high - start] = values[low:high]
                begin_here = np.flatnonzero((at + offsets[:-1] >= start) & (at + offsets[:-1] < end))
                if len(begin_here):
                    rows = mine.take(pa.array(begin_here))
                    starts = pa.array(at + offsets[begin_here])
                    columns = [rows["id"], starts, rows["length"], rows["source"], rows["url"]]
                    writer.write_table(pa.table(columns, schema=DOCUMENTS_SCHEMA))
                    n_documents += len(begin_here)
                at += len(values)
                if at >= end:
                    break
    write_shard(storage.join(folder, unit.name), tokens, block, pad_id)
    return {"name": unit.name, "documents": n_documents, "bytes": tokens.nbytes}
