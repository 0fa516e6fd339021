"""Work with a trained model, done where it belongs: here, or in a job on a cluster as one Ray task on a fitting node.

Drivers run on a cluster's head, which has no GPU and little memory.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from jobs.session import ray_session
from jobs.settings import SettingsError

log = logging.getLogger("ingot")

Result = TypeVar("Result")
Write = Callable[[str], None]
Work = Callable[[Any, str, Write], Result]  # settings, "cpu" or "cuda", where to write text as it comes


def place(work: Work, settings: Any, write: Write, device: str = "cpu", cpus: float = 1) -> Any:
    """Do the work here, or in a job on a cluster on a node with a GPU or a free core; returns what it returns.

    Args:
        work: a function of a module; gets the settings, the device, and what takes text as it comes.
        settings: of the job, or whatever the work gets.
        write: takes the text. What is logged comes to this process's log.
        device: auto, cpu or gpu.
        cpus: cores to reserve.

    Raises:
        SettingsError: the device is gpu, and there is none.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return work(settings, _device_here(device), write)
    import ray

    with ray_session():
        there = ray.cluster_resources().get("GPU", 0) >= 1
        on_gpu = device == "gpu" or (device == "auto" and there)
        if on_gpu and not there:
            log.info("asks the cluster for a GPU, which has none yet")
        task = ray.remote(_speak).options(
            num_returns="streaming", num_cpus=cpus, num_gpus=1 if on_gpu else 0, name=work.__module__
        )
        for answer in task.remote(work, settings, "cuda" if on_gpu else "cpu"):
            kind, said = ray.get(answer)
            if kind == "log":
                log.log(said[0], "%s", said[1])
            elif kind == "text":
                write(said)
            elif kind == "error":
                raise said
            else:
                return said
    raise RuntimeError(f"{work.__module__} ended without a result")


def _device_here(device: str) -> str:
    import torch

    has_gpu = torch.cuda.is_available()
    if device == "gpu" and not has_gpu:
        raise SettingsError("device is gpu, and this machine has none that torch can use; take cpu or auto")
    return "cpu" if device == "cpu" or not has_gpu else "cuda"


class _ToQueue(logging.Handler):
    """Puts the text of log records into a queue."""

    def __init__(self, words: queue.SimpleQueue) -> None:
        super().__init__()
        self.words = words

    def emit(self, record: logging.LogRecord) -> None:
        self.words.put(("log", (record.levelno, record.getMessage())))


def _speak(work: Work, settings: Any, device: str) -> Iterator[tuple[str, Any]]:
    """Do the work on the node and yield what is logged and written as it comes, and at last the result or the error."""
    words: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            words.put(("result", work(settings, device, lambda text: words.put(("text", text)))))
        except Exception as error:
            words.put(("error", error))

    handler = _ToQueue(words)
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        threading.Thread(target=run, daemon=True).start()
        while True:
            word = words.get()
            yield word
            if word[0] in ("result", "error"):
                return
    finally:
        log.removeHandler(handler)
