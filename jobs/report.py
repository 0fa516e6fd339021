"""``ingot report``: one run, and the data it learned from, as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import html
import json
import logging
import time
from typing import Any

import numpy as np

from jobs.charts import number, standalone
from jobs.eval_page import evaluation_sections
from jobs.events import QUIET, counted, seconds, sentence, value
from jobs.history import History
from jobs.page import figure, folded, page, table, tiles
from jobs.panels import run_picture, step_at
from jobs.pictures import funnel_chart
from jobs.provenance import Mixture, data_section, mixture_section
from jobs.run_folder import StoredRun
from jobs.settings import ReportJob
from pipelines import storage
from pipelines.curate import stage_manifests

log = logging.getLogger("ingot")

REPORT = "report.html"

_MOST_EVENTS = 400  # in a table, the newest
_MOST_HURT = 8  # rollbacks whose worst sequences are shown, the newest


def run(settings: ReportJob) -> None:
    """Draw a run; says where the page is.

    Raises:
        FileNotFoundError: there is no such run.
    """
    log.info("report: %s", build_report(settings.workspace, settings.name))


def build_report(workspace: str, run: str) -> str:
    """Write ``runs/<run>/report.html`` from what lies in the workspace; parts that are not there are left out.

    Returns:
        The page's path or URI.

    Raises:
        FileNotFoundError: there is no such run.
    """
    workspace = storage.absolute(workspace)
    return RunPage(workspace, StoredRun(storage.join(workspace, "runs", run)), name=run).write()


class RunPage:
    """The page of one run, which can be written again cheaply while the run goes on.

    Args:
        workspace: that the run belongs to.
        folder: of the run.
        name: of the run, for its scores and for errors.
    """

    def __init__(self, workspace: str, folder: StoredRun, name: str) -> None:
        self.workspace, self.folder, self.name = workspace, folder, name
        self.history = History(folder)
        self.mixture: Mixture | None = None

    def write(self, again: float | None = None, most: int | None = None) -> str:
        """Write ``report.html``, whole or not at all, from what lies on storage now.

        Args:
            again: the run goes on, and the page will be written again after about so many seconds.
            most: samples to look up for the mixture this time; None looks up all.

        Returns:
            The page's path or URI.

        Raises:
            FileNotFoundError: there is no such run.
            OSError: storage fails.
        """
        facts = self.folder.read_json("run.json")
        if facts is None:
            raise FileNotFoundError(
                f"{self.folder.folder}: no run of this name; `ingot pretrain --name {self.name}` makes it"
            )
        self.history.update()
        events = sorted(self.folder.events(), key=lambda event: event["time"])
        ledger = self.folder.read_json("ledger.json") or {"checkpoints": [], "skips": []}
        data = facts.pop("data", {})
        sections = [
            _headline(facts, self.history, events, live=again is not None),
            _training(self.history, events, ledger["skips"]),
            table("What happened", *_event_rows(self.history, events, QUIET), status="event"),
            folded(f"All events ({len(events):,})", table("", *_event_rows(self.history, events, ()), status="event")),
            _hurt(events),
            self._mixture(facts, data, ledger["skips"], most),
            _samples(self.folder.read_json("samples.json") or []),
            evaluation_sections(self.workspace, self.name),
            data_section(data),
            _sweeps(self.workspace),
            _checkpoints(ledger),
            folded("Settings", f"<pre>{html.escape(json.dumps(facts, indent=1))}</pre>"),
        ]
        self.folder.write_text(REPORT, page(f"{self.name}: Ingot run", "\n".join(sections), again))
        return self.folder.uri(REPORT)

    def _mixture(self, facts: dict[str, Any], data: dict[str, Any], skips: list[list[int]], most: int | None) -> str:
        valid = self.history.valid()
        if not len(valid["step"]):
            return ""
        if self.mixture is None:
            self.mixture = Mixture(self.workspace, facts)
        seen = self.mixture.update(valid, skips, most)
        return mixture_section(seen, self.mixture, data.get("tokens", {}).get("train", {}).get("tokens"))


def training_picture(workspace: str, run: str, uri: str, only: tuple[str, ...] | None = None) -> None:
    """Save the picture of a run as an SVG file of its own; ``only`` names the panels, None draws all."""
    folder = StoredRun(storage.join(storage.absolute(workspace), "runs", run))
    history = History(folder)
    history.update()
    events = sorted(folder.events(), key=lambda event: event["time"])
    ledger = folder.read_json("ledger.json") or {"skips": []}
    storage.write_bytes(uri, standalone(run_picture(history, events, ledger["skips"], only)).encode())


def funnel_picture(workspace: str, uri: str) -> None:
    """Save the funnel of documents as an SVG file of its own."""
    manifests = stage_manifests(storage.join(storage.absolute(workspace), "corpus"))
    storage.write_bytes(uri, standalone(funnel_chart(manifests)).encode())


# Sections of the page


def _headline(facts: dict[str, Any], history: History, events: list[dict[str, Any]], live: bool) -> str:
    train, validation = history.valid(), history.validation
    state, alert = _state(events, live)
    told = [("parameters", number(facts.get("n_params", 0)))]
    if len(train["step"]):
        told += [("steps", _of(train["step"][-1], facts)), ("tokens seen", number(train["tokens"][-1]))]
        first, last = _begin(train["loss"]), _end(train["loss"])
        told.append(("training loss", f"{first:.3f} → {last:.3f}"))
        if np.isfinite(train["tokens_per_second"]).any():
            told.append(("tokens per second (median)", number(float(np.nanmedian(train["tokens_per_second"])))))
        if np.isfinite(train["mfu"]).any():
            told.append(("model FLOP/s utilization", f"{np.nanmedian(train['mfu']):.1%}"))
    if len(validation["step"]):
        for name, key in (("validation loss", "validation_loss"), ("bits per byte", "validation_bits_per_byte")):
            told.append((name, f"{validation[key][0]:.3f} → {validation[key][-1]:.3f}"))
    count = [sum(event["event"] == kind for event in events) for kind in ("rollback", "resume")]
    told.append(("recoveries", f"{counted(count[0], 'rollback')}, {counted(count[1], 'restart')}"))
    lines = []
    starts = [event["time"] for event in events if event["event"] == "start"] or [facts.get("started")]
    if starts[0]:
        lines.append(f"started {_date(starts[0])}")
    if source := facts.get("init_from"):
        lines.append(f"went on from {source['model']}")
    if "world_size" in facts:
        lines.append(f"{counted(facts['world_size'], 'worker')} on {facts['device']}")
    if live:
        lines.append(f"as of {_date(time.time())}")
    return (
        f'<header><h1>{html.escape(str(facts.get("name", "run")))} <i class="{state}">{state}</i></h1>'
        f"<p>{html.escape(', '.join(lines))}</p></header>{alert}{tiles(told)}"
    )


def _state(events: list[dict[str, Any]], live: bool) -> tuple[str, str]:
    """How the run stands, in a word, and what is to be told at once, as HTML."""
    if live:
        return "running", ""
    since = next((i for i in reversed(range(len(events))) if events[i]["event"] == "start"), 0)
    ended = next((event for event in reversed(events[since:]) if event["event"] in ("end", "stop")), None)
    if ended is None:
        return "unfinished", ""
    if ended["event"] == "end":
        return "finished", ""
    return "stopped", f'<p class="alert">{html.escape(ended["diagnosis"])}</p>'


def _of(step: float, facts: dict[str, Any]) -> str:
    steps = facts.get("settings", {}).get("steps")
    return f"{step:,.0f}" + (f" of {steps:,}" if steps and steps != step else "")


def _begin(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)][0]) if np.isfinite(values).any() else np.nan


def _end(values: np.ndarray) -> float:
    """Mean of the last fiftieth, at least the last."""
    finite = values[np.isfinite(values)]
    return float(finite[-max(1, len(finite) // 50) :].mean()) if len(finite) else np.nan


def _date(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))


def _training(history: History, events: list[dict[str, Any]], skips: list[list[int]]) -> str:
    if not len(history.steps["step"]):
        return ""
    kinds = {event["event"] for event in events}
    help_ = "Point at a mark or at the strip of time to read what happened." if kinds - {"start"} else ""
    if "rollback" in kinds or "resume" in kinds:
        help_ += " Shaded steps were undone and trained again."
    if skips:
        ranges = ", ".join(f"{first:,} to {after - 1:,}" for first, after in skips[-20:])
        help_ += f" Triangles on the axis: where data was skipped (data steps {ranges})."
    return figure("Training", run_picture(history, events, skips), help_.strip())


def _event_rows(
    history: History, events: list[dict[str, Any]], without: tuple[str, ...]
) -> tuple[list[str], list[list[str]]]:
    told = [event for event in events if event["event"] not in without]
    rows = []
    if len(told) > _MOST_EVENTS:
        rows.append(["", "", "", f"{len(told) - _MOST_EVENTS:,} earlier ones are in events.jsonl"])
    for event in told[-_MOST_EVENTS:]:
        step = event["step"] if event.get("step") is not None else step_at(history, event["time"])
        kind = event["event"].replace("_", " ")
        rows.append([seconds(event["time"] - events[0]["time"]), f"{step:,}", kind, sentence(event)])
    return ["after", "step", "event", ""], rows


def _hurt(events: list[dict[str, Any]]) -> str:
    """The sequences with the highest losses in the data that made the run go back."""
    out = []
    for event in [event for event in events if event.get("documents")][-_MOST_HURT:]:
        documents = event["documents"]
        quotes = "".join(map(_quote, documents))
        title = f"Step {event.get('step', event.get('from_step', 0)):,}: {counted(len(documents), 'sequence')}"
        title += f" of data steps {event['skipped'][0]:,} to {event['skipped'][1] - 1:,}" if "skipped" in event else ""
        out.append(folded(f"{title}, {_where(documents[0])} first", quotes))
    note = "<p>The sequences with the highest loss in the data that made the run go back; it is skipped for good.</p>"
    return f"<section><h2>What hurt</h2>{note}{''.join(out)}</section>" if out else ""


def _where(document: dict[str, Any]) -> str:
    return document.get("url") or f"{document.get('source') or 'document'} {document.get('id', '')}"


def _quote(document: dict[str, Any]) -> str:
    facts = [] if document.get("loss") is None else [f"loss {document['loss']:.3f}"]
    facts += [f"{document[key]}" for key in ("source", "url") if document.get(key)]
    facts += [f"id {document['id']}"] if document.get("id") else []
    if document.get("data_step") is not None:
        facts.append(f"data step {document['data_step']:,}, sample {document.get('sample', 0):,}")
    if others := document.get("others"):
        facts.append(f"and parts of {counted(len(others), 'other document')}")
    excerpt = html.escape(document.get("excerpt") or "")
    return f"<blockquote><b>{html.escape(' · '.join(facts))}</b>\n{excerpt}</blockquote>"


def _checkpoints(ledger: dict[str, Any]) -> str:
    deleted = sum(bool(entry.get("deleted")) for entry in ledger["checkpoints"])
    rows = [
        [
            f"{entry['step']:,}",
            number(entry["tokens"]),
            *("" if entry.get(key) is None else f"{entry[key]:.4f}" for key in ("loss", "validation_loss")),
            entry["status"],
            entry["folder"],
        ]
        for entry in ledger["checkpoints"]
        if not entry.get("deleted")
    ]
    header = ["step", "tokens", "loss", "validation loss", "status", "folder"]
    note = f"<p>{counted(deleted, 'older one')} made room for newer ones.</p>" if deleted else ""
    return table("Checkpoints", header, rows, status="status") + note


def _samples(samples: list[dict[str, str]]) -> str:
    texts = "".join(
        f"<blockquote><b>{html.escape(s['prompt'])}</b>{html.escape(s['text'])}</blockquote>" for s in samples
    )
    return f"<section><h2>What it writes</h2>{texts}</section>" if samples else ""


def _sweeps(workspace: str) -> str:
    folder = storage.join(workspace, "sweeps")
    if not storage.exists(folder):
        return ""
    try:
        files = storage.list_files(storage.join(folder, "*", "results.json"))
    except FileNotFoundError:  # no sweep has ended yet
        return ""
    out = []
    for file in files:
        result = storage.read_json(file.uri)
        trials = result["trials"]
        header = [key for key in dict.fromkeys(key for trial in trials for key in trial) if key != "lineage"]
        rows = [[value(trial.get(key, "")) for key in header] for trial in trials]
        name = file.uri.rstrip("/").rsplit("/", 2)[-2]
        out.append(table(f"Sweep {name}", header, rows))
    return "".join(out)
