"""``ingot report``: one run, and the data it learned from, as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import html
import json
import logging
import time
from typing import Any

import numpy as np

from jobs.charts import Chart, byte_size, number, standalone
from jobs.page import figure, folded, page, table, tiles
from jobs.pictures import funnel_chart, loss_chart
from jobs.run_folder import StoredRun, valid_steps
from jobs.settings import ReportJob
from pipelines import storage
from pipelines.curate import stage_manifests

log = logging.getLogger("ingot")

REPORT = "report.html"


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
    folder = StoredRun(storage.join(workspace, "runs", run))
    facts = folder.read_json("run.json")
    if facts is None:
        raise FileNotFoundError(f"{folder.folder}: no run of this name; `ingot pretrain --name {run}` makes it")
    rows, events = folder.metrics(), folder.events()
    ledger = folder.read_json("ledger.json") or {"checkpoints": [], "skips": []}
    manifests = stage_manifests(storage.join(workspace, "corpus"))
    sections = [
        _headline(facts, rows, events),
        *_charts(rows, events, ledger["skips"]),
        table("What happened", *_event_rows(events, all_of_them=False)),
        folded(f"All events ({len(events)})", table("", *_event_rows(events, all_of_them=True))),
        _samples(folder.read_json("samples.json") or []),
        _evaluations(workspace, run),
        _data(workspace, manifests),
        _sweeps(workspace),
        _checkpoints(ledger),
        folded("Settings", f"<pre>{html.escape(json.dumps(facts, indent=1))}</pre>"),
    ]
    folder.write_text(REPORT, page(f"{run}: Ingot run", "\n".join(sections)))
    return folder.uri(REPORT)


def loss_picture(workspace: str, run: str, uri: str) -> None:
    """Save the loss curve of a run as an SVG file of its own."""
    folder = StoredRun(storage.join(storage.absolute(workspace), "runs", run))
    ledger = folder.read_json("ledger.json") or {"skips": []}
    chart = loss_chart(folder.metrics(), folder.events(), ledger["skips"])
    storage.write_bytes(uri, standalone(chart.svg()).encode())


def funnel_picture(workspace: str, uri: str) -> None:
    """Save the funnel of documents as an SVG file of its own."""
    manifests = stage_manifests(storage.join(storage.absolute(workspace), "corpus"))
    storage.write_bytes(uri, standalone(funnel_chart(manifests)).encode())


# Sections of the page


def _headline(facts: dict[str, Any], rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> str:
    train, validation = valid_steps(rows), valid_steps(rows, "validation_loss")
    ended = next((event for event in reversed(events) if event["event"] in ("end", "stop")), None)
    state = "unfinished"
    if ended is not None:
        state = "finished" if ended["event"] == "end" else "stopped"
    told = [("parameters", number(facts.get("n_params", 0)))]
    if train:
        final = train[max(train)]
        tail = [row["loss"] for row in list(train.values())[-max(1, len(train) // 50) :]]
        told += [
            ("steps", f"{max(train):,}"),
            ("tokens seen", number(final.get("tokens") or 0)),
            ("training loss", f"{train[min(train)]['loss']:.3f} → {sum(tail) / len(tail):.3f}"),
        ]
        speeds = [row["tokens_per_second"] for row in train.values() if row.get("tokens_per_second")]
        if speeds:
            told.append(("tokens per second (median)", number(float(np.median(speeds)))))
        shares = [row["mfu"] for row in train.values() if row.get("mfu")]
        if shares:
            told.append(("model FLOP/s utilization", f"{100 * float(np.median(shares)):.1f} %"))
    if validation:
        ends = validation[min(validation)], validation[max(validation)]
        told.append(("validation loss", " → ".join(f"{row['validation_loss']:.3f}" for row in ends)))
        told.append(("validation bits per byte", " → ".join(f"{row['validation_bits_per_byte']:.3f}" for row in ends)))
    count = [sum(event["event"] == kind for event in events) for kind in ("rollback", "resume")]
    told.append(("recoveries", f"{_counted(count[0], 'rollback')}, {_counted(count[1], 'restart')}"))
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(facts["started"])) if facts.get("started") else ""
    alert = f'<p class="alert">{html.escape(ended["diagnosis"])}</p>' if state == "stopped" else ""
    where = "" if "world_size" not in facts else f"{_counted(facts['world_size'], 'worker')} on {facts['device']}"
    return (
        f'<header><h1>{html.escape(str(facts.get("name", "run")))} <i class="{state}">{state}</i></h1>'
        f"<p>{html.escape(f'started {began}, {where}' if began else where)}</p></header>{alert}"
        f"{tiles(told)}"
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _reading_help(events: list[dict[str, Any]], skips: list[list[int]]) -> str:
    text = "Point at a mark to read what happened." if any(e["event"] in ("rollback", "resume") for e in events) else ""
    if skips:
        ranges = ", ".join(f"{first} to {after - 1}" for first, after in skips)
        text += f" Triangles on the axis: where data was skipped (data steps {ranges})."
    return text.strip()


def _charts(rows: list[dict[str, Any]], events: list[dict[str, Any]], skips: list[list[int]]) -> list[str]:
    if not rows:
        return []
    loss = figure("Training", loss_chart(rows, events, skips).svg(), _reading_help(events, skips))
    charts = []
    for key, title, log_scale in (
        ("lr", "Learning rate", False),
        ("grad_norm", "Gradient norm before clipping", True),
        ("tokens_per_second", "Tokens per second", False),
        ("mfu", "Model FLOP/s utilization", False),
    ):
        valid = valid_steps(rows, key)
        if valid:
            values = [row[key] for row in valid.values()]
            low = min((v for v in values if v > 0), default=1e-12) if log_scale else 0.0
            chart = Chart(title, (0, max(valid)), (low, max(values)), width=470, height=240, log=log_scale)
            chart.line(list(valid), values, "train")
            charts.append(f"<figure>{chart.svg()}</figure>")
    return [loss, f'<div class="grid">{"".join(charts)}</div>']


def _event_rows(events: list[dict[str, Any]], all_of_them: bool) -> tuple[list[str], list[list[str]]]:
    began = events[0]["time"] if events else 0.0
    rows = []
    for event in events:
        if all_of_them or event["event"] not in ("checkpoint", "outlier"):
            told = {k: v for k, v in event.items() if k not in ("time", "event", "step", "documents")}
            if documents := event.get("documents"):
                first = ", ".join(row["url"] or f"{row['source']} {row['id']}" for row in documents[:3])
                told["documents"] = f"{len(documents)} in the batches that stood out, such as {first}"
            facts = ", ".join(f"{k.replace('_', ' ')} {_value(v)}" for k, v in told.items() if v is not None)
            rows.append([_duration(event["time"] - began), event["event"], _value(event.get("step", "")), facts])
    return ["after", "event", "step", ""], rows


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _checkpoints(ledger: dict[str, Any]) -> str:
    rows = [
        [
            f"{entry['step']:,}",
            number(entry["tokens"]),
            "" if entry.get("loss") is None else f"{entry['loss']:.4f}",
            entry["status"],
            "deleted" if entry.get("deleted") else entry["folder"],
        ]
        for entry in ledger["checkpoints"]
    ]
    return table("Checkpoints", ["step", "tokens", "loss", "status", "folder"], rows)


def _samples(samples: list[dict[str, str]]) -> str:
    texts = "".join(
        f"<blockquote><b>{html.escape(s['prompt'])}</b>{html.escape(s['text'])}</blockquote>" for s in samples
    )
    return f"<section><h2>What it writes</h2>{texts}</section>" if samples else ""


def _evaluations(workspace: str, run: str) -> str:
    folder = storage.join(workspace, "evals", run)
    if not storage.exists(folder):
        return ""
    rows: list[list[str]] = []
    details = []
    for file in [file for file in storage.list_files(folder) if file.uri.endswith(".json")]:
        found = storage.read_json(file.uri)
        groups = {"": {k: v for k, v in found.items() if k not in ("name", "time")}}
        groups |= {name: group for name, group in found.items() if isinstance(group, dict)}
        for name, group in groups.items():
            told = {k: v for k, v in group.items() if isinstance(v, int | float | str)}
            rows += [[f"{name} {key}".strip().replace("_", " "), _value(value)] for key, value in told.items()]
            # What goes deeper, such as the accuracy of each subject
            for key, value in group.items():
                if name and isinstance(value, dict):
                    lines = [[inner.replace("_", " "), _value(v)] for inner, v in value.items()]
                    details.append(folded(f"{name}: {key.replace('_', ' ')}", table("", ["", ""], lines)))
    return table("Evaluation", ["", ""], rows) + "".join(details)


def _data(workspace: str, manifests: dict[str, dict[str, Any]]) -> str:
    out = []
    if manifests:
        rows = [
            [
                stage,
                f"{m['documents_in']:,}",
                f"{m['documents_out']:,}",
                byte_size(m["bytes_in"]),
                byte_size(m["bytes_out"]),
                f"{100 * m['documents_out'] / max(m['documents_in'], 1):.1f} %",
            ]
            for stage, m in manifests.items()
        ]
        why = [
            [stage, reason, f"{counts['documents']:,}", byte_size(counts["bytes"])]
            for stage, m in manifests.items()
            for reason, counts in sorted(m["set_aside"].items(), key=lambda item: -item[1]["documents"])
        ]
        out.append(figure("Data", funnel_chart(manifests), ""))
        out.append(table("", ["stage", "documents in", "out", "bytes in", "out", "kept"], rows))
        out.append(folded("Why documents went", table("", ["stage", "reason", "documents", "bytes"], why)))
    uri = storage.join(workspace, "tokenizer", "manifest.json")
    rows = []
    if storage.exists(uri):
        tokenizer = storage.read_json(uri)
        told = (
            f"{tokenizer['vocab_size']:,} tokens in the vocabulary, {tokenizer['bytes_per_token']:.2f} bytes per token"
        )
        rows.append(["tokenizer", told])
    for split in ("train", "validation"):
        uri = storage.join(workspace, "tokens", split, "manifest.json")
        if storage.exists(uri):
            m = storage.read_json(uri)
            told = f"{number(m['tokens'])} tokens of {m['documents']:,} documents, {byte_size(m['bytes'])} of text"
            rows.append([f"tokens, {split}", told])
    out.append(table("Tokens", ["", ""], rows))
    return "".join(out)


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
        header = list(dict.fromkeys(key for trial in trials for key in trial))
        rows = [[_value(trial.get(key, "")) for key in header] for trial in trials]
        name = file.uri.rstrip("/").rsplit("/", 2)[-2]
        out.append(table(f"Sweep {name}", header, rows))
    return "".join(out)
