"""OpenAI's completions over HTTP: reads requests, answers them with a model, says errors in its form.

https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from jobs.serve_engine import Asking, Batcher, prompt_scores
from jobs.serve_text import Piece, Scored, Text, token_text
from models.generate import Sampling

if TYPE_CHECKING:
    from jobs.trained import Trained

_MOST_TOP = 5  # alternatives that are told of a token, as with OpenAI
_MOST_STOPS = 4
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
_PAGE_POLICY += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class ApiError(Exception):
    """What a client gets instead of an answer."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def response(self) -> Response:
        """In OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else _INVALID
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(self.status)
        return JSONResponse({"error": error}, self.status, headers)


_INVALID = "invalid_request_error"


@dataclass(frozen=True)
class Limits:
    """What one server takes.

    Attributes:
        max_tokens: that a request may ask for in each text.
        max_texts: prompts times n of a request.
        max_waiting: texts that may wait for a slot; more are refused with 429.
        max_bytes: of a request.
    """

    max_tokens: int
    max_texts: int
    max_waiting: int
    max_bytes: int


@dataclass(frozen=True)
class Completion:
    """A request for completions, checked."""

    prompts: list[str | list[int]]
    max_tokens: int
    temperature: float
    top_p: float
    n: int
    stop: tuple[str, ...]
    seed: int | None
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool


def read_completion(body: bytes, model: str, limits: Limits) -> Completion:
    """A request's body.

    Raises:
        ApiError: it is none, or asks for what there is not.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no JSON") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is no JSON object")
    if fields.get("model", model) != model:
        said = f"the model {fields['model']!r} does not exist here; this is {model!r}"
        raise ApiError(404, said, param="model", code="model_not_found")
    for name, neutral in (("suffix", ""), ("logit_bias", {}), ("presence_penalty", 0), ("frequency_penalty", 0)):
        if fields.get(name) not in (None, neutral):
            raise ApiError(400, f"{name} is not supported", param=name)
    n = _number(fields, "n", int, 1, 1, limits.max_texts)
    if fields.get("best_of") not in (None, n):
        raise ApiError(400, "best_of is not supported beside n", param="best_of")
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options has to be an object", param="stream_options")
    echo = _switch(fields, "echo")
    prompts = _prompts(fields.get("prompt"))
    if len(prompts) * n > limits.max_texts:
        raise ApiError(400, f"prompts times n may be {limits.max_texts} at most", param="prompt")
    return Completion(
        prompts=prompts,
        max_tokens=_number(fields, "max_tokens", int, min(16, limits.max_tokens), 0 if echo else 1, limits.max_tokens),
        temperature=_number(fields, "temperature", float, 1.0, 0.0, 2.0),
        top_p=_number(fields, "top_p", float, 1.0, 0.0, 1.0),
        n=n,
        stop=_stops(fields.get("stop")),
        seed=_number(fields, "seed", int, None, -(2**63), 2**63 - 1),
        logprobs=_number(fields, "logprobs", int, None, 0, _MOST_TOP),
        echo=echo,
        stream=_switch(fields, "stream"),
        include_usage=_switch(options, "include_usage"),
    )


def _number(fields: dict[str, Any], name: str, kind: type, default: Any, low: float, high: float) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    fits = isinstance(value, kind | int) and not isinstance(value, bool) and low <= value <= high
    if not fits:
        what = "a whole number" if kind is int else "a number"
        raise ApiError(400, f"{name} is {value!r}, but has to be {what} from {low} to {high}", param=name)
    return kind(value)


def _switch(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value not in (None, True, False):
        raise ApiError(400, f"{name} is {value!r}, but has to be true or false", param=name)
    return bool(value)


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ApiError(400, f"stop has to be a string, or a list of up to {_MOST_STOPS}", param="stop")
    return tuple(stops)


def _prompts(prompt: Any) -> list[str | list[int]]:
    """A text, texts, token ids, or lists of them: always as a list of prompts."""
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) and _is_text(item) for item in prompt):
            return prompt
        lists = prompt if isinstance(prompt[0], list) else [prompt]
        if all(isinstance(ids, list) and ids and all(type(i) is int for i in ids) for ids in lists):
            return lists
    raise ApiError(400, "prompt has to be a string, token ids, or a list of either", param="prompt")


def _is_text(text: str) -> bool:
    """Whether it has no half of a surrogate pair, which JSON can say."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Api:
    """Answers requests with one model.

    Args:
        trained: the model and its tokenizer.
        batcher: with an engine of that model.
        key_hash: SHA-256 of the key that clients have to show.
        limits: of requests.
    """

    def __init__(self, trained: Trained, batcher: Batcher, key_hash: bytes, limits: Limits):
        self.trained, self.batcher, self.key_hash, self.limits = trained, batcher, key_hash, limits
        self.created = int(time.time())
        with open(os.path.join(os.path.dirname(__file__), "serve_page.html"), encoding="utf-8") as file:
            self.page = file.read()

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        try:
            return await self._routed(request)
        except ApiError as error:
            return error.response()
        except RuntimeError as error:
            return ApiError(500, str(error)).response()

    async def _routed(self, request: Request) -> Response:
        path, method = request.url.path, request.method
        if path == "/" and method == "GET":
            return HTMLResponse(self.page, headers={"Content-Security-Policy": _PAGE_POLICY})
        if path == "/health" and method == "GET":
            failed = self.batcher.failure is not None
            engine = self.batcher.engine
            load = {"active": engine.active, "waiting": engine.waiting, "slots": engine.slots}
            return JSONResponse({"status": "failed" if failed else "ok", **load}, 503 if failed else 200)
        if not path.startswith("/v1/"):
            raise ApiError(404, f"there is nothing at {path}")
        self._authorize(request.headers.get("authorization", ""))
        model = {"id": self.trained.name, "object": "model", "created": self.created, "owned_by": "ingot"}
        model["max_model_len"] = self.batcher.engine.length
        if path == "/v1/models" and method == "GET":
            return JSONResponse({"object": "list", "data": [model]})
        if path == f"/v1/models/{self.trained.name}" and method == "GET":
            return JSONResponse(model)
        if path != "/v1/completions":
            raise ApiError(404, f"there is nothing at {path}")
        if method != "POST":
            raise ApiError(405, f"{path} takes POST")
        return await self._complete(read_completion(await self._body(request), self.trained.name, self.limits))

    def _authorize(self, header: str) -> None:
        kind, _, key = header.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        if kind.lower() != "bearer" or not hmac.compare_digest(digest, self.key_hash):
            raise ApiError(401, "give this server's key as `Authorization: Bearer KEY`", code="invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.limits.max_bytes:
                raise ApiError(413, f"a request may have {self.limits.max_bytes} bytes at most")
        return bytes(body)

    async def _complete(self, asked: Completion) -> Response:
        texts = self._texts(asked)
        if self.batcher.open + len(texts) > self.batcher.engine.slots + self.limits.max_waiting:
            raise ApiError(429, "too many requests wait here already; try again later", code="rate_limit_exceeded")
        answer = _Answer(self, asked, texts)
        if not asked.stream:
            return JSONResponse(await answer.whole())
        if self.batcher.failure is not None:
            raise ApiError(500, "the model failed")
        return StreamingResponse(answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    def token_name(self, token: int) -> str:
        """How a token is told: its text, and where that is none, as of special ones, its name."""
        data = self.trained.tokenizer.token_bytes(token)
        return token_text(data) if data else self.trained.tokenizer.backend.id_to_token(token) or ""

    def _texts(self, asked: Completion) -> list[tuple[list[int], Sampling, str]]:
        """Token ids of each choice's prompt, how it is continued, and the prompt as text."""
        tokenizer = self.trained.tokenizer
        length = self.batcher.engine.length
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        texts = []
        for prompt in asked.prompts:
            # a text as `ingot generate` begins it, ids as they are
            ids = [tokenizer.bos_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
            if not all(0 <= token < tokenizer.vocab_size for token in ids):
                raise ApiError(400, f"token ids have to be from 0 to {tokenizer.vocab_size - 1}", param="prompt")
            if len(ids) + max(0, asked.max_tokens - 1) > length:  # the last token is not fed back
                said = (
                    f"the prompt has {len(ids)} tokens, with max_tokens {asked.max_tokens} that is more than {length}"
                )
                raise ApiError(400, said, param="max_tokens", code="context_length_exceeded")
            text = prompt if isinstance(prompt, str) else tokenizer_text(self.trained, prompt)
            for _ in range(asked.n):
                sampling = Sampling(
                    max_new_tokens=max(1, asked.max_tokens),
                    temperature=asked.temperature,
                    # an empty nucleus is the likeliest token alone
                    top_p=max(asked.top_p, 1e-9),
                    seed=seed + len(texts),
                    stop=self.trained.ends,
                    top=asked.logprobs or 0,
                )
                texts.append((ids, sampling, text))
        return texts


def tokenizer_text(trained: Trained, tokens: Sequence[int]) -> str:
    """The text of token ids; special ones have none."""
    return b"".join(map(trained.tokenizer.token_bytes, tokens)).decode("utf-8", "replace")


class _Answer:
    """The answer to one request."""

    def __init__(self, api: Api, asked: Completion, texts: list[tuple[list[int], Sampling, str]]):
        self.api, self.asked, self.texts = api, asked, texts
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        token_bytes = api.trained.tokenizer.token_bytes
        end = api.trained.tokenizer.eot_id
        self.choices = [
            Text(token_bytes, api.token_name, asked.stop, len(text) if asked.echo else 0, end) for _, _, text in texts
        ]
        self.generated = 0

    async def pieces(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """What came to which choice, as it comes; the prompts first when they are asked for."""
        if self.asked.echo:
            n = self.asked.n  # choices of a prompt follow each other
            with self.api.batcher.opened(len(self.texts)):  # scoring prompts is work too
                prompts = [await self._prompt(index) for index in range(0, len(self.texts), n)]
                yield [(index, prompts[index // n]) for index in range(len(self.texts))]
            if self.asked.max_tokens == 0:
                return
        left = len(self.texts)
        asked = [(ids, sampling) for ids, sampling, _ in self.texts]
        async with self.api.batcher.ask(asked) as asking, contextlib.aclosing(asking.tokens()) as batches:
            async for batch in batches:
                done = self._continued(batch, asking)
                left -= sum(piece.finish_reason is not None for _, piece in done)
                yield done
                if not left:
                    return

    def _continued(self, batch: list[tuple[int, Any]], asking: Asking) -> list[tuple[int, Piece]]:
        pieces = []
        for index, token in batch:
            text = self.choices[index]
            if text.finish_reason:
                continue  # tokens that were on their way when it ended
            self.generated += token.token is not None
            piece = text.add(token.token, token.log_probability, token.top, token.finished)
            if piece.finish_reason and not token.finished:
                self.api.batcher.cancel(asking, index)
            pieces.append((index, piece))
        return pieces

    async def _prompt(self, index: int) -> Piece:
        ids, _, text = self.texts[index]
        if self.asked.logprobs is None:
            return Piece(text, [], "length" if self.asked.max_tokens == 0 else None)
        trained, top, name = self.api.trained, self.asked.logprobs, self.api.token_name
        token_bytes, vocab_size = trained.tokenizer.token_bytes, trained.tokenizer.vocab_size
        scores = await self.api.batcher.call(lambda: prompt_scores(trained.model, ids, max(top, 1), vocab_size))
        # what a text begins with is not a part of it
        of_text = isinstance(self.asked.prompts[index // self.asked.n], str)
        first: list[tuple[int, tuple[Any, Any]]] = [] if of_text else [(ids[0], (None, None))]
        # as the text is decoded: characters count when they are whole
        decoder, offset = codecs.getincrementaldecoder("utf-8")("replace"), 0
        tokens = []
        for token, (log_probability, others) in [*first, *zip(ids[1:], scores, strict=True)]:
            alternatives = None if others is None else {name(i): value for i, value in others}
            tokens.append(Scored(name(token), log_probability, alternatives, offset))
            offset += len(decoder.decode(token_bytes(token)))
        return Piece(text, tokens, "length" if self.asked.max_tokens == 0 else None)

    async def whole(self) -> dict[str, Any]:
        """All of it at once."""
        parts: list[list[Piece]] = [[] for _ in self.texts]
        async with contextlib.aclosing(self.pieces()) as batches:
            async for batch in batches:
                for index, piece in batch:
                    parts[index].append(piece)
        choices = [self._choice(index, pieces) for index, pieces in enumerate(parts)]
        return {**self._head(), "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """As server-sent events."""
        usage = {"usage": None} if self.asked.include_usage else {}
        try:
            async with contextlib.aclosing(self.pieces()) as batches:
                async for batch in batches:
                    together: dict[int, list[Piece]] = {}
                    for index, piece in batch:
                        together.setdefault(index, []).append(piece)
                    for index, pieces in together.items():
                        if any(piece.text or piece.tokens or piece.finish_reason for piece in pieces):
                            yield _event({**self._head(), "choices": [self._choice(index, pieces)], **usage})
            if self.asked.include_usage:
                yield _event({**self._head(), "choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except RuntimeError as error:
            yield _event(json.loads(ApiError(500, str(error)).response().body))

    def _choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        logprobs = self._logprobs([token for piece in pieces for token in piece.tokens])
        reason = pieces[-1].finish_reason if pieces else None
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: list[Scored]) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.log_probability for token in tokens],
            "top_logprobs": [token.top for token in tokens] if self.asked.logprobs else None,
            "text_offset": [token.offset for token in tokens],
        }

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.api.trained.name,
        }

    def _usage(self) -> dict[str, int]:
        prompts = sum(len(ids) for ids, _, _ in self.texts[:: self.asked.n])
        return {
            "prompt_tokens": prompts,
            "completion_tokens": self.generated,
            "total_tokens": prompts + self.generated,
        }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
