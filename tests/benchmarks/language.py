"""Language identification: Ingot's kernel against py3langid itself and other identifiers, on one core.

    python tests/benchmarks/language.py LABELLED.jsonl [--most 300] [--characters 2000]

reads lines with ``text`` and ``language`` (ISO 639-1), takes at most ``--most`` documents of a language, and prints for
each identifier how many documents it reads in a second of CPU time, the share of documents whose language it finds, and
the share on which it agrees with py3langid, which for Ingot has to be all. Identifiers that are not installed are left
out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from pipelines.language import identify_batch

Identify = Callable[[list[str]], list[str]]
"""Texts to codes."""

_SAME = {"nb": "no", "nn": "no", "iw": "he", "zh-Hant": "zh", "zh-TW": "zh"}


def main() -> None:
    """Time every identifier and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("--most", type=int, default=300, help="documents of a language")
    parser.add_argument("--characters", type=int, default=2000, help="of a document that are looked at")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts")
    args = parser.parse_args()
    texts, labels = read(args.corpus, args.most)
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts)} documents in {len(set(labels))} languages, {size / len(texts):,.0f} bytes each")
    found: dict[str, list[str]] = {}
    speed: dict[str, float] = {}
    for name, identify in identifiers(args.characters):
        identify(texts[:2])  # models are loaded, kernels compiled
        seconds = []
        for _ in range(args.rounds):
            began = time.process_time()
            found[name] = [_SAME.get(code, code) for code in identify(texts)]
            seconds.append(time.process_time() - began)
        speed[name] = len(texts) / min(seconds)
    print(f"{'identifier':32} {'docs/CPU s':>12} {'as labelled':>12} {'as py3langid':>13}")
    for name, codes in found.items():
        right = np.mean([code == label for code, label in zip(codes, labels, strict=True)])
        same = np.mean([a == b for a, b in zip(codes, found["py3langid"], strict=True)])
        print(f"{name:32} {speed[name]:12,.0f} {right:12.4f} {same:13.4f}")


def read(path: str, most: int) -> tuple[list[str], list[str]]:
    """Texts and their languages, at most so many of each."""
    counts: Counter[str] = Counter()
    texts, labels = [], []
    with open(path) as lines:
        for line in lines:
            row = json.loads(line)
            label = _SAME.get(row["language"], row["language"])
            counts[label] += 1
            if counts[label] <= most:
                texts.append(row["text"])
                labels.append(label)
    return texts, labels


def identifiers(characters: int) -> Iterator[tuple[str, Identify]]:
    """Names and functions of those that are installed."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier
    from resiliparse.parse.lang import detect_fast

    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    yield "ingot", lambda texts: identify_batch(pa.array(texts, pa.large_string()), characters)[0].to_pylist()
    yield "py3langid", lambda texts: [model.classify(text[:characters])[0] for text in texts]
    yield "resiliparse detect_fast", lambda texts: [detect_fast(text[:characters])[0] for text in texts]
    yield "resiliparse, whole documents", lambda texts: [detect_fast(text)[0] for text in texts]
    try:
        import pycld2
    except ImportError:
        return

    def cld2(text: str) -> str:
        try:
            return pycld2.detect(text, isPlainText=True)[2][0][1].partition("-")[0]
        except pycld2.error:  # a character that it refuses
            return "und"

    yield "pycld2, whole documents", lambda texts: [cld2(text) for text in texts]


if __name__ == "__main__":
    main()
