"""Following a job on a cluster: its log as it grows, over dropped connections, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import Any

from jobs.job_server import JobServer

QUIET_SECONDS = 15  # without a line of the log, after which the cluster is asked what it waits for
ASLEEP_SECONDS = 120  # longer than any answer takes: this machine was suspended


class JobLostError(RuntimeError):
    """The cluster has lost the job without its fault: the head went, and the job's driver with it."""


def follow(server: JobServer, job: str, patience: float) -> int:
    """Print a job's log to stdout as it grows, what it waits for to stderr, and return its exit status at its end.

    Args:
        server: the cluster.
        job: submission id.
        patience: seconds without a connection after which following is given up.

    Returns:
        0 when the job succeeded, its own exit status when it failed, 1 when it was stopped.

    Raises:
        ConnectionError: the cluster was out of reach for ``patience`` seconds.
        JobLostError: the cluster does not know the job, or lost its driver.
    """
    import aiohttp

    printer = Printer()
    last_seen = time.monotonic()
    dropped = False
    while True:
        before = printer.characters
        try:
            asyncio.run(_print_log(server, job, printer))
            details = server.client.get_job_info(job)
            last_seen = time.monotonic()
            if details.status.is_terminal():
                break
        except (RuntimeError, OSError, aiohttp.ClientError) as error:  # Ray's, requests' and the log stream's
            if _unknown(server, job):  # a head that was started again answers, and knows nothing
                raise JobLostError("the cluster does not know this job") from None
            if printer.characters > before:
                last_seen = time.monotonic()
            if not dropped:
                print(f"{job}: connection lost ({first_line(error)}); trying again", file=sys.stderr)
            dropped = True
            if time.monotonic() - last_seen > patience:
                raise ConnectionError(f"no connection for {patience:.0f} s") from None
        time.sleep(1)
    if dropped:
        with contextlib.suppress(RuntimeError, OSError):
            printer.restart()
            printer.add(server.client.get_job_logs(job))
    return ended(job, details)


def ended(job: str, details: Any) -> int:
    """Tell how a job ended and return its exit status.

    Raises:
        JobLostError: its driver was lost.
    """
    if details.status == "FAILED" and details.error_type in (
        "JOB_SUPERVISOR_ACTOR_DIED",
        "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE",
    ):
        raise JobLostError(f"the cluster lost the job's driver ({first_line(details.message)})")
    print(f"{job}: {details.status.value}", file=sys.stderr)
    if details.status == "SUCCEEDED":
        return 0
    if details.message:
        print(f"{job}: {reason(details)}", file=sys.stderr)
    code = details.driver_exit_code or 1
    return code if 0 < code < 256 else 1


def reason(details: Any) -> str:
    """Why a job ended, without the log's end that Ray appends."""
    return first_line(details.message or "").split(", last available logs")[0]


def _unknown(server: JobServer, job: str) -> bool:
    try:
        server.client.get_job_info(job)
    except (RuntimeError, OSError) as error:
        return "does not exist" in str(error)
    return False


def stop(server: JobServer, job: str, seconds: float = 30) -> str:
    """Stop a job and wait for it; returns its status.

    Raises:
        RuntimeError: there is no such job.
    """
    server.client.stop_job(job)
    deadline = time.monotonic() + seconds
    while not (status := server.client.get_job_status(job)).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.5)
    return status.value


class Printer:
    """Prints a log that is sent from its start again after each reconnection, every part once."""

    def __init__(self) -> None:
        self.characters = 0
        self._skip = 0

    def restart(self) -> None:
        """The log comes from its start again."""
        self._skip = self.characters

    def add(self, text: str) -> None:
        """Print what of the log's next part is new."""
        new = text[self._skip :]
        self._skip -= len(text) - len(new)
        self.characters += len(new)
        print(new, end="", flush=True)


async def _print_log(server: JobServer, job: str, printer: Printer) -> None:
    """Print the log until the server ends it.

    Raises:
        ConnectionError: no word for long, and the server is out of reach or this machine has slept.
    """
    printer.restart()
    stream = server.client.tail_job_logs(job)
    upcoming = None
    told = ""
    try:
        while True:
            upcoming = upcoming or asyncio.ensure_future(anext(stream))
            asked = time.time()
            done, _ = await asyncio.wait({upcoming}, timeout=QUIET_SECONDS)
            if not done:
                # A connection can die without a word: an answer says that this one has not, unless the machine slept
                # meanwhile.
                if time.time() - asked > ASLEEP_SECONDS:
                    raise ConnectionError("this machine was asleep")
                status = await asyncio.to_thread(server.client.get_job_status, job)
                if status.is_terminal():  # and the log's end is late
                    printer.restart()
                    printer.add(await asyncio.to_thread(server.client.get_job_logs, job))
                    return
                told = await asyncio.to_thread(_tell_waiting, server, job, told)
                continue
            try:
                printer.add(upcoming.result())
            except StopAsyncIteration:
                return
            upcoming = None
    finally:
        if upcoming is not None and not upcoming.done():
            upcoming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await upcoming
        await stream.aclose()


def _tell_waiting(server: JobServer, job: str, told: str) -> str:
    """Say what the cluster waits for unless it was said last; returns what was said."""
    with contextlib.suppress(ConnectionError, ValueError, KeyError):
        waits = server.waiting()
        if waits and waits != told:
            print(f"{job}: the cluster waits, {waits}", file=sys.stderr)
        return waits
    return told


def first_line(text: object) -> str:
    """The first line of an error's text, or its type."""
    return (str(text).strip().splitlines() or [type(text).__name__])[0][:300]
