"""A run's time on the clock: when it trained, when it did again what had been undone, and when it was down."""

from __future__ import annotations

import html
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from jobs.charts import Plot
from jobs.events import seconds, sentence
from jobs.history import History, runs

_MOST = 60  # stretches of a kind that are drawn, the longest


@dataclass
class Clock:
    """A run's time in Unix seconds: its begin and end, and the stretches (first, last) in which it did what."""

    begin: float
    end: float
    trained: list[tuple[float, float]]
    again: list[tuple[float, float]]
    down: list[tuple[float, float, str]]


def clock_of(history: History, events: list[dict[str, Any]]) -> Clock | None:
    """When the run trained and when it was down, None when it has not trained yet.

    It is down from the last step before a start or resume to the begin of the first step after it; all else between
    the steps, such as validations and checkpoints, belongs to training.
    """
    rows = history.steps
    if not len(rows["step"]):
        return None
    after = rows["time"]
    before = after - np.nan_to_num(rows["seconds"])
    causes: dict[int, str] = {}
    for event in events:
        place = int(np.searchsorted(after, event["time"], "right"))
        if event["event"] in ("start", "resume") and 0 < place < len(after):
            causes[place] = sentence(event)
    down = [(float(after[p - 1]), float(max(before[p], after[p - 1])), cause) for p, cause in sorted(causes.items())]
    edges = [0, *sorted(causes), len(after)]
    trained = [(float(before[a]), float(after[b - 1])) for a, b in pairwise(edges)]
    again = [
        (float(before[a]), float(after[b - 1]))
        for first, last in runs(~history.counts)
        for a, b in _within(first, last, edges)
    ]
    begin = min([float(before[0]), *(event["time"] for event in events[:1])])
    end = max([float(after[-1]), *(event["time"] for event in events[-1:])])
    return Clock(begin, end, trained, again, down)


def _within(first: int, last: int, edges: list[int]) -> list[tuple[int, int]]:
    """The run of places cut at the edges."""
    cuts = [first, *(edge for edge in edges if first < edge < last), last]
    return list(pairwise(cuts))


def clock_strip(history: History, events: list[dict[str, Any]], sides: tuple[float, float], top: float) -> list[str]:
    """The clock as parts of a picture, between two horizontal places and from ``top`` on, some 32 pixels high."""
    clock = clock_of(history, events)
    if clock is None:
        return []
    whole = max(clock.end - clock.begin, 1e-3)
    down = sum(last - first for first, last, _ in clock.down)
    again = sum(last - first for first, last in clock.again)
    told = seconds(whole) + " in all"
    told += f", {seconds(down)} of them down ({down / whole:.1%})" if clock.down else ""
    told += f", {seconds(again)} undone ({again / whole:.1%})" if clock.again else ""
    plot = Plot("Time on the clock", (0.0, whole), (0.0, 1.0), *sides, top, top + 16, now=told)
    out = plot.svg()[:2]

    def bar(first: float, last: float, css: str, note: str) -> None:
        a, b = plot.px(first - clock.begin), plot.px(last - clock.begin)
        out.append(
            f'<rect class="{css}" x="{a:.1f}" width="{max(float(b - a), 0.5):.1f}" y="{top}" height="16">'
            f"<title>{html.escape(note)}</title></rect>"
        )

    for first, last in clock.trained:
        bar(first, last, "kept", f"trained for {seconds(last - first)}")
    for first, last in sorted(clock.again, key=lambda ab: ab[0] - ab[1])[:_MOST]:
        bar(first, last, "again", f"{seconds(last - first)} of work that was undone")
    for first, last, cause in sorted(clock.down, key=lambda d: d[0] - d[1])[: 2 * _MOST]:
        bar(first, last, "down", f"down for {seconds(last - first)}: {cause}")
    for moment in _times(whole):
        x = plot.px(moment)
        out.append(f'<text text-anchor="middle" x="{x:.1f}" y="{top + 32}">{_moment(moment, whole)}</text>')
    return out


_UNITS = ((1, "s"), (60, "min"), (3600, "h"), (86400, "d"))


def _times(whole: float, about: int = 8) -> list[float]:
    """Round moments between 0 and ``whole`` seconds."""
    steps = [1, 2, 5, 10, 15, 30]
    steps += [60 * k for k in steps] + [3600 * k for k in (1, 2, 3, 6, 12)]
    steps += [86400 * k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500)]
    step = next((s for s in steps if whole / s <= about), steps[-1]) if whole >= about else whole / about
    return [k * step for k in range(int(whole / step) + 1)]


def _moment(moment: float, whole: float) -> str:
    size, unit = next((u for u in reversed(_UNITS) if whole >= 3 * u[0]), _UNITS[0])
    return f"{moment / size:.3g} {unit}"
