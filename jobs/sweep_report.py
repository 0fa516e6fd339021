"""``report.html`` of a sweep: its trials in parallel coordinates, their learning curves, the loss over each setting.

Written again while the sweep runs; with population based training it also draws who went on from whose weights.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable

import numpy as np

from jobs.charts import Plot, number, picture, ticks
from jobs.events import counted, value
from jobs.page import figure, page, table, tiles
from jobs.settings import TuneJob
from jobs.sweep_space import Dimension
from jobs.sweep_trials import Trial, Trials
from pipelines import storage

REPORT = "report.html"
_WIDTH = 960
_HALO = "paint-order:stroke;stroke:var(--paper);stroke-width:4px"  # texts on lines
_REFRESH = 15.0  # seconds until the browser looks again


def draw_report(settings: TuneJob, space: list[Dimension], trials: Trials, share: float, unit: str, live: bool) -> None:
    """Write the page.

    Args:
        settings: of the sweep.
        space: that it searches.
        trials: so far.
        share: of ``unit`` that a trial takes.
        unit: what a trial trains on, GPU or CPU core.
        live: the sweep still runs.
    """
    ranked = trials.ranked()
    body = [_head(settings, trials, share, unit, live)]
    if ranked:
        body.append(_best(settings, ranked[0]))
        body.append(
            figure(
                "Settings and where they led",
                parallel_coordinates(space, trials),
                "A line for each trial; the best one is orange, those that were stopped early or failed are grey. "
                "Those without a setting pass below its axis. Point at a line to read it.",
            )
        )
        body.append(figure("Validation loss over steps", learning_curves(trials, settings.pretrain.steps)))
        body.append(
            figure(
                "Validation loss over each setting",
                loss_over_settings(space, trials),
                "Filled: trials that came to the last step; rings: the others, with their last loss.",
            )
        )
    if settings.scheduler == "pbt":
        body.append(_lineage(settings, space, trials))
    body.append(_table(space, trials))
    errors = [[trial.name, trial.state, trial.error] for trial in trials.all.values() if trial.error]
    body.append(table("What went wrong", ["trial", "state", ""], errors, status="state"))
    again = _REFRESH if live else None
    text = page(f"Sweep {settings.name}", "".join(body), again)
    uri = storage.join(settings.workspace, "sweeps", settings.name, REPORT)
    storage.write_bytes(uri, text.encode())


def _head(settings: TuneJob, trials: Trials, share: float, unit: str, live: bool) -> str:
    state = "running" if live else "finished"
    ended = trials.count("finished", "stopped", "diverged")
    counts = [f"{ended} of {settings.trials} ended"]
    kinds = {kind: trials.count(kind) for kind in ("running", "waiting", "stopped", "diverged", "failed")}
    counts += [f"{count} {kind}" + (" early" if kind == "stopped" else "") for kind, count in kinds.items() if count]
    hours = trials.hours() * share
    budget = "" if settings.budget_hours is None else f" of {settings.budget_hours:g}"
    told = [
        ("trials", ", ".join(counts)),
        ("search and scheduler", f"{settings.search}, {settings.scheduler}"),
        (f"{unit} hours", f"{hours:.3g}{budget}"),
    ]
    if ranked := trials.ranked():
        told.insert(0, ("best validation loss", f"{ranked[0].loss:.4f}"))
    return (
        f'<header><h1>{html.escape(settings.name)} <i class="{state}">{state}</i></h1>'
        f"<p>{settings.pretrain.steps:,} steps a trial</p></header>{tiles(told)}"
    )


def _best(settings: TuneJob, best: Trial) -> str:
    found = [[name, value(chosen)] for name, chosen in best.settings.items()]
    title = f"The best: trial {best.name}, {best.loss:.4f} after {counted(best.step, 'step')}"
    return table(title, ["setting", "value"], found)


def _table(space: list[Dimension], trials: Trials) -> str:
    ranked = trials.ranked()
    moves = any(len(trial.stretches) > 1 for trial in trials.all.values())
    rows = []
    for trial in [*ranked, *(other for other in trials.all.values() if other not in ranked)]:
        row = [trial.name, *(value(trial.settings.get(d.name, "")) for d in space)]
        row += [f"{trial.step:,}", f"{trial.loss:.4f}" if trial in ranked else "", trial.state]
        row += [f"{trial.seconds / 60:.1f}"]
        if moves:
            taken = [f"{s.parent} at {s.start:,}" for s in trial.stretches if s.parent not in (None, trial.name)]
            row.append(", ".join(taken))
        rows.append(row)
    header = ["trial", *(d.name for d in space), "step", "validation loss", "state", "minutes"]
    return table("Trials", header + (["weights taken from"] if moves else []), rows)


# Pictures


def parallel_coordinates(space: list[Dimension], trials: Trials) -> str:
    """An axis for each setting and one for the loss at the last step, a line for each trial that has one."""
    height, top, bottom, left, right = 330, 44, 290, 70, _WIDTH - 70
    ranked = trials.ranked()
    losses = [trial.loss for trial in ranked]
    low, high = min(losses), max(losses)
    names = _short_names(space)
    axes = [(names[dimension.name], _place(dimension), _marks(dimension)) for dimension in space]
    span = (high - low) or 1.0
    marks = (
        [((mark - low) / span, number(mark)) for mark in ticks(low, high, 5)] if high > low else [(0.0, number(low))]
    )
    axes.append(("validation loss", lambda trial: (trial.loss - low) / span, marks))
    across = [left + (right - left) * i / max(len(axes) - 1, 1) for i in range(len(axes))]

    def y(place: float | None) -> float:
        return bottom + 20 if place is None else bottom - place * (bottom - top)

    parts, texts = [], []
    for i, (x, (name, _, marks)) in enumerate(zip(across, axes, strict=True)):
        above = top - 14 - (16 if i % 2 and len(axes) > 6 else 0)  # many names stand in two rows
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="bold" text-anchor="middle" x="{x:.1f}" y="{above}">{html.escape(name)}</text>')
        left_of = f'class="small" style="{_HALO}" text-anchor="end" x="{x - 6:.1f}"'
        texts += [f'<text {left_of} y="{y(place) + 4:.1f}">{html.escape(text)}</text>' for place, text in marks]
    furthest = max(trial.step for trial in ranked)
    for rank, trial in reversed(list(enumerate(ranked))):  # the best lie on top
        points = " ".join(f"{x:.1f},{y(place(trial)):.1f}" for x, (_, place, _) in zip(across, axes, strict=True))
        css, style = _look(trial, rank, len(ranked), furthest)
        note = f"<title>{html.escape(_note(trial))}</title>"
        parts.append(f'<polyline class="line {css}"{style} points="{points}">{note}</polyline>')
    return picture(_WIDTH, height, parts + texts, "Parallel coordinates")


def _look(trial: Trial, rank: int, of: int, furthest: int) -> tuple[str, str]:
    """CSS class and style of a trial's line: the best, the others by their rank, those that did not get that far."""
    if rank == 0:
        return "validation", ""
    if trial.step < furthest or trial.state in ("stopped", "diverged", "failed"):
        return "undone", ' style="opacity:.55"'
    return "train slim", f' style="opacity:{0.9 - 0.6 * rank / of:.2f}"'


def _note(trial: Trial) -> str:
    told = ", ".join(f"{name} {value(chosen)}" for name, chosen in trial.settings.items())
    return f"trial {trial.name}, {trial.state}: {trial.loss:.4f} after {counted(trial.step, 'step')}; {told}"


def _short_names(space: list[Dimension]) -> dict[str, str]:
    """Names of settings without their groups, where that tells them apart."""
    lasts = [dimension.name.rpartition(".")[2] for dimension in space]
    return {
        dimension.name: last if lasts.count(last) == 1 else dimension.name
        for dimension, last in zip(space, lasts, strict=True)
    }


def _place(dimension: Dimension) -> Callable[[Trial], float | None]:
    """Where a trial lies on the axis of a setting, 0 to 1; None where it has none."""
    choices = dimension.given.values

    def place(trial: Trial) -> float | None:
        if dimension.name not in trial.settings:
            return None
        chosen = trial.settings[dimension.name]
        if choices is not None:
            return (choices.index(chosen) + 0.5) / len(choices)
        return dimension.unit(chosen)

    return place


def _marks(dimension: Dimension, least: float = 0.08) -> list[tuple[float, str]]:
    """Places and texts along the axis of a setting, at least so far from each other."""
    given = dimension.given
    if given.values is not None:
        return [((i + 0.5) / len(given.values), value(choice)) for i, choice in enumerate(given.values)]
    if given.scale == "linear":
        marks = ticks(given.low, given.high, 5)
    else:
        decades = range(math.floor(math.log10(given.low)), math.ceil(math.log10(given.high)) + 1)
        wide = given.high / given.low > 30
        factors = (1,) if given.high / given.low > 1e4 else (1, 3) if wide else (1, 2, 3, 5, 7)
        marks = [f * 10.0**k for k in decades for f in factors if given.low <= f * 10.0**k * 1.0001]
        marks = [mark for mark in marks if mark <= given.high * 1.0001]
    apart: list[tuple[float, str]] = []
    for mark in marks:
        if not apart or dimension.unit(mark) - apart[-1][0] >= least:
            apart.append(
                (
                    dimension.unit(mark),
                    number(mark) if mark == 0 or mark >= 0.01 else f"{mark:.0e}".replace("e-0", "e-"),
                )
            )
    return apart


def learning_curves(trials: Trials, steps: int) -> str:
    """The validation loss of every trial over its steps."""
    height, ranked = 320, trials.ranked()
    curves = [sorted((s, v) for s, v in trial.losses.items() if math.isfinite(v)) for trial in ranked]
    values = np.array([loss for curve in curves for step, loss in curve if step > 0] or [1.0])
    # What diverges must not press the others flat.
    top = float(min(values.max(), np.median(values) + 4 * (np.median(values) - values.min()) + 1e-3))
    ends = (float(values.min()), max(top, float(values.min()) + 1e-3))
    plot = Plot("validation loss (nats)", (0, steps), ends, 60, _WIDTH - 20, 28, height - 40)
    furthest = max(trial.step for trial in ranked)
    for rank, (trial, curve) in reversed(list(enumerate(zip(ranked, curves, strict=True)))):
        x, y = np.array([s for s, _ in curve if s > 0], float), np.array([v for s, v in curve if s > 0])
        if not len(x):
            continue
        css, style = _look(trial, rank, len(ranked), furthest)
        before = len(plot.parts)
        plot.line(x, y, css)
        note = f"<title>{html.escape(_note(trial))}</title>"
        plot.parts[before:] = [part.replace("/>", f"{style}>{note}</polyline>") for part in plot.parts[before:]]
        plot.dots(x[-1:], y[-1:], css.split()[0] if css.split()[0] == "validation" else "again", [_note(trial)])
    return picture(_WIDTH, height, plot.svg() + _steps_axis(plot, height - 22), "Learning curves")


def _steps_axis(plot: Plot, y: float) -> list[str]:
    marks = [
        f'<text text-anchor="middle" x="{plot.px(step):.1f}" y="{y:.0f}">{number(step)}</text>'
        for step in ticks(*plot.x, 8)
    ]
    middle = (plot.left + plot.right) / 2
    return [*marks, f'<text text-anchor="middle" x="{middle:.0f}" y="{y + 16:.0f}">step</text>']


def loss_over_settings(space: list[Dimension], trials: Trials) -> str:
    """A small picture for each setting: a dot for each trial, its last loss over what the setting was."""
    ranked = trials.ranked()
    columns = min(3, len(space))
    wide, high = _WIDTH / columns, 240
    losses = np.array([trial.loss for trial in ranked])
    # The lower three quarters and some: bad settings are told apart by where they stick to the upper edge.
    top = float(min(losses.max(), np.quantile(losses, 0.75) + 2 * (np.quantile(losses, 0.75) - losses.min()) + 1e-3))
    span = (top - float(losses.min())) or 1.0
    ends = (float(losses.min()) - 0.05 * span, top + 0.05 * span)
    furthest = max(trial.step for trial in ranked)
    parts = []
    for i, dimension in enumerate(space):
        row, column = divmod(i, columns)
        left, upper = column * wide + 58, row * high + 30
        plot = Plot(dimension.name, (-0.03, 1.03), ends, left, (column + 1) * wide - 14, upper, upper + high - 74)
        place = _place(dimension)
        for rank, trial in reversed(list(enumerate(ranked))):
            at = place(trial)
            if at is None:
                continue
            x, y = float(plot.px(at)), float(plot.py(trial.loss))
            kind = "dot validation" if rank == 0 else "kept" if trial.step == furthest else "ring"
            style = ' style="fill:none;stroke:var(--undone);stroke-width:1.5"' if kind == "ring" else ""
            plot.parts.append(
                f'<circle class="{kind}"{style} cx="{x:.1f}" cy="{y:.1f}" r="{5 if rank == 0 else 3.5}">'
                f"<title>{html.escape(_note(trial))}</title></circle>"
            )
        parts += plot.svg()
        for at, text in _marks(dimension, 0.12):
            parts.append(
                f'<text class="small" text-anchor="middle" x="{float(plot.px(at)):.1f}" '
                f'y="{plot.bottom + 16:.0f}">{html.escape(text)}</text>'
            )
    return picture(_WIDTH, -(-len(space) // columns) * high, parts, "Loss over each setting")


# Population based training


def _lineage(settings: TuneJob, space: list[Dimension], trials: Trials) -> str:
    moves: list[list[str]] = []
    for trial in trials.all.values():
        for before, now in zip(trial.stretches, trial.stretches[1:], strict=False):
            if now.parent == trial.name:
                continue
            parent = trials.all[now.parent]
            lost, won = trial.losses.get(now.start, math.inf), parent.losses.get(now.start, math.inf)
            there = next(s for s in parent.stretches if s.end == now.start)
            changed = ", ".join(
                f"{name} {value(there.settings.get(name, ''))} → {value(new)}" for name, new in now.settings.items()
            )
            old = ", ".join(f"{name} {value(was)}" for name, was in before.settings.items())
            moves.append([f"{now.start:,}", trial.name, f"{lost:.4f}", old, parent.name, f"{won:.4f}", changed])
    moves.sort(key=lambda move: int(move[0].replace(",", "")))
    drawn = figure(
        "Who went on from whom",
        family_tree(settings, space, trials),
        "A bar for each stretch of a member, the darker the lower its loss at the end; an arrow where it took the "
        "weights and, changed a little, the settings of another one. Point at a bar to read it.",
    )
    header = ["step", "trial", "its loss", "its settings", "goes on from", "whose loss", "settings from there"]
    return drawn + table("Exploited and explored", header, moves)


def family_tree(settings: TuneJob, space: list[Dimension], trials: Trials) -> str:
    """A row of bars for each member of a population over the steps, and an arrow for each that was copied."""
    members = list(trials.all.values())
    row, left, right, top = 34, 60, _WIDTH - 20, 16
    names = {member.name: i for i, member in enumerate(members)}

    def x(step: float) -> float:
        return left + (right - left) * step / settings.pretrain.steps

    def y(name: str) -> float:
        return top + names[name] * row + 12

    parts, arrows = [], []
    for member in members:
        parts.append(
            f'<text class="ink" text-anchor="end" x="{left - 10}" y="{y(member.name) + 4}">{member.name}</text>'
        )
        for stretch in member.stretches:
            others = sorted(other.losses.get(stretch.end, math.inf) for other in members)
            loss = member.losses.get(stretch.end, math.inf)
            shade = 1 - 0.75 * others.index(loss) / max(len(others) - 1, 1) if math.isfinite(loss) else 0.12
            told = ", ".join(f"{name} {value(chosen)}" for name, chosen in stretch.settings.items())
            note = f"trial {member.name}, steps {stretch.start:,} to {stretch.end:,}: {told}; loss {loss:.4f}"
            first = space[0].name
            wide = x(stretch.end) - x(stretch.start) - 3
            parts.append(
                f'<g><title>{html.escape(note)}</title><rect class="kept" style="opacity:{shade:.2f}" rx="2" '
                f'x="{x(stretch.start):.1f}" width="{wide:.1f}" y="{y(member.name) - 9:.1f}" height="18"/></g>'
            )
            if first in stretch.settings and wide > 60:
                text = value(stretch.settings[first])
                fill = "var(--paper)" if shade > 0.5 else "var(--ink)"
                parts.append(
                    f'<text class="small" style="fill:{fill}" x="{x(stretch.start) + 8:.1f}" '
                    f'y="{y(member.name) + 4:.1f}">{html.escape(text)}</text>'
                )
            if stretch.parent not in (None, member.name):
                arrows.append(_arrow(x(stretch.start) - 1.5, y(stretch.parent), y(member.name)))
    bottom = top + len(members) * row + 8
    parts += [
        f'<text text-anchor="middle" x="{x(step):.1f}" y="{bottom + 10:.0f}">{number(step)}</text>'
        for step in ticks(0, settings.pretrain.steps, 8)
    ]
    note = f"step; the numbers in the bars are {space[0].name}"
    parts.append(
        f'<text text-anchor="middle" x="{(left + right) / 2:.0f}" y="{bottom + 28:.0f}">{html.escape(note)}</text>'
    )
    return picture(_WIDTH, bottom + 34, parts + arrows, "Lineage")


def _arrow(x: float, start: float, end: float) -> str:
    up = 1 if end > start else -1
    tip = end - up * 2
    head = f"M{x - 4:.1f},{tip - up * 8:.1f} L{x:.1f},{tip:.1f} L{x + 4:.1f},{tip - up * 8:.1f}"
    return (
        f'<path class="line rollback" d="M{x:.1f},{start:.1f} L{x:.1f},{tip:.1f} {head}"/>'
        f'<circle class="dot rollback" cx="{x:.1f}" cy="{start:.1f}" r="3.5"/>'
    )
