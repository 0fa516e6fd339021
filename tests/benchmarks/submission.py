"""What a submission costs: seconds until the first line of the job's log, and bytes uploaded, twice for the same tree.

``python -m tests.benchmarks.submission`` starts a cluster of this machine on ports of its own and stops it again;
``--address URL`` measures with one that runs. The job asks for a run that does not exist, so that all it does is start.
The second submission finds the program on the cluster already and uploads nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

TOKEN = "a-token-for-the-benchmark-of-submission"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help="a cluster that runs; its token is looked for where Ray looks")
    parser.add_argument("--times", type=int, default=3)
    known = parser.parse_args()
    with contextlib.nullcontext(known.address) if known.address else cluster() as address:
        print("submission  submitted  log begins  Ingot's first line  job ended  uploaded")
        for number in range(1, known.times + 1):
            print(f"{number:>10}  {measure(address)}")


def measure(address: str) -> str:
    """Submit once; the line of the table."""
    with tempfile.TemporaryDirectory() as workspace:
        command = [sys.executable, "-m", "jobs", "submit", "generate", "--address", address, "--workspace", workspace]
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seen: dict[str, float] = {}
        output = ""
        for line in process.stdout:
            output += line
            for event, sign in (
                ("submitted", ": submitted to"),
                ("log", "Running entrypoint"),  # before it, Ray only says that it unpacks the program
                ("own", "there is no such run"),
            ):
                if sign in line:
                    seen.setdefault(event, time.monotonic() - began)
        process.wait()
        took = time.monotonic() - began
    sent = re.search(r"([\d,]+) kB uploaded|nothing to upload", output)
    if sent is None or set(seen) != {"submitted", "log", "own"}:
        raise SystemExit(f"the submission went wrong:\n{output}")
    return (
        f"{seen['submitted']:>7.1f} s  {seen['log']:>8.1f} s  {seen['own']:>16.1f} s  {took:>7.1f} s  "
        f"{sent[0] if sent[1] else 'nothing'}"
    )


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """A cluster of this machine with token authentication; gives the address of its dashboard."""
    import requests

    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(6)]
        ports = [each.getsockname()[1] for each in sockets]
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += ("metrics-export-port", "ray-client-server-port")
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray = [os.path.join(os.path.dirname(sys.executable), "ray"), "start", "--head", "--block", "--num-cpus=2"]
        ray += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
        ray += [f"--temp-dir={folder}", *(f"--{name}={port}" for name, port in zip(names, ports, strict=True))]
        with open(f"{folder}/start.log", "w") as log:
            head = subprocess.Popen(ray, stdout=log, stderr=log, cwd=folder, start_new_session=True)
        address = f"http://127.0.0.1:{ports[1]}"
        try:
            while True:
                with contextlib.suppress(requests.RequestException):
                    answer = requests.get(
                        f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=5
                    )
                    if answer.status_code == 200:
                        break
                time.sleep(0.5)
            time.sleep(5)  # a cluster that has just started is still busy with that
            yield address
        finally:
            head.terminate()  # --block: ends everything that it started
            head.wait(30)


if __name__ == "__main__":
    main()
