"""Sharded checkpoints: written whole or not at all, recognised when they are torn, read at any number of workers.

``torch.distributed.checkpoint`` writes every rank's own shards straight to their place, local or an object store;
``checkpoint.json``, written last with sizes and checksums, makes the folder a checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from models.training.run_folder import RunFolder

log = logging.getLogger("ingot")

RECEIPT = "checkpoint.json"

_RETRY_AFTER = (2.0, 8.0, 30.0)  # seconds between attempts, on all ranks alike, so by count and not by the clock
_WRITERS = 4  # threads of a rank
_READ_AHEAD = 1 << 20  # bytes of an object store's file

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
    write(run, folder, states(model, optimizer), facts)


def write(
    run: RunFolder,
    folder: str,
    state: dict[str, Any],
    facts: dict[str, Any],
    planner: DefaultSavePlanner | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint with its receipt; tried again when storage fails. A collective of the group.

    Args:
        run: the run's folder.
        folder: of the checkpoint.
        state: what `states` gave.
        facts: JSON that comes back from `load`.
        planner: where the values come from, if not from the state itself.
        group: of all ranks; None is the default one.

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


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer state as ``torch.distributed.checkpoint`` wants them, shards included."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


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
    state = states(model, optimizer)
    try:
        with _alone():
            dcp.load(state, storage_reader=_reader(run, folder), process_group=group)
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
            dcp.load({"model": weights}, storage_reader=_reader(run, folder), no_dist=True)
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
        writer = _Writer(run, folder)
        error = _tried(lambda: dcp.save(state, storage_writer=writer, planner=planner, process_group=group))
    sums: dict[str, list] = {}
    if error is None:
        error = _tried(lambda: sums.update(run.checksums(folder, rank, world)))
    shares = _gather((error, sums), group)
    failed = next((f"rank {i}: {error}" for i, (error, _) in enumerate(shares) if error is not None), None)
    if failed is None and rank == 0:
        receipt = {**facts, "files": _merged([sums for _, sums in shares]), "world_size": world}
        failed = _tried(lambda: write_receipt(run, folder, receipt))
    return _from_first(failed, group)


class _ObjectStore(FileSystemBase):
    """The folder of a run on an object store; paths are names in it. What is written there appears when it is whole."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    @contextlib.contextmanager
    def create_stream(self, path: str, mode: str) -> Iterator[IO[bytes]]:
        if mode == "rb":
            with self.run.open_input(path) as stream:
                yield io.BufferedReader(stream, _READ_AHEAD)
        else:
            with self.run.open_stream(path) as stream:
                yield stream

    def concat_path(self, path: str, suffix: str) -> str:
        return f"{path}/{suffix.removesuffix('.tmp')}"  # what would be renamed gets its name at once

    def rename(self, path: str, new_path: str) -> None:
        pass

    def init_path(self, path: str) -> str:
        return path

    def mkdir(self, path: str) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str) -> bool:
        return True

    def exists(self, path: str) -> bool:
        return False  # the folder was emptied before

    def rm_file(self, path: str) -> None:
        self.run.delete(path)


class _Writer(dcp.FileSystemWriter):
    """Writes files by several threads; what fails in one of them, which torch only prints, fails here."""

    def __init__(self, run: RunFolder, folder: str) -> None:
        uri = run.uri(folder)
        remote = "://" in uri
        super().__init__(uri, thread_count=_WRITERS, sync_files=not remote)  # without a file, it syncs the machine
        if remote:
            self.fs, self.path = _ObjectStore(run), folder

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list]:
        written = super().write_data(plan, planner)
        missing = len(plan.items) - len(written.value())
        if missing:
            raise OSError(f"{missing} of {len(plan.items)} parts of the checkpoint were not written")
        return written


class _ObjectStoreReader(dcp.FileSystemReader):
    """Reads each tensor in one request, small ones together."""

    def __init__(self, run: RunFolder, folder: str) -> None:
        super().__init__(run.uri(folder))
        self.fs, self.path = _ObjectStore(run), folder

    def _slice_file(self, file: IO[bytes], place: Any) -> IO[bytes]:
        file.seek(place.offset)
        return io.BytesIO(file.read(place.length))


def _reader(run: RunFolder, folder: str) -> dcp.FileSystemReader:
    uri = run.uri(folder)
    return _ObjectStoreReader(run, folder) if "://" in uri else dcp.FileSystemReader(uri)


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
