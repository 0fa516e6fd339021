"""``ingot serve``: a trained model behind OpenAI's completions interface, on Ray Serve."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jobs.session import ray_session
from jobs.settings import ServeJob, SettingsError, require
from jobs.trained import load, located, model_name

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger("ingot")

_TELL_EVERY = 1.0  # seconds between two sets of metrics
_GRACE = 10.0  # seconds that running requests have at the end


class Replica:
    """One copy of the model, in a process of its own; answers HTTP requests that Ray Serve passes on.

    Args:
        settings: of the job.
        device: "cpu" or "cuda".
        key_hash: SHA-256 of the key; the key itself stays with whoever started the server.
    """

    def __init__(self, settings: ServeJob, device: str, key_hash: bytes):
        from jobs.serve_api import Api, Limits
        from jobs.serve_engine import Batcher
        from models.generate import Engine, slots_that_fit

        trained = load(settings, device)
        longest = trained.model.config.max_seq_len
        length = min(settings.length or longest, longest)
        slots = settings.slots or slots_that_fit(trained.model, length)
        engine = Engine(trained.model, slots=slots, length=length, vocab_size=trained.tokenizer.vocab_size)
        self.batcher = Batcher(engine, _metrics(trained.name))
        limits = Limits(
            max_tokens=min(settings.max_tokens or length, length),
            max_texts=settings.max_texts,
            max_waiting=settings.max_waiting,
            max_bytes=settings.max_request_bytes,
        )
        self.api = Api(trained, self.batcher, key_hash, limits)

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        return await self.api(request)

    def check_health(self) -> None:
        """Ray Serve asks this now and then, and starts another replica in the place of one that raises."""
        if self.batcher.failure is not None:
            raise self.batcher.failure

    def __del__(self) -> None:
        if hasattr(self, "batcher"):
            self.batcher.close()


def _metrics(model: str) -> Callable[[int, int, int], None]:
    """Ray metrics of a replica: what the engine's thread tells goes there about once a second."""
    from ray.serve.metrics import Counter, Gauge

    names = {
        "ingot_serve_tokens_per_second": "Tokens generated each second",
        "ingot_serve_active": "Texts that are being continued",
        "ingot_serve_waiting": "Texts that wait for a slot",
    }
    gauges = [Gauge(name, description=text, tag_keys=("model",)) for name, text in names.items()]
    total = Counter("ingot_serve_tokens", description="Tokens generated", tag_keys=("model",))
    for metric in (*gauges, total):
        metric.set_default_tags({"model": model})  # each its own: Serve adds to it
    since, tokens = time.monotonic(), 0

    def observe(new: int, active: int, waiting: int) -> None:
        nonlocal since, tokens
        tokens += new
        passed = time.monotonic() - since
        if passed < _TELL_EVERY:
            return
        for gauge, value in zip(gauges, (tokens / passed, active, waiting), strict=True):
            gauge.set(value)
        if tokens:
            total.inc(tokens)
        since, tokens = time.monotonic(), 0

    return observe


def run(settings: ServeJob) -> None:
    """Serve until interrupted or ended.

    Raises:
        SettingsError: there is no such run, no key in the variable or one that no client can send, no GPU, or the port
            is taken.
    """
    settings = located(settings)
    key, generated = _key(settings)
    if not os.environ.get("RAY_ADDRESS"):
        _check_port(settings)
    ended = threading.Event()
    with ray_session(dashboard=True), serving(settings, key) as url:  # which also has the metrics
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
        log.info("serve: %s answers at %s/v1/completions, a page to try it is at %s", _name(settings), url, url)
        if generated:
            print(f"key: {key}", flush=True)  # once, and not into the log
        ended.wait()
        log.info("serve: ends; running requests have %.0f s", _GRACE)


def _key(settings: ServeJob) -> tuple[str, bool]:
    """The key that clients have to show, and whether it was made up here."""
    if settings.api_key_env is None:
        return secrets.token_urlsafe(24), True
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise SettingsError(f"api_key_env is {settings.api_key_env!r}; the environment has no such variable, or no key")
    if not key.isascii():
        raise SettingsError(f"api_key_env is {settings.api_key_env!r}; a key has to be ASCII, as HTTP's headers are")
    return key, False


def _name(settings: ServeJob) -> str:
    return settings.name if settings.model is None else model_name(settings.model)


@contextmanager
def serving(settings: ServeJob, key: str) -> Iterator[str]:
    """A server on a Ray that runs, for the time of a context; gives its address.

    Raises:
        SettingsError: no GPU, or the port is taken.
    """
    from ray import serve

    device = _device(settings)
    options: dict[str, Any] = {"num_cpus": settings.cpus}
    if device == "cuda":
        options["num_gpus"] = settings.gpus_per_replica
    waiting = (settings.slots or 128) + settings.max_waiting
    deployment = serve.deployment(
        Replica,
        name="model",
        num_replicas=settings.replicas,
        ray_actor_options=options,
        max_ongoing_requests=waiting + 32,  # refused by the replica, in OpenAI's form
        max_queued_requests=waiting + 32,
        graceful_shutdown_timeout_s=_GRACE,
        max_constructor_retry_count=2,
    )
    key_hash = hashlib.sha256(key.encode()).digest()
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    others = ", ".join(serve.status().applications)
    if others:  # one port and one set of options for all that a cluster serves
        raise SettingsError(f"this cluster serves {others} already; end that first, or take another cluster")
    name = f"ingot-{_name(settings)}"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start("HeadOnly", {"host": settings.host, "port": settings.port}, logging_config=quiet)
    try:
        own = dataclasses.replace(settings, api_key_env=None)
        app = deployment.bind(own, device, key_hash)
        try:
            serve.run(app, name=name, route_prefix="/", logging_config=quiet)
        except RuntimeError as error:
            deployments = serve.status().applications[name].deployments.values()
            why = "; ".join(d.message.strip().rpartition("\n")[2] for d in deployments) or str(error)
            raise SettingsError(f"the model cannot be served: {why}") from None
        yield address(settings.host, settings.port)
    finally:
        serve.shutdown()


def address(host: str, port: int) -> str:
    """Where a server that listens at ``host`` can be opened; one that listens everywhere, on its own machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - it is told, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _device(settings: ServeJob) -> str:
    """Where the replicas run; a cluster whose GPU nodes scale up from zero has to be told."""
    import ray

    there = ray.cluster_resources().get("GPU", 0) >= settings.gpus_per_replica
    require(
        there or settings.device != "gpu" or bool(os.environ.get("RAY_ADDRESS")),
        "device", settings.device, "cpu or auto on a machine without a GPU",
    )  # fmt: skip
    return "cuda" if settings.device == "gpu" or (settings.device == "auto" and there) else "cpu"


def _check_port(settings: ServeJob) -> None:
    """Raise SettingsError when something listens there already."""
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        with socket.create_server((settings.host, settings.port), family=family):
            pass
    except OSError as error:
        raise SettingsError(f"port is {settings.port}; on {settings.host}: {error.strerror or error}") from None
