"""Scores as pictures: a group of tasks with a bar for each subject, and checkpoints as curves."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

import numpy as np

from jobs.charts import Plot, number, picture, standalone, ticks

Row = dict[str, Any]  # as of jobs.eval_harness.rows

_LINE = 18
_COLUMN, _NAMES, _BARS = 480, 205, 190  # pixels: of a column, of its names, of bars of full length
_CURVE, _GAP = 90, 36


def tasks_picture(scores: list[Row]) -> dict[str, str]:
    """A picture, as an SVG file of its own, of each group that is part of no other, by its name."""
    return {task: standalone(group_picture(scores, task)) for task in roots(scores) if _below(scores, task)}


def roots(scores: Iterable[Row]) -> list[str]:
    """Tasks and groups that are part of no group, in their order."""
    return list(dict.fromkeys(row["task"] for row in scores if row["group"] is None))


def group_picture(scores: list[Row], task: str) -> str:
    """A bar for each task below a group, block by block, with its standard error; one metric."""
    blocks = _blocks(scores, task)
    columns: list[list[Row]] = [[], []]
    half = sum(map(len, blocks)) / 2
    for block in blocks:
        columns[1 if len(columns[0]) + len(block) / 2 > half and columns[0] else 0] += block
    shown = [row for column in columns for row in column]
    longest = max(1e-9, *(max(row["value"] + (row["stderr"] or 0), row.get("chance") or 0) for row in shown))
    parts = []
    for place, column in enumerate(columns):
        for line, row in enumerate(column):
            parts += _bar(row, place * _COLUMN + _NAMES, line * _LINE, _BARS / longest)
    metric = shown[0]["metric"]
    height = max(map(len, columns)) * _LINE + 26
    note = f"{metric}; thin lines: one standard error to both sides"
    note += "" if shown[0]["n_shot"] is None else f"; {shown[0]['n_shot']}-shot"
    chance = shown[0].get("chance")
    note += f"; dashed: chance, {chance:.0%}" if chance else ""
    parts.append(f'<text x="0" y="{height - 4}">{html.escape(note)}</text>')
    return picture(2 * _COLUMN, height, parts, f"Scores of {task}")


def _bar(row: Row, x: float, y: float, scale: float) -> list[str]:
    value, error, chance = row["value"], row["stderr"] or 0.0, row.get("chance")
    told = f"{row['task']}: {row['metric']} {value:.4f}" + (f" ± {error:.4f}" if row["stderr"] is not None else "")
    told += f", {row['items']:,} questions" if row["items"] else ""
    css = "bold" if row["is_group"] else "ink"
    name = row["alias"].strip(" -").replace("_", " ")
    end, middle = x + value * scale, y + 9
    low, high = max(value - error, 0) * scale + x, (value + error) * scale + x
    out = [
        f"<g><title>{html.escape(told)}</title>",
        f'<text class="{css}" text-anchor="end" x="{x - 8}" y="{y + 13}">{html.escape(name)}</text>',
        f'<rect class="kept" x="{x}" width="{max(end - x, 0.5):.1f}" y="{y + 3}" height="{_LINE - 6}" rx="2"/>',
        f'<line class="line undone" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>',
    ]
    if chance:
        at = x + chance * scale
        out.append(f'<line class="undone dashed" x1="{at:.1f}" x2="{at:.1f}" y1="{y}" y2="{y + _LINE}"/>')
    shown = f"{value:.1%}" if row["metric"].startswith(("acc", "exact_match", "pass@")) else number(value)
    after = max(end, high, x + (chance or 0) * scale) + 6
    return [*out, f'<text class="ink" x="{after:.1f}" y="{y + 13}">{shown}</text></g>']


def _blocks(scores: list[Row], task: str) -> list[list[Row]]:
    """The group itself, then each group below it with its tasks, and tasks that are directly below it."""
    first = next(row for row in scores if row["task"] == task)
    same = {
        row["task"]: row
        for row in scores
        if (row["metric"], row["filter"]) == (first["metric"], first["filter"])
    }  # fmt: skip
    groups = {row["group"] for row in scores}
    children = [row for row in same.values() if row["group"] == task]
    alone = [row for row in children if row["task"] not in groups]
    blocks = [[same[task]], *([alone] if alone else [])]
    inner = [row["task"] for row in children if row["task"] in groups]
    blocks += [[row for block in _blocks(scores, child) for row in block] for child in inner]
    return [[row | {"is_group": row["task"] in groups} for row in block] for block in blocks]


def _below(scores: list[Row], task: str) -> bool:
    return any(row["group"] == task for row in scores)


def curves_picture(checkpoints: list[tuple[int, list[Row]]]) -> str:
    """Scores over steps, a panel for each metric of each task that is part of no group; the surface: standard errors.

    Args:
        checkpoints: steps, rising, and what they scored; only what was asked in the same way is joined.
    """
    series: dict[tuple[Any, ...], list[tuple[int, Row]]] = {}
    for step, scores in checkpoints:
        for row in scores:
            if row["group"] is None:
                key = tuple(row[name] for name in ("task", "metric", "filter", "n_shot", "items"))
                series.setdefault(key, []).append((step, row))
    series = {key: points for key, points in series.items() if len(points) > 1}
    if not series:
        return ""
    ends = 0.0, float(max(step for points in series.values() for step, _ in points))
    parts, top = [], 24.0
    for (task, metric, filtered, shots, items), points in series.items():
        steps = np.array([step for step, _ in points], float)
        values = np.array([row["value"] for _, row in points])
        errors = np.array([row["stderr"] or 0.0 for _, row in points])
        low, high = float((values - errors).min()), float((values + errors).max())
        pad = 0.08 * (high - low) or 0.05
        low = low - pad if values.min() < 0 else max(low - pad, 0.0)
        title = f"{task} {metric}" + ("" if filtered == "none" else f", {filtered}")
        asked = [] if shots is None else [f"{shots}-shot"]
        asked += [f"{items:,} questions"] if items else []
        title += f" ({', '.join(asked)})" if asked else ""
        plot = Plot(title, ends, (low, high + pad), 62, 944, top, top + _CURVE, now=f"{values[-1]:.4f}")
        plot.band(steps, values - errors, values + errors, "train")
        plot.line(steps, values, "train")
        notes = [f"step {step:,}: {row['value']:.4f} ± {row['stderr'] or 0:.4f}" for step, row in points]
        plot.dots(steps, values, "validation", notes)
        parts += plot.svg()
        top += _CURVE + _GAP
    bottom = top - _GAP
    parts += [
        f'<text text-anchor="middle" x="{plot.px(step):.1f}" y="{bottom + 18}">{number(step)}</text>'
        for step in ticks(*ends, about=8)
    ]
    parts.append(f'<text text-anchor="end" x="48" y="{bottom + 18}">step</text>')
    return picture(960, bottom + 28, parts, "Scores over checkpoints")
