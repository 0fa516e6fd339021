"""One command at a time on a run: two that train it would write over each other's ledger and checkpoints."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

from jobs.run_folder import StoredRun
from jobs.settings import SettingsError
from models.training.run_folder import patiently

FILE = "lease.json"
EVERY_SECONDS = 10.0
LOST_AFTER_SECONDS = 45.0


@contextlib.contextmanager
def lease(run: StoredRun, name: str) -> Iterator[None]:
    """Hold the run for the time of a block; the file that says so is renewed every few seconds.

    Raises:
        SettingsError: another command that still lives holds it.
    """
    held = patiently(run.read_json, FILE)
    if held is not None and not _gone(held):
        age = time.time() - held["time"]
        raise SettingsError(
            f"the run {name} is being trained by process {held['pid']} on {held['host']}, last seen {age:.0f} s ago; "
            f"stop that command first, or, if it is lost, try again in {LOST_AFTER_SECONDS - age:.0f} s"
        )
    stopped = threading.Event()

    def sign() -> None:
        run.write_json(FILE, {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()})

    def renew() -> None:
        while not stopped.wait(EVERY_SECONDS):
            with contextlib.suppress(OSError):  # storage is away: the next turn renews it
                sign()

    patiently(sign)
    thread = threading.Thread(target=renew, daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(timeout=30)
        with contextlib.suppress(OSError):  # a lease that stays is found to be that of a process that has gone
            run.delete(FILE)


def _gone(held: dict) -> bool:
    """Whether the holder of a lease has let too much time pass, is this process, or is a dead one of this machine."""
    if time.time() - held["time"] > LOST_AFTER_SECONDS:
        return True
    if held["host"] != socket.gethostname():
        return False
    if held["pid"] == os.getpid():
        return True
    try:
        os.kill(held["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
