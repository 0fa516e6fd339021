"""From the fields of a JSON object or the columns of a table to a document, by the source's mapping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipelines.documents import document_id
from pipelines.sources import Record, Source
from pipelines.sources.code import language_of

DEFAULTS = {"text": "text", "url": "url"}
"""Where the parts of a document are looked for unless the source says otherwise."""

_OWN = ("text", "url", "id", "language", "language_score")  # all other names of the mapping go to the metadata
_SCALARS = (str, int, float, bool)
_CHARACTERS = 2000  # of a string in the metadata
_ITEMS = 20  # of a list in the metadata


def mapping(source: Source) -> dict[str, str]:
    """The source's columns, with the defaults for those that it does not name."""
    return DEFAULTS | source.columns


def document(fields: Mapping[str, Any], source: Source, uri: str, place: int) -> Record | str:
    """The document that a record's fields make, but for its path and offset, or why they make none.

    Args:
        fields: of the record; nested ones are named with dots.
        source: whose mapping is taken.
        uri: the file.
        place: number of the record in the file, by which its id is made unless the mapping names one.
    """
    wanted = mapping(source)
    found = {part: lookup(fields, name) for part, name in wanted.items()}
    text = found["text"]
    if not isinstance(text, str):
        return f"no string in the field {wanted['text']}; there are {', '.join(map(str, list(fields)[:50])) or 'none'}"
    key: tuple[str, Any] = (source.relative(uri), place)
    if "id" in wanted:
        if not isinstance(found["id"], (str, int)):
            return f"no id in the field {wanted['id']}"
        key = ("", found["id"])
    record: Record = {"id": document_id(source.label, *key), "text": clean(text), "path": uri}
    record["url"] = clean(found["url"]) if isinstance(found["url"], str) else None
    if isinstance(found.get("language"), str):
        record["language"] = clean(found["language"]).lower()
    if isinstance(found.get("language_score"), (int, float)):
        record["language_score"] = float(found["language_score"])
    named = {part: _storable(value) for part, value in found.items() if part not in _OWN}
    if source.kind == "code" and "language" not in record and isinstance(named.get("file"), str):
        record["language"] = language_of(named["file"])
    rest = _rest(fields, set(wanted.values()))
    record["metadata"] = rest | {part: value for part, value in named.items() if value is not None}
    return record


def lookup(fields: Mapping[str, Any], name: str) -> Any:
    """The field of that name, or the nested one that it leads to; None when there is none."""
    if name in fields:
        return fields[name]
    head, _, rest = name.partition(".")
    inner = fields.get(head) if rest else None
    return lookup(inner, rest) if isinstance(inner, Mapping) else None


def _rest(fields: Mapping[str, Any], taken: set[str], prefix: str = "") -> dict[str, Any]:
    """Numbers, truth values and strings of moderate length that the mapping does not name, at most one level deep."""
    out = {}
    for key, value in fields.items():
        name = f"{prefix}{key}"
        if name in taken:
            continue
        if isinstance(value, Mapping) and not prefix:
            out |= _rest(value, taken, f"{name}.")
        elif isinstance(value, _SCALARS) and (value := _storable(value)) is not None:
            out[clean(name)] = value
    return out


def _storable(value: Any) -> Any:
    """A value that metadata can hold: a scalar or a short list of such; None for others."""
    if isinstance(value, list):
        return [v for v in map(_storable, value[:_ITEMS]) if isinstance(v, _SCALARS)]
    if not isinstance(value, _SCALARS) or (isinstance(value, str) and len(value) > _CHARACTERS):
        return None
    if isinstance(value, float) and not math.isfinite(value):  # which JSON does not have
        return None
    return clean(value) if isinstance(value, str) else value


def clean(text: str) -> str:
    """A text that can be stored as UTF-8: lone surrogates, which JSON can spell, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
