"""The work of an evaluation in this process: a model that is loaded, from text to log-likelihoods and texts."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from jobs.encoder import Encoder

if TYPE_CHECKING:
    from jobs.trained import Trained
    from models.generate import Engine, Sampling
    from models.prefix_tree import Request
    from models.scoring import Score, Scorer
    from pipelines.tokenizer import Tokenizer

_MOST_TEXTS = 1024  # that a GPU continues together

TextRequest = tuple[str, Sequence[str], "Sampling"]
"""A prompt, strings before which its text ends, and how the text is made."""


_changing, _inside = threading.Lock(), 0  # of `heap_at_rest`: how many are in it


@contextlib.contextmanager
def heap_at_rest() -> Iterator[None]:
    """What exists is not looked through for garbage as long as anybody is in this context: with all modules and
    documents that takes a third of a second, again and again.
    """
    global _inside  # noqa: PLW0603
    with _changing:
        if not _inside:
            gc.freeze()
        _inside += 1
    try:
        yield
    finally:
        with _changing:
            _inside -= 1
            if not _inside:
                gc.unfreeze()


class LocalWorkers:
    """As of ``jobs.harness.Workers``, in this process; while one call computes, that of another thread can encode.

    Calls for log-likelihoods take turns by batches. One for texts computes until its results are read to the end or
    closed; others wait for that.

    Args:
        trained: the model and its tokenizer.
        tokens_per_batch: tokens that are scored together; None suits the device.
        slots: texts that are continued together at most; None suits the device's memory.
    """

    def __init__(self, trained: Trained, *, tokens_per_batch: int | None = None, slots: int | None = None) -> None:
        on_cpu = trained.device.type == "cpu"
        self.trained = trained
        self.max_length = trained.model.config.max_seq_len
        self.tokens_per_batch = tokens_per_batch or (8192 if on_cpu else 65536)
        self.slots = slots
        self._encoder = Encoder(trained.tokenizer)
        self._decoder = _Decoder(trained.tokenizer)
        self._encoding, self._computing = threading.Lock(), threading.Lock()  # one after another
        self._scorer: weakref.ReferenceType[Scorer] | None = None  # of those that are at work
        self._engine: Engine | None = None
        self._wanted = 0  # slots of it, were there memory for them

    def log_likelihoods(self, requests: Sequence[tuple[str, str]]) -> Iterator[tuple[int, tuple[float, bool, bool]]]:
        """As of ``Workers``.

        Raises:
            ValueError: a continuation is empty, or longer than the model's context; or a context is white space alone,
                and the tokenizer begins texts with nothing.
        """
        with self._encoding:
            asked, cut = self._fitting(self._encoder.pairs(requests))
        for index, value, likeliest in self._scored(asked):
            yield index, (value, likeliest, cut[index])

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> Iterator[tuple[int, float]]:
        """As of ``Workers``."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        asked: list[Request] = []
        of: list[int] = []
        with self._encoding:
            for index, ids in enumerate(self._encoder.texts(texts)):
                windows = get_rolling_token_windows(
                    token_list=ids.tolist(),
                    prefix_token=self._encoder.prefix_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                asked += map(make_disjoint_window, windows)
                of += [index] * (len(asked) - len(of))
        left = np.bincount(of, minlength=len(texts)).tolist()
        sums = [0.0] * len(texts)
        yield from ((index, 0.0) for index, windows in enumerate(left) if not windows)
        for window, value, _ in self._scored(asked):
            index = of[window]
            sums[index] += value
            left[index] -= 1
            if not left[index]:
                yield index, sums[index]

    def _fitting(self, pairs: Sequence[Request]) -> tuple[list[Request], list[bool]]:
        """Without the beginnings that the model cannot read, and whether there was one."""
        asked: list[Request] = []
        cut: list[bool] = []
        last: tuple[Sequence[int], int, Sequence[int]] = ([], 0, [])
        for context, continuation in pairs:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, but must have 1 to {self.max_length}, the model's "
                    f"max_seq_len: {self._encoder.text(continuation)[:100]!r}"
                )
            # the last token is predicted, never read
            over = len(context) + len(continuation) - self.max_length - 1
            cut.append(over > 0)
            if over > 0:
                if context is not last[0] or over != last[1]:  # choices of a question go on having one context
                    last = context, over, context[over:]
                asked.append((last[2], continuation))
            else:
                asked.append((context, continuation))
        return asked, cut

    def _scored(self, asked: Sequence[Request]) -> Iterator[Score]:
        from models.scoring import Scorer

        if not asked:
            return
        with self._turn():
            scorer = self._scorer and self._scorer()
            if scorer is None:
                scorer = Scorer(self.trained.model, turn=self._turn)
                self._scorer = weakref.ref(scorer)
        yield from scorer.log_likelihoods(asked, tokens_per_batch=self.tokens_per_batch)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Nobody else computes, and there is room for scoring."""
        with self._computing:
            self._make_room()
            yield

    def _make_room(self) -> None:
        """Let go of the engine where a GPU has not the memory for both."""
        import torch

        device = self.trained.device
        if self._engine is None or device.type != "cuda":
            return
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes
        if torch.cuda.mem_get_info(device)[0] + kept < 2**34:
            self._engine = None
            torch.cuda.empty_cache()

    def generate(self, requests: Sequence[TextRequest]) -> Iterator[tuple[int, tuple[str, bool]]]:
        """As of ``Workers``.

        Raises:
            ValueError: a prompt is empty, or its text is longer than the model's context.
        """
        if not requests:
            return
        with self._encoding:
            prompts = self._encoder.texts([prompt for prompt, _, _ in requests])
            end = self._encoder.written(self.trained.tokenizer.eot_id)
        asked: list[tuple[np.ndarray, list[str], Sampling]] = []
        for prompt, (_, until, sampling) in zip(prompts, requests, strict=True):
            room = self.max_length - sampling.max_new_tokens
            ends = [*until, *([] if end in until else [end])]
            asked.append((prompt[-room:], ends, replace(sampling, stop=self.trained.ends)))
        with self._computing:
            for index, text in self._continued(asked):
                yield index, (text, len(prompts[index]) > len(asked[index][0]))

    def _continued(self, asked: list[tuple[np.ndarray, list[str], Sampling]]) -> Iterator[tuple[int, str]]:
        engine = self._engine_for(asked)
        # those that begin alike one after another: the engine reads a common beginning once
        # (big-endian, so that bytes sort as tokens do)
        waiting = sorted(range(len(asked)), key=lambda i: asked[i][0].astype(">i4").tobytes(), reverse=True)
        running: dict[int, tuple[int, _Text]] = {}
        try:
            while waiting or engine.busy:
                while waiting and engine.waiting < engine.slots:
                    index = waiting.pop()
                    prompt, until, sampling = asked[index]
                    running[engine.submit(prompt, sampling)] = index, _Text(self._decoder, until)
                for token in engine.step():
                    if token.request not in running:
                        continue
                    index, text = running[token.request]
                    stopped = token.token is not None and text.add(token.token)
                    if stopped and token.finished is None:
                        engine.cancel(token.request)
                    if stopped or token.finished is not None:
                        del running[token.request]
                        yield index, text.cut()
        except Exception:
            self._engine = None  # it may say that it holds what a step that failed has not read
            raise
        finally:
            for request in running:
                engine.cancel(request)

    def _engine_for(self, asked: list[tuple[np.ndarray, list[str], Sampling]]) -> Engine:
        from models.generate import Engine, slots_that_fit

        model = self.trained.model
        longest = max(len(prompt) + sampling.max_new_tokens for prompt, _, sampling in asked)
        # as many in the last turn as in the others, were all of one length
        turns = -(-len(asked) // _MOST_TEXTS)
        wanted = self.slots or -(-len(asked) // turns)
        if self._engine is None or self._engine.length < longest - 1 or self._wanted < wanted:
            self._engine = None  # its memory is free before the next one's is asked for
            length = min(-(-longest // 128) * 128, self.max_length)
            slots = self.slots or slots_that_fit(model, length, on_cuda=wanted, on_cpu=min(wanted, 32))
            self._engine, self._wanted = Engine(model, slots=slots, length=length), wanted
        return self._engine


class _Decoder:
    """Tokens to text as the harness has it: special tokens are left out, but may be stop strings."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        backend = tokenizer.backend
        special = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.decode = backend.decode
        self.written = [
            special[i].encode() if i in special else tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)
        ]
        self._with_one_of: dict[frozenset[int], frozenset[int]] = {}

    def with_one_of(self, values: frozenset[int]) -> frozenset[int]:
        """The tokens that contain one of some bytes."""
        if values not in self._with_one_of:
            found = (i for i, text in enumerate(self.written) if not values.isdisjoint(text))
            self._with_one_of[values] = frozenset(found)
        return self._with_one_of[values]


class _Text:
    """A text that grows by tokens until it contains one of some strings."""

    def __init__(self, decoder: _Decoder, until: Sequence[str]) -> None:
        self.decoder = decoder
        self.until = [string for string in until if string]
        self.tokens: list[int] = []
        self._ends = [string.encode() for string in self.until]
        self._longest = max(map(len, self._ends), default=0)
        self._may_end = decoder.with_one_of(frozenset(end[-1] for end in self._ends))

    def add(self, token: int) -> bool:
        """Whether the text contains one of the strings now."""
        self.tokens.append(token)
        # most tokens lack a string's last byte, and most others do not make its bytes: both are quick to see
        if token not in self._may_end:
            return False
        written, last = self.decoder.written, self.tokens[-self._longest - 4 :]
        tail = b"".join(written[i] for i in last if i < len(written))  # the embedding may have more rows than tokens
        if not any(end in tail for end in self._ends):
            return False
        text = self.decoder.decode(last, skip_special_tokens=False)
        return any(string in text for string in self.until)

    def cut(self) -> str:
        """The text before the strings."""
        text = self.decoder.decode(self.tokens, skip_special_tokens=True)
        for string in self.until:
            text = text.split(string)[0]
        return text
