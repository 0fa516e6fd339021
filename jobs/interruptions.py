"""Why a run should save between its usual checkpoints: a node is about to go, or the group is about to be resized.

Everything here happens in the workers. The controller's side of a resize is in ``jobs.controller``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

_RESIZE, _LOOK, _LAST = 1, 2, 4


@dataclass
class Asked:
    """A checkpoint that the controller wants before it changes the number of workers; one for each process.

    Attributes:
        wanted: the controller has asked.
        from_step: the step at which the loop was told; a checkpoint of it or of a later one is the answer.
        answered: that checkpoint is there, or training is over.
    """

    wanted: bool = False
    from_step: int | None = None
    answered: bool = False


ASKED = Asked()


def ask_for_checkpoint() -> None:
    """Called by the controller in each worker's process, beside the thread that trains."""
    ASKED.wanted = True


def checkpoint_taken() -> bool:
    """Called by the controller in the first worker's process, beside the thread that trains."""
    return ASKED.answered


class Interruptions:
    """Called by all ranks after every step; gives all of them the same reason to save now, or None.

    Rank 0 decides, and the ranks talk about it every ``EVERY_SECONDS``, at a step that they agreed on the time before.
    Of a preemption Ray Train's watcher of nodes tells; asking it is a collective over an actor, some milliseconds, and
    so done more rarely. A node that is about to go still computes until then: the loop is told at once, and again
    when there is just time left for one more checkpoint.

    Attributes:
        step: the step that the loop is about to take; it is kept up to date from outside.
        nodes: the nodes that are known to go.
    """

    EVERY_SECONDS = 2.0
    LOOK_SECONDS = 4.0
    SPARE_SECONDS = 3.0

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.step = 0
        self.nodes: set[str] = set()
        self._calls = self._next = 0
        self._deadline: float | None = None
        self._looked = self._talked = float("-inf")
        self._told: float | None = None
        self._saving = 0.0

    def __call__(self) -> str | None:
        """``preemption``, ``resize`` or None."""
        self._calls += 1
        if self._calls <= self._next:
            return None
        code, wait = self._of_rank_0(*((self._due(), self._wait()) if self.rank == 0 else (0, 0)))
        self._calls, self._next = 0, wait
        if code & _LOOK and self._notice():
            self._told = time.time()
            return "preemption"
        if code & _LAST:
            self._deadline = None
            return "preemption"
        if code & _RESIZE:
            ASKED.from_step = self.step + 1  # it is under way
            return "resize"
        return None

    def saved(self, step: int) -> None:
        """Take note of a checkpoint that has become durable."""
        # the run may have gone back since: what it saves next is the answer
        if ASKED.from_step is not None and step >= min(ASKED.from_step, self.step + 1):
            ASKED.answered = True

    def over(self) -> None:
        """Take note that no further checkpoint will come."""
        ASKED.answered = True

    def wait_for_the_end(self, seconds: float = 900.0) -> None:
        """After an error: when a node has been announced to go, leave it to the controller to end the workers.

        It waits for the node's last moment anyway. An error that it gets from a survivor before it knows that the node
        is gone would count as a failure of training.
        """
        until = time.monotonic() + seconds
        while self.nodes and time.monotonic() < until:
            time.sleep(1)

    def _due(self) -> int:
        now, code = time.time(), 0
        if self._told is not None:  # the first call since the loop was told: it has saved meanwhile
            self._saving, self._told = now - self._told, None
            if self._deadline is not None and now > self._last_moment():
                self._deadline = None  # too late for another one
        if ASKED.wanted and ASKED.from_step is None:
            code |= _RESIZE
        if now - self._looked >= self.LOOK_SECONDS:
            code |= _LOOK
            self._looked = now
        if self._deadline is not None and now >= self._last_moment():
            code |= _LAST
        return code

    def _last_moment(self) -> float:
        return self._deadline - 2 * self._saving - self.SPARE_SECONDS

    def _wait(self) -> int:
        """Steps until the next talk, by how long the last ones took; few more than before, as first steps are slow."""
        now = time.monotonic()
        seconds, self._talked = now - self._talked, now
        return int(min(self.EVERY_SECONDS / max(seconds, 1e-6) * (self._next + 1), 2 * self._next + 1))

    def _of_rank_0(self, *numbers: int) -> tuple[int, ...]:
        if self.world == 1:
            return numbers
        import torch
        import torch.distributed as dist

        told = torch.tensor(numbers)  # on the CPU, over gloo: the GPU's queue is not waited for
        dist.broadcast(told, src=0)
        return tuple(told.tolist())

    def _notice(self) -> bool:
        """Whether a node has been announced to go that was not before."""
        import ray.train

        info = ray.train.get_preemption_info()
        if info is None or set(info.preempted_node_ids) <= self.nodes:
            return False
        self.nodes |= set(info.preempted_node_ids)
        self._deadline = info.deadline_ms / 1000 if info.deadline_ms else None
        return True
