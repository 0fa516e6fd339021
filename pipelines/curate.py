"""The graph of stages from sources to deduplicated documents: extract, filter, exact, near."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines import sources, storage
from pipelines.dedup import exact, minhash
from pipelines.documents import SCHEMA, SET_ASIDE_SCHEMA, BadRecord, set_aside_bad_records, to_table
from pipelines.filters import Verdict
from pipelines.filters.gopher import GopherQuality, GopherRepetition
from pipelines.language import LanguageFilter, identify
from pipelines.sources import Source
from pipelines.stage import (
    Output,
    Stage,
    Unit,
    part_uris,
    read_manifest,
    read_part,
    require_manifest,
    run_stage,
    text_bytes,
)
from pipelines.words import analyse

log = logging.getLogger("ingot")

STAGES = ("extract", "filter", "exact", "near")

_BATCH_DOCUMENTS = 512
_BATCH_BYTES = 16_000_000


@dataclass
class CurationSettings:
    """Where documents come from and which of them stay."""

    sources: list[Source] = field(default_factory=list)
    """What to read, such as `[{kind: warc, path: s3://bucket/crawl/*.warc.gz, name: web}]`."""
    language: LanguageFilter = field(default_factory=LanguageFilter)
    """Languages to keep; code is not asked."""
    gopher_quality: GopherQuality = field(default_factory=GopherQuality)
    """Rules of quality for prose (Rae et al. 2021); code is not asked, and books may have any number of words."""
    gopher_repetition: GopherRepetition = field(default_factory=GopherRepetition)
    """Rules against repetition for prose (Rae et al. 2021); code is not asked."""
    exact: exact.ExactDedup = field(default_factory=exact.ExactDedup)
    """Removal of exact duplicates."""
    near: minhash.MinHashDedup = field(default_factory=minhash.MinHashDedup)
    """Removal of near-duplicates."""
    set_aside_share: float = 1.0
    """Share of the dropped documents that is stored with its reason; all are counted."""

    def validate(self) -> None:
        """Raise ValueError for what cannot work."""
        if not self.sources:
            raise ValueError(
                "sources is empty; name at least one, such as --sources '[{kind: warc, path: crawl/*.warc.gz}]'"
            )
        if not 0 <= self.set_aside_share <= 1:
            raise ValueError(f"set_aside_share is {self.set_aside_share}; it has to lie between 0 and 1")


def final_corpus(corpus: str) -> tuple[str, dict[str, Any]]:
    """Folder and manifest of the last stage, which the tokenizer and the token shards are made from.

    Raises:
        FileNotFoundError: curation has not finished, or was started anew and did not get to its end.
    """
    folder = storage.join(corpus, STAGES[-1])
    last = require_manifest(folder, "curate")
    after = last
    for name in reversed(STAGES[:-1]):
        before = read_manifest(storage.join(corpus, name))
        if before is None or after["inputs"].get(name) != before["fingerprint"]:
            raise FileNotFoundError(
                f"{corpus}: stage {after['stage']} was made from an older or unfinished {name}; "
                "run `ingot curate` again"
            )
        after = before
    return folder, last


def curate(corpus: str, settings: CurationSettings) -> dict[str, dict[str, Any]]:
    """Run the stages that are not up to date, each on the one before.

    Args:
        corpus: folder of the stages.
        settings: sources, rules and dedup.

    Returns:
        The manifests by stage.

    Raises:
        FileNotFoundError: a source's path has no files.
    """
    manifests = {"extract": _extract_stage(storage.join(corpus, "extract"), settings)}
    share = settings.set_aside_share
    rules = {name: getattr(settings, name) for name in ("language", "gopher_quality", "gopher_repetition")}
    plain = {name: asdict(rule) for name, rule in rules.items()}
    stage = _next_stage(corpus, "filter", "extract", manifests["extract"], {**plain, "set_aside_share": share})
    manifests["filter"] = _run(
        stage,
        corpus,
        manifests["extract"],
        _filter,
        lambda part: {**rules_for(part["kind"], **rules), "prose": part["kind"] != "code"},
        share,
    )
    for name, before, dedup in (("exact", "filter", settings.exact), ("near", "exact", settings.near)):
        stage = _next_stage(corpus, name, before, manifests[before], {**asdict(dedup), "set_aside_share": share})
        manifests[name] = _run(
            stage,
            corpus,
            manifests[before],
            _drop,
            lambda part, folder=stage.folder: {"duplicates": storage.join(folder, "_duplicates", part["file"])},
            share,
            prepare=lambda parts, folder=stage.folder, dedup=dedup: _find_duplicates(parts, folder, dedup),
            reason=f"{name} duplicate",
        )
        storage.delete(storage.join(stage.folder, "_duplicates"))
    return manifests


def rules_for(kind: str, gopher_quality: GopherQuality, **rules: Any) -> dict[str, Any]:
    """The filter stage's rules for a kind of source: a book is a whole work, so its length has no upper bound."""
    if kind == "books":
        gopher_quality = replace(gopher_quality, max_words=sys.maxsize)
    return {**rules, "gopher_quality": gopher_quality}


def _next_stage(corpus: str, name: str, before: str, manifest: dict[str, Any], settings: dict[str, Any]) -> Stage:
    return Stage(name, storage.join(corpus, name), settings, {before: manifest["fingerprint"]})


def _run(
    stage: Stage,
    corpus: str,
    before: dict[str, Any],
    work: Callable[..., Iterator[Output]],
    arguments: Callable[[dict[str, Any]], dict[str, Any]],
    share: float,
    *,
    prepare: Callable[[list[str]], None] | None = None,
    **common: Any,
) -> dict[str, Any]:
    """Run one stage part by part over the stage before, unless it is up to date."""
    if manifest := stage.finished():
        log.info("%s: up to date, nothing to do", stage.name)
        return manifest
    uris = part_uris(storage.join(corpus, before["stage"]), before)
    if prepare is not None:
        stage.begin()
        prepare(uris)
    units = [
        Unit(part["file"].removesuffix(".parquet"), {"part": uri, **arguments(part), **common}, {"kind": part["kind"]})
        for part, uri in zip(before["parts"], uris, strict=True)
    ]
    return run_stage(stage, units, work, set_aside_share=share)


# extract: sources to documents


def _extract_stage(folder: str, settings: CurationSettings) -> dict[str, Any]:
    units = sources.discover(settings.sources)
    listing = json.dumps([[unit.name, unit.files, unit.bytes, unit.changed] for unit in units])
    stage = Stage(
        "extract",
        folder,
        {"sources": [asdict(source) for source in settings.sources], "set_aside_share": settings.set_aside_share},
        {"files": xxhash.xxh3_128_hexdigest(listing.encode())},
    )
    if manifest := stage.finished():
        log.info("extract: up to date, nothing to do")
        return manifest
    return run_stage(
        stage,
        [Unit(f"part-{i:05d}", {"unit": unit}, {"kind": unit.source.kind}) for i, unit in enumerate(units)],
        _extract,
        set_aside_share=settings.set_aside_share,
    )


def _extract(unit: sources.Unit) -> Iterator[Output]:
    """Work of the extract stage: records of a source to documents, HTML to text; what is malformed is set aside."""
    from pipelines.extract import extract_text

    rows: list[dict[str, Any]] = []
    bad: list[BadRecord] = []
    size = 0
    for record in sources.read(unit):
        if isinstance(record, BadRecord):
            bad.append(record)
        else:
            if "html" in record:
                page = record.pop("html")
                size += len(page)
                try:
                    record["text"] = extract_text(page, record.pop("content_type", None))
                except Exception as error:  # one page must not end the job
                    bad.append(BadRecord(record["path"], record.get("offset", -1), "html: not extracted", repr(error)))
                    continue
            else:
                size += len(record["text"].encode("utf-8", "surrogatepass"))
            rows.append(record)
        if len(rows) + len(bad) >= _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield _extracted(rows, bad, size, unit.source.label)
            rows, bad, size = [], [], 0
    yield _extracted(rows, bad, size, unit.source.label)


def _extracted(rows: list[dict[str, Any]], bad: list[BadRecord], size: int, source: str) -> Output:
    table = to_table(rows)
    empty = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(table["text"])), 0)
    aside = set_aside_bad_records(bad, source)
    if pc.any(empty).as_py():
        aside = pa.concat_tables(
            [aside, set_aside(table.filter(empty), [Verdict("empty: no text", 0.0, 1.0)] * len(rows))]
        )
        table = table.filter(pc.invert(empty))
    return Output(table, aside, len(rows) + len(bad), size)


def set_aside(table: pa.Table, verdicts: list[Verdict], details: list[str] | None = None) -> pa.Table:
    """Dropped documents as rows of SET_ASIDE_SCHEMA, each with its verdict (extra verdicts are ignored)."""
    n = table.num_rows
    verdicts = verdicts[:n]
    columns = [
        pa.array([v.reason for v in verdicts], pa.string()),
        pa.array([v.value for v in verdicts], pa.float64()),
        pa.array([v.threshold for v in verdicts], pa.float64()),
        pa.nulls(n, pa.int64()),
        pa.array(details, pa.string()) if details is not None else pa.nulls(n, pa.string()),
    ]
    return pa.table([*table.select(SCHEMA.names).columns, *columns], schema=SET_ASIDE_SCHEMA)


# filter: language, quality, repetition


def _filter(
    part: str,
    language: LanguageFilter,
    gopher_quality: GopherQuality,
    gopher_repetition: GopherRepetition,
    prose: bool,
) -> Iterator[Output]:
    """Work of the filter stage: the first rule that a document breaks sets it aside; code passes as it is."""
    for table in read_part(part, rows=_BATCH_DOCUMENTS):
        size = text_bytes(table)
        if not prose:
            yield Output(table, None, table.num_rows, size)
            continue
        verdicts: list[Verdict | None] = []
        codes, scores = [], []
        for text in table["text"].to_pylist():
            code, score = identify(text)
            verdict = language.judge(code, score)
            if verdict is None:
                words = analyse(text)
                verdict = gopher_quality.judge(words) or gopher_repetition.judge(words)
            codes.append(code)
            scores.append(score)
            verdicts.append(verdict)
        columns = dict(zip(SCHEMA.names, table.columns, strict=True))
        columns |= {"language": pa.array(codes, pa.string()), "language_score": pa.array(scores, pa.float32())}
        judged = pa.table(columns, schema=SCHEMA)
        keep = pa.array([verdict is None for verdict in verdicts])
        aside = set_aside(judged.filter(pc.invert(keep)), [v for v in verdicts if v is not None])
        yield Output(judged.filter(keep), aside, table.num_rows, size)


# exact, near: drop what the search for duplicates found


def _find_duplicates(parts: list[str], folder: str, dedup: Any) -> None:
    """Run a search for duplicates unless an earlier, killed run of the stage finished it."""
    output = storage.join(folder, "_duplicates")
    done = storage.join(output, "done.json")
    if storage.exists(done):
        return
    module = exact if isinstance(dedup, exact.ExactDedup) else minhash
    log.info("%s: looks for duplicates in %d parts", storage.file_name(folder), len(parts))
    module.find_duplicates(parts, output, dedup)
    storage.write_json(done, {"parts": len(parts)})


def _drop(part: str, duplicates: str, reason: str) -> Iterator[Output]:
    """Work of the dedup stages: a part without the rows that the search listed for it."""
    listed: dict[int, dict[str, Any]] = {}
    if storage.exists(duplicates):
        listed = {row["row"]: row for row in storage.open_parquet(duplicates).read().to_pylist()}
    at = 0
    for table in read_part(part):
        dropped = [listed.get(row) for row in range(at, at + table.num_rows)]
        at += table.num_rows
        keep = pa.array([row is None for row in dropped])
        gone = [row for row in dropped if row is not None]
        aside = set_aside(
            table.filter(pc.invert(keep)),
            [Verdict(reason, row["similarity"], None) for row in gone],
            [f"duplicate of {row['duplicate_of']}" for row in gone],
        )
        yield Output(table.filter(keep), aside, table.num_rows, text_bytes(table))
