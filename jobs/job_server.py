"""A cluster as its dashboard shows it over HTTP: the job server, its token, the nodes, what is wrong with any of it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlparse

from jobs.settings import SettingsError
from jobs.shipping import is_here
from jobs.tunnel import Entrance, read_entrance, tunnel

REACH_SECONDS = 10
TOKEN_PLACES = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"  # noqa: S105 (where it is looked for)


def default_address() -> str:
    """Where Ray's own tools would look."""
    return os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"


@dataclass
class Door:
    """Which cluster: by the address of its dashboard, or by the file that describes it."""

    address: str | None = None
    """Where the dashboard answers; None takes what Ray's tools would take."""
    cluster: str | None = None
    """A cluster's YAML, for `ray up` or of KubeRay: its head is found and reached through a tunnel."""

    def validate(self) -> None:
        """Raise SettingsError for what cannot work."""
        if self.address is not None and self.cluster is not None:
            raise SettingsError("address and cluster are two ways to say the same; give one of them")
        address = self.url()
        if urlparse(address).scheme not in ("http", "https") or not urlparse(address).hostname:
            raise SettingsError(f"address is {self.address!r}; it has to be a URL such as http://127.0.0.1:8265")

    def url(self) -> str:
        """The address in full."""
        address = self.address or default_address()
        return (address if "://" in address else f"http://{address}").rstrip("/")

    def option(self) -> str:
        """How to name the cluster again on the command line."""
        return f"--cluster {self.cluster}" if self.cluster else f"--address {self.url()}"


def add_door(parser: argparse.ArgumentParser) -> None:
    """The options that say which cluster."""
    parser.add_argument(
        "--address", help=f"where the cluster's dashboard answers (default, without --cluster: {default_address()})"
    )
    parser.add_argument(
        "--cluster",
        metavar="FILE",
        help="the cluster's YAML, for `ray up` or of KubeRay: finds its head, opens a tunnel there and keeps it open",
    )


@dataclass
class JobServer:
    """A cluster that answers and takes the token.

    Attributes:
        address: of its dashboard, as it is reached from here.
        headers: that each request carries: the token.
        client: Ray's client of the job server.
        file: the cluster's YAML, if it was given.
    """

    address: str
    headers: dict[str, str]
    client: Any
    file: Entrance | None = field(default=None)

    def get(self, path: str, **query: Any) -> Any:
        """The answer of the dashboard to a GET, ready to be read.

        Raises:
            ConnectionError: it is out of reach, or answers with an error.
        """
        import requests

        try:
            answer = requests.get(
                f"{self.address}{path}",
                headers=self.headers,
                params=query,
                timeout=REACH_SECONDS,
                allow_redirects=False,
            )
            answer.raise_for_status()
        except requests.RequestException as error:
            raise ConnectionError(f"{self.address}{path}: {type(error).__name__}") from None
        return answer

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that are alive, as the dashboard describes them, the head first.

        Raises:
            ConnectionError: as ``get``.
        """
        data = self.get("/nodes", view="summary").json()["data"]
        used = data.get("nodeLogicalResources") or {}
        nodes = [node["raylet"] for node in data["summary"] if node["raylet"].get("state") == "ALIVE"]
        nodes = [node | {"used": used.get(node["nodeId"], "")} for node in nodes]
        return sorted(nodes, key=lambda node: (not node.get("isHeadNode"), node["nodeName"]))

    def nodes_elsewhere(self) -> list[str]:
        """Addresses of the nodes that are not this machine; a forwarded port looks local but is not.

        Raises:
            ConnectionError: as ``get``.
        """
        listed = self.get("/api/v0/nodes", limit=1000).json()["data"]["result"]["result"]
        return sorted({node["node_ip"] for node in listed if node["state"] == "ALIVE" and not is_here(node["node_ip"])})

    def waiting(self) -> str:
        """What the cluster waits for, in a line: nodes that start or failed to, and demands that no node meets yet.

        Raises:
            ConnectionError: as ``get``.
        """
        text = self.get("/api/cluster_status", format=1).json()["data"].get("clusterStatus") or ""
        return "; ".join(
            f"{title.lower()}: {', '.join(lines)}"
            for title in ("Pending", "Recent failures", "Pending Demands", "Demands")
            if (lines := _section(text, title))
        )


@contextlib.contextmanager
def job_server(door: Door) -> Iterator[JobServer]:
    """The cluster behind a door, which stays open while the context lasts.

    Raises:
        SettingsError: nothing answers, it is no Ray cluster, it refuses the token, or runs another version of Ray.
    """
    door.validate()
    if door.cluster is None:
        yield _connect(door.url(), token_headers(""))
        return
    file = read_entrance(door.cluster)
    headers = token_headers("" if _token_given() else file.token())
    with tunnel(file) as address:
        server = _connect(address, headers)
        server.file = file
        yield server


def _token_given() -> bool:
    return bool(os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"))


def token_headers(token: str) -> dict[str, str]:
    """The header that token authentication asks for, with ``token`` or the one that lies where Ray looks for it."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    token = token or os.environ.get("RAY_AUTH_TOKEN", "")
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


def _connect(address: str, headers: dict[str, str]) -> JobServer:
    """A client of the job server, after one question that tells apart all that can be wrong with it.

    Raises:
        SettingsError: as ``job_server``.
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
                    "`ray start --head`, or reach one through its file with --cluster"
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
    for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk"):
        logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)  # they tell of closed connections
    with _ray_addresses_unset():
        return JobServer(address, headers, JobSubmissionClient(address, headers=dict(headers)))


def _section(text: str, title: str) -> list[str]:
    """The lines below a title of the autoscaler's report that say something: it puts "(none)" where nothing is."""
    lines = text.splitlines()
    if f"{title}:" not in lines:
        return []
    found: list[str] = []
    for line in lines[lines.index(f"{title}:") + 1 :]:
        if not line.startswith(" "):
            break
        found.append(line.strip())
    return [line for line in found if not line.startswith("(no")]
