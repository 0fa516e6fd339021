"""A model that an evaluation asks: in this process, or copies of it in Ray actors, one for each GPU."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.eval_validation import validation
from jobs.local_workers import LocalWorkers, heap_at_rest
from jobs.session import ray_session
from jobs.settings import EvaluateJob
from jobs.trained import Trained, load

if TYPE_CHECKING:
    from jobs.local_workers import TextRequest

log = logging.getLogger("ingot")

_SMALLEST = 512  # continuations that an actor gets at least; fewer keep a GPU busy for too short
_LARGEST = 4096  # items that it gets at most, if it gets several shares: it begins when their text is encoded
_AT_ONCE = 2  # shares that an actor has: while it computes one, it encodes the text of another
_MOST_LOST = 3  # times that one actor may be lost before it is given up
_REPLY_EVERY = 0.5  # seconds between two replies of an actor at work
_LOOK_EVERY = 0.2  # seconds between two looks whether a lost actor is there again


@dataclass
class Facts:
    """What an evaluation knows of a model that may be elsewhere.

    Attributes:
        name: of the run or the folder.
        step: of the checkpoint; None of a model that is no run.
        fingerprint: of the weights, the precision and the kind of device.
        max_length: tokens that it takes.
        parameters: their number.
        device: cpu, or the name of the GPU.
        dtype: of matrix products.
    """

    name: str
    step: int | None
    fingerprint: str
    max_length: int
    parameters: int
    device: str
    dtype: str


class Model:
    """The model in this process, with the methods of ``jobs.harness.Workers`` and the validation loss."""

    def __init__(self, settings: EvaluateJob, device: str) -> None:
        self.trained = load(settings, device)
        self.workers = LocalWorkers(self.trained)

    def facts(self) -> Facts:
        """Of the model."""
        return facts(self.trained)

    def validation(self, workspace: str, samples: int, batch: int) -> dict[str, float]:
        """``jobs.eval_validation.validation`` of the model."""
        return validation(self.trained, workspace, samples, batch)

    def log_likelihoods(self, requests: Sequence[tuple[str, str]]) -> Iterator[tuple[int, tuple[float, bool, bool]]]:
        """As of ``Workers``."""
        return self.workers.log_likelihoods(requests)

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> Iterator[tuple[int, float]]:
        """As of ``Workers``."""
        return self.workers.rolling_log_likelihoods(texts)

    def generate(self, requests: Sequence[TextRequest]) -> Iterator[tuple[int, tuple[str, bool]]]:
        """As of ``Workers``."""
        return self.workers.generate(requests)


def facts(trained: Trained) -> Facts:
    """What others need to know of a model that is loaded."""
    import torch

    on_gpu = trained.device.type == "cuda"
    dtype = "bfloat16" if on_gpu else str(next(trained.model.parameters()).dtype).removeprefix("torch.")
    config = trained.model.config
    return Facts(
        name=trained.name,
        step=trained.step,
        fingerprint=f"{trained.fingerprint}-{dtype}-{trained.device.type}",
        max_length=config.max_seq_len,
        parameters=config.n_params(),
        device=torch.cuda.get_device_name(trained.device) if on_gpu else "cpu",
        dtype=dtype,
    )


@contextlib.contextmanager
def open_model(settings: EvaluateJob, device: str) -> Iterator[Model | ManyModels]:
    """The model on this machine: in this process when a single copy is asked for, else in actors.

    Args:
        settings: which model, and how many copies.
        device: of the copies, "cpu" or "cuda".
    """
    import torch

    here = torch.cuda.device_count() if device == "cuda" else 0
    copies = settings.workers or max(here, 1)
    if copies == 1:
        yield Model(settings, device)
        return
    with ray_session(math.ceil(copies * settings.cpus)), _actors(settings, copies, device == "cuda") as actors:
        yield actors


@contextlib.contextmanager
def open_on_cluster(settings: EvaluateJob) -> Iterator[Model | ManyModels]:
    """The model in actors on a cluster; in this process, a task of the cluster, when one copy on a CPU is asked for."""
    import ray

    there = int(ray.cluster_resources().get("GPU", 0))
    on_gpu = settings.device == "gpu" or (settings.device == "auto" and there >= 1)
    copies = settings.workers or (max(there, 1) if on_gpu else 1)
    if not on_gpu and copies == 1:
        yield Model(settings, "cpu")
        return
    with _actors(settings, copies, on_gpu) as actors:
        yield actors


@contextlib.contextmanager
def _actors(settings: EvaluateJob, copies: int, on_gpu: bool) -> Iterator[ManyModels]:
    import ray

    log.info("evaluate: %d copies of the model, each on a %s", copies, "GPU" if on_gpu else "CPU core")
    options = {"num_cpus": settings.cpus, "num_gpus": 1 if on_gpu else 0, "max_restarts": _MOST_LOST}
    kind = ray.remote(ModelActor).options(max_concurrency=_AT_ONCE, **options)
    actors = [kind.remote(settings, "cuda" if on_gpu else "cpu") for _ in range(copies)]
    try:
        yield ManyModels(actors)
    finally:
        for actor in actors:
            ray.kill(actor)


class ModelActor:
    """A copy of the model that stays loaded."""

    def __init__(self, settings: EvaluateJob, device: str) -> None:
        self.model = Model(settings, device)

    def facts(self) -> Facts:
        """Of the model."""
        return self.model.facts()

    def validation(self, workspace: str, samples: int, batch: int) -> dict[str, float]:
        """The validation loss."""
        return self.model.validation(workspace, samples, batch)

    def work(self, kind: str, requests: Sequence[Any]) -> Iterator[list[tuple[int, Any]]]:
        """What the method ``kind`` of the model gives, several results at a time."""
        ready, told = [], time.monotonic()
        with heap_at_rest():
            for result in getattr(self.model, kind)(requests):
                ready.append(result)
                if time.monotonic() - told > _REPLY_EVERY:
                    yield ready
                    ready, told = [], time.monotonic()
        if ready:
            yield ready


class ManyModels:
    """Copies of one model in actors, which take the next items whenever they are done with theirs.

    Those that find no room yet join when they do. An actor that is lost is started again by Ray; what it had not
    answered is asked again, of whoever is free.
    """

    def __init__(self, actors: list[Any]) -> None:
        self.actors = actors

    def facts(self) -> Facts:
        """Of the model."""
        import ray

        return ray.get(self._first()[1])

    def validation(self, workspace: str, samples: int, batch: int) -> dict[str, float]:
        """The validation loss, of one of them."""
        import ray

        return ray.get(self._first()[0].validation.remote(workspace, samples, batch))

    def _first(self) -> tuple[Any, Any]:
        """An actor that is there, and what it knows of the model."""
        import ray
        from ray.exceptions import RayActorError

        asked = {actor.facts.remote(): actor for actor in self.actors}
        while True:
            (answer, *_), others = ray.wait(list(asked))
            try:
                ray.get(answer)
            except RayActorError:  # it could not be started; another one may
                if not others:
                    raise
                del asked[answer]
            else:
                return asked[answer], answer

    def log_likelihoods(self, requests: Sequence[tuple[str, str]]) -> Iterator[tuple[int, tuple[float, bool, bool]]]:
        """As of ``Workers``."""
        smallest = min(_SMALLEST, math.ceil(len(requests) / len(self.actors)))
        return self._spread("log_likelihoods", requests, _AT_ONCE, smallest)

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> Iterator[tuple[int, float]]:
        """As of ``Workers``."""
        return self._spread("rolling_log_likelihoods", texts, _AT_ONCE, 1)  # whole documents

    def generate(self, requests: Sequence[TextRequest]) -> Iterator[tuple[int, tuple[str, bool]]]:
        """As of ``Workers``."""
        # they take long, and an engine is empty towards the end of a share: so each actor gets a single one
        return self._spread("generate", requests, 1, math.ceil(len(requests) / len(self.actors)))

    def _spread(self, kind: str, requests: Sequence[Any], at_once: int, smallest: int) -> Iterator[tuple[int, Any]]:
        share = _Share(len(requests), at_once * len(self.actors), smallest)
        results: queue.SimpleQueue = queue.SimpleQueue()
        threads = [
            threading.Thread(target=_feed, args=(actor, kind, requests, share, results), daemon=True)
            for _ in range(at_once)
            for actor in self.actors
        ]
        for thread in threads:
            thread.start()
        at_work, errors, missing = len(threads), [], len(requests)
        try:
            while at_work and missing:
                found = results.get()
                if isinstance(found, list):
                    missing -= len(found)
                    yield from found
                else:
                    at_work -= 1
                    errors += [found] if found is not None else []
        finally:
            share.close()  # also when nobody wants the rest
        if missing:
            raise errors[-1]


class _Share:
    """Which items are nobody's yet. Neighbours stay together, since they often begin alike.

    Args:
        items: their number.
        takers: how many there are.
        smallest: items of a share; shares get smaller to the end, down to this, so that all end together.
    """

    def __init__(self, items: int, takers: int, smallest: int) -> None:
        self.changed = threading.Condition()
        self.smallest = smallest
        self.parts = 2 * takers
        self.left = [range(items)] if items else []
        self.held = 0  # shares that somebody has
        self.closed = False

    def take(self) -> range | None:
        """The next items, None when there are none left and none will come back; waits while some might."""
        with self.changed:
            while not self.left and self.held and not self.closed:
                self.changed.wait()
            if not self.left or self.closed:
                return None
            first = self.left.pop()
            size = max(self.smallest, min(_LARGEST, (len(first) + sum(map(len, self.left))) // self.parts))
            if first[size:]:
                self.left.append(first[size:])
            self.held += 1
            return first[:size]

    def give_back(self, items: Sequence[int]) -> None:
        """A share is done with, except for these items, in their order."""
        with self.changed:
            self.held -= 1
            for _, run in itertools.groupby(enumerate(items), lambda pair: pair[1] - pair[0]):  # neighbours
                own = [item for _, item in run]
                self.left.append(range(own[0], own[-1] + 1))
            self.changed.notify_all()

    def close(self) -> None:
        """Nobody takes any more."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


def _wait_for(actor: Any, share: _Share) -> None:
    import ray
    from ray.exceptions import ActorUnavailableError

    answer = actor.__ray_ready__.remote()
    while not share.closed:
        if not ray.wait([answer], timeout=1.0)[0]:  # there may be no room for it
            continue
        try:
            ray.get(answer)
            break
        except ActorUnavailableError:  # it is being started again
            time.sleep(_LOOK_EVERY)
            answer = actor.__ray_ready__.remote()


def _feed(actor: Any, kind: str, requests: Sequence[Any], share: _Share, results: queue.SimpleQueue) -> None:
    """Have one actor work; puts lists of results, and at the end None, or the error that it ended with."""
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    lost, error = 0, None
    try:
        _wait_for(actor, share)  # it takes nothing before it is there
        while (items := share.take()) is not None:
            left = dict.fromkeys(items)
            try:
                replies = actor.work.options(num_returns="streaming").remote(kind, [requests[item] for item in items])
                for reply in replies:
                    answers = [(items[place], value) for place, value in ray.get(reply)]
                    for item, _ in answers:
                        del left[item]
                    results.put(answers)
            except RayActorError:
                lost += 1
                if not share.closed:  # at the end of a process its actors go too
                    log.warning("evaluate: a copy of the model was lost; %d items are asked again", len(left))
                if lost > _MOST_LOST:
                    raise
            finally:
                share.give_back(list(left))
            if left:
                _wait_for(actor, share)
    except RayTaskError as failure:
        error = failure.cause or failure
        if error is not failure:
            error.__cause__ = failure  # says where it was
    except Exception as failure:
        error = failure
    if error is not None and not share.closed:  # the others may go on, and all end well
        log.warning("evaluate: a copy of the model is given up: %s", error)
    results.put(error)
