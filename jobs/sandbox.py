"""Runs programs that nobody has read, such as a model's answers to HumanEval, and says whether they pass their tests.

Each program gets a fresh Python process with an empty environment, without standard input, bounded in time, memory,
open files and output, and confined by what the kernel gives:

- seccomp: a list of some 100 system calls; no sockets of any kind, no processes, programs, signals or tracing. Needed.
- namespaces: a network without interfaces and a file tree that holds the Python installation, read-only, and a
  scratch folder in memory. Needs unprivileged user namespaces, or root with CAP_SYS_ADMIN.
- Landlock (Linux 5.13): reads the Python installation, writes the scratch folder, nothing else.

Of the last two at least one has to be there; containers mostly have Landlock only, some laptops too. As no process can
be started, nothing outlives a program. On macOS and on other processors than x86_64 and aarch64 there is no such
protection, and ``run`` refuses unless it is told otherwise.

The tests run in another process of the same sandbox, and only plain values pass between the two: a program cannot read
the tests, change them, answer with objects that equal everything, or end the process that gives the verdict.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

LAYERS = ("namespaces", "landlock", "seccomp")


class SandboxError(RuntimeError):
    """Programs cannot be confined here; the message says why and what to do."""


@dataclass(frozen=True)
class Program:
    """A program and what has to be true of it.

    Attributes:
        solution: Python that is not trusted; defines ``entry_point``.
        tests: Python that raises unless the function is right; it finds it under its name.
        entry_point: name of the function.
        preamble: Python that the tests may use, such as HumanEval's prompt with its helper functions.
    """

    solution: str
    tests: str
    entry_point: str
    preamble: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        passed: the tests ran to their end and none failed.
        reason: why it did not pass, in a line: an exception, a limit, how it ended.
        seconds: that it ran.
        layers: which of LAYERS confined it.
    """

    passed: bool
    reason: str
    seconds: float
    layers: tuple[str, ...]


def run(
    program: Program,
    *,
    seconds: float = 3.0,
    memory: int = 1 << 30,
    disk: int = 16 << 20,
    files: int = 256,
    unconfined: bool = False,
    layers: Sequence[str] = LAYERS,
) -> Outcome:
    """Run one program and its tests.

    Args:
        program: what to run.
        seconds: of wall time, from the start of the program to the end of its tests; Python's start comes on top.
        memory: bytes of address space, of the program and of its tests each.
        disk: bytes of the scratch folder, which is the working directory, of each file in it and of what is printed.
        files: in the scratch folder, which has no folders in it.
        unconfined: run it also where it cannot be kept from files and network.
        layers: that are used where the kernel has them.

    Raises:
        SandboxError: the platform cannot confine it, and ``unconfined`` is not set.
    """
    scratch = tempfile.mkdtemp(prefix="ingot-sandbox-")
    try:
        job = {"solution": program.solution, "seconds": seconds, "memory": memory, "disk": disk, "files": files}
        job |= {"unconfined": unconfined, "layers": list(layers), "scratch": os.path.realpath(scratch)}
        tests = {"tests": program.tests, "entry_point": program.entry_point, "preamble": program.preamble}
        said = _guarded(_message(job) + _message(tests), scratch, seconds)
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(scratch)
    if said is None:
        return Outcome(False, "the sandbox itself did not end", seconds, ())
    if "refused" in said:
        raise SandboxError(
            f"programs cannot be kept from files and network here: {said['refused'] or 'this is not Linux'}. Run this "
            "on Linux 5.13 or newer, on x86_64 or aarch64, where Landlock or user namespaces are switched on, such as "
            "in a container of its own"
        )
    return Outcome(said["passed"], said["reason"], said["seconds"], tuple(said["layers"]))


def many(programs: Iterable[Program], *, workers: int, **limits: object) -> Iterator[tuple[int, Outcome]]:
    """Run programs side by side; gives each one's index and outcome as they end.

    Args:
        programs: what to run.
        workers: how many at a time; more than there are cores makes programs run out of time.
        limits: as of ``run``.

    Raises:
        SandboxError: as ``run``.
    """
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(run, program, **limits): index for index, program in enumerate(programs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def protections(**limits: object) -> tuple[str, ...]:
    """Which of LAYERS this platform has; what to tell the user before programs run.

    Raises:
        SandboxError: as ``run``.
    """
    return run(Program("def f(): return 1", "assert f() == 1", "f"), seconds=30.0, **limits).layers


def _message(content: object) -> bytes:
    body = json.dumps(content).encode()
    return len(body).to_bytes(4, "big") + body


def _guarded(words: bytes, scratch: str, seconds: float) -> dict | None:
    """Start the guard (sandbox_inside.py) in the scratch folder; what it says, None if it says nothing in time."""
    inside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox_inside.py")
    with subprocess.Popen(
        [sys.executable, "-I", "-X", "utf8", inside],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd=scratch,
        start_new_session=True,
    ) as guard:
        try:
            said, _ = guard.communicate(words, timeout=seconds + 60)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            guard.kill()
    return json.loads(said[4:]) if len(said) > 4 else None
