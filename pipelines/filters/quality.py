"""A quality classifier: which of two sets of documents, that the user names, a document reads like.

Logistic regression over hashed word n-grams, as for GPT-3's filter (Brown et al. 2020, appendix A) and, with fastText,
DCLM (Li et al. 2024): ``good`` documents (an encyclopedia, textbooks, instruction data) against ``bad`` ones
(unfiltered crawl). The score is the probability of being good if both kinds were equally frequent. A document stays
when its score reaches a threshold, or by GPT-3's rule, which lets some low scores through at random.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from pipelines import sources, storage
from pipelines.documents import InputError
from pipelines.extract import Extractor, ExtractSettings
from pipelines.filters import Applied, Batch, Measure
from pipelines.sources import Source
from pipelines.stage import Stage, require_manifest

log = logging.getLogger("ingot")

FEWEST = 100
"""Documents of each set that training needs at least."""
HELD_OUT = 0.1
"""Share of the documents, chosen by a hash of their text, on which the model is measured."""

_MODEL = "model.npz"
_CHARACTERS = 100_000  # of a document are read in training: a book must not outweigh a thousand pages
_BATCH = 512


@dataclass
class QualityClassifier:
    """Keeps documents that a linear model over hashed word n-grams holds for good; acts when it has a model."""

    good: list[Source] = field(default_factory=list)
    """Sources of documents to keep more of, such as `[{kind: jsonl, path: wiki/*.jsonl}]`."""
    bad: list[Source] = field(default_factory=list)
    """Sources of documents to tell them from, such as a sample of unfiltered pages."""
    model: str = ""
    """Folder of a trained model to use in place of good and bad (a model lies in corpus/quality-model after a run)."""
    threshold: float = 0.5
    """Smallest score that stays; the model's manifest says which share of held-out documents stay at which."""
    pareto: float = 0.0
    """Shape of the Pareto distribution of GPT-3's rule (there 9), which replaces the threshold: a document stays if a
    number drawn from it, by a hash of the document's id, is above 1 - score. 0 does not."""
    store_score: bool = False
    """Whether the score goes into the metadata as `quality`, for users and for dedup to keep the best."""
    documents: int = 20_000
    """Most documents of each set to train on, taken evenly from its files."""
    ngrams: int = 2
    """Longest word n-grams that are looked at."""
    bits: int = 18
    """The model has 2 to the power of this many weights."""
    regularization: float = 1e-5
    """Weight of the squared weights in the loss; more for few or noisy documents."""
    seed: int = 0
    """Of the Pareto rule's draws."""

    @property
    def enabled(self) -> bool:
        """Whether there is a model to judge by, or documents to train one."""
        return bool(self.model or self.good or self.bad)

    def validate(self) -> None:
        """Raises ValueError for settings that cannot work."""
        if self.model and (self.good or self.bad):
            raise ValueError("model is given, so good and bad would not be used; give either")
        if bool(self.good) != bool(self.bad):
            given, lacking = ("good", "bad") if self.good else ("bad", "good")
            raise ValueError(f"{given} is given, so {lacking} has to be too")
        for source in (*self.good, *self.bad):
            source.validate()
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}, must be a probability between 0 and 1")
        if self.pareto < 0:
            raise ValueError(f"pareto is {self.pareto}, must be positive, or 0 for none")
        if self.documents < FEWEST:
            raise ValueError(f"documents is {self.documents}, must be at least {FEWEST}")
        if not 1 <= self.ngrams <= 5:
            raise ValueError(f"ngrams is {self.ngrams}, must be 1 to 5")
        if not 10 <= self.bits <= 24:
            raise ValueError(f"bits is {self.bits}, must be 10 to 24")
        if not self.regularization > 0:
            raise ValueError(f"regularization is {self.regularization}, must be above 0")

    def apply(self, batch: Batch) -> Applied:
        """Measures the score of each document; ``prepare`` has to have made the model."""
        scores = self.score(batch.table["text"])
        if self.pareto:
            ids = batch.table["id"].to_pylist()
            measures = [
                Measure("quality: score", scores),
                Measure("quality: score plus draw", scores + self._draws(ids), minimum=np.nextafter(1, 2)),
            ]
        else:
            measures = [Measure("quality: score", scores, minimum=self.threshold)]
        columns = {}
        if self.store_score:
            columns["metadata"] = with_score(batch.table["metadata"].to_pylist(), scores)
        return Applied(measures, columns=columns)

    def fingerprint(self) -> str:
        """Of the model."""
        return require_manifest(self.model, "curate")["fingerprint"]

    def score(self, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Probability of being good of each text, (documents,), float64."""
        from pipelines.filters import linear  # late: it compiles

        weights, intercept, ngrams, bits = self._trained
        return linear.sigmoid(linear.logits(linear.features(column, ngrams, bits), weights, intercept))

    @functools.cached_property
    def _trained(self) -> tuple[np.ndarray, float, int, int]:
        """The model, read once for all batches that these settings are applied to."""
        path = storage.join(self.model, _MODEL)
        if not self.model or not storage.exists(path):
            raise FileNotFoundError(f"{self.model or 'quality.model is empty'}: no quality model is there")
        with np.load(BytesIO(storage.read_bytes(path)), allow_pickle=False) as model:
            return model["weights"], float(model["intercept"]), int(model["ngrams"]), int(model["bits"])

    def _draws(self, ids: list[str]) -> np.ndarray:
        """A number of the Pareto (Lomax) distribution for each id."""
        hashes = [xxhash.xxh3_64_intdigest(f"quality\0{self.seed}\0{i}".encode()) for i in ids]
        uniform = (np.array(hashes, np.uint64) >> np.uint64(11)).astype(np.float64) / 2**53
        return (1 - uniform) ** (-1 / self.pareto) - 1


def with_score(metadata: list[str | None], scores: np.ndarray) -> pa.Array:
    """Metadata with the score added as ``quality``, rounded to four places."""
    out = []
    for text, score in zip(metadata, scores, strict=True):
        fields = json.loads(text) if text else {}
        fields["quality"] = round(float(score), 4)
        out.append(json.dumps(fields, ensure_ascii=False))
    return pa.array(out, pa.string())


def prepare(settings: QualityClassifier, folder: str) -> QualityClassifier:
    """Train the model, unless it is there or one is named.

    Args:
        settings: with ``good`` and ``bad``, or ``model``.
        folder: where the model and its manifest go.

    Returns:
        The settings to apply: with ``model`` in place of ``good`` and ``bad``.

    Raises:
        FileNotFoundError: a source has no files, or the folder named by ``model`` no model.
        ValueError: a set has too few documents; the message names it.
    """
    settings.validate()
    if settings.model:
        ready = replace(settings, model=storage.absolute(settings.model))
        ready.fingerprint()
        return ready
    units = {name: sources.discover(getattr(settings, name)) for name in ("good", "bad")}
    inputs = {
        name: xxhash.xxh3_128_hexdigest(json.dumps([[u.name, u.files, u.bytes, u.changed] for u in found]).encode())
        for name, found in units.items()
    }
    names = ("good", "bad", "documents", "ngrams", "bits", "regularization")
    stage = Stage("quality model", folder, {k: v for k, v in asdict(settings).items() if k in names}, inputs)
    if stage.finished():
        log.info("quality model: up to date, nothing to do")
    else:
        import ray

        stage.begin()
        log.info("quality model: trains on up to %d documents of each set", settings.documents)
        try:
            facts = ray.get(ray.remote(train).remote(folder, units, settings))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise
        stage.publish(facts)
        log.info("quality model: done, held-out AUC %.3f, accuracy %.3f", facts["auc"], facts["accuracy"])
    return replace(settings, model=folder, good=[], bad=[])


def train(folder: str, units: dict[str, list[sources.Unit]], settings: QualityClassifier) -> dict[str, Any]:
    """Train on the units of ``good`` and ``bad``, write the model, and return what its manifest says of it."""
    from pipelines.filters import linear

    seen: dict[bool, list[linear.Features]] = {False: [], True: []}  # by whether they are held out
    good: dict[bool, list[bool]] = {False: [], True: []}
    for name in ("good", "bad"):
        n = 0
        for texts in _batches(units[name], settings.documents):
            x = linear.features(pa.array(texts, pa.large_string()), settings.ngrams, settings.bits)
            # by the text: a document that a set holds twice, or both sets hold, is never on both sides
            held = np.array([xxhash.xxh3_64_intdigest(text.encode()) < HELD_OUT * 2**64 for text in texts])
            for side in (False, True):
                seen[side].append(linear.select(x, held == side))
                good[side] += [name == "good"] * int((held == side).sum())
            n += len(texts)
        if n < FEWEST:
            paths = ", ".join(source.path for source in getattr(settings, name))
            raise InputError(f"quality.{name}: {paths} has {n} documents, at least {FEWEST} are needed to train")
    y, y_held = np.array(good[False], bool), np.array(good[True], bool)
    if any(side.all() or not side.any() for side in (y, y_held)):
        raise InputError("quality: good or bad holds too few different documents to train and to measure the model")
    weights, intercept = linear.fit(linear.concatenate(seen[False]), y, settings.bits, settings.regularization)
    out = BytesIO()
    np.savez(out, weights=weights, intercept=intercept, ngrams=settings.ngrams, bits=settings.bits)
    storage.write_bytes(storage.join(folder, _MODEL), out.getvalue())
    scores = linear.sigmoid(linear.logits(linear.concatenate(seen[True]), weights, intercept))
    counts = {
        name: {"train": int((y == is_good).sum()), "held_out": int((y_held == is_good).sum())}
        for name, is_good in (("good", True), ("bad", False))
    }
    return {"documents": counts, **_measured(scores, y_held)}


def _measured(scores: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """How well the model tells held-out documents apart; both sets weigh the same."""
    from pipelines.filters import linear

    right = np.where(y, scores, 1 - scores)
    each = [right[y], right[~y]]
    thresholds = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    return {
        "auc": linear.area_under_curve(scores, y),
        "accuracy": float(np.mean([(r >= 0.5).mean() for r in each])),
        "log_loss": float(np.mean([-np.log(np.maximum(r, 1e-300)).mean() for r in each])),
        "kept_at_threshold": {
            str(t): {"good": float((scores[y] >= t).mean()), "bad": float((scores[~y] >= t).mean())} for t in thresholds
        },
    }


def _batches(units: list[sources.Unit], most: int) -> Iterator[list[str]]:
    """Texts of the units, of each about as many, cut to a length that bounds memory."""
    batch: list[str] = []
    left = most
    with Extractor(ExtractSettings()) as extractor:
        for i, unit in enumerate(units):
            share = -(-left // (len(units) - i))
            for record in sources.read(unit) if share else ():
                text = _text(record, extractor)
                if not text.strip():
                    continue
                batch.append(text[:_CHARACTERS])
                if len(batch) == _BATCH:
                    yield batch
                    batch = []
                share, left = share - 1, left - 1
                if share == 0:
                    break
    if batch:
        yield batch


def _text(record: Any, extractor: Extractor) -> str:
    """A record's text; of a sample only the good ones count, so what is malformed has none."""
    if not isinstance(record, dict):
        return ""
    if "html" in record:
        (text,) = extractor([(record["html"], record.get("content_type"))])
        return text if isinstance(text, str) else ""
    return record["text"] or ""
