"""A run as one picture: its numbers in panels over the same steps, what happened to it as marks through all of them.

The strip below, of ``jobs.clock``, has the time.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from jobs.charts import Buckets, Plot, bucketed, number, picture, smooth, ticks
from jobs.clock import clock_strip
from jobs.events import sentence
from jobs.history import Columns, History, runs

WIDTH, LEFT, RIGHT = 960, 62, 944
_BUCKETS = 294  # of 3 pixels each
_MOST_POINTS = 3 * _BUCKETS  # drawn one by one
_APART = 6.0  # pixels; marks of one kind that are nearer become one
_LANE = 42  # where the marks' symbols are
_LOSS_HEIGHT, _HEIGHT, _GAP = 230, 62, 34
_MOST_STRETCHES = 60  # that were undone, the longest

# Marks by the kind of event; a resume is one of its cause.
_KINDS = {
    "checkpoint": "checkpoint",
    "spike": "rollback",
    "rollback": "rollback",
    "stop": "rollback",
    "worker_failure": "restart",
    "controller_failure": "restart",
    "preemption": "resize",
    "preempted": "resize",
    "resize": "resize",
    "interrupt": "resize",
    "checkpoint_failed": "failed",
    "corrupt_checkpoint": "failed",
    "validation_failed": "failed",
}
_NAMES = {
    "checkpoint": "checkpoint",
    "restart": "restart",
    "rollback": "spike, rollback",
    "resize": "preemption, resize",
    "failed": "checkpoint failed",
    "outlier": "update skipped",
}
_ORDER = ("outlier", "checkpoint", "failed", "resize", "restart", "rollback")


@dataclass
class Mark:
    """Something that happened: at which step, of what kind, in words, and from which step on it undid the rest."""

    step: float
    kind: str
    note: str
    undone_from: float | None = None


def run_picture(
    history: History, events: list[dict[str, Any]], skips: list[list[int]], only: tuple[str, ...] | None = None
) -> str:
    """The whole picture as SVG.

    Args:
        history: the run's metrics.
        events: in the order of their time.
        skips: half-open ranges of data steps that training passed over for good.
        only: titles of the panels to draw, None for all that there are numbers for.
    """
    valid = history.valid()
    ends = 0.0, max(float(np.max(c["step"], initial=1.0)) for c in (history.steps, history.validation))
    top, plots = _LANE + 36, []
    if only is None or "Loss" in only:
        plots.append(_loss_plot(history, valid, ends, top))
        top += _LOSS_HEIGHT + _GAP
    for title, key, log in (
        ("Gradient norm before clipping", "grad_norm", True),
        ("Learning rate", "lr", False),
        ("Tokens per second", "tokens_per_second", False),
        ("Model FLOP/s utilization", "mfu", False),
        ("GPU memory at its peak (GB)", "memory_gb", False),
    ):
        if (only is None or title in only) and np.isfinite(valid[key]).any():
            plots.append(_plot(title, key, valid, ends, top, log))
            top += _HEIGHT + _GAP
    bottom = plots[-1].bottom if plots else top
    marks = marks_of(history, events)
    parts = [part for plot in plots for part in plot.svg()]
    behind = _shades(marks, plots)
    front = [*_draw(marks, plots[0], bottom), *_skipped(skips, valid, plots[0], bottom)] if plots else []
    below = (
        [*_step_axis(plots[0], valid, bottom), *clock_strip(history, events, (LEFT, RIGHT), bottom + 70)]
        if plots
        else []
    )
    legend = _legend(history, valid, marks)
    return picture(WIDTH, bottom + 140, [*legend, *behind, *parts, *front, *below], "The run step by step")


# Panels


def _loss_plot(history: History, valid: Columns, ends: tuple[float, float], top: float) -> Plot:
    step, loss, held_out = valid["step"], valid["loss"], history.validation
    many = len(step) > _MOST_POINTS
    few = bucketed(step, loss, ends, _BUCKETS if many else max(len(step), 1))
    undone = undone_stretches(history)
    low, high = _loss_range(few, held_out, ends)
    # A spike that was undone may leave the picture at its top.
    highest = max([float(np.nanmax(y)) for _, y in undone if np.isfinite(y).any()], default=high)
    high = max(high, min(highest, low + 1.25 * (high - low)))
    told = []
    if len(few.median):
        told.append(f"training {_newest(loss):.3f}")
    if len(held_out["step"]):
        last = held_out["validation_loss"][-1], held_out["validation_bits_per_byte"][-1]
        told.append(f"validation {last[0]:.3f}, {last[1]:.3f} bits per byte")
    plot = Plot("Loss (nats per token)", ends, (low, high), LEFT, RIGHT, top, top + _LOSS_HEIGHT, now=" · ".join(told))
    for x, y in undone:
        plot.line(x, y, "undone dashed")
    if many:
        plot.band(few.x, few.low, few.high, "train")
        plot.line(few.x, few.median, "train")
    else:
        window = len(step) // 40
        plot.line(step, loss, "train thin" if window > 1 else "train")
        if window > 1:
            finite = np.isfinite(loss)
            plot.line(step[finite], smooth(loss[finite], window), "train")
    points, notes = _validation_points(held_out)
    plot.line(held_out["step"], held_out["validation_loss"], "validation")
    plot.dots(points["step"], points["validation_loss"], "validation", notes)
    return plot


def _loss_range(few: Buckets, held_out: Columns, ends: tuple[float, float]) -> tuple[float, float]:
    """The scale shows all but the run's first hundredth and outliers, whose height would squeeze the rest flat."""
    shown = np.concatenate([few.low, few.high, held_out["validation_loss"]])
    if not len(shown):
        return 0.0, 1.0
    low, high = float(shown.min()), float(shown.max())
    begun = ends[0] + 0.01 * (ends[1] - ends[0])
    settled = np.concatenate([few.median[few.x >= begun], held_out["validation_loss"][held_out["step"] >= begun]])
    outliers = np.max(few.high[few.x >= begun], initial=low)
    if len(settled) and settled.max() > low:
        span = float(settled.max()) - low
        high = min(high, low + max(1.15 * span, min(1.6 * span, float(outliers) - low)))
    pad = 0.04 * (high - low) or 0.5
    return low - pad, high + pad


def _validation_points(held_out: Columns) -> tuple[Columns, list[str]]:
    """Validations to draw a dot for, not too many, and what the dots say."""
    every = max(1, -(-len(held_out["step"]) // 100))
    some = {name: column[::-1][::every][::-1] for name, column in held_out.items()}
    columns = some["step"], some["validation_loss"], some["validation_bits_per_byte"]
    notes = [
        f"step {s:,.0f}: validation {loss:.4f}, {bits:.4f} bits per byte"
        for s, loss, bits in zip(*columns, strict=True)
    ]
    return some, notes


def _plot(title: str, key: str, valid: Columns, ends: tuple[float, float], top: float, log: bool) -> Plot:
    step, y = valid["step"], valid[key].copy()
    if log:
        y[y <= 0] = np.nan
    many = len(step) > _MOST_POINTS
    few = bucketed(step, y, ends, _BUCKETS if many else max(len(step), 1))
    high = float(np.max(few.high, initial=0.0))
    low = float(np.min(few.low, initial=high)) if log else 0.0
    if log:
        low, high = (low / 1.2, high * 1.2) if high > 0 else (0.1, 1.0)
    else:
        high = high * 1.06 or 1.0
    newest = _newest(y)
    now = "" if math.isnan(newest) else f"{newest:.1%}" if key == "mfu" else number(float(f"{newest:.4g}"))
    plot = Plot(title, ends, (low, high), LEFT, RIGHT, top, top + _HEIGHT, log=log, now=now)
    if many:
        plot.band(few.x, few.low, few.high, "train")
        plot.line(few.x, few.median, "train slim")
    else:
        plot.line(step, y, "train slim")
    return plot


def _newest(y: np.ndarray) -> float:
    """Median of the last fiftieth of the values, NaN when there is none."""
    finite = y[np.isfinite(y)]
    return float(np.median(finite[-max(1, len(finite) // 50) :])) if len(finite) else math.nan


def undone_stretches(history: History) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps and losses that a rollback or a restart undid, cut where one does not follow the other."""
    step, loss = history.steps["step"], history.steps["loss"]
    stretches = [
        (step[first:after], loss[first:after])
        for start, end in runs(~history.counts)
        for first, after in _consecutive(step, start, end)
    ]
    return sorted(stretches, key=lambda xy: -len(xy[0]))[:_MOST_STRETCHES]


def _consecutive(step: np.ndarray, start: int, end: int) -> list[tuple[int, int]]:
    cuts = start + 1 + np.flatnonzero(np.diff(step[start:end]) != 1)
    edges = [start, *cuts.tolist(), end]
    return list(pairwise(edges))


# Marks


def marks_of(history: History, events: list[dict[str, Any]]) -> list[Mark]:
    """What happened, at the steps that training had reached."""
    marks = []
    for event in events:
        kind = event["event"]
        reached = step_at(history, event["time"])
        step = event["step"] if event.get("step") is not None else reached
        note = f"step {step:,}: {sentence(event)}"
        if kind == "resume":
            by_plan = event.get("cause") in ("preemption", "resize")
            undone = event["from_step"] if reached > event["from_step"] else None
            note = f"step {reached:,}: {sentence(event)}"
            marks.append(Mark(reached, "resize" if by_plan else "restart", note, undone))
        elif kind == "rollback":
            marks.append(Mark(event["from_step"], "rollback", note, event["to_step"]))
        elif kind in _KINDS:
            marks.append(Mark(step, _KINDS[kind], note))
    skipped = (history.steps["skipped"] == 1) & history.counts
    for step, loss in zip(
        history.steps["step"][skipped].tolist(), history.steps["loss"][skipped].tolist(), strict=True
    ):
        marks.append(Mark(step, "outlier", f"step {step:,.0f}: the update was skipped, loss {loss:.4g}"))
    return marks


def step_at(history: History, when: float) -> int:
    """The step that training had reached at a time, 0 before the first."""
    place = int(np.searchsorted(history.steps["time"], when, "right"))
    return int(history.steps["step"][place - 1]) if place else 0


def _merged(marks: list[Mark], kind: str, plot: Plot) -> list[tuple[float, str]]:
    """Place in pixels and note of the marks of a kind; those that nearly touch are one."""
    merged: list[tuple[float, list[str]]] = []
    for mark in sorted((m for m in marks if m.kind == kind), key=lambda m: m.step):
        x = float(plot.px(min(mark.step, plot.x[1])))  # a step that was lost may lie beyond all that is known
        if merged and x - merged[-1][0] < _APART:
            merged[-1][1].append(mark.note)
        else:
            merged.append((x, [mark.note]))
    return [
        (x, "\n".join(notes if len(notes) <= 4 else [*notes[:2], f"… {len(notes) - 3:,} more", notes[-1]]))
        for x, notes in merged
    ]


def _shades(marks: list[Mark], plots: list[Plot]) -> list[str]:
    """What was undone, as shaded steps of every panel."""
    out = []
    for mark in marks:
        if mark.undone_from is not None:
            for plot in plots:
                first, last = plot.px(mark.undone_from), plot.px(mark.step)
                out.append(
                    f'<rect class="shade {mark.kind}" x="{first:.1f}" width="{max(float(last - first), 1):.1f}" '
                    f'y="{plot.top}" height="{plot.bottom - plot.top}"/>'
                )
    return out


def _draw(marks: list[Mark], plot: Plot, bottom: float) -> list[str]:
    """Every mark: a line through all panels, and a symbol above them that says what happened."""
    out = []
    for kind in _ORDER:
        for x, note in _merged(marks, kind, plot):
            line = f'<line class="rule {_css(kind)}" x1="{x:.1f}" x2="{x:.1f}" y1="{_LANE + 6}" y2="{bottom}"/>'
            title = f"<title>{html.escape(note)}</title>"
            out.append(f"<g>{title}{'' if kind == 'outlier' else line}{_symbol(kind, x, _LANE)}</g>")
    return out


def _css(kind: str) -> str:
    return {"checkpoint": "checkpoint", "failed": "rollback dashed", "outlier": "rollback"}.get(kind, f"{kind} dashed")


def _symbol(kind: str, x: float, y: float) -> str:
    """Each kind has a shape of its own, so that it needs no colour to be told."""
    if kind == "restart":
        return f'<circle class="dot restart" cx="{x:.1f}" cy="{y}" r="4.5"/>'
    if kind == "failed":
        a, b = 3.5, y
        return f'<path class="line rollback" d="M{x - a:.1f},{b - a} l7,7 M{x + a:.1f},{b - a} l-7,7"/>'
    shape = {
        "checkpoint": f"M{x - 1:.1f},{y - 3} h2 v6 h-2 Z",
        "outlier": f"M{x - 0.75:.1f},{y + 6} h1.5 v6 h-1.5 Z",
        "rollback": f"M{x - 5.5:.1f},{y - 4.5} h11 l-5.5,9.5 Z",
        "resize": f"M{x:.1f},{y - 5.5} l5.5,5.5 l-5.5,5.5 l-5.5,-5.5 Z",
    }[kind]
    css = {"checkpoint": "again", "outlier": "dot rollback"}.get(kind, f"dot {kind}")
    return f'<path class="{css}" d="{shape}"/>'


def _skipped(skips: list[list[int]], valid: Columns, plot: Plot, bottom: float) -> list[str]:
    """Triangles on the axis where data was passed over."""
    out = []
    for first, after in skips:
        later = np.flatnonzero(valid["data_step"] >= after)
        if len(later):
            step = valid["step"][later[0]]
            x, note = (
                float(plot.px(step)),
                f"data steps {first:,} to {after - 1:,} were skipped before step {step:,.0f}",
            )
            shape = f"M{x - 4.5:.1f},{bottom + 8} h9 l-4.5,-8 Z"
            out.append(f'<g><title>{note}</title><path class="dot rollback" d="{shape}"/></g>')
    return out


# Around the panels


def _legend(history: History, valid: Columns, marks: list[Mark]) -> list[str]:
    many = len(valid["step"]) > _MOST_POINTS
    items = [("line train", "training, median and range" if many else "training")]
    if len(history.validation["step"]):
        items.append(("line validation", "validation"))
    if not history.counts.all():
        items.append(("line undone dashed", "undone"))
    there = {mark.kind for mark in marks}
    items += [
        (kind, _NAMES[kind])
        for kind in ("checkpoint", "restart", "resize", "rollback", "failed", "outlier")
        if kind in there
    ]
    widths = [36 + 6.3 * len(label) for _, label in items]
    # Two rows where one is too narrow: what the lines are, and what the marks are.
    lines = sum(css.startswith("line") for css, _ in items)
    rows = [items] if sum(widths) < RIGHT - LEFT else [items[:lines], items[lines:]]
    out = []
    for row, y in zip(rows, (12,) if len(rows) == 1 else (5, 21), strict=True):
        x = float(LEFT)
        for css, label in row:
            if css.startswith("line"):
                out.append(f'<line class="{css}" x1="{x:.0f}" x2="{x + 18:.0f}" y1="{y}" y2="{y}"/>')
            else:
                out.append(_symbol(css, x + 12, y - 9 if css == "outlier" else y))
            out.append(f'<text class="ink" x="{x + 23:.0f}" y="{y + 4}">{html.escape(label)}</text>')
            x += 36 + 6.3 * len(label)
    return out


def _step_axis(plot: Plot, valid: Columns, bottom: float) -> list[str]:
    """Steps, and the tokens that had been seen by then."""
    out = []
    for step in ticks(*plot.x, about=8):
        x = f'text-anchor="middle" x="{plot.px(step):.1f}"'
        out.append(f'<text {x} y="{bottom + 20}">{number(step)}</text>')
        if len(valid["step"]) and 0 < step <= valid["step"][-1]:
            tokens = float(np.interp(step, valid["step"], valid["tokens"]))
            out.append(f'<text class="small" {x} y="{bottom + 33}">{number(tokens)}</text>')
    out.append(f'<text text-anchor="end" x="{LEFT - 14}" y="{bottom + 20}">step</text>')
    out.append(f'<text class="small" text-anchor="end" x="{LEFT - 14}" y="{bottom + 33}">tokens</text>')
    return out
