"""The token shard format: a split's tokens as one long sequence, cut into Parquet shards of fixed blocks.

Row ``r`` of shard ``k`` holds, as little-endian bytes, the tokens from ``k * shard_tokens + r * block`` on, so a
token's offset gives its file and row by arithmetic. Documents follow one another, each ended by ``<|endoftext|>``; the
last block of the last shard is filled up with padding, which the manifest's token count leaves out. ``documents/`` says
which document lies where.

Where the manifest names a ``sequence_length`` L, whole documents were packed: the tokens are sequences of L + 1, inputs
and the last target. No document lies in two of them unless it is longer than one, and what a sequence has no document
for is padding, which is counted. A document that was cut has an entry in ``documents/`` for each piece.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.documents import InputError
from pipelines.stage import require_manifest

ROW_GROUP_BLOCKS = 8  # what one read brings in: 64 KiB at the default block of 4096 uint16 tokens

DOCUMENTS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("start", pa.int64()),  # offset of the first token in the split
        ("length", pa.int64()),  # tokens, the <|endoftext|> included
        ("source", pa.string()),
        ("url", pa.string()),
    ]
)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smaller of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def shard_name(index: int) -> str:
    """File name of shard ``index``."""
    return f"shard-{index:05d}.parquet"


def write_shard(uri: str, tokens: np.ndarray, block: int, pad_id: int) -> None:
    """Write one shard, whole or not at all.

    Args:
        uri: the shard's file.
        tokens: (n,) uint16 or uint32.
        block: tokens in a row; the last row is filled up with ``pad_id``.
        pad_id: token id of the padding.
    """
    rows = -(-len(tokens) // block)
    padded = np.full(rows * block, pad_id, tokens.dtype.newbyteorder("<"))
    padded[: len(tokens)] = tokens
    # Bytes, not lists of numbers: half the size, as Parquet has no 16-bit numbers, and read without decoding each.
    kind = pa.binary(block * tokens.itemsize)
    column = pa.FixedSizeBinaryArray.from_buffers(kind, rows, [None, pa.py_buffer(padded)])
    table = pa.table({"tokens": column})
    # Not compressed: token ids barely shrink, and training reads them at random through a memory map.
    with storage.parquet_writer(uri, table.schema, compression="none", use_dictionary=False) as writer:
        writer.write_table(table, row_group_size=ROW_GROUP_BLOCKS)


class TokenShards:
    """A finished split, read at any offset.

    Attributes:
        n_tokens: tokens of the split.
        sequence_length: that whole documents were packed for, or None.
        pad_id: id of the padding that such packing leaves.

    Raises:
        FileNotFoundError: the split is not finished.
        ValueError: a shard is missing or, once it is read, damaged or of another size than the manifest says.
    """

    def __init__(self, folder: str, cached_groups: int = 64) -> None:
        self.folder = folder
        self.manifest: Mapping[str, Any] = require_manifest(folder, "tokenize")
        self.n_tokens: int = self.manifest["tokens"]
        self.block: int = self.manifest["block"]
        self.shard_tokens: int = self.manifest["shard_tokens"]
        self.sequence_length: int | None = self.manifest.get("sequence_length")
        self.pad_id: int | None = self.manifest.get("pad_id")
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self._check_all_there()
        self._files: dict[int, Any] = {}
        self._groups: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._cached_groups = cached_groups
        self._side: tuple[int, Any, Any] = (-1, None, None)
        self._sources: tuple[np.ndarray, np.ndarray, np.ndarray, list[str]] | None = None

    def _check_all_there(self) -> None:
        files = [file.uri.split("/") for file in storage.list_files(self.folder)]
        there = {parts[-1] for parts in files if parts[-2] != "documents"}
        expected = [shard_name(i) for i in range(-(-self.n_tokens // self.shard_tokens))]
        missing = [name for name in expected if name not in there]
        if missing:
            named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise InputError(
                f"{self.folder}: {len(missing)} of the {len(expected)} shards that the manifest lists are not there: "
                f"{named}; delete the folder and run `ingot tokenize` again"
            )

    def read(self, start: int, length: int) -> np.ndarray:
        """The tokens ``[start, start + length)`` of the split, (length,) in the shards' dtype.

        Raises:
            ValueError: the range leaves the split.
        """
        if start < 0 or length < 0 or start + length > self.n_tokens:
            raise ValueError(
                f"{self.folder}: tokens [{start}, {start + length}) asked for, but it holds {self.n_tokens}"
            )
        out = np.empty(length, self.dtype)
        done = 0
        while done < length:
            shard, inside = divmod(start + done, self.shard_tokens)
            group, first = divmod(inside, ROW_GROUP_BLOCKS * self.block)
            piece = self._group(shard, group)[first : first + length - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
        return out

    def _group(self, shard: int, group: int) -> np.ndarray:
        key = shard, group
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        file = self._file(shard)
        try:
            column = file.read_row_group(group, use_threads=False)["tokens"].combine_chunks()
            tokens = np.frombuffer(column.buffers()[1], self.dtype)[column.offset * self.block :]
        except (OSError, pa.ArrowInvalid) as error:
            if storage.failed(error):
                raise
            raise InputError(
                f"{storage.join(self.folder, shard_name(shard))}: row group {group} cannot be read ({error}); delete "
                "the folder and run `ingot tokenize` again"
            ) from None
        self._groups[key] = tokens
        if len(self._groups) > self._cached_groups:
            self._groups.popitem(last=False)
        return tokens

    def _file(self, shard: int) -> Any:
        if shard not in self._files:
            uri = storage.join(self.folder, shard_name(shard))
            file = storage.open_parquet(uri)
            tokens = min(self.shard_tokens, self.n_tokens - shard * self.shard_tokens)
            if not pa.types.is_fixed_size_binary(file.schema_arrow.field("tokens").type):
                raise InputError(
                    f"{uri}: written by an earlier version of Ingot, in a format that is no longer read; delete the "
                    "folder and run `ingot tokenize` again"
                )
            if file.metadata.num_rows != -(-tokens // self.block):
                raise InputError(
                    f"{uri}: has {file.metadata.num_rows} rows where the manifest says {-(-tokens // self.block)}; "
                    "delete the folder and run `ingot tokenize` again"
                )
            self._files[shard] = file
        return self._files[shard]

    def documents(self, start: int, length: int) -> list[dict[str, Any]]:
        """The documents that have tokens in ``[start, start + length)``, in order, as rows of DOCUMENTS_SCHEMA."""
        end = start + length
        found: list[dict[str, Any]] = []
        for shard in range((end - 1) // self.shard_tokens, -1, -1):
            table, starts = self._documents(shard)
            # From the last document that begins at or before ``start``, which may lie in an earlier shard.
            first = max(int(np.searchsorted(starts, start, "right")) - 1, 0)
            last = int(np.searchsorted(starts, end, "left"))
            rows = table.slice(first, last - first).to_pylist()
            found = [row for row in rows if row["start"] + row["length"] > start] + found
            if len(starts) and starts[0] <= start:
                break
        return found

    def tokens_by_source(self, starts: np.ndarray, length: int) -> dict[str, int]:
        """How many tokens of the ranges ``[start, start + length)`` belong to documents of each source.

        The first call reads where all documents lie, some 20 bytes for each, which is kept.

        Args:
            starts: (k,) int64 offsets; ranges that overlap count as often as there are of them.
            length: of each range.
        """
        if self._sources is None:
            self._sources = self._read_sources()
        begins, lengths, of, names = self._sources
        whole = np.zeros(len(begins) + 1, np.int64)  # how many ranges begin before a document less those that end there
        told = np.zeros(len(names), np.int64)
        for offsets, sign in ((starts + length, 1), (starts, -1)):
            # Tokens before an offset: whole documents up to the one that it lies in, and a part of that.
            inside = np.searchsorted(begins, offsets, "right") - 1
            covered = inside >= 0
            inside = inside[covered]
            parts = np.minimum(offsets[covered] - begins[inside], lengths[inside])
            np.add.at(told, of[inside], sign * parts)
            whole += sign * np.bincount(inside, minlength=len(whole))
        times = np.cumsum(whole[::-1])[::-1][1:]  # ranges that hold the whole document
        np.add.at(told, of, times * lengths)
        return {name: int(count) for name, count in zip(names, told, strict=True) if count}

    def _read_sources(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Of all documents in order: the first token's offset, the number of tokens, the source's place in the list."""
        tables = []
        for shard in range(-(-self.n_tokens // self.shard_tokens)):
            file = storage.open_parquet(storage.join(self.folder, "documents", shard_name(shard)))
            tables.append(file.read(columns=["start", "length", "source"]))
        table = pa.concat_tables(tables)
        sources = table["source"].combine_chunks().fill_null("").dictionary_encode()
        names = sources.dictionary.to_pylist()
        return table["start"].to_numpy(), table["length"].to_numpy(), sources.indices.to_numpy(), names

    def _documents(self, shard: int) -> tuple[pa.Table, np.ndarray]:
        """A shard's side table and the offsets where its documents begin; the last one read is kept."""
        if self._side[0] != shard:
            table = storage.open_parquet(storage.join(self.folder, "documents", shard_name(shard))).read()
            self._side = shard, table, table["start"].to_numpy()
        return self._side[1:]
