"""Checkpoints written beside the training, and copies in host memory to go back to within seconds.

A snapshot is first copied to host memory, on the GPU by a stream of its own while the next step computes; a thread
writes it from there, with a process group of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from models.training.checkpoints import load, states, write
from models.training.run_folder import RunFolder

log = logging.getLogger("ingot")

_ALIGNMENT = 512  # bytes between the tensors of a snapshot


@dataclass(eq=False)
class Snapshot:
    """Weights and optimizer state of one step in host memory.

    Attributes:
        step: optimizer steps done.
        folder: where the run keeps it.
        facts: what belongs to it, as JSON.
        tensors: by their name in the checkpoint; this rank's shards.
        copied: on CUDA, the event after which the copy is whole.
        pause: seconds for which the training waited for it.
    """

    step: int
    folder: str
    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    copied: torch.cuda.Event | None = None
    pause: float = 0.0


@dataclass
class Written:
    """The end of a write: where it lies, how long it took, and why it failed, if it did."""

    step: int
    folder: str
    facts: dict[str, Any]
    pause: float
    seconds: float
    error: str | None


class Checkpointer:
    """Writes a run's checkpoints beside the training and remembers the newest ones in host memory.

    All ranks make the same calls in the same order. One checkpoint is written at a time: ``collect`` the one before
    ``begin`` is called again.

    Args:
        run: the run's folder.
        model: whose weights are saved; its parameters stay the same objects.
        optimizer: whose state is saved.
        device: where the model is.
        snapshots: how many are remembered, each as large as weights and optimizer state of this rank. 0 writes
            without one, while the training waits.
        background: write in a thread; otherwise the training waits for that too.
    """

    def __init__(
        self,
        run: RunFolder,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        snapshots: int = 2,
        background: bool = True,
    ) -> None:
        self.run, self.model, self.optimizer, self.device = run, model, optimizer, device
        self.size, self.background = snapshots, background and snapshots > 0
        self.ring: list[Snapshot] = []
        self.free: list[dict[str, Tensor]] = []
        # The thread's own, and one for reading meanwhile; gloo, because what they exchange lies on the host.
        self.write_group, self.read_group = (
            (dist.new_group(backend="gloo"), dist.new_group(backend="gloo")) if dist.is_initialized() else (None, None)
        )
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.copying: torch.cuda.Event | None = None
        self.state: dict[str, Any] | None = None
        self.thread: threading.Thread | None = None
        self.writing = False
        self.source: Snapshot | None = None  # what is being written
        self.result: Written | None = None

    # Writing

    def begin(self, step: int, folder: str, facts: dict[str, Any]) -> None:
        """Take a snapshot and begin to write it."""
        if self.writing:
            raise RuntimeError(f"{folder}: begun before the checkpoint that is being written was collected")
        began = time.perf_counter()
        snapshot = self.remember(step, folder, facts) if self.size else None
        self.writing, self.result, self.source = True, None, snapshot
        if snapshot is not None:
            snapshot.pause = time.perf_counter() - began
        work = _Work(self, step, folder, facts, snapshot, self._live(), began)
        if self.background:
            self.thread = threading.Thread(target=work.run, daemon=True, name="checkpoint")
            self.thread.start()
        else:
            work.run()

    @property
    def written(self) -> bool:
        """Whether this rank has ended what ``begin`` began."""
        return self.result is not None

    def collect(self) -> Written | None:
        """Wait for the write that was begun, on all ranks, and tell how it ended; None when there is none."""
        if not self.writing:
            return None
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.source is not None and self.source not in self.ring:  # given up while it was written
            self.free.append(self.source.tensors)
        self.writing, self.source = False, None
        result, self.result = self.result, None
        return result

    def close(self, seconds: float = 60.0) -> None:
        """Let a write that goes on come to its end, if it does within some time."""
        if self.thread is not None:
            self.thread.join(seconds)

    # Host memory

    def remember(self, step: int, folder: str, facts: dict[str, Any]) -> Snapshot:
        """Copy weights and optimizer state to host memory, in place of the oldest snapshot when all are taken."""
        self.ring = [s for s in self.ring if s.step != step or self._release(s)]
        live = self._tensors()
        if self.free:
            buffers = self.free.pop()
        elif len(self.ring) < self.size:
            buffers = _host_copy(live, pinned=self.stream is not None)
        else:
            buffers = self.ring.pop(0).tensors
        snapshot = Snapshot(step, folder, facts, buffers)
        if self.stream is None:
            for name, tensor in live.items():
                buffers[name].copy_(tensor)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                for name, tensor in live.items():
                    buffers[name].copy_(tensor, non_blocking=True)
                snapshot.copied = torch.cuda.Event()
                snapshot.copied.record(self.stream)
            self.copying = snapshot.copied
        self.ring.append(snapshot)
        return snapshot

    def before_update(self) -> None:
        """To be called before weights change: makes the device wait until they are copied, not the host."""
        if self.copying is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copying)
            self.copying = None

    def recall(self, step: int) -> dict[str, Any] | None:
        """Put model and optimizer back to the snapshot of a step; its facts, or None when it is not remembered."""
        snapshot = next((s for s in self.ring if s.step == step), None)
        if snapshot is None:
            return None
        if snapshot.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(snapshot.copied)
        for name, tensor in self._tensors().items():
            tensor.copy_(snapshot.tensors[name], non_blocking=True)
        return snapshot.facts

    def forget_after(self, step: int) -> None:
        """Give up the snapshots of later steps: what they hold was undone."""
        self.ring = [s for s in self.ring if s.step <= step or self._release(s)]

    def load(self, folder: str) -> dict[str, Any] | None:
        """``load`` of this module, into this model and optimizer."""
        self.before_update()
        facts = load(self.run, folder, self.model, self.optimizer, self.read_group)
        self.state = None  # the optimizer's state may lie elsewhere now
        return facts

    def _release(self, snapshot: Snapshot) -> bool:
        """Give a snapshot's memory back, unless it is still written from; False, for filters."""
        if snapshot is not self.source:
            self.free.append(snapshot.tensors)
        return False

    def _live(self) -> dict[str, Any]:
        """The state that checkpoints hold, made once: the tensors in it are the model's and the optimizer's own."""
        if self.state is None:
            self.state = states(self.model, self.optimizer)
        return self.state

    def _tensors(self) -> dict[str, Tensor]:
        """This rank's part of every tensor of the state, by its name in the checkpoint."""
        return dict(_flat(self._live()))


@dataclass
class _Work:
    """One write, as the thread does it."""

    owner: Checkpointer
    step: int
    folder: str
    facts: dict[str, Any]
    snapshot: Snapshot | None
    state: dict[str, Any]
    began: float = field(default_factory=time.perf_counter)

    def run(self) -> None:
        owner, error = self.owner, None
        began = time.perf_counter()
        planner = None
        try:
            if self.snapshot is not None:
                if self.snapshot.copied is not None:
                    self.snapshot.copied.synchronize()
                planner = _FromHost(self.snapshot.tensors)
            write(owner.run, self.folder, self.state, self.facts, planner, owner.write_group)
        except Exception as failure:  # told by whoever collects it; the training goes on
            error = f"{type(failure).__name__}: {failure}"
        ended = time.perf_counter()
        pause = self.snapshot.pause if owner.background and self.snapshot is not None else ended - self.began
        owner.result = Written(self.step, self.folder, self.facts, pause, ended - began, error)


class _FromHost(DefaultSavePlanner):
    """Plans by the live state and takes the values from a snapshot's host tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self.tensors[write_item.index.fqn]


def _flat(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Local parts of all tensors in nested dictionaries, by their keys joined with dots: a checkpoint's own names."""
    for key, value in state.items():
        path = f"{name}.{key}" if name else str(key)
        if isinstance(value, dict):
            yield from _flat(value, path)
        elif isinstance(value, DTensor):
            yield path, value.to_local().detach()
        elif isinstance(value, Tensor):
            yield path, value.detach()


def _host_copy(tensors: dict[str, Tensor], *, pinned: bool) -> dict[str, Tensor]:
    """Empty host tensors of the same shapes in one allocation; page-locked, so that the device copies by itself."""
    offsets, end = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = end
        end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    block = torch.empty(max(end, 1), dtype=torch.uint8)
    if pinned:  # registered: pin_memory would round the size up to a power of two
        status = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.numel(), 0)
        if int(status) != 0:
            log.warning("checkpoints: %.1f GB of host memory could not be page-locked; copies wait", end / 1e9)
    return {
        name: block[offsets[name] : offsets[name] + tensor.numel() * tensor.element_size()]
        .view(tensor.dtype)
        .view(tensor.shape)
        for name, tensor in tensors.items()
    }
