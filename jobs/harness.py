"""A model as lm-evaluation-harness knows one: its log-likelihoods and texts are those of the harness's own backend for
``transformers`` (``HFLM``) on the exported folder, with the same tokens, cuts and ends.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lm_eval.api.model import LM

from jobs.local_workers import heap_at_rest

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from jobs.local_workers import TextRequest
    from models.generate import Sampling

MAX_GEN_TOKS = 256
"""Tokens of a text at most, where a task does not say; the harness's own number."""


class Workers(Protocol):
    """Who does the work, from text to results, which come as they are ready, each with the index of its request.

    Results of the first and the last kind end with whether the request was longer than the model can read, so that its
    beginning was left out.
    """

    def log_likelihoods(self, requests: Sequence[tuple[str, str]]) -> Iterator[tuple[int, tuple[float, bool, bool]]]:
        """Of contexts and what continues them: its log-probability, in nats, whether each of its tokens is the
        likeliest, and whether the context was cut.
        """
        ...

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> Iterator[tuple[int, float]]:
        """Log-probabilities of whole texts, in nats, in windows that do not overlap in what they predict."""
        ...

    def generate(self, requests: Sequence[TextRequest]) -> Iterator[tuple[int, tuple[str, bool]]]:
        """The text that continues each prompt, up to the first of its strings or the token that ends texts, and
        whether the prompt was cut.
        """
        ...


class IngotLM(LM):
    """The harness's LM class over ``Workers``.

    Args:
        workers: do the work.
        max_length: tokens the model can read.

    Attributes:
        asked: requests so far.
        cut: those of them that were longer than the model can read, so that their beginnings were left out.
    """

    def __init__(self, workers: Workers, max_length: int) -> None:
        super().__init__()
        self.workers = workers
        self.max_length = max_length
        self.asked = self.cut = 0

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, given contexts."""
        asked = [request.args for request in requests]
        results = self._counted(_all(self.workers.log_likelihoods(asked), len(asked)))
        return [(value, likeliest) for value, likeliest, _ in results]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts."""
        texts = [text for (text,) in (request.args for request in requests)]
        self.asked += len(texts)
        return _all(self.workers.rolling_log_likelihoods(texts), len(texts))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to their tasks' stop strings, or the token that ends texts.

        Raises:
            ValueError: a task asks for what is not known here, or for texts as long as the model's context.
        """
        asked: list[TextRequest] = []
        seen: Counter[str] = Counter()
        for request in requests:
            text, settings = request.args
            until, sampling = _sampling(settings)
            if sampling.temperature > 0:  # the same prompt again is another draw
                key = json.dumps([text, settings], sort_keys=True)
                sampling, seen[key] = _sampling(settings, seen[key])[1], seen[key] + 1
            if sampling.max_new_tokens >= self.max_length:
                raise ValueError(
                    f"a task asks for {sampling.max_new_tokens} new tokens, but the model's max_seq_len is "
                    f"{self.max_length}; ask for less with --max_gen_toks"
                )
            asked.append((text, until, sampling))
        return [text for text, _ in self._counted(_all(self.workers.generate(asked), len(asked)))]

    def _counted(self, results: list[Any]) -> list[Any]:
        self.asked += len(results)
        self.cut += sum(result[-1] for result in results)
        return results


def _all(found: Iterator[tuple[int, Any]], count: int) -> list[Any]:
    """Results in the order of the requests."""
    with heap_at_rest():
        results = dict(found)
    return [results[index] for index in range(count)]


def _sampling(settings: dict[str, Any], seed: int = 0) -> tuple[list[str], Sampling]:
    """What a task's settings for texts say: strings before which they end, and how they are made."""
    from models.generate import Sampling

    settings = dict(settings)
    until = settings.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
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
    )
