"""Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): train, load, encode, special tokens.

Every byte has a token, so any text round-trips exactly. Ids: merges follow the 256 bytes, which follow the special
tokens, so that the ids of the special tokens do not depend on the vocabulary's size. A special token written out in a
text is text; only its id is control.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import xxhash

from pipelines import storage
from pipelines.documents import InputError
from pipelines.stage import Stage, part_uris
from pipelines.word_counts import WordCounts, add_up, count_words

log = logging.getLogger("ingot")

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


@dataclass
class TokenizerSettings:
    """How the tokenizer is trained."""

    vocab_size: int = 32768
    """Number of tokens, special ones and the 256 bytes included."""
    pre_tokenizer: Literal["gpt4", "gpt2"] = "gpt4"
    """Regular expression that cuts text into the words within which tokens lie: GPT-4's (cl100k_base) or GPT-2's."""
    digits: int = 3
    """Digits of a number that can be one token at most, 1 to 3; GPT-2's pre-tokenizer has no such bound."""
    special_tokens: list[str] = field(default_factory=list)
    """Special tokens of your own, such as those of a chat format; they follow `<|endoftext|>` and `<|pad|>`."""
    reserved_tokens: int = 62
    """Special tokens `<|reserved_0|>` … kept free for later use."""
    sample_bytes: int = 1_000_000_000
    """Bytes of text to train on, about: documents from all over the corpus, chosen by a hash of their id."""
    min_frequency: int = 2
    """A pair of tokens seen less often than this is not merged."""

    def validate(self) -> None:
        """Raise ValueError for what cannot work."""
        special = self.all_special_tokens()
        least = 256 + len(special)
        if self.vocab_size < least or self.vocab_size > 2**31:
            raise ValueError(
                f"tokenizer.vocab_size is {self.vocab_size}; it has to be at least {least} "
                f"(256 bytes, {len(special) - self.reserved_tokens} special and {self.reserved_tokens} reserved tokens)"
            )
        for name in ("reserved_tokens", "min_frequency"):
            if getattr(self, name) < 0:
                raise ValueError(f"tokenizer.{name} is {getattr(self, name)}; it must not be negative")
        if self.sample_bytes < 1:
            raise ValueError(f"tokenizer.sample_bytes is {self.sample_bytes}; it has to be positive")
        if self.pre_tokenizer not in ("gpt2", "gpt4"):
            raise ValueError(f"tokenizer.pre_tokenizer is {self.pre_tokenizer!r}; it has to be gpt2 or gpt4")
        if not 1 <= self.digits <= 3:
            raise ValueError(f"tokenizer.digits is {self.digits}; it has to be 1, 2 or 3")
        if twice := sorted({token for token in special if special.count(token) > 1}):
            raise ValueError(f"tokenizer.special_tokens: {', '.join(twice)} is there twice, or taken by Ingot itself")
        # One character can be a byte's token, whose id a special token must not share.
        if short := [token for token in self.special_tokens if len(token) < 2]:
            raise ValueError(f"tokenizer.special_tokens: {short[0]!r} is too short; take two characters or more")

    def all_special_tokens(self) -> list[str]:
        """The special tokens in the order of their ids, from 0."""
        return [END_OF_TEXT, PAD, *self.special_tokens, *(f"<|reserved_{i}|>" for i in range(self.reserved_tokens))]


_OURS = (END_OF_TEXT, PAD, END_OF_TEXT)


class Tokenizer:
    """A byte-level BPE tokenizer that was trained here, or what a model in Hugging Face's format came with.

    Attributes:
        backend: the ``tokenizers.Tokenizer``.
        eot_id: the token that ends a text.
        bos_id: the token that begins one; ours begin where another ended, with the same token.
        pad_id: the token that fills batches.
        config: content of its ``tokenizer_config.json``; empty for ours, which need none.
    """

    def __init__(
        self,
        backend: Any,
        *,
        eot: str = END_OF_TEXT,
        pad: str = PAD,
        bos: str | None = None,
        split_special_tokens: bool = True,
        config: dict[str, Any] | None = None,
    ) -> None:
        """Wrap a ``tokenizers.Tokenizer``.

        Args:
            backend: it.
            eot: the token that ends a text.
            pad: the token that fills batches.
            bos: the token that begins a text; None is the one that ends it.
            split_special_tokens: take special tokens that are written out in a text for text.
            config: content of ``tokenizer_config.json``.
        """
        backend.encode_special_tokens = split_special_tokens  # not part of tokenizer.json: set after loading
        self.backend = backend
        self.eot_id: int = backend.token_to_id(eot)
        self.pad_id: int = backend.token_to_id(pad)
        self.bos_id: int = backend.token_to_id(bos or eot)
        self.config = config or {}

    @classmethod
    def load(cls, uri: str) -> Tokenizer:
        """Load a workspace's ``tokenizer.json`` from a file or from the folder that holds it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a tokenizer, or it is not known which of its tokens end texts and fill batches.
        """
        path = uri if uri.endswith(".json") else storage.join(uri, "tokenizer.json")
        backend = _read_backend(path, "; run `ingot tokenizer` first")
        missing = [token for token in (END_OF_TEXT, PAD) if backend.token_to_id(token) is None]
        # that of one that was imported says which tokens stand for these, also where it has tokens of these names
        config = storage.json_if_there(f"{path.removesuffix('tokenizer.json')}tokenizer_config.json") or {}
        names = {role: token_name(config, role) for role in ("eos_token", "pad_token", "bos_token")}
        says = all(names[role] and backend.token_to_id(names[role]) is not None for role in ("eos_token", "pad_token"))
        if missing and not says:
            raise InputError(f"{path}: lacks the special tokens {', '.join(missing)}")
        if not says or (names["eos_token"], names["pad_token"], names["bos_token"] or END_OF_TEXT) == _OURS:
            return cls(backend)
        return cls(backend, eot=names["eos_token"], pad=names["pad_token"], bos=names["bos_token"], config=config)

    @classmethod
    def of_model(cls, folder: str, eos_id: int | None = None) -> Tokenizer:
        """Load the tokenizer of a model in Hugging Face's format; it encodes as ``transformers`` does with it.

        Args:
            folder: of the model.
            eos_id: the token that ends a text where ``tokenizer_config.json`` does not say.

        Raises:
            FileNotFoundError: the folder has no ``tokenizer.json``.
            ValueError: it is not a tokenizer, or it is not known which token ends a text.
        """
        path = storage.join(folder, "tokenizer.json")
        backend = _read_backend(path, ", which is the only form of a tokenizer that can be read")
        config = storage.json_if_there(storage.join(folder, "tokenizer_config.json")) or {}
        # older models name their tokens in a file of their own
        config = (storage.json_if_there(storage.join(folder, "special_tokens_map.json")) or {}) | config
        known = {}
        for role in ("eos_token", "pad_token", "bos_token"):
            name = token_name(config, role)
            known[role] = name if name is not None and backend.token_to_id(name) is not None else None
        eot = known["eos_token"] or (None if eos_id is None else backend.id_to_token(eos_id))
        ours = [token for token in (END_OF_TEXT, PAD) if not config and backend.token_to_id(token) is not None]
        eot = eot or next(iter(ours), None)
        if eot is None:
            raise InputError(f"{folder}/tokenizer_config.json: eos_token is missing, so nothing would end a text")
        return cls(
            backend,
            eot=eot,
            pad=known["pad_token"] or ([eot, *ours])[-1],
            bos=known["bos_token"],
            split_special_tokens=bool(config.get("split_special_tokens", False)),
            config=config,
        )

    def same_as(self, other: Tokenizer) -> bool:
        """Whether both give the same ids for every text, by what decides them."""
        deciding = ("model", "normalizer", "pre_tokenizer", "added_tokens")
        mine, others = (json.loads(each.backend.to_str()) for each in (self, other))
        return all(mine[part] == others[part] for part in deciding)

    @cached_property
    def vocab_size(self) -> int:
        """Number of token ids: one more than the largest."""
        return max(self.backend.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without any that begins or ends it; special tokens written out in it are text."""
        return self.backend.encode(text, add_special_tokens=False).ids

    @cached_property
    def _bulk(self) -> Any:
        import fastokens

        try:
            return fastokens.Tokenizer.from_json_str(self.backend.to_str())
        except Exception as error:  # some tokenizers of others it does not know
            log.info("tokenizer: encodes with the tokenizers package; the faster one cannot this kind: %s", error)
            return None

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of many texts, one after another: what `encode` gives, by the fastest library that does.

        Returns:
            ids, (tokens,) uint32, and where those of each text begin, and the last one's end, (len(texts) + 1,) int64.
        """
        if self._bulk is None:
            encoded = [each.ids for each in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
            starts = np.concatenate([[0], np.cumsum([len(ids) for ids in encoded])]).astype(np.int64)
            return np.fromiter((token for ids in encoded for token in ids), np.uint32, starts[-1]), starts
        ids, starts = self._bulk.encode_batch_flat(texts, split_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.frombuffer(starts, np.uint64).astype(np.int64)

    def check_batch(self, texts: list[str]) -> None:
        """Hold `encode_batch`, the work of another library, against `encode` on some texts.

        Raises:
            RuntimeError: they differ.
        """
        ids, starts = self.encode_batch(texts)
        for i, text in enumerate(texts):
            if ids[starts[i] : starts[i + 1]].tolist() != self.encode(text):
                raise RuntimeError(
                    "the installed versions of fastokens and tokenizers give different ids for the text "
                    f"{text[:100]!r}; install others"
                )

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD, special tokens stand as they are written."""
        return self.backend.decode(ids, skip_special_tokens=False)

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        added = self.backend.get_added_tokens_decoder()
        of_token = _byte_level if _is_byte_level(self.backend) else _byte_fallback
        return [
            (b"" if added[i].special else added[i].content.encode())
            if i in added
            else of_token(self.backend.id_to_token(i) or "")
            for i in range(self.vocab_size)
        ]

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; none for special tokens."""
        return self._token_bytes[token]

    def byte_lengths(self) -> np.ndarray:
        """Bytes that each token stands for, (vocab_size,) int64; 0 for special tokens."""
        return np.array([len(token) for token in self._token_bytes], np.int64)


def _read_backend(path: str, advice: str) -> Any:
    from tokenizers import Tokenizer as Backend

    if not storage.exists(path):
        raise FileNotFoundError(f"{path}: no such file{advice}")
    try:
        return Backend.from_str(storage.read_bytes(path).decode())
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path}: not a tokenizer file ({error})") from None


def token_name(config: dict[str, Any], role: str) -> str | None:
    """A token that ``tokenizer_config.json`` gives a role, such as ``eos_token``: by its name or with its flags."""
    value = config.get(role)
    return value["content"] if isinstance(value, dict) else value


def _is_byte_level(backend: Any) -> bool:
    """Whether tokens are written in ``byte_chars``."""
    return "ByteLevel" in f"{backend.pre_tokenizer}{backend.decoder}"


def _byte_level(token: str) -> bytes:
    values = _byte_values()
    return bytes(values[char] for char in token) if values.keys() >= set(token) else token.encode()


def _byte_fallback(token: str) -> bytes:
    """Bytes of a token of SentencePiece, which writes a space as U+2581 and bytes without a token as <0x0A>."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


@functools.cache
def _byte_values() -> dict[str, int]:
    return {char: byte for byte, char in enumerate(byte_chars())}


@functools.cache
def byte_chars() -> list[str]:
    """How tokenizer.json writes each byte: as one printable character (Radford et al. 2019).

    Printable Latin-1 bytes stand for themselves, the others, in order, are the characters from U+0100 on.
    """
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in own]
    return [chr(byte) if byte in own else chr(256 + others.index(byte)) for byte in range(256)]


def train_on_texts(texts: Iterable[str], settings: TokenizerSettings) -> Tokenizer:
    """Train on texts in this process."""
    from pipelines.pretokens import count

    columns = (pa.array([text], pa.large_string()) for text in texts)
    words = add_up(count(columns, settings.pre_tokenizer, settings.digits))
    return train_on_counts(words, settings)[0]


def train_on_counts(words: pa.Table, settings: TokenizerSettings) -> tuple[Tokenizer, int]:
    """Train on words and how often each occurs.

    The tokenizer is the one that the trainer of ``tokenizers`` makes of the same text, ties included (see merges.py).

    Args:
        words: distinct pre-tokens, as `word_counts.SCHEMA`, in any order.
        settings: vocabulary size, pre-tokenizer, special tokens.

    Returns:
        The tokenizer, and the number of its tokens in the text that was counted.
    """
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    from pipelines.merges import learn_merges
    from pipelines.pretokens import pre_tokenizer, utf8

    special, chars = settings.all_special_tokens(), byte_chars()
    vocab = {token: i for i, token in enumerate([*special, *sorted(chars)])}
    byte_ids = np.array([vocab[char] for char in chars])
    data, offsets = utf8(words["word"])
    counts = words["count"].to_numpy()
    learned = learn_merges(
        data, offsets, counts, byte_ids, settings.vocab_size - len(vocab), max(settings.min_frequency, 1)
    )
    for text in learned.made:
        vocab["".join(chars[byte] for byte in text)] = len(vocab)
    written = list(vocab)
    merges = [(written[left], written[right]) for left, right, _ in learned.merges]
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizer(settings.pre_tokenizer, settings.digits)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return Tokenizer(backend), learned.tokens


def train(folder: str, corpus: str, corpus_manifest: dict[str, Any], settings: TokenizerSettings) -> dict[str, Any]:
    """Train a tokenizer on a corpus stage with Ray and publish it in ``folder``; skipped when it is there.

    Args:
        folder: where ``tokenizer.json`` and ``manifest.json`` go.
        corpus: folder of the corpus stage.
        corpus_manifest: its manifest.
        settings: vocabulary size, sample and special tokens.

    Returns:
        The manifest.

    Raises:
        ValueError: the corpus is empty, or the sample.
    """
    settings.validate()
    stage = Stage("tokenizer", folder, settings, {"corpus": corpus_manifest["fingerprint"]}, version=2)
    words = storage.join(folder, "_words")
    if manifest := stage.finished():
        log.info("tokenizer: up to date, nothing to do")
        storage.delete(words)  # a run that was killed at its very end left it
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
    sample = count_words(words, parts, settings.sample_bytes, settings.pre_tokenizer, settings.digits)
    if not sample.documents:
        raise InputError(
            f"tokenizer.sample_bytes is {settings.sample_bytes}: so little that the sample holds no document; raise it"
        )
    facts = ray.get(ray.remote(_learn).remote(folder, sample, settings))
    if facts["vocab_size"] < settings.vocab_size:
        log.warning(
            "tokenizer: made %d of %d tokens: no other pair occurs %d times in the sample",
            facts["vocab_size"],
            settings.vocab_size,
            settings.min_frequency,
        )
    log.info("tokenizer: done, %d tokens, %.2f bytes a token", facts["vocab_size"], facts["bytes_per_token"])
    manifest = stage.publish(facts)
    storage.delete(words)
    return manifest


def take(folder: str, source: str, name: str, eos_id: int | None) -> dict[str, Any]:
    """Publish the tokenizer of a model in Hugging Face's format as the workspace's; skipped when it is there.

    Documents end with the token that ends the model's texts. What fills batches has to be another, or it would be taken
    for the end of a document: where the model has none, one of its other special tokens, which no text has.

    Args:
        folder: where ``tokenizer.json``, ``tokenizer_config.json`` and ``manifest.json`` go.
        source: folder of the model.
        name: what it was called.
        eos_id: the token that ends a text where ``tokenizer_config.json`` does not say.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: the model has no ``tokenizer.json``.
        ValueError: it is not known which token ends a text, or none is free to fill batches.
    """
    tokenizer = Tokenizer.of_model(source, eos_id)
    backend = tokenizer.backend
    special = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}
    pad = tokenizer.pad_id
    if pad == tokenizer.eot_id:
        free = [i for i in special if i not in (tokenizer.eot_id, tokenizer.bos_id)]
        if not free:
            raise InputError(f"{source}/tokenizer_config.json: pad_token is missing, no special token is free for it")
        pad = min(free, key=lambda i: ("pad" not in special[i], "reserved" not in special[i], i))
    config = {key: value for key, value in tokenizer.config.items() if key != "chat_template"}
    config |= {"eos_token": backend.id_to_token(tokenizer.eot_id), "pad_token": backend.id_to_token(pad)}
    config |= {"bos_token": backend.id_to_token(tokenizer.bos_id) if config.get("bos_token") else None}
    content = backend.to_str(pretty=True)
    stage = Stage("tokenizer", folder, {"taken": xxhash.xxh3_128_hexdigest(content.encode()), "config": config}, {}, 2)
    if manifest := stage.finished():
        log.info("tokenizer: up to date, nothing to do")
        return manifest
    stage.begin()
    storage.write_bytes(storage.join(folder, "tokenizer.json"), content.encode())
    storage.write_json(storage.join(folder, "tokenizer_config.json"), config)
    log.info("tokenizer: %d tokens, taken from %s", tokenizer.vocab_size, name)
    facts = {"vocab_size": tokenizer.vocab_size, "bytes_per_token": None, "from": name}
    return stage.publish(facts | {"special_tokens": list(special.values())})


def _learn(folder: str, sample: WordCounts, settings: TokenizerSettings) -> dict[str, Any]:
    """Work of the one task that learns the merges from all counts, and writes the tokenizer."""
    words = sample.read()
    tokenizer, tokens = train_on_counts(words, settings)
    storage.write_bytes(storage.join(folder, "tokenizer.json"), tokenizer.backend.to_str(pretty=True).encode())
    return {
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": sample.bytes / max(tokens, 1),
        "special_tokens": settings.all_special_tokens(),
        "sample": {"documents": sample.documents, "bytes": sample.bytes, "words": words.num_rows},
    }
