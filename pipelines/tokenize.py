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
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from pipelines import storage
from pipelines.documents import InputError
from pipelines.shards import DOCUMENTS_SCHEMA, shard_name, token_dtype, write_shard
from pipelines.progress import Progress
from pipelines.stage import Output, Stage, Unit, for_each, part_uris, read_part, run_stage
from pipelines.tokenizer import Tokenizer

log = logging.getLogger("ingot")

SPLITS = ("train", "validation")


@dataclass
class TokenizeSettings:
    """How documents become token shards."""

    validation_share: float = 0.005
    """Share of the documents, chosen by a hash of their id, that is kept for validation."""
    block: int = 4096
    """Tokens in a row of a shard; training can use any sequence length."""
    shard_tokens: int = 67_108_864
    """Tokens in a shard, a multiple of 32 blocks."""

    def validate(self) -> None:
        """Raise ValueError for what cannot work."""
        if not 0 < self.validation_share < 1:
            raise ValueError(f"tokenize.validation_share is {self.validation_share}; it has to lie between 0 and 1")
        if self.block < 1 or self.shard_tokens < 1 or self.shard_tokens % (32 * self.block):
            raise ValueError(
                f"tokenize.shard_tokens is {self.shard_tokens}; "
                f"it has to be a multiple of 32 * block = {32 * self.block}"
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

    encode = Stage("encode", encoded_folder, {"validation_share": settings.validation_share}, inputs)
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
            ("tokens", pa.large_list(pa.from_numpy_dtype(token_dtype(vocab_size)))),
        ]
    )


@functools.cache
def _tokenizer(folder: str, made: str) -> Tokenizer:
    """The tokenizer, loaded once a process; ``made``, its manifest's fingerprint, tells it from an earlier one."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every task has one core; Ray runs as many tasks as there are
    return Tokenizer.load(folder)


def is_validation(document: str, share: float) -> bool:
    """Whether the document with this id belongs to the validation split."""
    return xxhash.xxh32_intdigest(f"split\0{document}".encode()) < share * 2**32


def _encode(part: str, tokenizer: str, made: str, validation_share: float) -> Iterator[Output]:
    """Work of the encode stage: a corpus part to its documents' tokens, each ended by ``<|endoftext|>``."""
    encoder = _tokenizer(tokenizer, made)
    schema = _encoded_schema(encoder.vocab_size)
    for table in read_part(part, rows=256, columns=["id", "text", "source", "url"]):
        texts = table["text"].to_pylist()
        ids = [[*tokens, encoder.eot_id] for tokens in encoder.encode_batch(texts)]
        validation = [is_validation(document, validation_share) for document in table["id"].to_pylist()]
        sizes = [len(text.encode()) for text in texts]
        counts: dict[str, int] = {}
        for tokens, size, held_out in zip(ids, sizes, validation, strict=True):
            split = SPLITS[held_out]
            for name, count in ("documents", 1), ("tokens", len(tokens)), ("bytes", size):
                counts[f"{split}_{name}"] = counts.get(f"{split}_{name}", 0) + count
        kept = pa.table(
            [
                table["id"],
                table["source"],
                table["url"],
                pa.array(validation),
                pa.array(ids, schema.field("tokens").type),
            ],
            schema=schema,
        )
        yield Output(kept, None, table.num_rows, sum(sizes), counts)


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
            "tokenizer": stage.inputs["tokenizer"],
            "shards": [unit.name for unit in units],
            **{k: v for k, v in asdict(settings).items() if k in ("block", "shard_tokens")},
        }
    )
    progress.finish(f"{total:,} tokens in {len(units)} shards")
    return manifest


def _fill(folder: str, validation: bool, block: int, pad_id: int, dtype: str, unit: Unit) -> dict[str, Any]:
    """Write one shard: the split's tokens ``[start, end)``; the shard file, written last, is its own receipt."""
    start, end = unit.arguments["start"], unit.arguments["end"]
    tokens = np.empty(end - start, dtype)
    documents = []
    for uri, first in unit.arguments["parts"]:
        at = first
        for table in read_part(uri):
            mine = table.filter(pa.compute.equal(table["validation"], validation)).combine_chunks()
            if not mine.num_rows:
                continue
            column = mine["tokens"].combine_chunks() if mine["tokens"].num_chunks != 1 else mine["tokens"].chunk(0)
            values = column.flatten().to_numpy()
            offsets = np.asarray(column.offsets) - column.offsets[0].as_py()
            low, high = max(start - at, 0), min(end - at, len(values))
            if low < high:
                tokens[at + low - start : at + high - start] = values[low:high]
            for i in np.flatnonzero((at + offsets[:-1] >= start) & (at + offsets[:-1] < end)):
                row = {name: mine[name][int(i)].as_py() for name in ("id", "source", "url")}
                documents.append(row | {"start": int(at + offsets[i]), "length": int(offsets[i + 1] - offsets[i])})
            at += len(values)
            if at >= end:
                break
    with storage.parquet_writer(storage.join(folder, "documents", unit.name), DOCUMENTS_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(documents, DOCUMENTS_SCHEMA))
    write_shard(storage.join(folder, unit.name), tokens, block, pad_id)
    return {"name": unit.name, "documents": len(documents), "bytes": tokens.nbytes}
