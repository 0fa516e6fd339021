"""Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): train, load, special tokens.

Every byte has a token, so any text round-trips exactly. Ids: merges follow the 256 bytes, which follow the special
tokens, so that the ids of the special tokens do not depend on the vocabulary's size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipelines import storage
from pipelines.documents import InputError
from pipelines.stage import Stage, part_uris, read_part

log = logging.getLogger("ingot")

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


@dataclass
class TokenizerSettings:
    """How the tokenizer is trained."""

    vocab_size: int = 32768
    """Number of tokens, special ones and the 256 bytes included."""
    reserved_tokens: int = 62
    """Special tokens `<|reserved_0|>` … kept free for later use, such as a chat format."""
    sample_bytes: int = 1_000_000_000
    """Bytes of text to train on, taken evenly from all parts of the corpus."""
    min_frequency: int = 2
    """A pair of tokens seen less often than this is not merged."""

    def validate(self) -> None:
        """Raise ValueError for what cannot work."""
        least = 256 + 2 + self.reserved_tokens
        if self.vocab_size < least or self.vocab_size > 2**31:
            raise ValueError(
                f"tokenizer.vocab_size is {self.vocab_size}; it has to be at least {least} "
                f"(256 bytes, 2 special and {self.reserved_tokens} reserved tokens)"
            )
        for name in ("reserved_tokens", "min_frequency"):
            if getattr(self, name) < 0:
                raise ValueError(f"tokenizer.{name} is {getattr(self, name)}; it must not be negative")
        if self.sample_bytes < 1:
            raise ValueError(f"tokenizer.sample_bytes is {self.sample_bytes}; it has to be positive")


def special_tokens(reserved: int) -> list[str]:
    """The special tokens in the order of their ids, from 0."""
    return [END_OF_TEXT, PAD, *(f"<|reserved_{i}|>" for i in range(reserved))]


class Tokenizer:
    """A trained byte-level BPE tokenizer."""

    def __init__(self, backend: Any) -> None:
        """Wrap a ``tokenizers.Tokenizer``."""
        backend.encode_special_tokens = True  # not part of tokenizer.json, so it has to be set after loading
        self.backend = backend
        self.eot_id: int = backend.token_to_id(END_OF_TEXT)
        self.pad_id: int = backend.token_to_id(PAD)

    @classmethod
    def load(cls, uri: str) -> Tokenizer:
        """Load ``tokenizer.json`` from a file or from the folder that holds it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a tokenizer, or lacks ``<|endoftext|>`` or ``<|pad|>``.
        """
        from tokenizers import Tokenizer as Backend

        path = uri if uri.endswith(".json") else storage.join(uri, "tokenizer.json")
        if not storage.exists(path):
            raise FileNotFoundError(f"{path}: no such file; run `ingot tokenizer` first")
        try:
            backend = Backend.from_str(storage.read_bytes(path).decode())
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{path}: not a tokenizer file ({error})") from None
        missing = [token for token in (END_OF_TEXT, PAD) if backend.token_to_id(token) is None]
        if missing:
            raise InputError(f"{path}: lacks the special tokens {', '.join(missing)}")
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; special tokens written out in it are text, not control."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD, special tokens stand as they are written."""
        return self.backend.decode(ids, skip_special_tokens=False)

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        from tokenizers.pre_tokenizers import ByteLevel

        # The byte-level alphabet writes each byte as one printable character: printable Latin-1 bytes as themselves,
        # the others, in order, as the characters from U+0100 on (Radford et al. 2019).
        own = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in own]
        byte_of = {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}
        if set(byte_of) != set(ByteLevel.alphabet()):
            raise RuntimeError("the tokenizers package has changed its byte-level alphabet")
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        return [
            b"" if i in special else bytes(byte_of[c] for c in self.backend.id_to_token(i))
            for i in range(self.vocab_size)
        ]

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; none for special tokens."""
        return self._token_bytes[token]

    def byte_lengths(self) -> np.ndarray:
        """Bytes that each token stands for, (vocab_size,) int64; 0 for special tokens."""
        return np.array([len(token) for token in self._token_bytes], np.int64)


def train_on_texts(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    """Train byte-level BPE with GPT-2's pre-tokenizer on an iterator of texts."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        special_tokens=special_tokens(settings.reserved_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def sample_texts(parts: list[tuple[str, int]], budget: int) -> Iterator[str]:
    """Texts of the parts ``(uri, bytes of text)`` until each has given its share of ``budget`` bytes."""
    total = sum(size for _, size in parts)
    for uri, size in parts:
        left = size if total <= budget else int(budget * size / total)
        for table in read_part(uri, rows=256, columns=["text"]):
            for text in table["text"].to_pylist():
                if left <= 0:
                    break
                yield text
                left -= len(text.encode())
            if left <= 0:
                break


def train(folder: str, corpus: str, corpus_manifest: dict[str, Any], settings: TokenizerSettings) -> dict[str, Any]:
    """Train a tokenizer on a corpus stage in a Ray task and publish it in ``folder``; skipped when it is there.

    Args:
        folder: where ``tokenizer.json`` and ``manifest.json`` go.
        corpus: folder of the corpus stage.
        corpus_manifest: its manifest.
        settings: vocabulary size, sample and special tokens.

    Returns:
        The manifest.

    Raises:
        ValueError: the corpus is empty.
    """
    settings.validate()
    stage = Stage("tokenizer", folder, settings, {"corpus": corpus_manifest["fingerprint"]})
    if manifest := stage.finished():
        log.info("tokenizer: up to date, nothing to do")
        return manifest
    if not corpus_manifest["documents_out"]:
        raise InputError(f"{corpus}: holds no document; look at its set-aside folder for the reasons")
    import ray

    parts = list(zip(part_uris(corpus, corpus_manifest), [p["bytes"] for p in corpus_manifest["parts"]], strict=True))
    stage.begin()
    log.info(
        "tokenizer: trains %d tokens on up to %.1f MB",
        settings.vocab_size,
        min(settings.sample_bytes, sum(size for _, size in parts)) / 1e6,
    )
    facts = ray.get(ray.remote(_train_task).remote(folder, parts, settings))
    log.info("tokenizer: done, %d tokens, %.2f bytes a token", facts["vocab_size"], facts["bytes_per_token"])
    return stage.publish(facts)


def _train_task(folder: str, parts: list[tuple[str, int]], settings: TokenizerSettings) -> dict[str, Any]:
    tokenizer = train_on_texts(sample_texts(parts, settings.sample_bytes), settings)
    storage.write_bytes(storage.join(folder, "tokenizer.json"), tokenizer.backend.to_str(pretty=True).encode())
    size = tokens = 0
    for text in sample_texts(parts, min(settings.sample_bytes, 2_000_000)):
        size += len(text.encode())
        tokens += len(tokenizer.encode(text))
    return {
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": size / max(tokens, 1),
        "special_tokens": special_tokens(settings.reserved_tokens),
    }
