"""``ingot jobs``: the jobs that a cluster has been given: list them, follow a log, stop one, or tell how one stands."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from typing import Any

from jobs.following import JobLostError, follow, reason, stop
from jobs.job_server import Door, JobServer, add_door, job_server
from jobs.settings import SettingsError
from jobs.submit import INTERRUPTED

ACTIONS = {
    "list": "all jobs, the newest first",
    "logs": "follow a job's log to its end and return its exit status",
    "stop": "stop a job",
    "status": "a job's status, how far it is, why it failed",
}
TAIL_LINES = 200  # of a log, in which its last words are looked for


def main(arguments: list[str]) -> int:
    """The command line of ``ingot jobs``; returns the exit status."""
    lines = "\n".join(f"  {name:<8} {text}" for name, text in ACTIONS.items())
    parser = argparse.ArgumentParser(
        prog="ingot jobs",
        description="The jobs that a cluster has been given with `ingot submit` or `ray job submit`.",
        epilog=f"actions:\n{lines}\n\nWithout an ID, logs, stop and status take the newest job that still runs, logs "
        "and status else the newest.\nThe beginning of an ID is enough.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help="what to do; see below")
    parser.add_argument("id", nargs="?", metavar="ID", help="of a job, as `ingot submit` has told it")
    add_door(parser)
    parser.add_argument(
        "--patience",
        type=float,
        metavar="S",
        default=600.0,
        help="seconds without a connection after which following is given up (default: %(default)s)",
    )
    known = parser.parse_args(arguments)
    with job_server(Door(known.address, known.cluster)) as server:
        jobs = submitted(server)
        if known.action == "list":
            print("\n".join(table([["ID", "STATUS", "STARTED", "TOOK"], *map(_row, jobs)])) if jobs else "no jobs")
            return 0
        job = chosen(jobs, known.id, running=known.action == "stop")
        if known.action == "stop":
            status = stop(server, job.submission_id)
            print(f"{job.submission_id}: {status}")
            return 0 if status == "STOPPED" else 1
        if known.action == "status":
            print("\n".join(described(server, job)))
            return 0
        return _logs(server, job.submission_id, known.patience)


def submitted(server: JobServer) -> list[Any]:
    """Ray's details of all jobs that were submitted, the newest first.

    Raises:
        SettingsError: the cluster does not tell them.
    """
    try:
        jobs = server.client.list_jobs()
    except (RuntimeError, OSError) as error:
        raise SettingsError(f"{server.address}: the cluster does not tell its jobs: {error}") from None
    return sorted((job for job in jobs if job.submission_id), key=lambda job: job.start_time or 0, reverse=True)


def chosen(jobs: list[Any], given: str | None, *, running: bool) -> Any:
    """The job that an ID, or the beginning of one, names; without one the newest, of those that run if there are any.

    Args:
        jobs: the newest first.
        given: the ID.
        running: only one that runs will do.

    Raises:
        SettingsError: there is none, or several.
    """
    if given is None:
        at_work = [job for job in jobs if not job.status.is_terminal()]
        found = (at_work or ([] if running else jobs))[:1]
    else:
        exact = [job for job in jobs if job.submission_id == given]
        found = exact or [job for job in jobs if job.submission_id.startswith(given)]
    if len(found) == 1:
        return found[0]
    if given is None:
        raise SettingsError("the cluster runs no job" if running else "the cluster knows no job")
    ids = ", ".join(job.submission_id for job in (found or jobs)[:5])
    what = "is the beginning of several" if found else "is none that the cluster knows"
    raise SettingsError(f"ID is {given!r}, which {what}: {ids or 'it knows no job'}")


def last_words(server: JobServer, job: Any) -> str:
    """How far a job says to be: the last line of its log that is from Ingot, without its time; "" when there is none.

    Only the end of the log is read, on the node where the job's driver runs.
    """
    if not job.driver_node_id:
        return ""
    try:
        text = server.get(
            "/api/v0/logs/file",
            node_id=job.driver_node_id,
            filename=f"job-driver-{job.submission_id}.log",
            lines=TAIL_LINES,
        ).text
    except ConnectionError:  # not written yet, or gone with its node
        return ""
    told = re.findall(r"^\d\d:\d\d:\d\d (\w+: .+?)\s*$", text, re.MULTILINE)
    return told[-1] if told else ""


def described(server: JobServer, job: Any) -> list[str]:
    """Lines that tell all about how a job stands."""
    metadata, running = job.metadata or {}, not job.status.is_terminal()
    facts = {
        "workspace": metadata.get("workspace", ""),
        "command": job.entrypoint,
        "message": "" if running or job.status == "SUCCEEDED" else reason(job),
    }
    if running:
        with contextlib.suppress(ConnectionError):
            facts["waits"] = server.waiting()
    return [*described_short(server, job), *_facts(facts)]


def described_short(server: JobServer, job: Any) -> list[str]:
    """Lines that tell how a job stands and how far it is."""
    facts = {"status": f"{job.status.value}, started {_clock(job.start_time)}, took {_took(job)}"}
    return [job.submission_id, *_facts(facts | {"progress": last_words(server, job)})]


def _facts(facts: dict[str, str]) -> list[str]:
    return [f"  {name:<10} {value}" for name, value in facts.items() if value]


def table(rows: list[list[str]]) -> list[str]:
    """Rows as lines with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(job: Any) -> list[str]:
    return [job.submission_id, job.status.value, _clock(job.start_time), _took(job)]


def _clock(milliseconds: int | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(milliseconds / 1000)) if milliseconds else ""


def _took(job: Any) -> str:
    if not job.start_time:
        return ""
    return duration((job.end_time or 1000 * time.time()) / 1000 - job.start_time / 1000)


def duration(seconds: float) -> str:
    """Seconds as 0:05:12 or 2 d 3:10:00."""
    days, rest = divmod(max(int(seconds), 0), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} d {clock}" if days else clock


def _logs(server: JobServer, job: str, patience: float) -> int:
    try:
        return follow(server, job, patience)
    except (JobLostError, ConnectionError) as error:
        print(f"{job}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{job}: goes on", file=sys.stderr)
        return INTERRUPTED
