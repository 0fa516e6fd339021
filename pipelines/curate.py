"""The graph of stages from sources to the corpus: extract, filter, exact, lines, near, clean, mix.

Each stage reads the parts of the one before and writes parts of its own; what is switched off is left out of the graph.
``corpus/manifest.json``, written last, says which stages made the corpus.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines import sources, storage
from pipelines.curation import CurationSettings, rules_for
from pipelines.decontaminate import Decontaminator, ngram_table
from pipelines.decontaminate import prepare as prepare_ngrams
from pipelines.dedup import exact, lines, minhash, published
from pipelines.documents import BadRecord, set_aside_bad_records, to_table
from pipelines.extract import ExtractionError, Extractor, ExtractSettings
from pipelines.filters import Verdict, quality
from pipelines.filters.chain import filter_part, set_aside
from pipelines.mix import mix
from pipelines.stage import (
    MANIFEST,
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

log = logging.getLogger("ingot")

STAGES = ("extract", "filter", "exact", "lines", "near", "clean", "mix")
"""All stages, in order; those that the settings switch off are left out."""

_NOT_READ = ("rules", "settings", "weight", "delay")  # of a source: they do not change what it gives
_SEARCH = "_search"  # folder of what a stage looked for in all parts before it goes through them

_BATCH_DOCUMENTS = 512
_BATCH_BYTES = 16_000_000
_EXPANSION = 4  # of compressed text and pages, until the first file shows


def final_corpus(corpus: str) -> tuple[str, dict[str, Any]]:
    """Folder and manifest of the last stage, which the tokenizer and the token shards are made from.

    Raises:
        FileNotFoundError: curation has not finished, or was started anew and did not get to its end.
    """
    made = require_manifest(corpus, "curate")["stages"]
    for name, fingerprint in made.items():
        manifest = read_manifest(storage.join(corpus, name))
        if manifest is None or manifest["fingerprint"] != fingerprint:
            raise FileNotFoundError(f"{corpus}: stage {name} is unfinished or newer; run `ingot curate` again")
    return storage.join(corpus, name), manifest


def stage_manifests(corpus: str) -> dict[str, dict[str, Any]]:
    """Manifests of the stages that made the corpus, or of those that are finished where it is not, in order."""
    made = read_manifest(corpus)
    found = {name: read_manifest(storage.join(corpus, name)) for name in (made["stages"] if made else STAGES)}
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def curate(corpus: str, settings: CurationSettings) -> dict[str, dict[str, Any]]:
    """Run the stages that are not up to date, each on the one before.

    Args:
        corpus: folder of the stages.
        settings: sources, rules and dedup.

    Returns:
        The manifests by stage, in order.

    Raises:
        FileNotFoundError: a source's path has no files.
    """
    graph = _Graph(corpus, settings)
    graph.look_for_files()
    graph.extract()
    graph.filter()
    graph.dedup("exact", exact, settings.exact)
    graph.lines()
    graph.dedup("near", minhash, settings.near)
    graph.clean()
    graph.mix()
    return graph.publish()


class _Graph:
    """The stages that were run, each on the last of them."""

    def __init__(self, corpus: str, settings: CurationSettings) -> None:
        self.corpus, self.settings = corpus, settings
        self.manifests: dict[str, dict[str, Any]] = {}

    def look_for_files(self) -> None:
        """Raise what is wrong with the files that later stages read before hours are spent on the first."""
        for source in self.settings.sources:
            if (rules := rules_for(self.settings, source).get("url")) is not None:
                rules.fingerprint()
        for name, settings in (("exact", self.settings.exact), ("near", self.settings.near)):
            if settings.enabled:
                published.set_files(settings.against, settings.scheme())
                published.refuse_own(settings.against, name, storage.join(self.corpus, name, published.FOLDER))
        if self.settings.decontaminate.enabled and self.settings.decontaminate.sets:
            ngram_table(self.settings.decontaminate)

    def extract(self) -> None:
        """Sources to documents."""
        units = sources.discover(self.settings.sources)
        listing = json.dumps([[unit.name, unit.files, unit.bytes, unit.changed] for unit in units])
        plain = [asdict(source) for source in self.settings.sources]
        reading = [{k: v for k, v in source.items() if k not in _NOT_READ} for source in plain]
        stage = Stage(
            "extract",
            storage.join(self.corpus, "extract"),
            {
                "sources": reading,
                "extract": asdict(self.settings.extract),
                "set_aside_share": self.settings.set_aside_share,
            },
            {"files": xxhash.xxh3_128_hexdigest(listing.encode())},
        )
        works = [
            Unit(
                f"part-{i:05d}",
                {"unit": unit, "settings": self.settings.extract},
                {"source": self.settings.sources.index(unit.source)},
                unit.bytes * (_EXPANSION if unit.files[0].endswith((".gz", ".zst")) else 1),
            )
            for i, unit in enumerate(units)
        ]
        self.manifests["extract"] = self._finish(stage, lambda: works, _extract)

    def filter(self) -> None:
        """Documents that the rules of their source let through."""
        chains = [rules_for(self.settings, source) for source in self.settings.sources]
        plain = [[[name, asdict(rule)] for name, rule in chain.items()] for chain in chains]
        files: dict[str, str] = {}  # that rules read are inputs too
        if any("quality" in chain for chain in chains):
            ready = quality.prepare(self.settings.quality, storage.join(self.corpus, "quality-model"))
            files["quality"] = ready.fingerprint()
        for i, chain in enumerate(chains):
            if "quality" in chain:
                chain["quality"] = replace(chain["quality"], model=ready.model, good=[], bad=[])
            if "url" in chain:
                files[f"{i} url"] = chain["url"].fingerprint()
        stage = self._stage("filter", {"rules": plain}, files)
        self._parts(stage, filter_part, lambda part: {"chain": list(chains[part["source"]].values())})

    def dedup(self, name: str, module: Any, settings: Any) -> None:
        """Documents without those that ``module.find_duplicates`` lists."""
        if not settings.enabled:
            return
        sets = {f"against {entry}": made for entry, made in published.set_contents(settings.against, name).items()}
        stage = self._stage(name, asdict(settings), sets)
        found = storage.join(stage.folder, _SEARCH)

        def search(parts: list[str]) -> None:
            publish = storage.join(stage.folder, published.FOLDER)
            _once(found, lambda: module.find_duplicates(parts, found, settings, publish=publish))

        self._parts(
            stage,
            _drop,
            lambda part: {"duplicates": storage.join(found, part["file"]), "reason": f"{name} duplicate"},
            search,
        )

    def lines(self) -> None:
        """Documents without the lines or paragraphs that too many share."""
        settings = self.settings.lines
        if not settings.enabled:
            return
        stage = self._stage("lines", asdict(settings))
        found = storage.join(stage.folder, _SEARCH)
        self._parts(
            stage,
            lines.work,
            lambda part: {"cuts": storage.join(found, part["file"]), "settings": settings},
            lambda parts: _once(found, lambda: lines.find(parts, found, settings)),
        )

    def clean(self) -> None:
        """Documents without what overlaps the evaluation sets, and without personal data."""
        settings, privacy = self.settings.decontaminate, self.settings.privacy
        decontaminates = settings.enabled and bool(settings.sets)
        if not (decontaminates or privacy.enabled):
            return
        asked = {"decontaminate": asdict(settings) if decontaminates else None, "privacy": asdict(privacy)}
        stage = self._stage("clean", asked, {"sets": settings.fingerprint()} if decontaminates else None)
        found = storage.join(stage.folder, _SEARCH)
        chain: list[Any] = []

        def prepare(parts: list[str]) -> None:
            if decontaminates:
                chain.append(Decontaminator(settings, prepare_ngrams(settings, found, parts)))
            if privacy.enabled:
                chain.append(privacy)

        self._parts(stage, filter_part, lambda part: {"chain": chain}, prepare)

    def mix(self) -> None:
        """Documents of all sources as often as their weights say, shuffled."""
        weights = {source.label: source.weight for source in self.settings.sources}
        if not self.settings.mix.enabled and all(weight == 1 for weight in weights.values()):
            return
        before, manifest = list(self.manifests.items())[-1]
        folder = storage.join(self.corpus, "mix")
        self.manifests["mix"] = mix(folder, storage.join(self.corpus, before), manifest, self.settings.mix, weights)

    def publish(self) -> dict[str, dict[str, Any]]:
        """Say which stages made the corpus."""
        stages = {name: manifest["fingerprint"] for name, manifest in self.manifests.items()}
        if (read_manifest(self.corpus) or {}).get("stages") != stages:
            storage.write_json(storage.join(self.corpus, MANIFEST), {"stages": stages})
        return self.manifests

    def _stage(self, name: str, settings: dict[str, Any], files: dict[str, str] | None = None) -> Stage:
        before, manifest = list(self.manifests.items())[-1]
        settings = {**settings, "set_aside_share": self.settings.set_aside_share}
        inputs = {before: manifest["fingerprint"], **(files or {})}
        return Stage(name, storage.join(self.corpus, name), settings, inputs)

    def _parts(
        self,
        stage: Stage,
        work: Callable[..., Iterator[Output]],
        arguments: Callable[[dict[str, Any]], dict[str, Any]],
        prepare: Callable[[list[str]], None] | None = None,
    ) -> None:
        """Run a stage part by part over the stage before."""
        before = list(self.manifests.values())[-1]
        began = time.monotonic()

        def units() -> list[Unit]:
            uris = part_uris(storage.join(self.corpus, before["stage"]), before)
            if prepare is not None:
                stage.begin()
                log.info("%s: searches %d parts", stage.name, len(uris))
                prepare(uris)
                log.info("%s: searched in %.1f s", stage.name, time.monotonic() - began)
            return [
                Unit(
                    part["file"].removesuffix(".parquet"),
                    {"part": uri, **arguments(part)},
                    {"source": part["source"]},
                    part["bytes"],
                )
                for part, uri in zip(before["parts"], uris, strict=True)
            ]

        self.manifests[stage.name] = self._finish(stage, units, work)
        storage.delete(storage.join(stage.folder, _SEARCH))

    def _finish(self, stage: Stage, units: Callable[[], list[Unit]], work: Callable[..., Any]) -> dict[str, Any]:
        if manifest := stage.finished():
            log.info("%s: up to date, nothing to do", stage.name)
            return manifest
        return run_stage(stage, units(), work, set_aside_share=self.settings.set_aside_share)


def _once(folder: str, search: Callable[[], Any]) -> None:
    """A search that is not made again after a kill of the job that comes after it."""
    done = storage.join(folder, "done.json")
    if not storage.exists(done):
        search()
        storage.write_json(done, True)


# extract: sources to documents


def _extract(unit: sources.Unit, settings: ExtractSettings) -> Iterator[Output]:
    """Work of the extract stage: records of a source to documents, HTML to text; what is malformed is set aside."""
    records: list[dict[str, Any]] = []
    bad: list[BadRecord] = []
    size = 0
    with Extractor(settings) as extractor:
        for record in sources.read(unit):
            if isinstance(record, BadRecord):
                bad.append(record)
            else:
                size += len(record["html"] if "html" in record else record["text"].encode("utf-8", "surrogatepass"))
                records.append(record)
            if len(records) + len(bad) >= _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
                yield _extracted(records, bad, size, unit.source.label, extractor)
                records, bad, size = [], [], 0
        yield _extracted(records, bad, size, unit.source.label, extractor)


def _extracted(
    records: list[dict[str, Any]], bad: list[BadRecord], size: int, source: str, extractor: Extractor
) -> Output:
    pages = [record for record in records if "html" in record]
    texts = extractor([(page.pop("html"), page.pop("content_type", None)) for page in pages]) if pages else []
    failed = set()
    for page, text in zip(pages, texts, strict=True):
        if isinstance(text, ExtractionError):
            bad.append(BadRecord(page["path"], page.get("offset", -1), text.reason, text.detail))
            failed.add(id(page))
        else:
            page["text"] = text
    seen = len(records) + len(bad) - len(failed)
    table = to_table(record for record in records if id(record) not in failed)
    empty = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(table["text"])), 0)
    aside = set_aside_bad_records(bad, source)
    if pc.any(empty).as_py():
        gone = table.filter(empty)
        verdicts = [Verdict("empty: no text", 0.0, 1.0)] * gone.num_rows
        aside = pa.concat_tables([aside, set_aside(gone, verdicts)])
        table = table.filter(pc.invert(empty))
    return Output(table, aside, seen, size)


# exact, near: drop what the search for duplicates found


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
