"""The corpus as one HTML page: funnel, sources, values of the rules with their thresholds, samples, duplicates."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import pyarrow as pa

from jobs.charts import byte_size, number, picture
from jobs.page import figure, folded, page, table, tiles
from jobs.pictures import funnel_chart
from jobs.provenance import stage_tables
from pipelines import statistics, storage
from pipelines.curate import stage_manifests
from pipelines.dedup import clusters, published
from pipelines.stage import part_uris, read_part

REPORT = "report.html"

_SAMPLES = 4  # of kept documents of a source, and of dropped ones of a reason
_SAMPLED_PARTS = 8
_SHOWN = 600  # characters of a sample
_UNBOUNDED = 1e15


def build_report(corpus: str) -> str:
    """Write ``report.html`` beside the stages, from their manifests and some of their rows.

    Returns:
        The page's path or URI.
    """
    manifests = stage_manifests(corpus)
    sections = [
        _headline(manifests),
        figure("Documents through the stages", funnel_chart(manifests)),
        stage_tables(manifests),
        _sources(manifests),
        _histograms(manifests),
        _kept_samples(corpus, manifests),
        *(_dropped_samples(corpus, name, manifest) for name, manifest in manifests.items()),
        _clusters(corpus, manifests),
        folded(
            "Settings",
            "".join(
                f"<h2>{name}</h2><pre>{html.escape(json.dumps(manifest['settings'], indent=1))}</pre>"
                for name, manifest in manifests.items()
            ),
        ),
    ]
    uri = storage.join(corpus, REPORT)
    storage.write_bytes(uri, page("Corpus: Ingot", "\n".join(sections)).encode("utf-8", "replace"))
    return uri


def _headline(manifests: dict[str, dict[str, Any]]) -> str:
    stages = list(manifests.values())
    first, last = stages[0], stages[-1]
    seconds = sum(manifest["seconds"] for manifest in stages)
    share = last["documents_out"] / max(first["documents_in"], 1)
    told = [
        ("records read", f"{first['documents_in']:,}"),
        ("read", byte_size(first["bytes_in"])),
        ("documents kept", f"{last['documents_out']:,}"),
        ("of the records", f"{share:.1%}"),
        ("text kept", byte_size(last["bytes_out"])),
        ("work of the stages", f"{seconds:,.0f} s"),
    ]
    return f"<header><h1>Corpus</h1></header>{tiles(told)}"


def _sources(manifests: dict[str, dict[str, Any]]) -> str:
    """Documents and bytes of each source after the first and after the last stage; languages and lengths at the end."""
    seen = [found["documents"] for m in manifests.values() if "documents" in (found := m["statistics"])]
    if not seen:
        return ""
    first, last = seen[0], seen[-1]
    total = sum(counts["bytes"] for counts in last["sources"].values()) or 1
    rows = []
    for source, before in sorted(first["sources"].items()):
        after = last["sources"].get(source, {"documents": 0, "bytes": 0})
        rows.append(
            [
                source,
                f"{before['documents']:,}",
                f"{after['documents']:,}",
                byte_size(before["bytes"]),
                byte_size(after["bytes"]),
                f"{100 * after['bytes'] / total:.1f} %",
            ]
        )
    languages = sorted(last["languages"].items(), key=lambda item: -item[1])
    told = [[code, f"{count:,}"] for code, count in languages[:30]]
    lengths = histogram_chart("Bytes of a document that was kept", "decades", last["bytes"], [])
    header = ["source", "documents read", "kept", "text read", "kept", "of the corpus"]
    return (
        table("Sources", header, rows)
        + folded("Languages", table("", ["language", "documents"], told))
        + f'<div class="grid"><figure>{lengths}</figure><div></div></div>'
    )


# The values of the rules


def _histograms(manifests: dict[str, dict[str, Any]]) -> str:
    charts = []
    for manifest in manifests.values():
        for reason, scales in sorted(manifest["statistics"].get("measures", {}).items()):
            for scale, found in scales.items():
                pairs = [tuple(map(float, key.split())) for key in found["limits"]]
                # A bound as high as whole numbers go is none.
                limits = [(low, math.inf if high > _UNBOUNDED else high) for low, high in pairs]
                charts.append(f"<figure>{histogram_chart(reason, scale, found['bins'], limits)}</figure>")
    if not charts:
        return ""
    note = "Documents by the value that a rule measured; the lines are its thresholds, and pale bars lie beyond them."
    return f'<section><h2>What the rules measured</h2><p>{note}</p><div class="grid">{"".join(charts)}</div></section>'


def histogram_chart(title: str, scale: str, bins: dict[str, int], limits: list[tuple[float, float]]) -> str:
    """Bars of how many documents have a value, pale beyond the limits, which are vertical lines.

    Args:
        title: what was measured.
        scale: of pipelines.statistics, ``shares`` or ``decades``.
        bins: documents by the number of the bin.
        limits: smallest and largest value that a rule allows; several where sources differ.
    """
    width, height, left, bottom, top = 470, 200, 50, 160, 26
    counts = {int(place): count for place, count in bins.items()}
    thresholds = sorted({limit for pair in limits for limit in pair if math.isfinite(limit)})
    step = 5 if scale == "shares" else 2  # bins drawn as one bar
    spots: dict[int, int] = {}
    lowest = min((place for place in counts if place > -1000), default=0)
    zero = lowest // step - 2  # zeros stand apart, left of a logarithmic scale
    for place, count in counts.items():
        spot = zero if place == -1000 else place // step
        spots[spot] = spots.get(spot, 0) + count
    marks = [_spot(limit, scale, step, zero) for limit in thresholds]
    first = min([*spots, *map(math.floor, marks)], default=0)
    last = max([*spots, *map(math.ceil, marks)], default=1) + 1
    if scale == "shares":
        first, last = 0, max(last, 100 // step)
    highest = max(spots.values(), default=1)

    def x(spot: float) -> float:
        return left + (spot - first) / (last - first) * (width - left - 10)

    parts = [f'<text class="bold" x="0" y="14">{html.escape(title)}</text>']
    for spot, count in sorted(spots.items()):
        size = (bottom - top) * count / highest
        low = "0" if spot == zero and scale == "decades" else number(_value(spot, scale, step))
        note = f"from {low}: {count:,} documents"
        start = 0.0 if spot == zero and scale == "decades" else _value(spot, scale, step)
        end = 0.0 if spot == zero and scale == "decades" else _value(spot + 1, scale, step)
        beyond = bool(limits) and all(end <= minimum or start > maximum for minimum, maximum in limits)
        css = "dropped" if beyond else "kept"
        parts.append(
            f'<g><title>{note}</title><rect class="{css}" x="{x(spot) + 0.5:.1f}" y="{bottom - size:.1f}" '
            f'width="{max(x(spot + 1) - x(spot) - 1, 1):.1f}" height="{max(size, 0.7):.1f}"/></g>'
        )
    parts.append(f'<line class="grid" x1="{left}" x2="{width - 10}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text text-anchor="end" x="{left - 6}" y="{top + 8}">{number(highest)}</text>')
    for spot in _tick_spots(first, last, scale, step, zero):
        label = "0" if spot == zero and scale == "decades" else number(_value(spot, scale, step))
        parts.append(f'<text text-anchor="middle" x="{x(spot):.1f}" y="{bottom + 16}">{label}</text>')
    for limit, mark in zip(thresholds, marks, strict=True):
        parts.append(
            f'<g><title>threshold {limit:g}</title><line class="rule rollback" x1="{x(mark):.1f}" x2="{x(mark):.1f}" '
            f'y1="{top}" y2="{bottom}"/></g><text x="{min(x(mark) + 4, width - 60):.1f}" y="{top + 8}">{limit:g}</text>'
        )
    return picture(width, height - 14, parts, title)


def _spot(value: float, scale: str, step: int, zero: int) -> float:
    """Where a value lies on the axis, in bars."""
    if scale == "shares":
        return value * 100 / step
    return math.log10(value) * 10 / step if value > 0 else zero


def _value(spot: int, scale: str, step: int) -> float:
    return statistics.bin_range(spot * step, scale)[0]


def _tick_spots(first: int, last: int, scale: str, step: int, zero: int) -> Iterator[int]:
    if scale == "shares":
        yield from range(0, last + 1, 4)
        return
    if first <= zero:
        yield zero
    decade = 10 // step
    every = decade * max(1, (last - first) // (decade * 7))
    yield from range(math.ceil((zero + 2) / every) * every, last + 1, every)


# Samples


def _kept_samples(corpus: str, manifests: dict[str, dict[str, Any]]) -> str:
    name, manifest = list(manifests.items())[-1]
    uris: dict[Any, list[str]] = {}
    for part, uri in zip(manifest["parts"], part_uris(storage.join(corpus, name), manifest), strict=True):
        uris.setdefault(part.get("source"), []).append(uri)
    rows = chain(*(_first_rows(found, ["id", "text", "url", "path", "source"]) for found in uris.values()))
    told = _by_group(rows, "source")
    parts = [folded(f"{source}", "".join(map(_sample, found))) for source, found in sorted(told.items())]
    return f"<section><h2>Samples of what was kept</h2>{''.join(parts)}</section>" if parts else ""


def _dropped_samples(corpus: str, name: str, manifest: dict[str, Any]) -> str:
    folder = storage.join(corpus, name, "set-aside")
    if not manifest["set_aside"] or not storage.exists(folder):
        return ""
    rows = _first_rows(
        [file.uri for file in storage.list_files(folder)],
        ["id", "text", "url", "path", "source", "reason", "value", "threshold", "detail", "offset"],
    )
    told = _by_group(rows, "reason")
    parts = [
        folded(f"{reason} ({counts['documents']:,})", "".join(map(_sample, told[reason])))
        for reason, counts in manifest["set_aside"].items()
        if reason in told
    ]
    return f"<section><h2>Samples of what {html.escape(name)} set aside</h2>{''.join(parts)}</section>"


def _first_rows(uris: list[str], columns: list[str]) -> Iterator[dict[str, Any]]:
    """Some rows from parts spread over all."""
    for uri in uris[:: max(1, len(uris) // _SAMPLED_PARTS)]:
        for rows in islice(read_part(uri, rows=512, columns=columns), 4):
            at = rows.schema.get_field_index("text")
            # A document may be a whole book: only its beginning leaves the table.
            text = pa.compute.utf8_slice_codeunits(rows["text"], 0, _SHOWN)
            yield from rows.set_column(at, "text", text).to_pylist()


def _by_group(rows: Iterable[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    told: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found = told.setdefault(row[key] or "", [])
        if len(found) < _SAMPLES:
            found.append(row)
    return told


def _sample(row: dict[str, Any]) -> str:
    where = row["url"] or row["path"] or row["id"] or ""
    if row.get("offset") is not None:
        where += f", offset {row['offset']:,}"
    why = ""
    if row.get("reason"):
        facts = [] if row["value"] is None else [f"value {row['value']:.4g}"]
        facts += [] if row["threshold"] is None else [f"threshold {row['threshold']:.4g}"]
        facts += [row["detail"]] if row["detail"] else []
        why = f" ({', '.join(facts)})" if facts else ""
    text = row["text"] or ""
    more = " …" if len(text) == _SHOWN else ""
    return f"<blockquote><b>{html.escape(where + why)}</b>\n{html.escape(text + more)}</blockquote>"


def _clusters(corpus: str, manifests: dict[str, dict[str, Any]]) -> str:
    """The largest sets of duplicates that each search found, with some of their members."""
    parts = []
    for name in ("exact", "near"):
        uri = storage.join(corpus, name, published.FOLDER, clusters.REPORT)
        if name not in manifests or not storage.exists(uri):
            continue
        found = storage.read_json(uri)
        sizes = sorted(found["sizes"].items(), key=lambda item: int(item[0]))
        rows = [[f"{int(size):,}", f"{count:,}"] for size, count in sizes]
        inner = table("", ["documents in a cluster", "clusters"], rows)
        for cluster in found["largest"]:
            members = "".join(
                f"<blockquote><b>{html.escape(m['id'])}</b>\n{html.escape(m['text'])}</blockquote>"
                for m in cluster["members"]
            )
            inner += folded(f"{cluster['size']:,} documents, kept {cluster['kept']}", members)
        parts.append(folded(f"{name} duplicates", inner))
    return f"<section><h2>Clusters of duplicates</h2>{''.join(parts)}</section>" if parts else ""
