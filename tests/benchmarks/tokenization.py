"""Tokenization beside the libraries that are known to be fast: MB/s of one core, and whether the ids are the same.

A tokenizer of each kind is trained, beside the trainer of ``tokenizers``, and then the documents are encoded with all
libraries that are installed. Blocks of documents go through one library after another; every library sees each block
once, and the figure is the median over the blocks behind the first: caches of words are as warm as in a long run, and
the noise of the machine falls on all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.documents import SCHEMA, document_id, to_table
from pipelines.pretokens import gpt4_pattern, pre_tokenizer
from pipelines.tokenize import ENCODED_TOGETHER, encode_table
from pipelines.tokenizer import Tokenizer, TokenizerSettings, train_on_texts

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
FROM_ARROW = "fastokens, from Arrow"
REFERENCE = "tokenizers encode_batch_fast"


def libraries(tokenizer: Tokenizer, pattern: str) -> dict[str, Callable[[list[str]], Any]]:
    """How each library that is installed encodes a list of texts: to a list of ids each, or to all ids in a row."""
    file = tokenizer.backend.to_str()
    ordinary = json.loads(file) | {"added_tokens": []}  # special tokens written out are text
    special = len(json.loads(file)["added_tokens"])
    ranks = {tokenizer.token_bytes(i): i - special for i in range(special, tokenizer.vocab_size)}
    found: dict[str, Callable[[list[str]], Any]] = {
        "tokenizers encode_batch": lambda texts: [
            e.ids for e in tokenizer.backend.encode_batch(texts, add_special_tokens=False)
        ],
        "tokenizers encode_batch_fast": lambda texts: [
            e.ids for e in tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
        ],
    }

    def add(name: str, make: Callable[[], Callable[[list[str]], Any]]) -> None:
        try:
            found[name] = make()
        except ImportError:
            print(f"{name}: not installed", file=sys.stderr)

    def tiktoken() -> Callable[[list[str]], Any]:
        from tiktoken import Encoding

        encoding = Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        return lambda texts: [np.array(encoding.encode_ordinary(text), np.int64) + special for text in texts]

    def riptoken() -> Callable[[list[str]], Any]:
        from riptoken import CoreBPE

        encoding = CoreBPE(ranks, {}, pattern)
        return lambda texts: [np.array(encoding.encode_ordinary(text), np.int64) + special for text in texts]

    def kitoken() -> Callable[[list[str]], Any]:
        from kitoken import Kitoken

        encoding = Kitoken.from_tokenizers(json.dumps(ordinary).encode())
        return lambda texts: encoding.encode_all(texts, False)

    def splintr() -> Callable[[list[str]], Any]:
        from splintr import from_json_bytes

        encoding = from_json_bytes(json.dumps(ordinary).encode())
        return lambda texts: np.frombuffer(encoding.encode_batch_flat(texts)[0], np.uint32)

    def snaptokens() -> Callable[[list[str]], Any]:
        from snaptokens import Tokenizer as Snap

        encoding = Snap.from_json_str(json.dumps(ordinary))
        return lambda texts: np.frombuffer(encoding.encode_batch_flat(texts)[0], np.uint32)

    def gigatoken() -> Callable[[list[str]], Any]:
        import awkward
        from gigatoken import Tokenizer as Giga

        encoding = Giga.from_json(json.dumps(ordinary).encode())
        return lambda texts: awkward.to_numpy(awkward.flatten(encoding.encode_batch(texts, parallel=False)))

    def fastokens() -> Callable[[list[str]], Any]:
        from fastokens import Tokenizer as Fast

        encoding = Fast.from_json_str(file)
        return lambda texts: np.frombuffer(encoding.encode_batch_flat(texts, split_special_tokens=True)[0], np.uint32)

    for make in tiktoken, riptoken, kitoken, splintr, snaptokens, gigatoken, fastokens:
        add(make.__name__, make)
    found[FROM_ARROW] = fastokens()  # with a cache of its own
    return found


def blocks_of(path: str, limit: int) -> list[pa.Table]:
    """Documents from all over a file, ``limit`` at most, in tables as the encode stage reads them."""
    with open(path, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    texts = texts[:: -(-len(texts) // limit)]
    rows = [{"id": document_id("bench", path, i), "text": text, "source": "bench"} for i, text in enumerate(texts)]
    n = -(-len(rows) // ENCODED_TOGETHER)
    return [to_table(rows[i::n], SCHEMA) for i in range(n)]


def flat(result: Any) -> np.ndarray:
    """All ids of a library's result, one after another."""
    return np.concatenate([np.asarray(ids) for ids in result]) if isinstance(result, list) else np.asarray(result)


def nasty_texts() -> list[str]:
    """Texts on which splits that differ in their Unicode version, their cases or their white space differ."""
    rng = np.random.default_rng(0)
    pieces = [
        "'s",
        "'S",
        "'\u017f",
        " ",
        "\n",
        "\r\n",
        "\u3000",
        "\x85",
        "12345",
        "\u00bd",
        "a",
        "\u1c89",
        "\U000323b0",
    ]
    pieces += ["<|endoftext|>", "\x00", "\ufffd", "e\u0301", "\u6f22", "\U0001f600", "...", "_", "\u01c5", "\u0300"]
    return ["".join(rng.choice(pieces, rng.integers(1, 30))) for _ in range(5000)]


def report(kind: str, blocks: list[pa.Table], vocab_size: int) -> None:
    """Train a tokenizer of one kind and print its tables."""
    texts = [text for block in blocks for text in block["text"].to_pylist()]
    size = sum(len(text.encode()) for text in texts)
    settings = TokenizerSettings(vocab_size=vocab_size, pre_tokenizer=kind)
    train_on_texts(texts[:20], settings)  # compiles
    started = time.perf_counter()
    tokenizer = train_on_texts(texts, settings)
    ours = time.perf_counter() - started
    started = time.perf_counter()
    theirs = by_tokenizers(texts, settings)
    took = time.perf_counter() - started
    same = "same file" if theirs == tokenizer.backend.to_str() else "DIFFERENT file"
    print(f"\n{kind}: training {vocab_size:,} tokens on {size / 1e6:.1f} MB, one core")
    print(f"  tokenizers {took:6.1f} s   Ingot {ours:6.1f} s   {took / ours:.1f}x, {same}")

    found = libraries(tokenizer, GPT2_PATTERN if kind == "gpt2" else gpt4_pattern(settings.digits))
    nasty = nasty_texts()
    reference = flat(found[REFERENCE](nasty))
    times: dict[str, list[float]] = {name: [] for name in [*found, "Ingot"]}
    same_ids = {name: np.array_equal(flat(encode(nasty)), reference) for name, encode in found.items()}
    same_ids["Ingot"] = np.array_equal(tokenizer.encode_batch(nasty)[0], reference)
    names = list(times)
    for number, block in enumerate(blocks):
        texts = block["text"].to_pylist()
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        made = {}
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:
            started = time.process_time()
            if name == "Ingot":
                result = encode_table(block, tokenizer, 0.005)[0]
            elif name == FROM_ARROW:
                result = found[name](block["text"].to_pylist())
            else:
                result = found[name](texts)
            times[name].append(megabytes / (time.process_time() - started))
            made[name] = flat(result) if name != "Ingot" else without_ends(result, tokenizer)
        for name in names:
            same_ids[name] &= np.array_equal(made[name], made[REFERENCE])
    speed = {name: statistics.median(measured[1:]) for name, measured in times.items()}
    fastest = max((name for name in found if same_ids[name]), key=speed.get)
    print(f"{kind}: encoding {size / 1e6:.1f} MB in {len(blocks)} blocks, median MB of a core's second")
    for name, value in sorted(speed.items(), key=lambda item: item[1]):
        alike = "same ids" if same_ids[name] else "other ids"
        print(f"  {name:32s} {value:7.1f}   {alike:9s} {value / speed[fastest]:6.2f} of the fastest with the same ids")
    for name in dict.fromkeys([fastest, FROM_ARROW]):
        ratios = [ours / theirs for ours, theirs in zip(times["Ingot"][1:], times[name][1:], strict=True)]
        print(f"  Ingot, from Arrow to Arrow with the ends of documents, to {name}: {statistics.median(ratios):.2f}")


def without_ends(table: pa.Table, tokenizer: Tokenizer) -> np.ndarray:
    """All ids of encoded documents but ``<|endoftext|>``."""
    ids = table["tokens"].combine_chunks().flatten().to_numpy()
    return ids[ids != tokenizer.eot_id]


def by_tokenizers(texts: list[str], settings: TokenizerSettings) -> str:
    """The tokenizer file that ``tokenizers`` makes of the texts."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer(settings.pre_tokenizer, settings.digits)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        special_tokens=settings.all_special_tokens(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()


def main() -> None:
    """Print the tables of both kinds of pre-tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True, help="folder with documents.jsonl, as corpus.py makes it")
    parser.add_argument("--vocab_size", type=int, default=32768)
    parser.add_argument("--documents", type=int, default=8192, help="at most")
    given = parser.parse_args()
    for variable in ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS"):
        os.environ[variable] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    blocks = blocks_of(os.path.join(given.corpus, "documents.jsonl"), given.documents)
    for kind in ("gpt4", "gpt2"):
        report(kind, blocks, given.vocab_size)


if __name__ == "__main__":
    main()
