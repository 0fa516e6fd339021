"""Text from tokens as they come: whole characters only, up to a stop string, with what is told about each token."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Scored:
    r"""A token and what the model held of it.

    Attributes:
        text: as OpenAI writes it: `bytes:\xe2\x82` where it is a part of a character.
        log_probability: given what is before it; None of the first.
        top: the likeliest tokens there and their log-probabilities, this one among them; None of the first.
        offset: characters before it.
    """

    text: str
    log_probability: float | None
    top: dict[str, float] | None
    offset: int


@dataclass(frozen=True)
class Piece:
    """What came to a text: characters, and the tokens that they are of."""

    text: str
    tokens: list[Scored]
    finish_reason: Literal["stop", "length"] | None = None


class Text:
    """One continuation.

    Args:
        token_bytes: of a token's id; half characters are kept until the other half comes.
        name: of a token's id, how it is told.
        stop: strings that end the text, and are not a part of it.
        offset: characters before the continuation.
        end: the token that ends a text; told, though it has no characters.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        name: Callable[[int], str],
        stop: Sequence[str] = (),
        offset: int = 0,
        end: int | None = None,
    ):
        self._name, self._end = name, end
        self._token_bytes, self._stop = token_bytes, [text for text in stop if text]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # could be the beginning of a stop string
        self._given = offset  # characters
        self._tokens: list[Scored] = []  # not given yet
        self.finish_reason: Literal["stop", "length"] | None = None

    def add(
        self,
        token: int | None,
        log_probability: float = 0.0,
        top: Sequence[tuple[int, float]] = (),
        finished: Literal["stop", "length"] | None = None,
    ) -> Piece:
        """What can be given out after one more token, or with None after the end; sets ``finish_reason``."""
        told = self._end if token is None else token
        if told is not None:
            alternatives = {self._name(other): value for other, value in top}
            alternatives.setdefault(self._name(told), log_probability)
            offset = self._given + len(self._held)
            self._tokens.append(Scored(self._name(told), log_probability, alternatives, offset))
        if token is not None:
            self._held += self._decoder.decode(self._token_bytes(token))
        if finished:
            self._held += self._decoder.decode(b"", final=True)
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            finished, self._held = "stop", self._held[: min(found)]
        keep = 0 if finished else self._may_begin_stop()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._given += len(text)
        self.finish_reason = finished
        # a token belongs to the text where its first character does; the one that ends a text comes with its last
        whole = bool(finished) and not found
        ready = sum(whole or token.offset < self._given for token in self._tokens)
        tokens, self._tokens = self._tokens[:ready], self._tokens[ready:]
        return Piece(text, tokens, finished)

    def _may_begin_stop(self) -> int:
        """Characters at the end of what is held that a stop string may begin with."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


def token_text(data: bytes) -> str:
    """A token's bytes as OpenAI writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
