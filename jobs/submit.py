"""``ingot submit JOB``: run a job on a cluster through Ray's job server, follow its log, return its exit status.

What is shipped is the program as it stands here and the job's recipe, nothing else. Paths mean on the cluster what
they mean here: on a cluster of this machine relative ones are made absolute, on any other they are refused.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlparse

from jobs.settings import SettingsError
from jobs.shipping import Paths, copy_program, is_here, ship_arguments

REACH_SECONDS = 10
QUIET_SECONDS = 60
START_SECONDS = 60
INTERRUPTED = 130  # what shells report for Ctrl-C


def _default_address() -> str:
    return os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"


@dataclass
class SubmitSettings:
    """Run a job on a Ray cluster."""

    address: str = field(default_factory=_default_address)
    """Where the cluster's dashboard answers; `ray dashboard CLUSTER.yaml` brings it to this machine."""
    wait: bool = True
    """Follow the log until the job ends and return its exit status."""
    stop_on_interrupt: bool = False
    """Ctrl-C stops the job; otherwise it only ends the following."""
    patience: float = 600.0
    """Seconds without a connection to the cluster after which following is given up; the job goes on."""

    def validate(self) -> None:
        """Raise SettingsError for what cannot work."""
        address = self.address if "://" in self.address else f"http://{self.address}"
        if urlparse(address).scheme not in ("http", "https") or not urlparse(address).hostname:
            raise SettingsError(f"address is {self.address!r}; it has to be a URL such as http://127.0.0.1:8265")
        if self.patience < 0:
            raise SettingsError(f"patience is {self.patience}; it has to be at least 0 seconds")


def main(arguments: list[str]) -> int:
    """The command line of ``ingot submit``; what it does not know belongs to the job. Returns the exit status."""
    from jobs.cli import JOBS

    default = SubmitSettings()
    parser = argparse.ArgumentParser(
        prog="ingot submit",
        usage="ingot submit JOB [--address URL] [--no-wait] [--stop-on-interrupt] [--patience S] [settings of the job]",
        description="Run a job on a Ray cluster: ships this program and the recipe, follows the log, returns the job's "
        "exit status. `ingot JOB --help` shows the job's own settings, which follow here as they are.",
        epilog="A relative workspace is taken from here when the cluster runs on this machine; for any other give "
        "s3://…, gs://… or the absolute path of a file system that every node mounts. Token authentication: the token "
        "of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token is sent unless RAY_AUTH_MODE is disabled.",
        allow_abbrev=False,
    )
    parser.add_argument("job", metavar="JOB", help=f"one of {', '.join(JOBS)}")
    parser.add_argument(
        "--address", default=default.address, help="where the cluster's dashboard answers (default: %(default)s)"
    )
    parser.add_argument("--no-wait", dest="wait", action="store_false", help="return once the job is submitted")
    parser.add_argument("--stop-on-interrupt", action="store_true", help="Ctrl-C stops the job")
    parser.add_argument(
        "--patience",
        type=float,
        default=default.patience,
        help="seconds without a connection after which following is given up (default: %(default)s)",
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

    address = (settings.address if "://" in settings.address else f"http://{settings.address}").rstrip("/")
    headers = _token_headers()
    with _ray_addresses_unset():
        client = _connect(address, headers)
        elsewhere = _nodes_elsewhere(address, headers)
    paths = Paths(address, elsewhere)
    workspace = paths.workspace(job_settings.workspace)
    submission = f"{job}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    with tempfile.TemporaryDirectory(prefix="ingot-submit-") as folder:
        copy_program(folder)
        shipped = ship_arguments(job, arguments, folder, paths)
        # On this machine the interpreter is known; elsewhere it is the one that the nodes' PATH finds.
        python = "python" if elsewhere else sys.executable
        entrypoint = [python, "-m", "jobs", job, *shipped, "--workspace", workspace]
        request = {
            "entrypoint": shlex.join(entrypoint),
            "runtime_env": {"working_dir": folder, "env_vars": {"PYTHONUNBUFFERED": "1"}},
            "metadata": {"ingot_job": job, "workspace": workspace},
        }
        _hand_in(client, address, submission, request)
    print(f"{submission}: submitted to {address}, workspace {workspace}", file=sys.stderr)
    hint = _hint(address, submission, bool(headers))
    if not settings.wait:
        print(hint, file=sys.stderr)
        return 0
    try:
        return _follow(client, submission, settings.patience)
    except ConnectionError as error:
        print(f"{submission}: {error}; the job goes on\n{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if not settings.stop_on_interrupt:
            print(f"\n{submission}: goes on\n{hint}", file=sys.stderr)
            return INTERRUPTED
        print(f"\n{submission}: is being stopped", file=sys.stderr)
        client.stop_job(submission)
        for _ in range(60):
            if client.get_job_status(submission).is_terminal():
                break
            time.sleep(0.5)
        print(f"{submission}: {client.get_job_status(submission)}", file=sys.stderr)
        return INTERRUPTED


def _hand_in(client: Any, address: str, submission: str, request: dict[str, Any]) -> None:
    """Submit, waiting for a cluster that has just started: its job server answers before it can take a job.

    Raises:
        SettingsError: the cluster does not take the job.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            client.submit_job(submission_id=submission, **request)
        except (RuntimeError, OSError) as error:  # Ray's, and what requests raises for a broken connection
            with contextlib.suppress(RuntimeError, OSError):
                client.get_job_info(submission)
                return  # it arrived; only the answer was lost
            passing = isinstance(error, OSError) or "No available agent" in str(error)
            if not passing or time.monotonic() > deadline:
                raise SettingsError(f"{address}: the cluster did not take the job: {_first_line(error)}") from None
            time.sleep(2)
        else:
            return


def _token_headers() -> dict[str, str]:
    """The header that token authentication asks for, from the places where Ray looks for the token."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    if not token:
        with contextlib.suppress(OSError), open(os.path.expanduser(path), encoding="utf-8") as file:
            token = file.read()
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


@contextlib.contextmanager
def _ray_addresses_unset() -> Iterator[None]:
    """Ray's clients put these variables before the address they are given, an explicit ``--address`` included."""
    kept = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def _connect(address: str, headers: dict[str, str]) -> Any:
    """A client of the job server, after one question that tells apart all that can be wrong with it.

    Raises:
        SettingsError: nothing answers, it is no Ray cluster, it refuses the token, or runs another version of Ray.
    """
    import ray
    import requests
    from ray.job_submission import JobSubmissionClient

    deadline = time.monotonic() + REACH_SECONDS
    answer = None
    while answer is None:  # `ray start` returns some seconds before the dashboard answers
        try:
            answer = requests.get(
                f"{address}/api/version", headers=headers, timeout=REACH_SECONDS, allow_redirects=False
            )
        except requests.exceptions.RequestException as error:
            if time.monotonic() > deadline:
                raise SettingsError(
                    f"{address}: no Ray dashboard answers ({type(error).__name__}); start a cluster with "
                    "`ray start --head`, or bring a remote one's dashboard here with `ray dashboard cluster/….yaml`"
                ) from None
            time.sleep(1)
    if answer.status_code in (401, 403):
        sent = "refuses the token that was sent" if headers else "asks for a token and none was found"
        raise SettingsError(
            f"{address}: the cluster {sent}; put the cluster's token (`ray get-auth-token` on its head) into "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token"
        )
    try:
        version = answer.json()["ray_version"]
    except (ValueError, KeyError, TypeError):
        raise SettingsError(f"{address}: something answers there (HTTP {answer.status_code}), but not Ray") from None
    if version != ray.__version__:
        raise SettingsError(
            f"{address}: the cluster runs Ray {version} and this machine {ray.__version__}; install the same on both"
        )
    for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)  # they tell of uploads and closed connections
    return JobSubmissionClient(address, headers=dict(headers))


def _nodes_elsewhere(address: str, headers: dict[str, str]) -> list[str]:
    """Addresses of the cluster's nodes that are not this machine; a forwarded port looks local but is not."""
    from ray.util.state import StateApiClient
    from ray.util.state.common import ListApiOptions, StateResource

    client = StateApiClient(address, headers={"Content-Type": "application/json", **headers})
    nodes = client.list(StateResource.NODES, options=ListApiOptions(limit=1000), raise_on_missing_output=False)
    return sorted({node.node_ip for node in nodes if node.state == "ALIVE" and not is_here(node.node_ip)})


def _follow(client: Any, submission: str, patience: float) -> int:
    """Print the log as it grows, over dropped connections, and return the exit status once the job has ended.

    Raises:
        ConnectionError: the cluster was out of reach for ``patience`` seconds.
    """
    import aiohttp

    printer = _Printer()
    last_seen = time.monotonic()
    dropped = False
    while True:
        before = printer.characters
        try:
            asyncio.run(_print_log(client, submission, printer))
            details = client.get_job_info(submission)
            last_seen = time.monotonic()
            if details.status.is_terminal():
                break
        except (RuntimeError, OSError, aiohttp.ClientError) as error:  # Ray's, requests' and the log stream's
            if printer.characters > before:
                last_seen = time.monotonic()
            if not dropped:
                print(f"{submission}: connection lost ({_first_line(error)}); trying again", file=sys.stderr)
            dropped = True
            if time.monotonic() - last_seen > patience:
                raise ConnectionError(f"no connection for {patience:.0f} s") from None
        time.sleep(1)
    if dropped:
        with contextlib.suppress(RuntimeError, OSError):
            printer.restart()
            printer.add(client.get_job_logs(submission))
    print(f"{submission}: {details.status.value}", file=sys.stderr)
    if details.status == "SUCCEEDED":
        return 0
    if details.message:
        reason = _first_line(details.message).split(", last available logs")[0]  # they were printed as they came
        print(f"{submission}: {reason}", file=sys.stderr)
    code = details.driver_exit_code or 1
    return code if 0 < code < 256 else 1


class _Printer:
    """Prints a log that is sent from its start again after each reconnection, every part once."""

    def __init__(self) -> None:
        self.characters = 0
        self._skip = 0

    def restart(self) -> None:
        self._skip = self.characters

    def add(self, text: str) -> None:
        new = text[self._skip :]
        self._skip -= len(text) - len(new)
        self.characters += len(new)
        print(new, end="", flush=True)


async def _print_log(client: Any, submission: str, printer: _Printer) -> None:
    """Print the log until the server ends it.

    Raises:
        ConnectionError: no word for long, and the server is out of reach or this machine has slept.
    """
    printer.restart()
    stream = client.tail_job_logs(submission)
    waiting = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(stream))
            asked = time.time()
            done, _ = await asyncio.wait({waiting}, timeout=QUIET_SECONDS)
            if not done:
                # A connection can die without a word: a status that comes back says that this one has not, unless
                # the machine slept meanwhile.
                if time.time() - asked > 2 * QUIET_SECONDS:
                    raise ConnectionError("this machine was asleep")
                status = await asyncio.to_thread(client.get_job_status, submission)
                if status.is_terminal():
                    raise ConnectionError("the log did not end with the job")
                continue
            try:
                printer.add(waiting.result())
            except StopAsyncIteration:
                return
            waiting = None
    finally:
        if waiting is not None and not waiting.done():
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
        await stream.aclose()


def _hint(address: str, submission: str, token: bool) -> str:
    environment = "RAY_AUTH_MODE=token " if token else ""
    return (
        f"  follow: {environment}ray job logs --address {address} --follow {submission}\n"
        f"  stop:   {environment}ray job stop --address {address} {submission}"
    )


def _first_line(text: object) -> str:
    return (str(text).strip().splitlines() or [type(text).__name__])[0][:300]
