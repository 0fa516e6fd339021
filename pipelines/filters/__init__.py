"""Published rule sets that say which documents to drop, and why; one file a rule set."""

from __future__ import annotations

from typing import NamedTuple


class Verdict(NamedTuple):
    """Why a document goes.

    Attributes:
        reason: rule set and rule, such as ``gopher quality: mean word length``.
        value: what the document has.
        threshold: what the rule allows.
    """

    reason: str
    value: float
    threshold: float
