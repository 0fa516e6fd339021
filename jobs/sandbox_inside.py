"""Runs inside the sandbox, as a program of its own: `python -I -X utf8 sandbox_inside.py`; see jobs/sandbox.py.

Three processes. The guard enters the namespaces, starts the other two and kills them. The solution loads the program
that is not trusted and answers calls of its function. The checker runs the tests; what they call is a stand-in that
sends the arguments to the solution and gives back its answer. Between the two go plain values as JSON, so the program
has neither the tests nor the verdict in its memory.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import importlib.util
import json
import os
import select
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Set
from types import ModuleType
from typing import Any

_LONGEST_MESSAGE = 16 << 20  # bytes
_LONGEST_REASON = 500  # characters
_WATCH_EVERY = 0.02  # seconds between looks into a scratch folder that nothing else bounds


def guard() -> None:
    """Read the job and then the tests from stdin, write the outcome to stdout; all are messages (``send``)."""
    layers = _beside("sandbox_layers")
    layers.die_with_parent()
    job = receive(0)
    entered, missing = _enter(job, layers)
    if not ("seccomp" in entered and len(entered) > 1) and not job["unconfined"]:
        send(1, {"refused": "; ".join(missing), "layers": entered})
        return
    (no_input, writer), requests, answers, verdict = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    os.close(writer)

    def start(body: Callable[[], None], *descriptors: int) -> int:
        """A confined process that has the descriptors as 3, 4, … and no other."""
        process = os.fork()
        if process == 0:
            try:
                layers.die_with_parent()
                os.setsid()
                # of its own: neither reads what the other prints
                output = os.memfd_create("output") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_WRONLY)
                high = [fcntl.fcntl(d, fcntl.F_DUPFD, 100) for d in (no_input, output, output, *descriptors)]
                for number, descriptor in enumerate(high):
                    os.dup2(descriptor, number)
                os.closerange(len(high), 1024)
                _confine(job, layers, entered)
                body()
            finally:
                os._exit(1)
        return process

    solution = start(lambda: _solve(job["solution"]), requests[0], answers[1])
    began = time.monotonic()
    tests = receive(0)  # only now, so that the solution's memory does not hold them
    checker = start(lambda: send(5, _check(tests)), answers[0], requests[1], verdict[1])
    for descriptor in (*requests, *answers, verdict[1]):
        os.close(descriptor)
    outcome = _wait(job, verdict[0], began, bounded="namespaces" in entered)
    seconds = time.monotonic() - began
    for process in (solution, checker):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process, signal.SIGKILL)  # with what it could start where nothing kept it from that
        os.kill(process, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(solution, 0)[1])
    os.waitpid(checker, 0)
    if outcome.get("gone"):
        by = f"signal {signal.Signals(-ended).name}" if ended < 0 else f"exit status {ended}"
        outcome = {"passed": False, "reason": f"ended before the tests did: {by}"}
    # a program can make text that no file takes: half of a surrogate pair
    reason = str(outcome.get("reason"))[:_LONGEST_REASON].encode("utf-8", "replace").decode()
    passed = outcome.get("passed") is True
    send(1, {"passed": passed, "reason": reason, "seconds": seconds, "layers": entered, "missing": missing})


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, os.path.join(os.path.dirname(__file__), f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _readable() -> list[str]:
    """The Python installation and what its libraries load."""
    python = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, os.path.realpath(sys.executable)]
    python += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    system = ["/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime"]
    return [*python, *system, "/dev/null", "/dev/urandom"]


def _enter(job: dict[str, Any], layers: ModuleType) -> tuple[list[str], list[str]]:
    """The layers there are, of those that the job wants: this process is in the namespaces; and what is missing."""
    entered, missing = [], []
    if "namespaces" in job["layers"] and layers.can_filter():
        try:
            layers.enter_namespaces(job["scratch"], _readable(), disk=job["disk"], files=job["files"])
            entered.append("namespaces")
        except OSError as error:
            missing.append(f"no namespaces ({error.strerror or error})")
            os.chdir(job["scratch"])
    if "landlock" in job["layers"]:
        (entered if layers.landlock_version() else missing).append("landlock")
    if "seccomp" in job["layers"]:
        (entered if layers.can_filter() else missing).append("seccomp")
    return entered, [name if " " in name else f"no {name}" for name in missing]


def _confine(job: dict[str, Any], layers: ModuleType, entered: list[str]) -> None:
    filtered = "seccomp" in entered
    layers.limit(
        seconds=job["seconds"], memory=job["memory"], disk=job["disk"], child_processes="seccomp" not in entered
    )
    # older versions of Landlock leave truncating to whoever can name a file
    writing = "namespaces" in entered or ("landlock" in entered and layers.landlock_version() >= 3)
    scratch = "/scratch" if "namespaces" in entered else job["scratch"]
    if "landlock" in entered:
        layers.enter_landlock(_readable(), scratch if writing else None)
    if filtered:
        layers.drop_capabilities()
        layers.filter_system_calls(writing=writing)


def _wait(job: dict[str, Any], verdict: int, began: float, *, bounded: bool) -> dict[str, Any]:
    """What the checker says, unless time or the scratch folder run out before."""
    while (left := began + job["seconds"] - time.monotonic()) > 0:
        if select.select([verdict], [], [], left if bounded else min(left, _WATCH_EVERY))[0]:
            try:
                return receive(verdict)
            except (EOFError, ValueError):
                return {"passed": False, "reason": "the tests ended without a verdict"}
        if not bounded:
            sizes = []
            for entry in os.scandir(job["scratch"]):
                with contextlib.suppress(FileNotFoundError):  # gone since
                    sizes.append(entry.stat(follow_symlinks=False).st_size)
            if len(sizes) > job["files"] or sum(sizes) > job["disk"]:
                return {"passed": False, "reason": "wrote more than the scratch folder may hold"}
    return {"passed": False, "reason": f"took longer than {job['seconds']:g} s"}


def _solve(program: str) -> None:
    """Load the program that is not trusted, and answer calls."""
    namespace: dict[str, Any] = {"__name__": "solution"}
    try:
        exec(compile(program, "<solution>", "exec"), namespace)  # noqa: S102
    except BaseException as error:  # SystemExit too
        send(4, {"raised": _named(error)})
        return
    send(4, {"loaded": True})
    while True:
        name, positional, named = decode(receive(3))
        try:
            answer = {"value": encode(namespace[name](*positional, **named))}
        except BaseException as error:
            answer = {"raised": _named(error)}
        send(4, answer)


def _check(tests: dict[str, str]) -> dict[str, Any]:
    """Run the tests against a stand-in for the solution's function; the verdict."""
    gone = False

    def answer() -> Any:
        nonlocal gone
        try:
            message = receive(3)
        except (EOFError, ValueError, RecursionError):
            gone = True
            raise
        if "raised" in message:
            name, text = message["raised"]
            kind = getattr(builtins, name, None)
            known = isinstance(kind, type) and issubclass(kind, Exception)
            raise kind(text) if known else RuntimeError(f"{name}: {text}")
        return decode(message.get("value"))

    def stand_in(*positional: Any, **named: Any) -> Any:
        nonlocal gone
        try:
            send(4, encode((tests["entry_point"], positional, named)))
        except OSError:
            gone = True
            raise
        return answer()

    try:
        answer()
        namespace: dict[str, Any] = {"__name__": "tests"}
        exec(compile(tests["preamble"], "<preamble>", "exec"), namespace)  # noqa: S102
        namespace[tests["entry_point"]] = stand_in
        exec(compile(tests["tests"], "<tests>", "exec"), namespace)  # noqa: S102
    except BaseException as error:  # SystemExit too
        return {"passed": False, "reason": ": ".join(part for part in _named(error) if part), "gone": gone}
    return {"passed": not gone, "reason": "", "gone": gone}


def _named(error: BaseException) -> tuple[str, str]:
    try:
        return type(error).__name__, str(error)[:_LONGEST_REASON]
    except Exception:
        return "Exception", ""


def send(descriptor: int, message: Any) -> None:
    """Write a message: its length in four bytes, then JSON."""
    body = json.dumps(message).encode()
    data = memoryview(len(body).to_bytes(4, "big") + body)
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:
    """Read a message.

    Raises:
        EOFError: the other side is gone.
        ValueError: it is no message, or too long a one.
    """
    length = int.from_bytes(_exactly(descriptor, 4), "big")
    if length > _LONGEST_MESSAGE:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(_exactly(descriptor, length))


def _exactly(descriptor: int, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = os.read(descriptor, min(length - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def encode(value: Any) -> Any:
    """A plain value as JSON: what is not JSON's own becomes [kind, content].

    Subclasses become the plain type, so that none brings an ``__eq__`` of its own to the tests.

    Raises:
        TypeError: it is no plain value, such as a generator.
    """
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # NumPy's scalars
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 53 else ["int", hex(value)]
    for kind, plain in ((float, float), (str, str)):
        if isinstance(value, kind):
            return plain(value)
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, Mapping):
        return ["dict", [[encode(k), encode(v)] for k, v in value.items()]]
    for kind, name in ((list, "list"), (tuple, "tuple"), (frozenset, "frozenset"), (Set, "set")):
        if isinstance(value, kind):
            return [name, [encode(item) for item in value]]
    raise TypeError(f"returned a {type(value).__name__}, which is no plain value")


def decode(message: Any) -> Any:
    """The value of ``encode``'s JSON; gives nothing but Python's plain types."""
    if not isinstance(message, list):
        return message
    kind, content = message
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(decode, content))


if __name__ == "__main__":
    guard()
