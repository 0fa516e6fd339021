"""datatrove's side of the benchmarks, run by the Python that has it: one JSON request a line, one JSON answer a line.

Its stages run at the settings of FineWeb (Penedo et al. 2024): repetition and quality rules of Gopher, C4's without the
one on terminal punctuation, FineWeb's own; MinHash with 14 bands of 8 over word 5-grams. Times are CPU seconds of the
work itself, without imports, reading and the first call, which loads models.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import Any


def rules(texts: list[str]) -> dict[str, Any]:
    """Each document through the chain; what it was dropped for, or None, and the text that is left."""
    from datatrove.data import Document

    chain = _chain()
    _warm(chain)
    began = time.process_time()
    verdicts, kept = [], []
    for number, text in enumerate(texts):
        document, verdict = Document(text=text, id=str(number)), None
        for rule in chain:
            result = rule.filter(document)
            if result is not True:
                verdict = f"{rule.name}: {result[1] if isinstance(result, tuple) else 'dropped'}"
                break
        verdicts.append(verdict)
        kept.append(None if verdict else document.text)
    return {"seconds": time.process_time() - began, "verdicts": verdicts, "texts": kept}


def minhash(texts: list[str]) -> dict[str, Any]:
    """MinHash signatures: text simplified, cut into words, shingled, hashed, permuted."""
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

    signer = MinhashDedupSignature(output_folder="/tmp", config=_minhash_config())
    signer.get_signature(signer.get_shingles("warm up " * 10))
    began = time.process_time()
    for text in texts:
        shingles = signer.get_shingles(text)
        if shingles.size:
            signer.get_signature(shingles)
    return {"seconds": time.process_time() - began}


def extract(pages: list[str]) -> dict[str, Any]:
    """HTML to text with the default extractor at its default settings."""
    from datatrove.pipeline.extractors import Trafilatura

    extractor = Trafilatura()
    extractor.extract(pages[0])
    texts = []
    began = time.process_time()
    for page in pages:
        try:
            texts.append(extractor.extract(page) or "")
        except Exception:  # as its pipeline does
            texts.append("")
    return {"seconds": time.process_time() - began, "texts": texts}


def whole(folder: str, output: str, workers: int) -> dict[str, Any]:
    """Documents in JSON Lines files to deduplicated ones, in wall-clock seconds."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    config, files = _minhash_config(), len(os.listdir(folder))
    work = {name: os.path.join(output, name) for name in ("filtered", "signatures", "buckets", "removed", "final")}
    stages = [
        ([JsonlReader(folder), *_chain(), JsonlWriter(work["filtered"])], files),
        ([JsonlReader(work["filtered"]), MinhashDedupSignature(work["signatures"], config)], files),
        ([MinhashDedupBuckets(work["signatures"], work["buckets"], config=config)], config.num_buckets),
        ([MinhashDedupCluster(work["buckets"], work["removed"], config=config)], 1),
        (
            [JsonlReader(work["filtered"]), MinhashDedupFilter(work["removed"]), JsonlWriter(work["final"])],
            files,
        ),
    ]
    seconds = []
    for number, (pipeline, tasks) in enumerate(stages):
        began = time.perf_counter()
        logs = os.path.join(output, f"logs-{number}")
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=min(workers, tasks), logging_dir=logs).run()
        seconds.append(time.perf_counter() - began)
    kept = sum(1 for document in JsonlReader(work["final"])())
    return {"seconds": sum(seconds), "stages": seconds, "documents": kept}


def _chain() -> list[Any]:
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    return [
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]


def _warm(chain: list[Any]) -> None:
    from datatrove.data import Document

    for rule in chain:
        rule.filter(Document(text="The first call of all loads what the others need. " * 20, id="0"))


def _minhash_config() -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    return MinhashConfig(hash_config=HashConfig(precision=64), num_buckets=14, hashes_per_bucket=8, n_grams=5)


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    from loguru import logger

    logger.remove()
    for line in sys.stdin:
        request = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            answer = globals()[request.pop("stage")](**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
