"""What can be set about curation, and which rules each source is asked by."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any

from pipelines.decontaminate import Decontamination
from pipelines.dedup import exact, lines, minhash
from pipelines.extract import ExtractSettings
from pipelines.filters.c4 import C4
from pipelines.filters.code import CodeRules
from pipelines.filters.fineweb import FineWeb
from pipelines.filters.gopher import GopherQuality, GopherRepetition
from pipelines.filters.quality import QualityClassifier
from pipelines.filters.url import UrlRules
from pipelines.language import LanguageFilter
from pipelines.mix import MixSettings
from pipelines.privacy import PrivacyRules
from pipelines.sources import Source

RULES = ("url", "language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "code", "quality")
"""The rule sets of the filter stage by the names of their settings."""

_QUALITY_OF_A_SOURCE = ("threshold", "pareto", "seed", "store_score")
_PROSE = ("language", "gopher_repetition", "gopher_quality", "quality")
_WEB = ("url", "language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "quality")  # as FineWeb's
_KIND_RULES = {"warc": _WEB, "wet": _WEB, "common-crawl": _WEB, "code": ("code",)}
_KIND_SETTINGS: dict[str, dict[str, Any]] = {
    "books": {"gopher_quality.max_words": sys.maxsize},  # a book is a whole work
}


@dataclass
class CurationSettings:
    """Where documents come from and which of them stay."""

    sources: list[Source] = field(default_factory=list)
    """What to read, such as `[{kind: warc, path: s3://bucket/crawl/*.warc.gz, name: web}]`. Each may have `rules` and
    `settings` of its own for the filter stage."""
    extract: ExtractSettings = field(default_factory=ExtractSettings)
    """How HTML becomes text."""
    rules: list[str] | None = None
    """Rule sets of the filter stage, in the order in which they are asked. null takes those for each source's kind: for
    pages url, language, gopher_repetition, gopher_quality, c4, fineweb, quality; for code, code; for everything else
    language, gopher_repetition, gopher_quality, quality."""
    url: UrlRules = field(default_factory=UrlRules)
    """Lists of domains, addresses and words that pages must not come from (Penedo et al. 2023)."""
    language: LanguageFilter = field(default_factory=LanguageFilter)
    """Languages to keep."""
    gopher_repetition: GopherRepetition = field(default_factory=GopherRepetition)
    """Rules against repetition (Rae et al. 2021)."""
    gopher_quality: GopherQuality = field(default_factory=GopherQuality)
    """Rules of quality (Rae et al. 2021); books may have any number of words."""
    c4: C4 = field(default_factory=lambda: C4(terminal_punctuation=False))
    """Lines and pages that are no prose (Raffel et al. 2020); as in FineWeb, lines may end without punctuation."""
    fineweb: FineWeb = field(default_factory=FineWeb)
    """Rules on lines (Penedo et al. 2024)."""
    code: CodeRules = field(default_factory=CodeRules)
    """Rules for source code (Kocetkov et al. 2022; Lozhkov et al. 2024)."""
    quality: QualityClassifier = field(default_factory=QualityClassifier)
    """A linear model, trained from two sets of documents that you name; acts when they are given."""
    exact: exact.ExactDedup = field(default_factory=exact.ExactDedup)
    """Removal of exact duplicates."""
    lines: lines.LineDedup = field(default_factory=lines.LineDedup)
    """Removal of lines or paragraphs that many documents share."""
    near: minhash.MinHashDedup = field(default_factory=minhash.MinHashDedup)
    """Removal of near-duplicates."""
    decontaminate: Decontamination = field(default_factory=Decontamination)
    """Evaluation sets that must not be trained on; acts when `sets` names some (Brown et al. 2020)."""
    privacy: PrivacyRules = field(default_factory=lambda: PrivacyRules(enabled=False))
    """Masking of e-mail addresses, IP addresses and telephone numbers; give `--privacy.enabled true` for it."""
    mix: MixSettings = field(default_factory=lambda: MixSettings(enabled=False))
    """A global shuffle, and sources repeated or thinned out by their `weight`; runs when it is enabled or a source has
    a weight."""
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
        weights: dict[str, float] = {}
        for source in self.sources:
            if weights.setdefault(source.label, source.weight) != source.weight:
                raise ValueError(f"sources: those of the name {source.label} have different weights; name them apart")
            for rule in rules_for(self, source).values():
                rule.validate()


def rules_for(settings: CurationSettings, source: Source) -> dict[str, Any]:
    """The filter stage's rule sets for a source by name, in order: its own, else the settings', else its kind's.

    Raises:
        ValueError: a rule set or a setting of the source is not known.
    """
    wanted = source.rules if source.rules is not None else settings.rules
    names = _KIND_RULES.get(source.kind, _PROSE) if wanted is None else wanted
    where = f"rules of the source {source.label}" if source.rules is not None else "rules"
    if unknown := [name for name in names if name not in RULES]:
        raise ValueError(f"{where}: {', '.join(unknown)} not known; there are {', '.join(RULES)}")
    rules = {name: getattr(settings, name) for name in names}
    for key, value in {**_KIND_SETTINGS.get(source.kind, {}), **source.settings}.items():
        name, _, threshold = key.partition(".")
        where = f"settings of the source {source.label}: {key}"
        if name not in RULES or threshold not in {f.name for f in dataclasses.fields(getattr(settings, name))}:
            raise ValueError(f"{where} is not a setting of a rule set")
        if name == "quality" and threshold not in _QUALITY_OF_A_SOURCE:
            raise ValueError(f"{where} is about the model, which all sources share; set it for all")
        if name in rules:
            now = getattr(rules[name], threshold)
            rules[name] = dataclasses.replace(rules[name], **{threshold: _as(now, value, where)})
        elif key in source.settings:
            raise ValueError(f"{where} is of a rule set that the source is not asked by; name it in its rules")
    return {name: rule for name, rule in rules.items() if rule.enabled}


def _as(now: Any, value: Any, where: str) -> Any:
    """A value given for one source, as the type of what it replaces: YAML reads 1e6 and the keys of JSON as text."""
    try:
        if isinstance(now, bool) or value is None:
            fits = isinstance(value, bool) or value is None
        elif isinstance(now, int | float):
            value = float(value)
            value = int(value) if isinstance(now, int) and value.is_integer() else value
            fits = isinstance(value, int) or isinstance(now, float)
        elif isinstance(now, dict):
            kind = type(next(iter(now), ""))
            value, fits = {kind(key): inner for key, inner in value.items()}, True
        else:
            fits = now is None or isinstance(value, type(now))
    except (TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"{where} is {value!r}, must be of the kind of {now!r}")
    return value
