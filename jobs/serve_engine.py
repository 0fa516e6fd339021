"""The engine in a thread of its own, which texts are asked of from an event loop; and the scores of a prompt."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from models.generate import Engine, Sampling, Token
    from models.transformer import Transformer

log = logging.getLogger("ingot")

_IDLE_SECONDS = 1.0  # how often an idle thread tells that it is
# tokens of a text that come within it are told together: an event for each would cost more than many a model's step
_TOGETHER_SECONDS = 0.03


class Asking:
    """Texts that one client waits for; give it up by leaving ``Batcher.ask``.

    Attributes:
        events: (which of the texts, its next token), in lists as the steps give them, or an exception.
    """

    def __init__(self, count: int, loop: asyncio.AbstractEventLoop):
        self.count, self.loop = count, loop
        self.events: asyncio.Queue[list[tuple[int, Token]] | Exception] = asyncio.Queue()
        self.numbers: dict[int, int] = {}  # the engine's number of each text; of the engine's thread

    async def tokens(self) -> AsyncIterator[list[tuple[int, Token]]]:
        """All that came since the last time, as it comes, without an end."""
        told = 0.0
        while True:
            batch = await self.events.get()
            early = told + _TOGETHER_SECONDS - self.loop.time()
            if early > 0 and isinstance(batch, list) and not any(token.finished for _, token in batch):
                await asyncio.sleep(early)
            while not self.events.empty() and not isinstance(batch, Exception):
                more = self.events.get_nowait()
                batch = more if isinstance(more, Exception) else batch + more
            if isinstance(batch, Exception):
                raise RuntimeError("the model failed") from batch  # noqa: TRY004 - an event, not an argument
            told = self.loop.time()
            yield batch


class Batcher:
    """Continuous batching for an event loop.

    Args:
        engine: that continues texts; from now on only the thread here may use it.
        observe: gets after each step, and while idle: tokens of the step, texts active, texts waiting.

    Attributes:
        open: texts that somebody waits for.
        failure: why the thread ended, if it did.
    """

    def __init__(self, engine: Engine, observe: Callable[[int, int, int], None] = lambda *_: None):
        self.engine, self.open = engine, 0
        self.failure: Exception | None = None
        self._observe = observe
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._texts: dict[int, tuple[Asking, int]] = {}  # by the engine's number
        self._waiters: set[Callable[[Exception], None]] = set()  # who are told when the thread fails
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @contextlib.asynccontextmanager
    async def ask(self, texts: Sequence[tuple[Sequence[int], Sampling]]) -> AsyncIterator[Asking]:
        """Have prompts continued; what is not finished on leaving is given up."""
        asking = Asking(len(texts), asyncio.get_running_loop())
        with self._told_of_failure(lambda error: _tell(asking, error)), self.opened(asking.count):
            try:
                self._commands.put(lambda: self._submit(asking, texts))
                yield asking
            finally:
                for index in range(asking.count):
                    self.cancel(asking, index)

    @contextlib.contextmanager
    def opened(self, count: int) -> Iterator[None]:
        """Count texts as waited for."""
        self.open += count
        try:
            yield
        finally:
            self.open -= count

    def cancel(self, asking: Asking, index: int) -> None:
        """Give up one of the texts."""
        self._commands.put(lambda: self._cancel(asking, index))

    async def call(self, function: Callable[[], Any]) -> Any:
        """Have the engine's thread do something else between two steps."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def work() -> None:
            try:
                answer, put = function(), done.set_result
            except Exception as error:
                answer, put = error, done.set_exception
            loop.call_soon_threadsafe(lambda: None if done.done() else put(answer))

        def fail(error: Exception) -> None:
            failed = RuntimeError("the model failed")
            failed.__cause__ = error
            loop.call_soon_threadsafe(lambda: None if done.done() else done.set_exception(failed))

        with self._told_of_failure(fail):
            self._commands.put(work)
            return await done

    @contextlib.contextmanager
    def _told_of_failure(self, tell: Callable[[Exception], None]) -> Iterator[None]:
        """Who waits is told even if the thread fails before it comes to what was asked.

        Raises:
            RuntimeError: the thread has failed already.
        """
        self._waiters.add(tell)  # first: the thread notes its failure before it looks whom to tell
        try:
            if self.failure is not None:
                raise RuntimeError("the model failed") from self.failure
            yield
        finally:
            self._waiters.discard(tell)

    def close(self) -> None:
        """End the thread."""
        self._commands.put(None)
        self._thread.join(10)

    def _submit(self, asking: Asking, texts: Sequence[tuple[Sequence[int], Sampling]]) -> None:
        for index, (prompt, sampling) in enumerate(texts):
            number = self.engine.submit(prompt, sampling)
            asking.numbers[index] = number
            self._texts[number] = (asking, index)

    def _cancel(self, asking: Asking, index: int) -> None:
        number = asking.numbers.pop(index, None)
        if number is not None and self._texts.pop(number, None):
            self.engine.cancel(number)

    def _work(self) -> None:
        try:
            while self._obey():
                tokens = self.engine.step() if self.engine.busy else []
                self._deliver(tokens)
                self._observe(len(tokens), self.engine.active, self.engine.waiting)
        except Exception as error:
            log.exception("serve: the model failed")
            self.failure = error
            for tell in self._waiters.copy():  # in one piece: the event loop may change it
                with contextlib.suppress(RuntimeError):  # an event loop that has ended
                    tell(error)

    def _obey(self) -> bool:
        """Do what was asked since the last step, wait for something to do; False at the end."""
        wait = not self.engine.busy
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get(timeout=_IDLE_SECONDS) if wait else self._commands.get_nowait()
                wait = False
                if command is None:
                    return False
                command()
        return True

    def _deliver(self, tokens: Sequence[Token]) -> None:
        batches: dict[int, tuple[Asking, list[tuple[int, Token]]]] = {}
        for token in tokens:
            text = self._texts.get(token.request)
            if text is None:
                continue
            if token.finished:
                del self._texts[token.request]
            asking, index = text
            batches.setdefault(id(asking), (asking, []))[1].append((index, token))
        for asking, batch in batches.values():
            _tell(asking, batch)


def _tell(asking: Asking, event: list[tuple[int, Token]] | Exception) -> None:
    with contextlib.suppress(RuntimeError):  # its event loop has ended
        asking.loop.call_soon_threadsafe(asking.events.put_nowait, event)


@torch.inference_mode()
def prompt_scores(
    model: Transformer, prompt: Sequence[int], top: int, vocab_size: int | None
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Log-probability of each token of a prompt but the first, and the ``top`` likeliest tokens in its place."""
    device = model.tok_embeddings.weight.device
    tokens = torch.tensor([list(prompt)], device=device)
    logits = model(tokens)[0, :-1, :vocab_size]
    scores = []
    for part, targets in zip(logits.split(256), tokens[0, 1:].split(256), strict=True):
        log_probabilities = part.float().log_softmax(-1)
        own = log_probabilities.gather(1, targets[:, None])[:, 0].tolist()
        values, ids = (each.tolist() for each in log_probabilities.topk(top))
        scores += [(p, list(zip(i, v, strict=True))) for p, i, v in zip(own, ids, values, strict=True)]
    return scores
