"""Sharded checkpoints, written beside the training, and copies in host memory to go back to within seconds.

``torch.distributed.checkpoint`` writes every rank's own shards straight to their place; ``checkpoint.json``, written
last with sizes and checksums, makes the folder a checkpoint. A snapshot is first copied to host memory, on the GPU by
a stream of its own while the next step computes; a thread writes it from there, with a process group of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from models.training.run_folder import RunFolder

log = logging.getLogger("ingot")

RECEIPT = "checkpoint.json"

_RETRY_AFTER = (2.0, 8.0, 30.0)  # seconds between attempts, on all ranks alike, so by count and not by the clock
_WRITERS = 4  # threads of a rank
_ALIGNMENT = 512  # bytes between the tensors of a snapshot

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def save(
    run: RunFolder, folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> None:
    """Write a checkpoint at once; a collective of all ranks. ``facts`` (JSON) come back from ``load``.

    Raises:
        OSError: storage failed, on any rank.
    """
    _write(run, folder, _states(model, optimizer), facts, planner=None, group=None)


def load(
    run: RunFolder,
    folder: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any] | None:
    """Read a checkpoint into model and optimizer, at any number of ranks and any layout; a collective of all of them.

    Returns:
        The facts given to ``save``, or None when the checkpoint is torn or was changed since: what model and optimizer
        hold is then to be loaded from another.

    Raises:
        OSError: storage cannot be read, on any rank.
    """
    rank, world = rank_and_world()
    # Every rank reads the receipt, but one decides: storage may show a file to one and not yet to another.
    receipt = _from_first(read_receipt(run, folder) if rank == 0 else None, group)
    if receipt is None:
        return None
    try:
        mine: Any = _files(run, folder, rank, world)
    except OSError as error:
        mine = error
    shares = _gather(mine, group)
    failed = next((share for share in shares if isinstance(share, OSError)), None)
    if failed is not None:
        raise OSError(f"{run.uri(folder)}: a worker cannot read it: {failed}")  # which says nothing of what is in it
    if _merged(shares) != receipt["files"]:
        return None
    state = _states(model, optimizer)
    try:
        with _alone():
            dcp.load(state, checkpoint_id=run.uri(folder), process_group=group)
    except CheckpointException as error:  # on all ranks alike
        causes = [failure for failure, _ in error.failures.values()]
        if any(isinstance(cause, OSError) for cause in causes):
            raise OSError(f"{run.uri(folder)}: {causes[0]}") from None
        log.warning("%s: cannot be put together: %s", run.uri(folder), causes[:1])
        return None
    # Betas, weight decay and so on are the settings': PBT goes on with others than the checkpoint was made with.
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
    return receipt


def load_weights(run: RunFolder, folder: str, model: nn.Module) -> None:
    """Read a checkpoint's weights alone, into a model that is not sharded.

    Raises:
        FileNotFoundError: the folder is not a finished checkpoint.
        ValueError: it was changed since it was written.
    """
    receipt = read_receipt(run, folder)
    if receipt is None:
        raise FileNotFoundError(f"{run.uri(folder)}: not a finished checkpoint (it has no intact {RECEIPT})")
    if _files(run, folder, 0, 1) != receipt["files"]:
        raise ValueError(f"{run.uri(folder)}: its files are not those that were written; take another checkpoint")
    weights = model.state_dict()
    try:
        with _alone():
            dcp.load({"model": weights}, checkpoint_id=run.uri(folder), no_dist=True)
    except CheckpointException as error:
        raise ValueError(f"{run.uri(folder)}: cannot be put together: {error.failures}") from None
    model.load_state_dict(weights)


def write_receipt(run: RunFolder, folder: str, receipt: dict[str, Any]) -> None:
    """Make a folder a checkpoint. The receipt bears its own checksum: no other file could say what it has to be."""
    run.write_json(f"{folder}/{RECEIPT}", {**receipt, "checksum": _checksum(receipt)})


def read_receipt(run: RunFolder, folder: str) -> dict[str, Any] | None:
    """What was given to ``write_receipt``; None when there is none, or when it is not as it was written."""
    try:
        receipt = run.read_json(f"{folder}/{RECEIPT}")
    except ValueError:  # no JSON any more
        return None
    if not isinstance(receipt, dict) or receipt.pop("checksum", None) != _checksum(receipt):
        return None
    return receipt


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
            self.state = _states(self.model, self.optimizer)
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
            _write(owner.run, self.folder, self.state, self.facts, planner, owner.write_group)
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


def _write(
    run: RunFolder,
    folder: str,
    state: dict[str, Any],
    facts: dict[str, Any],
    planner: DefaultSavePlanner | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Write a checkpoint with its receipt; tried again when storage fails. A collective of the group.

    Raises:
        OSError: it failed to the end, on any rank.
    """
    rank, _ = rank_and_world()
    for attempt, seconds in enumerate((*_RETRY_AFTER, None)):
        failed = _attempt(run, folder, state, facts, planner, group)
        if failed is None:
            return
        if seconds is None:
            if rank == 0:
                with contextlib.suppress(OSError):
                    run.delete(folder)
            raise OSError(f"{run.uri(folder)}: {failed}")
        if rank == 0:
            log.warning("%s: attempt %d failed: %s; again in %.0f s", run.uri(folder), attempt + 1, failed, seconds)
        time.sleep(seconds)


def _attempt(
    run: RunFolder,
    folder: str,
    state: dict[str, Any],
    facts: dict[str, Any],
    planner: DefaultSavePlanner | None,
    group: dist.ProcessGroup | None,
) -> str | None:
    """Write a checkpoint; the reason why it failed, the same on all ranks, or None.

    Whatever fails on one rank, all of them go through the same collectives: else the others would wait for it.
    """
    rank, world = rank_and_world()
    error = _tried(lambda: run.delete(folder)) if rank == 0 else None  # what an attempt that was killed may have left
    if (failed := _from_first(error, group)) is not None:
        return failed
    with _alone():
        place = _place(run.uri(folder))
        error = _tried(lambda: dcp.save(state, planner=planner, process_group=group, **place))
    sums: dict[str, list] = {}
    if error is None:
        error = _tried(lambda: sums.update(run.checksums(folder, rank, world)))
    shares = _gather((error, sums), group)
    failed = next((f"rank {i}: {error}" for i, (error, _) in enumerate(shares) if error is not None), None)
    if failed is None and rank == 0:
        receipt = {**facts, "files": _merged([sums for _, sums in shares]), "world_size": world}
        failed = _tried(lambda: write_receipt(run, folder, receipt))
    return _from_first(failed, group)


def _place(uri: str) -> dict[str, Any]:
    """Arguments of `dcp.save` for a folder: local ones are written by several threads."""
    if "://" in uri:
        return {"checkpoint_id": uri}
    return {"storage_writer": _ThreadedWriter(uri, thread_count=_WRITERS)}


class _ThreadedWriter(dcp.FileSystemWriter):
    """Writes files by several threads; what fails in one of them, which torch only prints, fails here."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list]:
        written = super().write_data(plan, planner)
        missing = len(plan.items) - len(written.value())
        if missing:
            raise OSError(f"{missing} of {len(plan.items)} parts of the checkpoint were not written")
        return written


def _tried(action: Callable[[], Any]) -> str | None:
    """Do it; what went wrong, in one line, or None."""
    try:
        action()
    except (Exception, CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = next(iter(error.failures.values()))[0]
        return f"{type(cause).__name__}: {cause}".splitlines()[0]
    return None


def _checksum(receipt: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(receipt, sort_keys=True).encode())


def _files(run: RunFolder, folder: str, part: int, of: int) -> dict[str, list]:
    """Size and hash of a share of a checkpoint's files, all but the receipt that lists them."""
    return {name: value for name, value in run.checksums(folder, part, of).items() if name != RECEIPT}


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer state as ``torch.distributed.checkpoint`` wants them, shards included."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


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


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without the warning that a process without a group saves or loads alone: here it is meant to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _gather(mine: T, group: dist.ProcessGroup | None) -> list[T]:
    """What every rank gives, on every rank, by rank."""
    shares = [mine]
    if dist.is_initialized():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, mine, group=group)
    return shares


def _from_first(value: T, group: dist.ProcessGroup | None) -> T:
    """What rank 0 gives, on every rank."""
    content = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(content, src=0, group=group)
    return content[0]


def _merged(shares: list[dict[str, Any]]) -> dict[str, Any]:
    """The ranks' dictionaries as one, sorted."""
    return dict(sorted(item for share in shares for item in share.items()))
