"""What a run adds to Ray Train's controller: a checkpoint before a wanted resize, events, an end to hopeless restarts.

The hooks are those of ``ray.train.v2._internal.execution.callback``, which Ray calls a developer API.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    PreemptingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    SchedulingState,
    ShuttingDownState,
)
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from jobs.interruptions import ask_for_checkpoint, checkpoint_taken
from jobs.run_folder import StoredRun
from jobs.settings import SettingsError
from pipelines.documents import InputError

log = logging.getLogger("ingot")

HOPELESS = (InputError, SettingsError)  # workers that are started again would only meet it again


class RunController(ControllerCallback, WorkerGroupCallback):
    """Callback of one run, in the controller's process.

    Args:
        folder: the run's.
        patience: seconds to wait for the checkpoint before a resize.
    """

    def __init__(self, folder: str, patience: float = 600.0) -> None:
        self.folder, self.patience = folder, patience
        self._group: Any = None
        self._resizing = self._waiting = False
        self._hopeless: Exception | None = None
        self._untold: list[dict[str, Any]] = []

    # The group of workers

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Keep the group at hand."""
        self._group, self._waiting = worker_group, False

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Tell what has happened: only now nobody else writes events."""
        self._group = None
        self._tell()

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Look for an error that would only come again."""
        for error in worker_group_status.errors.values():
            if isinstance(error, HOPELESS):
                self._hopeless = error

    # The controller

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """End the run at once when its workers cannot go on whatever is tried.

        Raises:
            InputError: or what the workers raised.
        """
        if self._hopeless is not None:
            error, self._hopeless = self._hopeless, None
            self._note("stop", diagnosis=str(error))
            raise error  # the failure policy takes it for an error of the controller, which is not tried again

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Have the workers save before a healthy group gives way to one of another size."""
        if not self._resizing or self._group is None:
            return
        began, saved, size = time.monotonic(), False, len(self._group)
        try:
            ray.get(self._group.execute_async(ask_for_checkpoint), timeout=self.patience)
            while not saved and time.monotonic() - began < self.patience:
                time.sleep(0.1)
                saved = ray.get(self._group.execute_single_async(0, checkpoint_taken), timeout=self.patience)
        except RayError as error:  # a worker died meanwhile: the new group starts from the checkpoint before
            log.warning("pretrain: no checkpoint before the resize, %s", error)
        seconds = round(time.monotonic() - began, 3)
        self._note("resize", before=size, after=resize_decision.num_workers, saved=saved, seconds=seconds)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Take note of what happens to the group."""
        if current_state is previous_state:
            # It waits for nodes, and would ask for them again without a pause.
            if isinstance(current_state, RestartingState | ReschedulingState):
                time.sleep(0.1)
            return
        if isinstance(current_state, SchedulingState):
            self._resizing = isinstance(previous_state, ResizingState)
        elif isinstance(current_state, PreemptingState):
            if not isinstance(previous_state, PreemptingState):
                info = current_state.preemption_info
                left = None if info.deadline_ms is None else round(info.deadline_ms / 1000 - time.time(), 1)
                self._note("preemption", ranks=info.preempted_ranks, nodes=info.preempted_node_ids, seconds_left=left)
        elif isinstance(current_state, RestartingState):
            self._failed(current_state.training_failed_error)
        elif isinstance(current_state, ErroredState) or (
            isinstance(current_state, ShuttingDownState) and isinstance(current_state.next_state, ErroredState)
        ):
            last = current_state if isinstance(current_state, ErroredState) else current_state.next_state
            if not isinstance(previous_state, ShuttingDownState):
                self._failed(last.training_failed_error)
        elif isinstance(current_state, ReschedulingState) and not self._waiting:
            self._waiting = True  # told once, until a group has started
            self._note("waiting_for_nodes", error=_cause(current_state.training_failed_error))
            self._tell()  # there are no workers
        if current_state.is_terminal():
            self._tell()

    def _failed(self, error: Exception) -> None:
        if isinstance(error, WorkerGroupError):
            errors = {f"{type(e).__name__}: {_first_line(e)}" for e in error.worker_failures.values() if str(e)}
            self._note("worker_failure", ranks=sorted(error.worker_failures), error="; ".join(sorted(errors)))
        elif isinstance(error, PreemptionError):
            self._note("preempted", ranks=error.preemption_info.preempted_ranks)
        elif isinstance(error, ControllerError) and not isinstance(error.controller_failure, HOPELESS):
            self._note("controller_failure", error=_cause(error))

    def _note(self, event: str, **facts: Any) -> None:
        line = {"time": time.time(), "event": event, **facts}
        if not any({**line, "time": None} == {**untold, "time": None} for untold in self._untold):
            self._untold.append(line)

    def _tell(self) -> None:
        run = StoredRun(self.folder)
        with contextlib.suppress(OSError):  # storage is away: the next turn tells it
            while self._untold:
                run.append_line("events.jsonl", json.dumps(self._untold[0]))
                self._untold.pop(0)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def _cause(error: Exception) -> str:
    """In one line, without what Ray Train says around it."""
    return _first_line(error.controller_failure if isinstance(error, ControllerError) else error)
