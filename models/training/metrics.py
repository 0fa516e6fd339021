"""A run's numbers: to files, TensorBoard and log lines; and what the hardware could do at most."""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from models.training.state import RunFolder

# Dense bf16 peak in FLOP/s by the vendors' data sheets; the name is matched as a part of the device's own.
PEAK_FLOPS = {
    "H200": 989.5e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.5e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,
}

_SEGMENT = 1000  # rows in a file; the file is written anew at each flush, which works on object stores too


def peak_flops(device: torch.device) -> float | None:
    """Peak of the device in FLOP/s, or None when it is not known (any CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class MetricsWriter:
    """Writes a run's metrics from rank 0: ``metrics/*.jsonl``, one object a line, and TensorBoard.

    A step that was undone by a rollback or a crash stays in the files; a row with ``undone_after`` says that the rows
    before it count only up to that step.
    """

    def __init__(self, run: RunFolder, tensorboard: str | None, every: float = 2.0) -> None:
        self.run, self.every = run, every
        self.rows: list[str] = []
        self.segment = self._new_segment()
        self.flushed = time.monotonic()
        self.board = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(tensorboard)

    @staticmethod
    def _new_segment() -> str:
        return f"metrics/{time.time_ns()}.jsonl"

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; it has a ``step``, and gets the ``time``."""
        self.rows.append(json.dumps({**row, "time": time.time()}))
        if self.board is not None:
            for name, value in row.items():
                if name not in ("step", "undone_after") and value is not None:
                    self.board.add_scalar(name, value, row["step"])
        if time.monotonic() - self.flushed > self.every or len(self.rows) >= _SEGMENT:
            self.flush()

    def flush(self) -> None:
        """Write what is not on storage yet."""
        self.flushed = time.monotonic()
        if self.rows:
            self.run.write_text(self.segment, "\n".join(self.rows) + "\n")
        if len(self.rows) >= _SEGMENT:
            self.rows, self.segment = [], self._new_segment()
        if self.board is not None:
            self.board.flush()
