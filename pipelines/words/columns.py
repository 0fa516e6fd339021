"""Arrow string columns as the bytes and offsets that the kernels read."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def buffers(column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 of all documents, uint8, and where each lies in it, (documents + 1,), int64; null is empty. No copy."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # combine_chunks of no chunks
        column = pa.array([], pa.large_string())
    if column.type != pa.large_string():
        column = column.cast(pa.large_string())
    if column.null_count:
        column = column.fill_null("")
    _, offsets, data = column.buffers()
    lengths = np.zeros(1, np.int64) if offsets is None else np.frombuffer(offsets, np.int64)
    lengths = lengths[column.offset : column.offset + len(column) + 1] if len(column) else np.zeros(1, np.int64)
    text = np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(0, np.uint8)
    lengths.flags.writeable = False  # one type for numba, which compiles anew for another
    text.flags.writeable = False
    return text, lengths
