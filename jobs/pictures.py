"""The two pictures that tell a run's story: its loss with what it survived, and the funnel of its documents."""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np

from jobs.charts import Chart, byte_size, number, picture, smooth
from jobs.run_folder import valid_steps


def loss_chart(rows: list[dict[str, Any]], events: list[dict[str, Any]], skips: list[list[int]]) -> Chart:
    """Training and validation loss by step, undone steps faint, with what the run survived.

    Args:
        rows: all metrics rows in the order of their time.
        events: all events in the order of their time.
        skips: half-open ranges of data steps that training passed over.
    """
    train, validation = valid_steps(rows), valid_steps(rows, "validation_loss")
    steps = np.array(list(train), float)
    losses = np.array([row["loss"] for row in train.values()], float)
    undone = undone_stretches(rows)
    # The scale is that of what counts; a spike that was undone may leave the picture at its top.
    shown = [*losses, *(row["validation_loss"] for row in validation.values())] or [0.0, 1.0]
    highest = max([max(shown), *(min(y, 1.25 * max(shown)) for _, ys in undone for y in ys if math.isfinite(y))])
    last = max([*train, *validation, *(x for xs, _ in undone for x in xs), 1])
    chart = Chart("Loss (nats per token)", (0, last), (min(shown), highest), head=44, height=400)
    for xs, ys in undone:
        chart.line(xs, ys, "undone dashed")
    if len(losses):
        window = max(1, len(losses) // 60)
        chart.line(steps, losses, "train thin" if window > 1 else "train", "" if window > 1 else "training")
        if window > 1:
            chart.line(steps, smooth(losses, window), "train", f"training (mean of {2 * (window // 2) + 1} steps)")
    points = [row["validation_loss"] for row in validation.values()]
    if points:
        chart.line(list(validation), points, "validation", "validation")
        notes = [f"step {step}: validation {value:.4f}" for step, value in zip(validation, points, strict=True)]
        chart.dots(list(validation), points, "validation", notes)
    if undone:
        chart.legend.append(("line undone dashed", "undone steps"))
    _mark_recoveries(chart, rows, events, skips, train)
    return chart


def _mark_recoveries(
    chart: Chart,
    rows: list[dict[str, Any]],
    events: list[dict[str, Any]],
    skips: list[list[int]],
    train: dict[int, dict[str, Any]],
) -> None:
    for event in events:
        if event["event"] == "rollback":
            first, after = event["skipped"]
            note = (
                f"rollback from step {event['from_step']} to {event['to_step']}: {event.get('reason', '')}; "
                f"data steps {first} to {after - 1} skipped"
            )
            chart.rule(event["from_step"], "rollback", note)
            chart.leap(event["from_step"], event["to_step"], "rollback", note)
        elif event["event"] == "resume":
            reached = last_step_before(rows, event["time"])
            cause = event["cause"].replace("_", " ")
            note = f"{cause} at step {reached}: resumed from step {event['from_step']}"
            chart.rule(reached, "restart", note)
            if reached > event["from_step"]:
                chart.leap(reached, event["from_step"], "restart", note)
    for first, after in skips:
        place = next((step for step, row in train.items() if row.get("data_step", -1) >= after), None)
        if place is not None:
            chart.block(place, "rollback", f"data steps {first} to {after - 1} were skipped before step {place}")
    kinds = {event["event"] for event in events}
    if "rollback" in kinds:
        chart.legend.append(("dot rollback", "rollback"))
    if "resume" in kinds:
        chart.legend.append(("dot restart", "restart"))


def undone_stretches(rows: list[dict[str, Any]]) -> list[tuple[list[float], list[float]]]:
    """Steps and losses of the rows that a rollback or a restart undid, cut where one does not follow the other."""
    valid = {id(row) for row in valid_steps(rows).values()}
    stretches: list[tuple[list[float], list[float]]] = []
    before = None
    for row in rows:
        if "loss" not in row:
            continue
        if id(row) not in valid:
            if before is None or row["step"] != before + 1:
                stretches.append(([], []))
            stretches[-1][0].append(row["step"])
            stretches[-1][1].append(math.nan if row["loss"] is None else row["loss"])
        before = row["step"] if id(row) not in valid else None
    return stretches


def last_step_before(rows: list[dict[str, Any]], when: float) -> int:
    """The step that training had reached at a time, 0 before the first."""
    return next((row["step"] for row in reversed(rows) if row["time"] <= when and "loss" in row), 0)


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
