"""The way to a cluster's dashboard, which listens on its head alone: through ssh or Kubernetes, opened and kept open.

For a file of ``ray up`` it is Ray's own launcher (``ray dashboard``) that finds the head and brings the port here, for
one of KubeRay it is ``kubectl port-forward``; both ask whoever they ask as the user who runs this.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from jobs.settings import SettingsError

OPEN_SECONDS = 120
DASHBOARD_PORT = 8265


@dataclass
class Entrance:
    """What a cluster's YAML says about the way to it.

    Attributes:
        path: of the file.
        content: of the file, or of its RayCluster where it holds several objects.
    """

    path: str
    content: dict[str, Any]

    @property
    def kubernetes(self) -> bool:
        """Whether KubeRay makes the cluster; otherwise ``ray up`` does."""
        return "kind" in self.content

    def command(self, port: int) -> list[str]:
        """What brings the dashboard to ``port`` of this machine for as long as it runs."""
        if self.kubernetes:
            service = f"service/{self._name()}-head-svc"
            return [*self._kubectl(), "port-forward", "--address=127.0.0.1", service, f"{port}:{DASHBOARD_PORT}"]
        return [sys.executable, "-m", "ray.scripts.scripts", "dashboard", self.path, f"--port={port}"]

    def token(self) -> str:
        """The cluster's token: the file that ``ray up`` copies to the nodes, or KubeRay's secret; "" for none.

        Raises:
            SettingsError: the file or the secret cannot be read.
        """
        if self.kubernetes:
            options = self.content["spec"].get("authOptions") or {}
            if options.get("mode") != "token":
                return ""
            command = [*self._kubectl(), "get", "secret", options.get("secretName") or self._name()]
            return base64.b64decode(_output([*command, "--output=jsonpath={.data.auth_token}"])).decode().strip()
        for there, here in (self.content.get("file_mounts") or {}).items():
            if there.endswith(".ray/auth_token"):
                try:
                    with open(os.path.expanduser(here), encoding="utf-8") as file:
                        return file.read().strip()
                except OSError as error:
                    raise SettingsError(
                        f"{self.path}: the token cannot be read ({error}); `ray get-auth-token --generate` makes one"
                    ) from None
        return ""

    def _name(self) -> str:
        return self.content["metadata"]["name"]

    def _kubectl(self) -> list[str]:
        namespace = self.content["metadata"].get("namespace")
        return ["kubectl", *([f"--namespace={namespace}"] if namespace else [])]


def read_entrance(path: str) -> Entrance:
    """Read a cluster's YAML.

    Raises:
        SettingsError: it is not there, or describes no cluster.
    """
    try:
        with open(path, encoding="utf-8") as file:
            objects = [item for item in yaml.safe_load_all(file) if isinstance(item, dict)]
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"cluster is {path!r}, which cannot be read: {error}") from None
    for item in objects:
        if item.get("kind") == "RayCluster" or ("provider" in item and "cluster_name" in item):
            return Entrance(path, item)
    kinds = ", ".join(str(item["kind"]) for item in objects if "kind" in item)
    raise SettingsError(
        f"cluster is {path!r}, which holds {kinds or 'no cluster'}; give a file for `ray up`, or one with a RayCluster"
    )


class Tunnel:
    """A port of this machine behind which the cluster's dashboard answers; reopened when it breaks, until closed."""

    def __init__(self, cluster: Entrance) -> None:
        self.cluster = cluster
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._closed = threading.Event()
        self._process = self._start()
        self._keeper = threading.Thread(target=self._keep, daemon=True, name="tunnel")

    def open(self) -> None:
        """Wait until the port takes connections, and keep it so from then on.

        Raises:
            SettingsError: the cluster has no head, or it cannot be reached.
        """
        deadline = time.monotonic() + OPEN_SECONDS
        while not self._answers():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                raise SettingsError(
                    f"{self.cluster.path}: the way to the cluster's head cannot be opened: {self._last_words()}"
                )
            time.sleep(0.1)
        self._keeper.start()

    def close(self) -> None:
        """End it."""
        self._closed.set()
        if self._keeper.is_alive():
            self._keeper.join()
        _end(self._process)
        self._output.close()

    def _start(self) -> subprocess.Popen:
        self._output.seek(0)
        self._output.truncate()
        try:
            # A session of its own: Ctrl-C is for whoever follows a job, and all of it can be ended at once.
            return subprocess.Popen(
                self.cluster.command(self.port),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise SettingsError(f"{self.cluster.path}: {error.filename} is needed to reach the cluster") from None

    def _keep(self) -> None:
        """Start it again whenever it ends: at once, then ever more slowly while it does not hold."""
        wait, started = 1.0, time.monotonic()
        while not self._closed.wait(0.5):
            if self._process.poll() is None:
                continue
            wait = 1.0 if time.monotonic() - started > 60 else min(2 * wait, 30)
            if self._closed.wait(wait):
                return
            started = time.monotonic()
            self._process = self._start()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2):
            return True
        return False

    def _last_words(self) -> str:
        self._output.seek(0)
        lines = [line.strip() for line in self._output.read().decode(errors="replace").splitlines() if line.strip()]
        return " ".join(lines[-3:])[-500:] or f"nothing answers within {OPEN_SECONDS} s"


@contextlib.contextmanager
def tunnel(cluster: Entrance) -> Iterator[str]:
    """The address at which the cluster's dashboard answers on this machine while the context lasts.

    Raises:
        SettingsError: the cluster has no head, or it cannot be reached.
    """
    way = Tunnel(cluster)
    try:
        way.open()
        yield f"http://127.0.0.1:{way.port}"
    finally:
        way.close()


def _end(process: subprocess.Popen) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)  # the ssh that it started as well
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=OPEN_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SettingsError(f"{' '.join(command)}: {error}") from None
    if done.returncode:
        raise SettingsError(f"{' '.join(command)}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout
