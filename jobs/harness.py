"""A model as lm-evaluation-harness knows one: its log-likelihoods and texts are those of the harness's own backend for
``transformers`` (``HFLM``) on the exported folder, with the same tokens, cuts and ends.

``IngotLM`` turns text into tokens and back; the model's work is that of ``Workers``, in this process or elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pipelines.pretokens import gpt4_pattern

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from jobs.trained import Trained
    from models.generate import Engine, Sampling
    from models.scoring import Request
    from pipelines.tokenizer import Tokenizer

MAX_GEN_TOKS = 256
"""Tokens of a text at most, where a task does not say; the harness's own number."""

_MOST_TEXTS = 1024  # that a GPU continues together

TextRequest = tuple[Sequence[int], Sequence[str], "Sampling"]
"""Token ids of a prompt, strings before which the text ends, and how it is made."""


class Workers(Protocol):
    """Who does the model's work. Results come as they are ready, each with the index of its request."""

    def log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Log-probability of each continuation, in nats, and whether each of its tokens is the likeliest."""
        ...

    def generate(self, requests: Sequence[TextRequest]) -> Iterator[tuple[int, str]]:
        """The text that continues each prompt, up to the first of its strings."""
        ...


class LocalWorkers:
    """The work in this process.

    Args:
        trained: the model and its tokenizer.
        tokens_per_batch: tokens that are scored together; None suits the device.
        slots: texts that are continued together at most; None suits the device's memory.
    """

    def __init__(self, trained: Trained, *, tokens_per_batch: int | None = None, slots: int | None = None) -> None:
        on_cpu = trained.device.type == "cpu"
        self.trained = trained
        self.tokens_per_batch = tokens_per_batch or (8192 if on_cpu else 65536)
        self.slots = slots
        self._decoder = _Decoder(trained.tokenizer)
        self._engine: Engine | None = None
        self._wanted = 0  # slots of it, were there memory for them

    def log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """As of ``Workers``.

        Raises:
            ValueError: a request is empty or longer than the model's context.
        """
        from models.scoring import log_likelihoods

        scores = log_likelihoods(self.trained.model, requests, tokens_per_batch=self.tokens_per_batch)
        for index, value, likeliest in scores:
            yield index, (value, likeliest)

    def generate(self, requests: Sequence[TextRequest]) -> Iterator[tuple[int, str]]:
        """As of ``Workers``.

        Raises:
            ValueError: a prompt is empty, or too long with its text for the model's context.
        """
        if not requests:
            return
        engine = self._engine_for(requests)
        # those that begin alike one after another: the engine reads a common beginning once
        # (big-endian, so that bytes sort as tokens do)
        waiting = sorted(range(len(requests)), key=lambda i: np.array(requests[i][0], ">i4").tobytes(), reverse=True)
        running: dict[int, tuple[int, _Text]] = {}
        try:
            while waiting or engine.busy:
                while waiting and engine.waiting < engine.slots:
                    index = waiting.pop()
                    prompt, until, sampling = requests[index]
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

    def _engine_for(self, requests: Sequence[TextRequest]) -> Engine:
        from models.generate import Engine, slots_that_fit

        model = self.trained.model
        longest = max(len(prompt) + sampling.max_new_tokens for prompt, _, sampling in requests)
        # as many in the last turn as in the others, were all of one length
        turns = -(-len(requests) // _MOST_TEXTS)
        wanted = self.slots or -(-len(requests) // turns)
        if self._engine is None or self._engine.length < longest - 1 or self._wanted < wanted:
            self._engine = None  # its memory is free before the next one's is asked for
            length = min(-(-longest // 128) * 128, max(longest - 1, model.config.max_seq_len))
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


class IngotLM(TemplateLM):
    """The harness's LM class over ``Workers``.

    Args:
        workers: do the model's work.
        tokenizer: of the model.
        max_length: tokens the model can read.
        eot_id: the token that ends texts; None is the tokenizer's.
        prefix_id: the token in front of a text that has no context; None is the one that begins texts.

    Attributes:
        asked: requests so far; of whole texts, their windows.
        cut: those of them that were longer than the model can read, so that their beginnings were left out.
    """

    def __init__(
        self,
        workers: Workers,
        tokenizer: Tokenizer,
        max_length: int,
        eot_id: int | None = None,
        prefix_id: int | None = None,
    ) -> None:
        super().__init__()
        self.workers = workers
        self.max_length = max_length
        self.asked = self.cut = 0
        self._eot_id = tokenizer.eot_id if eot_id is None else eot_id
        self._prefix_id = getattr(tokenizer, "bos_id", self._eot_id) if prefix_id is None else prefix_id
        self._encode = Encoder(tokenizer)
        self._prefix = self._encode.written(self._prefix_id)
        self._pair: tuple[str, np.ndarray, int, int] = ("", np.array([], np.int32), 0, 0)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._eot_id

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text that has no context."""
        return self._prefix_id

    @property
    def max_gen_toks(self) -> int:
        """Tokens of a text at most, where the task does not say."""
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart."""
        return self._encode.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens that are written out in the text are control, as in ``transformers``."""
        ids = self._of(string) if add_special_tokens is None else self._encode(string, add_special_tokens)
        return ids.tolist()

    def _of(self, text: str, start: int = 0) -> np.ndarray:
        """Token ids of a text from a cut on; the tokenizer's special ones are added to one that does not have them."""
        return self._encode(text[start:], not start and not text.startswith(self._prefix))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, given contexts."""
        texts, last = [], None
        for request in requests:
            context, continuation = _moved(*request.args)
            if context != last:
                last, end = context, self._encode.last_cut(context)
                texts += [context[:end], context[end:]]
            texts.append(context[end:] + continuation)
        self._encode.prepare(texts)
        return super().loglikelihood(requests, disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[Sequence[int], list[int]]:
        context, continuation = _moved(context, continuation)
        if context != self._pair[0]:  # choices of a question follow each other
            end = self._encode.last_cut(context)
            tokens = of_tail = self._of(context, end)
            if end:
                tokens = np.concatenate([self._of(context[:end]), of_tail])
            self._pair = context, tokens, end, len(of_tail)
        _, tokens, end, known = self._pair
        return tokens, self._of(context + continuation, end)[known:].tolist()

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, Sequence[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked: list[Request] = []
        cut: tuple[Any, int, Any] = (None, 0, None)
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, but must have 1 to {self.max_length}, the model's "
                    f"max_seq_len: {self._encode.text(continuation)[:100]!r}"
                )
            # the last token is predicted, never read
            over = len(context) + len(continuation) - self.max_length - 1
            if over > 0:
                self.cut += 1
                if context is not cut[0] or over != cut[1]:  # choices of a question go on having one context
                    cut = context, over, context[over:]
                context = cut[2]
            asked.append((context, continuation))
        self.asked += len(asked)
        results: list[Any] = [None] * len(asked)
        for index, value in self.workers.log_likelihoods(asked):
            results[index] = value
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that do not overlap in what they predict."""
        windows: list[tuple[None, list[int], list[int]]] = []
        ends = []
        for request in requests:
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self._prefix_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            ends.append(len(windows))
        values = [value for value, _ in self._loglikelihood_tokens(windows)]
        return [sum(values[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to their tasks' stop strings, or the token that ends texts.

        Raises:
            ValueError: a task asks for what is not known here, or for texts as long as the model's context.
        """
        self._encode.prepare([request.args[0] for request in requests])
        asked: list[TextRequest] = []
        seen: Counter[str] = Counter()
        for request in requests:
            text, settings = request.args
            until, sampling = self._sampling(settings)
            if sampling.temperature > 0:  # the same prompt again is another draw
                key = json.dumps([text, settings], sort_keys=True)
                sampling, seen[key] = self._sampling(settings, seen[key])[1], seen[key] + 1
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"a task asks for {sampling.max_new_tokens} new tokens, but the model's max_seq_len is "
                    f"{self.max_length}; ask for less with max_gen_toks"
                )
            prompt = self._of(text)
            self.cut += len(prompt) > room
            asked.append((prompt[-room:], until, sampling))
        self.asked += len(asked)
        results: list[Any] = [None] * len(asked)
        for index, text in self.workers.generate(asked):
            results[index] = text
        return results

    def _sampling(self, settings: dict[str, Any], seed: int = 0) -> tuple[list[str], Sampling]:
        from models.generate import Sampling

        settings = dict(settings)
        until = settings.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        if (end := self._encode.written(self._eot_id)) not in until:
            until.append(end)
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        limits = [limit for name in names if (limit := settings.pop(name, None)) is not None]
        temperature, top_p = float(settings.pop("temperature", 0.0) or 0.0), settings.pop("top_p", 1.0)
        sample = settings.pop("do_sample", None)
        if sample and temperature == 0:
            raise ValueError("a task asks for samples (do_sample) at a temperature of 0; it has to be above 0")
        for name, value in settings.items():
            if (name, value) not in (("num_beams", 1), ("top_k", 0), ("use_cache", True)):
                raise ValueError(f"a task sets {name} to {value!r}, which is not known here; leave it out")
        greedy = sample is False or temperature == 0
        return until, Sampling(
            int(limits[0]) if limits else MAX_GEN_TOKS,
            temperature=0.0 if greedy else temperature,
            top_p=1.0 if greedy else float(top_p),
            seed=seed,
            stop=frozenset([self._eot_id]),
        )


def _moved(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of a context belong to what continues it."""
    end = len(context.rstrip())
    return context[:end], context[end:] + continuation


class Encoder:
    """Text to the token ids that ``transformers`` gives, fast where texts have lines in common.

    Few-shot prompts consist of the same lines again and again; where the tokenizer cuts texts at them anyway, each is
    encoded once. It does where a line begins with a letter and the one before ends with what is no white space: no
    pre-token crosses that, and what is on one side does not change the pre-tokens of the other.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers import Tokenizer as Backend

        content = tokenizer.backend.to_str()
        self.fingerprint = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        backend = Backend.from_str(content)  # one of our own: here, special tokens in a text are control
        backend.no_padding()
        backend.no_truncation()
        plain, special = (backend.encode("a", add_special_tokens=flag).ids for flag in (False, True))
        self._backend = backend
        self._before = special[: len(special) - len(plain)]
        self.by_lines = _cuts_at_lines(json.loads(content)) and special == self._before + plain
        self._known: dict[str, list[int]] = {}
        self._examples: tuple[str, np.ndarray] = ("", np.array([], np.int32))

    def __call__(self, text: str, add_special_tokens: bool) -> np.ndarray:
        """Token ids, int32, with those that the tokenizer adds to each text when asked."""
        if not self.by_lines:
            return np.array(self._backend.encode(text, add_special_tokens=add_special_tokens).ids, np.int32)
        before = self._before if add_special_tokens else []
        examples, rest = self._parted(text)
        if not examples:
            return np.array(before + self._of_lines(rest), np.int32)
        if examples != self._examples[0]:  # questions of a subject follow each other
            self._examples = examples, np.array(self._of_lines(examples), np.int32)
        return np.concatenate([np.array(before, np.int32), self._examples[1], np.array(self._of_lines(rest), np.int32)])

    def _parted(self, text: str) -> tuple[str, str]:
        """What is before the last paragraph, up to where the tokenizer cuts, and the rest."""
        end = self.last_cut(text, text.rfind("\n\n"))
        return text[:end], text[end:]

    def _of_lines(self, text: str) -> list[int]:
        ids: list[int] = []
        for line in _CUT.split(text):
            if line not in self._known:
                self._known[line] = self._backend.encode(line, add_special_tokens=False).ids
            ids += self._known[line]
        return ids

    def prepare(self, texts: Iterable[str]) -> None:
        """Encode the lines of texts together, on all cores, for when they are asked for."""
        if not self.by_lines:
            return
        if len(self._known) > _MOST_LINES:
            self._known.clear()
        lines: set[str] = set()
        last = ""
        for text in texts:
            examples, rest = self._parted(text)
            if examples and examples != last:
                last = examples
                lines.update(_CUT.split(examples))
            lines.update(_CUT.split(rest))
        fresh = list(lines.difference(self._known))
        for start in range(0, len(fresh), _LINES_TOGETHER):
            some = fresh[start : start + _LINES_TOGETHER]
            found = self._backend.encode_batch_fast(some, add_special_tokens=False)
            self._known.update(zip(some, (one.ids for one in found), strict=True))

    def last_cut(self, text: str, before: int | None = None) -> int:
        """Where the last line, of those that begin up to there, begins that can be encoded apart; 0 is none."""
        end = text.rfind("\n", 0, before) if self.by_lines and before != -1 else -1
        while end > 0:
            if _CUT.match(text, end + 1):
                return end + 1
            end = text.rfind("\n", 0, end)
        return 0

    def written(self, token: int) -> str:
        """A token as text, special ones too."""
        return self._backend.decode([token], skip_special_tokens=False)

    def text(self, tokens: Sequence[int]) -> str:
        """Text of token ids, with special tokens."""
        return self._backend.decode(list(tokens), skip_special_tokens=False)


_MOST_LINES, _LINES_TOGETHER = 1 << 18, 1 << 14
_CUT = re.compile(r"(?<=[!-~]\n)(?=[A-Za-z])")


def _cuts_at_lines(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is of byte-level BPE behind GPT-2's or GPT-4's split, which never crosses `_CUT`."""
    if content["model"]["type"] != "BPE" or content["model"].get("dropout") or content.get("normalizer"):
        return False
    if any(
        token["lstrip"] or token["rstrip"] or token["single_word"] or "\n" in token["content"]
        for token in content["added_tokens"]
    ):
        return False
    split = content["pre_tokenizer"] or {}
    parts = split["pretokenizers"] if split.get("type") == "Sequence" else [split]
    *first, last = parts
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return False
    if not first:
        return last["use_regex"]
    known = [gpt4_pattern(digits) for digits in (1, 2, 3)]
    return (
        len(first) == 1
        and not last["use_regex"]
        and first[0].get("type") == "Split"
        and first[0]["behavior"] == "Isolated"
        and not first[0]["invert"]
        and first[0]["pattern"].get("Regex") in known
    )
