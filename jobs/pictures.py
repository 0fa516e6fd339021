"""Two pictures of data: the funnel of documents, and the shares of the sources."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

from jobs.charts import byte_size, number, picture


def funnel_chart(manifests: dict[str, dict[str, Any]]) -> str:
    """Documents and bytes that stay after each stage, as shares of what came in at first, and why the rest went."""
    width, left, right, row = 960, 90, 620, 84
    parts = ['<text class="bold" x="0" y="14">From raw documents to the corpus</text>']
    stages = list(manifests.items())
    first = stages[0][1] if stages else None
    for place, (stage, manifest) in enumerate(stages):
        y = 30 + place * row
        parts.append(f'<text class="bold" x="0" y="{y + 22}">{html.escape(stage)}</text>')
        for line, (unit, show) in enumerate((("documents", number), ("bytes", byte_size))):
            whole = max(first[f"{unit}_in"], first[f"{unit}_out"], 1)
            came, stayed = manifest[f"{unit}_in"], manifest[f"{unit}_out"]
            scale = (right - left) / whole
            bar = f'y="{y + line * 24}" height="18" rx="2"'
            note = f"{stage}: {came:,} {unit} in, {stayed:,} out"
            parts.append(f'<g><title>{note}</title><rect class="dropped" x="{left}" width="{came * scale:.1f}" {bar}/>')
            parts.append(f'<rect class="kept" x="{left}" width="{min(stayed, came) * scale:.1f}" {bar}/></g>')
            text = f"{show(stayed)} of {show(came)}" + (" documents" if unit == "documents" else "")
            parts.append(f'<text class="ink" x="{right + 10}" y="{y + line * 24 + 14}">{text}</text>')
        reasons = sorted(manifest["set_aside"].items(), key=lambda item: -item[1]["documents"])
        told = " · ".join(f"{number(counts['documents'])} {reason}" for reason, counts in reasons[:3])
        more = f" · {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
        if told:
            parts.append(f'<text x="{left}" y="{y + 60}">gone: {html.escape(told + more)}</text>')
    return picture(width, 24 + max(len(stages), 1) * row, parts, "Funnel of documents")


def shares_chart(parts: list[tuple[str, float]], show: Callable[[float], str], most: int = 20) -> str:
    """A bar for each part of a whole, the largest first.

    Args:
        parts: name and size.
        show: a size for people.
        most: bars; the rest becomes one.
    """
    width, left, right, row = 960, 150, 760, 24
    whole = sum(size for _, size in parts) or 1
    if len(parts) > most:
        rest = parts[most - 1 :]
        parts = [*parts[: most - 1], (f"{len(rest)} more", sum(size for _, size in rest))]
    out = []
    for place, (name, size) in enumerate(parts):
        y = place * row
        length = max((right - left) * size / max(parts[0][1], *(s for _, s in parts)), 0.5)
        out.append(f'<text class="ink" text-anchor="end" x="{left - 10}" y="{y + 14}">{html.escape(name)}</text>')
        out.append(f'<rect class="kept" x="{left}" width="{length:.1f}" y="{y + 2}" height="16" rx="2"/>')
        told = f"{size / whole:.2%}, {show(size)}"
        out.append(f'<text class="ink" x="{left + length + 8:.1f}" y="{y + 14}">{html.escape(told)}</text>')
    return picture(width, max(len(parts), 1) * row, out, "Shares")
