"""Published rule sets that say which documents to drop, and why; one file a rule set.

A rule set is a settings dataclass with ``enabled``, ``validate()`` and ``apply(batch) -> Applied``: it measures every
document of a batch, says which values are allowed, and may edit the text. Whoever runs it asks ``judge`` for the first
broken measure of each document. Measures hold the true value for every document, so that they can be drawn.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from pipelines.words import Texts


class Verdict(NamedTuple):
    """Why a document goes.

    Attributes:
        reason: rule set and rule, such as ``gopher quality: mean word length``.
        value: what the document has.
        threshold: what the rule allows.
    """

    reason: str
    value: float
    threshold: float | None


class Measure(NamedTuple):
    """One value of every document of a batch, and what is allowed.

    Attributes:
        reason: rule set and rule, countable, such as ``gopher quality: mean word length``.
        values: (documents,), float64; NaN where the rule does not apply, which is never broken.
        minimum: smallest value that is allowed.
        maximum: largest value that is allowed.
        details: optional words per document, such as ``domain example.com is listed``.
    """

    reason: str
    values: np.ndarray
    minimum: float = -np.inf
    maximum: float = np.inf
    details: Sequence[str | None] | None = None


class Applied(NamedTuple):
    """What a rule set found in a batch.

    Attributes:
        measures: in the order in which they are judged; the first broken one is the verdict.
        text: the edited text of all documents (large_string), when the rule set edits.
        counts: countable side facts, such as ``c4: javascript line`` with the number of lines removed.
        columns: columns of the table that the rule set fills, for all documents, by name.
    """

    measures: list[Measure]
    text: pa.Array | None = None
    counts: Mapping[str, int] = MappingProxyType({})
    columns: Mapping[str, pa.Array] = MappingProxyType({})


class Batch:
    """Documents on their way through the rules.

    Attributes:
        table: the documents, ``documents.SCHEMA``.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    @functools.cached_property
    def texts(self) -> Texts:
        """The one pass over the text column, made when a rule first asks."""
        from pipelines.words import Texts

        return Texts.of(self.table["text"])

    def filter(self, mask: np.ndarray) -> Batch:
        """The documents where ``mask`` (documents,), bool, is true; what was analysed is not analysed again."""
        rest = Batch(self.table.filter(pa.array(mask)))
        if "texts" in self.__dict__:
            rest.texts = self.texts.filter(mask)
        return rest

    def with_text(self, column: pa.Array | pa.ChunkedArray) -> Batch:
        """The same documents with other text; what was analysed and did not change is not analysed again."""
        at = self.table.schema.get_field_index("text")
        rest = Batch(self.table.set_column(at, self.table.schema.field(at), column))
        if "texts" in self.__dict__:
            same = pc.fill_null(pc.equal(self.table["text"], rest.table["text"]), False)
            changed = ~np.asarray(same, dtype=bool)
            if not changed.any():
                rest.texts = self.texts
            elif changed.mean() < 0.5:
                rest.texts = self.texts.updated(changed, rest.table["text"].filter(pa.array(changed)))
        return rest

    def with_columns(self, columns: Mapping[str, pa.Array]) -> Batch:
        """The same documents with columns other than the text replaced."""
        table = self.table
        for name, values in columns.items():
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(at), values)
        rest = Batch(table)
        if "texts" in self.__dict__:
            rest.texts = self.texts
        return rest


def judge(measures: Sequence[Measure], n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first broken measure of each document.

    Args:
        measures: in order; each with ``n`` values.
        n: documents.

    Returns:
        Index of the first broken measure or -1, (n,), int64; its value and the threshold it breaks, (n,), float64,
        NaN where none is broken.
    """
    broken = np.full(n, -1, np.int64)
    value, threshold = np.full(n, np.nan), np.full(n, np.nan)
    for i, measure in enumerate(measures):
        low = measure.values < measure.minimum  # NaN compares false
        here = (low | (measure.values > measure.maximum)) & (broken < 0)
        broken[here] = i
        value[here] = measure.values[here]
        threshold[here] = np.where(low[here], measure.minimum, measure.maximum)
    return broken, value, threshold


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Part of the whole, float64; NaN where the whole is nothing."""
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
