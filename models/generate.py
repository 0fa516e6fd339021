"""Text from a model: many prompts at once by continuous batching (Yu et al. 2022), each with its own sampling."""

import os
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.decoder import Decoder, to_device
from models.transformer import Transformer

# tokens of prompts that are read in one pass, padding included: enough to keep a device busy
_TOGETHER = {"cuda": 16384, "cpu": 1024}
# a shorter common beginning is read again rather than copied; on a GPU also one that is less than this share of a
# prompt, as attention to what was read before is slower there than that of whole prompts
_SHORTEST_PREFIX = 16
_LEAST_SHARE = {"cuda": 1 / 3, "cpu": 0.0}
# steps that a device is given before the tokens of the one before them are looked at
_AHEAD = {"cuda": 1, "cpu": 0}


@dataclass(frozen=True)
class Sampling:
    """How a text is continued."""

    max_new_tokens: int
    """At most this many tokens are generated."""
    temperature: float = 0.0
    """Divides the logits; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus of the distribution to draw from, in (0, 1]."""
    seed: int = 0
    """Of the draws."""
    stop: frozenset[int] = frozenset()
    """Ids that end the text."""
    top: int = 0
    """Likeliest ids that are told beside each token."""


class Token(NamedTuple):
    """The next token of a request.

    Attributes:
        request: number of the request.
        token: its id; None for one that ends the text.
        log_probability: of the token given those before it; temperature and nucleus play no part in it.
        finished: "stop" after an id that ends the text, "length" with the last of max_new_tokens, else None.
        top: as many of the likeliest ids in its place as were asked for, and their log-probabilities.
    """

    request: int
    token: int | None
    log_probability: float
    finished: Literal["stop", "length"] | None = None
    top: tuple[tuple[int, float], ...] = ()


class _Request:
    """A text that is being continued."""

    def __init__(self, number: int, prompt: np.ndarray, sampling: Sampling):
        self.number, self.prompt, self.sampling = number, prompt, sampling
        self.row = -1  # in the cache
        self.asked = self.generated = 0  # tokens asked of the model, and those that came
        self.ended = False
        self.draws = random.Random(sampling.seed)


class _Answer(NamedTuple):
    """The next token of some texts, on its way from the device.

    Attributes:
        requests: whose tokens these are.
        places: of each in the numbers.
        numbers: ids and log-probabilities, (2, n), fp64.
        top: the likeliest ids and their log-probabilities, (2, n, count), fp64, where they were asked for.
        arrived: when the numbers are there; None is at once.
    """

    requests: list[_Request]
    places: list[int]
    numbers: Tensor
    top: Tensor | None
    arrived: torch.cuda.Event | None


class Engine:
    """Continues many texts at once; they come and go at any time (continuous batching).

    A text's tokens do not depend on the others, beyond the rounding of matrix products of another size. Keys and values
    of texts stay until their place is needed; a prompt that begins as one of them is only read from where it differs.

    Args:
        model: on any device, not sharded, in evaluation mode.
        slots: texts that are continued at the same time; more wait.
        length: tokens there is room for in each, prompt and continuation; None is the model's max_seq_len. Memory is
            slots · length · 2 · n_layers · n_kv_heads · head_dim numbers, taken at once.
        vocab_size: only ids below this are chosen: the tokenizer's, when the embedding has more rows; None is all.
        compiled: compile a step and record it as a CUDA graph, which takes some ten seconds; None does so on CUDA.

    Raises:
        ValueError: slots or length are out of range, or compiled is True without CUDA.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        slots: int = 32,
        length: int | None = None,
        vocab_size: int | None = None,
        compiled: bool | None = None,
    ):
        longest = model.config.max_seq_len
        length = longest if length is None else length
        if slots < 1:
            raise ValueError(f"slots is {slots}, but must be at least 1")
        if not 1 <= length <= longest:
            raise ValueError(f"length is {length}, but must be from 1 to the model's max_seq_len {longest}")
        on_cuda = model.tok_embeddings.weight.is_cuda
        if compiled and not on_cuda:
            raise ValueError("compiled is True, but can be so on CUDA alone")
        self.slots, self.length = slots, length
        self._decoder = Decoder(model, slots, length, vocab_size, on_cuda if compiled is None else compiled)
        device = "cuda" if on_cuda else "cpu"
        self._together, self._least_share, self._ahead = _TOGETHER[device], _LEAST_SHARE[device], _AHEAD[device]
        self._answers: deque[_Answer] = deque()
        self._waiting: deque[_Request] = deque()
        self._active: list[_Request] = []  # in the order of their rows in the cache
        # tokens whose keys and values a row holds; also after its text has ended, for prompts that begin alike
        self._held = np.zeros((slots, length), np.int32)
        self._lengths = np.zeros(slots, np.int64)
        self._number = 0

    @property
    def busy(self) -> bool:
        """Whether there is a text that has not ended."""
        return bool(self._active or self._waiting)

    @property
    def active(self) -> int:
        """Texts that are being continued."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Texts that wait for a slot."""
        return len(self._waiting)

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """Have a text continued; returns the number under which its tokens come.

        Raises:
            ValueError: the prompt is empty, a setting is out of range, or prompt and continuation are too long.
        """
        _check(len(prompt), sampling, self.length)
        self._number += 1
        self._waiting.append(_Request(self._number, np.asarray(prompt, np.int32), sampling))
        return self._number

    def cancel(self, request: int) -> None:
        """Give a text up, such as one that contains a stop string; nothing happens when it has ended."""
        self._waiting = deque(r for r in self._waiting if r.number != request)
        self._remove([row for row, r in enumerate(self._active) if r.number == request])

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Read prompts where there are free slots, and have one more token made of each text.

        On a GPU the tokens that come are those that the call before asked for. While texts are under way, prompts are
        read in one pass at most, so that they do not wait long.
        """
        others_wait = bool(self._active)
        while group := self._admitted():
            self._read(*group)
            if others_wait:
                break
        ahead = self._ahead if self._advance() else 0
        tokens: list[Token] = []
        while len(self._answers) > ahead:
            tokens += self._come(self._answers.popleft())
        return tokens

    def _advance(self) -> bool:
        """Ask for the next token of each text that lacks one, which reads its last; False where none does."""
        rows = len(self._active)
        running = np.array([r.asked < r.sampling.max_new_tokens for r in self._active], bool)
        if not running.any():
            return False
        results = self._decoder.step(self._lengths[:rows], running)
        self._lengths[:rows] += running
        places = np.flatnonzero(running).tolist()
        self._ask([self._active[i] for i in places], places, 0, *results)
        return True

    def _admitted(self) -> tuple[list[_Request], list[int], list[int]] | None:
        """Texts to read together: with the row that each one's beginning is in, and the length of that beginning."""
        row = len(self._active)
        free = self.slots - row
        # with a queue, a few slots at a time: reading few tokens takes as long as reading some more
        if not self._waiting or not free or (row and len(self._waiting) > free and free < self.slots // 8):
            return None
        group: list[_Request] = []
        sources: list[int] = []
        starts: list[int] = []
        total = longest = 0
        while self._waiting and len(group) < free:
            request = self._waiting[0]
            shared = self._shared(request.prompt[:-1])
            fresh = shared[row : row + len(group)].copy()
            shared[row : row + len(group)] = 0
            source = int(shared.argmax())
            least = max(_SHORTEST_PREFIX, self._least_share * len(request.prompt))
            start = int(shared[source]) if shared[source] >= least else 0
            if group and fresh.max() >= max(start + _SHORTEST_PREFIX, least):
                break  # one of this group has the longer beginning: read that first
            size = len(request.prompt) - start
            padded = max(longest, size) * (len(group) + 1)
            if group and (padded > self._together or padded > 1.5 * (total + size) + 256):
                break
            self._waiting.popleft()
            total, longest = total + size, max(longest, size)
            own = row + len(group)
            sources.append(source if start else own)
            starts.append(start)
            group.append(request)
            self._held[own, : len(request.prompt)] = request.prompt
            self._lengths[own] = len(request.prompt)
        return group, sources, starts

    def _shared(self, prompt: np.ndarray) -> np.ndarray:
        """How many tokens at its beginning a prompt shares with each row; 0 where too few to be of use."""
        shared = np.zeros(self.slots, np.int64)
        begin = prompt[:_SHORTEST_PREFIX]
        alike = np.flatnonzero((self._held[:, : len(begin)] == begin).all(axis=1))
        if len(begin) == _SHORTEST_PREFIX and len(alike):
            differs = self._held[alike, : len(prompt)] != prompt
            first = np.where(differs.any(axis=1), differs.argmax(axis=1), len(prompt))
            shared[alike] = np.minimum(first, self._lengths[alike])
        return shared

    def _read(self, group: list[_Request], sources: list[int], starts: list[int]) -> None:
        """Fill the next rows with prompts, and ask for the token that follows each."""
        row = len(self._active)
        if any(source != row + i for i, source in enumerate(sources)):
            self._decoder.copy(sources, row, max(starts))
        fresh = [r.prompt[start:] for r, start in zip(group, starts, strict=True)]
        results = self._decoder.prompt(fresh, row, starts)
        for i, request in enumerate(group):
            request.row = row + i
        self._active += group
        self._ask(group, list(range(len(group))), row, *results)

    def _ask(
        self, requests: list[_Request], places: list[int], row: int, logits: Tensor, best: Tensor, normalizers: Tensor
    ) -> None:
        """Choose a token for each text, which its row reads next; those of `places` in these results are wanted.

        Args:
            requests: whose tokens are wanted.
            places: of each in the results.
            row: of the first result.
            logits: (n, vocab).
            best: the likeliest id, (n,).
            normalizers: logarithm of the sum of the logits' exponentials, (n,).
        """
        device = logits.device
        drawn = [(i, r) for i, r in zip(places, requests, strict=True) if r.sampling.temperature > 0]
        if drawn:
            settings = [(r.sampling.temperature, r.sampling.top_p, r.draws.random()) for _, r in drawn]
            where = to_device(np.array([i for i, _ in drawn]), device)
            chosen = choose(logits[where], *to_device(np.array(settings, np.float32).T.copy(), device))
            best = best.index_copy(0, where, chosen)
        self._decoder.last[row : row + len(best)] = best
        log_probabilities = logits.gather(1, best[:, None])[:, 0].float() - normalizers
        numbers, top = torch.stack([best.double(), log_probabilities.double()]), None
        if most := max(r.sampling.top for r in requests):
            values, ids = logits.float().topk(most)
            top = torch.stack([ids.double(), (values - normalizers[:, None]).double()])
        for request in requests:
            request.asked += 1
        arrived = None
        if device.type == "cuda":
            numbers, top = (None if t is None else t.to("cpu", non_blocking=True) for t in (numbers, top))
            arrived = torch.cuda.Event()
            arrived.record()
        self._answers.append(_Answer(requests, places, numbers, top, arrived))

    def _come(self, answer: _Answer) -> list[Token]:
        """The tokens of an answer; texts that end with them are let go of."""
        if answer.arrived is not None:
            answer.arrived.synchronize()
        ids, values = answer.numbers.tolist()
        top = None if answer.top is None else answer.top.tolist()
        tokens, ended = [], []
        for request, i in zip(answer.requests, answer.places, strict=True):
            if request.ended:  # by the token before this one, or given up
                continue
            token, sampling, finished = int(ids[i]), request.sampling, None
            place = len(request.prompt) + request.generated
            if place < self.length:
                self._held[request.row, place] = token
            request.generated += 1
            if token in sampling.stop:
                finished = "stop"
            elif request.generated == sampling.max_new_tokens:
                finished = "length"
            told = ()
            if top and sampling.top:
                told = tuple(zip(map(int, top[0][i]), top[1][i], strict=True))[: sampling.top]
            tokens.append(Token(request.number, None if finished == "stop" else token, values[i], finished, told))
            if finished:
                ended.append(request.row)
        self._remove(ended)
        return tokens

    def _remove(self, rows: list[int]) -> None:
        """Free rows; the last active ones move there, so that the active are the first."""
        for row in sorted(rows, reverse=True):
            self._active[row].ended = True
            last = self._active.pop()
            end = len(self._active)
            if row < end:
                length = int(self._lengths[end])
                self._decoder.copy([end], row, length)
                self._decoder.last[row : row + 1] = self._decoder.last[end : end + 1]
                self._active[row], last.row = last, row
                self._held[row], self._lengths[row] = self._held[end], length
                # a token that is still to come will be noted in the new row alone
                self._lengths[end] = min(length, len(last.prompt) + last.generated)


def slots_that_fit(model: Transformer, length: int, *, on_cuda: int = 128, on_cpu: int = 16) -> int:
    """How many texts of `length` tokens to continue at once: as a quarter of the machine's memory holds, or on a GPU
    half of what is free, more where that leaves 16 GiB for prompts that are read.

    Args:
        model: where it is going to be used.
        length: of the longest text with its continuation.
        on_cuda: no more than this on a GPU.
        on_cpu: no more than this on the CPU; many gain little there, as a core is busy with few.
    """
    device = model.tok_embeddings.weight.device
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what earlier work took and let go of
        free = torch.cuda.mem_get_info(device)[0]
        if model.compute_dtype not in (None, model.tok_embeddings.weight.dtype):  # the decoder's matrices are copies
            free -= model.config.n_params() * model.compute_dtype.itemsize
        most, room = on_cuda, max(free // 2, free - 2**34)
    else:
        most, room = on_cpu, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    config, dtype = model.config, model.compute_dtype or model.tok_embeddings.weight.dtype
    text = 2 * config.n_layers * config.n_kv_heads * config.head_dim * length * dtype.itemsize
    return max(1, min(most, room // text))


def choose(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """A token id for each row of logits.

    The draw is from the smallest set of likeliest tokens whose probabilities sum to `top_p` or more (nucleus sampling,
    Holtzman et al. 2020), by inversion: a number makes one token, whoever shares the batch and wherever it is computed.

    Args:
        logits: (rows, vocab).
        temperature: divides them, above 0, (rows,).
        top_p: in (0, 1], (rows,).
        uniform: in [0, 1), (rows,).
    """
    # one that is all but 0 would make infinities of logits, and NaN of their softmax
    scaled = logits.float() / temperature.clamp(min=1e-6)[:, None]
    probabilities, tokens = torch.softmax(scaled, dim=-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill((before >= top_p[:, None]) & (before > 0), 0.0)
    reached = probabilities.cumsum(-1)
    index = (reached <= uniform[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
    # rounding may not lead to one outside the nucleus
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return tokens.gather(1, index.minimum(last))[:, 0]


def generate(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: set[int] | frozenset[int] = frozenset(),
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Continue one prompt, yielding each token id as soon as it is known.

    Args:
        model: on any device, not sharded.
        prompt: token ids; at least one.
        max_new_tokens: at most this many are generated.
        temperature: divides the logits; 0 is greedy.
        top_p: nucleus of the distribution to draw from, in (0, 1].
        seed: of the draws.
        stop: ids that end the text; the one that does is not yielded.
        vocab_size: only ids below this are drawn: the tokenizer's, when the embedding has more rows; None is all.

    Raises:
        ValueError: at the call, for an empty prompt, settings out of range, or a text longer than max_seq_len.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, frozenset(stop))
    _check(len(prompt), sampling, model.config.max_seq_len)
    return _generate(model, prompt, sampling, vocab_size)


def _generate(model: Transformer, prompt: Sequence[int], sampling: Sampling, vocab_size: int | None) -> Iterator[int]:
    length = len(prompt) + sampling.max_new_tokens - 1
    engine = Engine(model, slots=1, length=length, vocab_size=vocab_size, compiled=False)
    engine.submit(prompt, sampling)
    while engine.busy:
        yield from (token.token for token in engine.step() if token.token is not None)


def _check(prompt: int, sampling: Sampling, longest: int) -> None:
    new = sampling.max_new_tokens
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token, such as <|endoftext|>")
    if new < 1:
        raise ValueError(f"max_new_tokens is {new}, but must be at least 1")
    if sampling.temperature < 0:
        raise ValueError(f"temperature is {sampling.temperature}, but must be at least 0")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}, but must be above 0 and at most 1")
    if prompt + new - 1 > longest:  # the last token is not fed back
        raise ValueError(
            f"max_new_tokens is {new}, but after a prompt of {prompt} tokens must be at most "
            f"{max(0, longest + 1 - prompt)}: the model's max_seq_len is {longest}"
        )
