"""``ingot submit JOB``: run a job on a cluster through Ray's job server, follow its log, return its exit status.

What is shipped is the program as it stands here and the job's recipe, nothing else. Paths mean on the cluster what
they mean here: on a cluster of this machine relative ones are made absolute, on any other they are refused.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from jobs.following import JobLostError, first_line, follow, stop
from jobs.job_server import TOKEN_PLACES, Door, JobServer, add_door, job_server
from jobs.lease import LOST_AFTER_SECONDS
from jobs.settings import SettingsError, require
from jobs.shipping import Paths, package, program, ship_arguments, upload

START_SECONDS = 60
INTERRUPTED = 130  # what shells report for Ctrl-C


@dataclass
class SubmitSettings(Door):
    """Run a job on a Ray cluster."""

    wait: bool = True
    """Follow the log until the job ends and return its exit status."""
    stop_on_interrupt: bool = False
    """Ctrl-C stops the job; otherwise it only ends the following."""
    patience: float = 600.0
    """Seconds without a connection to the cluster after which following is given up; the job goes on."""
    resubmit: int = 0
    """How often to submit the job again when the cluster has lost it with its head; it goes on where it was."""
    env: list[str] = field(default_factory=list)
    """Names of environment variables that the job gets as they are here."""
    runtime_env: str | None = None
    """YAML file with more of Ray's runtime environment, such as `pip: [wandb]`."""

    def validate(self) -> None:
        """Raise SettingsError for what cannot work."""
        super().validate()
        require(self.patience >= 0, "patience", self.patience, "at least 0 seconds")
        require(self.resubmit >= 0, "resubmit", self.resubmit, "at least 0")
        require(self.wait or not self.resubmit, "resubmit", self.resubmit, "0 without waiting")
        for name in self.env:
            require(name in os.environ, "env", name, "the name of an environment variable that is set here")


def main(arguments: list[str]) -> int:
    """The command line of ``ingot submit``; what it does not know belongs to the job. Returns the exit status."""
    from jobs.cli import JOBS

    default = SubmitSettings()
    parser = argparse.ArgumentParser(
        prog="ingot submit",
        usage="ingot submit JOB [--cluster FILE | --address URL] [options below] [settings of the job]",
        description="Run a job on a Ray cluster: ships this program and the recipe, follows the log, returns the job's "
        "exit status. `ingot JOB --help` shows the job's own settings, which follow here as they are.",
        epilog="A relative workspace is taken from here when the cluster runs on this machine; for any other give "
        "s3://…, gs://… or the absolute path of a file system that every node mounts. Token authentication: the token "
        f"of {TOKEN_PLACES} is sent unless RAY_AUTH_MODE is disabled; with --cluster, the one that its file names.",
        allow_abbrev=False,
    )
    parser.add_argument("job", metavar="JOB", help=f"one of {', '.join(JOBS)}")
    add_door(parser)
    parser.add_argument(
        "--env",
        metavar="NAME",
        action="append",
        default=[],
        help="an environment variable to pass on, by name, such as WANDB_API_KEY; may be given again. Whoever has the "
        "cluster's token can read its value",
    )
    parser.add_argument(
        "--runtime-env",
        metavar="FILE",
        help="YAML with more of Ray's runtime environment, such as `pip: [wandb]`",
    )
    parser.add_argument("--no-wait", dest="wait", action="store_false", help="return once the job is submitted")
    parser.add_argument("--stop-on-interrupt", action="store_true", help="Ctrl-C stops the job")
    parser.add_argument(
        "--patience",
        type=float,
        metavar="S",
        default=default.patience,
        help="seconds without a connection after which following is given up (default: %(default)s)",
    )
    parser.add_argument(
        "--resubmit",
        type=int,
        metavar="N",
        default=default.resubmit,
        help="submit the job again, up to N times, when the cluster's head was lost and the job with it",
    )
    known, rest = parser.parse_known_args(arguments)
    settings = SubmitSettings(**{f.name: getattr(known, f.name) for f in fields(SubmitSettings)})
    return run(settings, known.job, rest)


def run(settings: SubmitSettings, job: str, arguments: list[str]) -> int:
    """Submit a job and, unless told otherwise, follow it to its end.

    Args:
        settings: where and how.
        job: name of a job of ``jobs.cli``.
        arguments: the job's own command line, such as ``["--config", "recipe.yaml", "--steps", "100"]``.

    Returns:
        The exit status: 0 when the job succeeded (or was submitted, without waiting), the job's own when it failed,
        1 when it was stopped or lost, 130 after Ctrl-C.

    Raises:
        SettingsError: the job is unknown, its settings are wrong, or the cluster does not take it.
    """
    from jobs import cli
    from jobs.settings import checked

    settings.validate()
    if job not in cli.JOBS:
        raise SettingsError(f"there is no job {job!r}; there are {', '.join(cli.JOBS)}")
    job_settings = cli.parse(job, arguments)
    checked(job_settings)
    environment = _runtime_env(settings)
    with job_server(settings) as server:
        try:
            elsewhere = server.nodes_elsewhere()
        except ConnectionError as error:
            raise SettingsError(f"the cluster does not tell its nodes: {error}") from None
        paths = Paths(settings.cluster or server.address, elsewhere)
        workspace = paths.workspace(job_settings.workspace)
        files = program()
        shipped = ship_arguments(job, arguments, files, paths)
        if settings.cluster is not None:
            shipped += _gpus_to_come(settings.cluster, job_settings)
        # On this machine the interpreter is known; elsewhere it is the one that the nodes' PATH finds.
        python = "python" if elsewhere else sys.executable
        request = {
            "entrypoint": shlex.join([python, "-m", "jobs", job, *shipped, "--workspace", workspace]),
            "runtime_env": environment,
            "metadata": {"ingot_job": job, "workspace": workspace},
        }
        for left in range(settings.resubmit, -1, -1):
            submission = job_id(job, job_settings)
            sent = _hand_in(server, submission, request, files)
            uploaded = f"{sent / 1e3:,.0f} kB uploaded" if sent else "nothing to upload"
            where = settings.cluster or server.address
            print(f"{submission}: submitted to {where}, workspace {workspace}, {uploaded}", file=sys.stderr)
            if not settings.wait:
                print(_hint(settings, submission), file=sys.stderr)
                return 0
            status = _watch(settings, server, submission, left)
            if status is not None:
                return status
            time.sleep(LOST_AFTER_SECONDS)  # the lost job holds its run for so long
    return 1


def job_id(job: str, settings: Any) -> str:
    """A submission id that says what it is: ``ingot-pretrain-base-20250131-184502-3fa9c1``."""
    name = getattr(settings, "name", None) or getattr(getattr(settings, "pretrain", None), "name", "")
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")
    parts = ["ingot", job, plain, time.strftime("%Y%m%d-%H%M%S"), secrets.token_hex(3)]
    return "-".join(part for part in parts if part)


def _runtime_env(settings: SubmitSettings) -> dict[str, Any]:
    """Ray's runtime environment of the job, without the program."""
    import yaml

    given: Any = {}
    if settings.runtime_env is not None:
        try:
            with open(settings.runtime_env, encoding="utf-8") as file:
                given = yaml.safe_load(file) or {}
        except (OSError, yaml.YAMLError) as error:
            raise SettingsError(f"runtime_env is {settings.runtime_env!r}, which cannot be read: {error}") from None
        right = isinstance(given, dict) and "working_dir" not in given
        require(right, "runtime_env", settings.runtime_env, "a file with a mapping without working_dir, the program")
    passed = {name: os.environ[name] for name in settings.env}
    return given | {"env_vars": {"PYTHONUNBUFFERED": "1", **(given.get("env_vars") or {}), **passed}}


def _gpus_to_come(cluster: str, job_settings: Any) -> list[str]:
    """Options that turn a device of auto into gpu when the cluster can bring nodes with GPUs.

    The job itself sees only the nodes that are there.
    """
    from jobs.cluster import check

    undecided = list(_undecided(job_settings))
    kinds = [kind.name for kind in check(cluster)[0].workers() if kind.gpus] if undecided else []
    if kinds:
        print(f"device: gpu, for {cluster} has {', '.join(kinds)}", file=sys.stderr)
    return [word for option in undecided for word in (option, "gpu")] if kinds else []


def _undecided(job_settings: Any, prefix: str = "--") -> Iterator[str]:
    for inner in fields(job_settings):
        value = getattr(job_settings, inner.name)
        if is_dataclass(value):
            yield from _undecided(value, f"{prefix}{inner.name}.")
        elif inner.name == "device" and value == "auto":
            yield prefix + inner.name


def _watch(settings: SubmitSettings, server: JobServer, submission: str, left: int) -> int | None:
    """Follow a job; returns the exit status, None when it is to be submitted again, ``left`` times more at most."""
    hint = _hint(settings, submission)
    try:
        return follow(server, submission, settings.patience)
    except JobLostError as error:
        again = "it is submitted again" if left else "submitted again, it goes on where it was"
        print(f"{submission}: {error}; {again}", file=sys.stderr)
        return None if left else 1
    except ConnectionError as error:
        print(f"{submission}: {error}; the job goes on\n{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if not settings.stop_on_interrupt:
            print(f"\n{submission}: goes on\n{hint}", file=sys.stderr)
            return INTERRUPTED
        print(f"\n{submission}: is being stopped", file=sys.stderr)
        print(f"{submission}: {stop(server, submission)}", file=sys.stderr)
        return INTERRUPTED


def _hand_in(server: JobServer, submission: str, request: dict[str, Any], files: dict[str, bytes]) -> int:
    """Ship the program and submit, waiting for a cluster that has just started; returns the bytes that were sent.

    A job server answers before it can take a job.

    Raises:
        SettingsError: the cluster does not take the job.
    """
    uri, packed = package(files)
    environment = request["runtime_env"] | {"working_dir": uri}
    deadline = time.monotonic() + START_SECONDS
    sent = 0
    while True:
        try:
            sent += upload(server.address, server.headers, uri, packed)
            server.client.submit_job(submission_id=submission, **request | {"runtime_env": environment})
        except (RuntimeError, OSError) as error:  # Ray's, and what requests raises for a broken connection
            with contextlib.suppress(RuntimeError, OSError):
                server.client.get_job_info(submission)
                return sent  # it arrived; only the answer was lost
            passing = isinstance(error, OSError) or "No available agent" in str(error)
            if not passing or time.monotonic() > deadline:
                raise SettingsError(
                    f"{server.address}: the cluster did not take the job: {first_line(error)}"
                ) from None
            time.sleep(2)
        else:
            return sent


def _hint(door: Door, submission: str) -> str:
    return (
        f"  follow: ingot jobs logs {submission} {door.option()}\n"
        f"  stop:   ingot jobs stop {submission} {door.option()}"
    )
