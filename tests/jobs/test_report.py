import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jobs import report
from jobs.charts import byte_size, number, smooth, thin_out, ticks
from jobs.pictures import loss_chart, undone_stretches
from jobs.run_folder import StoredRun


class Page(HTMLParser):
    """Checks that tags are closed as they were opened, and collects what a browser would fetch or run."""

    void = frozenset({"meta", "circle", "line", "rect", "polyline", "path"})

    def __init__(self):
        super().__init__()
        self.open, self.text, self.fetched = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.void:
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "onload", "onclick")]
        if tag in ("script", "link", "iframe", "img"):
            self.fetched.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(text):
    page = Page()
    page.feed(text)
    assert page.open == []
    return page


@pytest.fixture
def workspace(tmp_path):
    """A run of 200 steps that lost a worker at step 60 and went back from 131 to 120, and the data it read."""
    rng = np.random.default_rng(0)
    run = tmp_path / "runs" / "base"
    (run / "metrics").mkdir(parents=True)
    rows, events, clock = [], [], 1_000_000.0

    def train(first, last, data_step, bad=False):
        nonlocal clock
        for step in range(first, last + 1):
            clock += 0.5
            loss = 3 + 5 * math.exp(-step / 40) + rng.normal(0, 0.03) + (4 if bad else 0)
            row = {"step": step, "data_step": data_step, "loss": loss, "lr": 1e-3 * min(1, step / 20)}
            row |= {"grad_norm": float(rng.lognormal()), "tokens": step * 8192, "tokens_per_second": 16000.0}
            rows.append(row | {"mfu": None, "seconds": 0.5, "time": clock})
            data_step += 1
            if step % 40 == 0:
                rows.append(
                    {"step": step, "validation_loss": loss + 0.05, "validation_bits_per_byte": loss / 3, "time": clock}
                )

    def event(kind, **facts):
        nonlocal clock
        clock += 0.1
        events.append({"time": clock, "event": kind, **facts})

    event("start", world_size=2, attempt=1)
    rows.append({"step": 0, "validation_loss": 8.1, "validation_bits_per_byte": 2.7, "time": clock})
    train(1, 60, 0)
    event("worker_failure", ranks=[1], error="ActorDiedError: <the worker> died & was lost")
    event("resume", step=40, cause="worker_restart", from_step=40, world_size=2)
    train(41, 130, 40)
    train(131, 131, 130, bad=True)
    event("spike", step=130, loss=7.2, median=3.2, reason="loss far above its median")
    event(
        "rollback", step=131, from_step=131, to_step=120, checkpoint_status="clean", skipped=[125, 135], reason="loss"
    )
    train(121, 125, 120)
    train(126, 200, 135)
    event("checkpoint", step=200)
    event("end", step=200, validation_loss=3.1)
    for i, chunk in enumerate((rows[:90], rows[90:])):
        (run / "metrics" / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chunk))
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    facts = {"name": "base", "n_params": 1_100_000, "device": "cpu", "world_size": 2, "started": 1_000_000.0}
    (run / "run.json").write_text(json.dumps(facts | {"settings": {"steps": 200}, "model": {}}))
    checkpoints = [
        {"step": s, "data_step": s, "tokens": s * 8192, "loss": None if s == 0 else 4.0, "status": status, "time": 1.0}
        | {"folder": f"checkpoints/step-{s:08d}", "deleted": s == 0}
        for s, status in ((0, "clean"), (120, "clean"), (130, "poisoned"), (200, "pending"))
    ]
    (run / "ledger.json").write_text(
        json.dumps({"checkpoints": checkpoints, "skips": [[125, 135]], "rollbacks": 1, "rollback_steps": [131]})
    )
    (run / "samples.json").write_text(json.dumps([{"prompt": "def f(x):", "text": "\n    return x < 3 & y"}]))

    documents, size = 2000, 40_000_000
    for stage, reasons in (
        ("extract", {"warc: truncated gzip member": 1, "code: generated": 12}),
        ("filter", {"gopher quality: mean word length": 200, "language: de": 40, "gopher repetition: lines": 7}),
        ("exact", {"exact duplicate": 300}),
        ("near", {"near duplicate": 150}),
    ):
        gone = sum(reasons.values())
        aside = {reason: {"documents": n, "bytes": n * 9000} for reason, n in reasons.items()}
        manifest = {"stage": stage, "documents_in": documents, "documents_out": documents - gone, "set_aside": aside}
        manifest |= {"bytes_in": size, "bytes_out": size - gone * 9000}
        documents, size = documents - gone, size - gone * 9000
        (tmp_path / "corpus" / stage).mkdir(parents=True)
        (tmp_path / "corpus" / stage / "manifest.json").write_text(json.dumps(manifest))
    for name, manifest in (
        ("tokenizer", {"vocab_size": 4096, "bytes_per_token": 3.21}),
        ("tokens/train", {"tokens": 9_100_000, "documents": 1200, "bytes": 29_000_000}),
        ("tokens/validation", {"tokens": 190_000, "documents": 25, "bytes": 610_000}),
        ("sweeps/lr", None),
        ("evals/base", None),
    ):
        (tmp_path / name).mkdir(parents=True)
        if manifest:
            (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    trials = [{"trial": "a", "optimizer.lr": 0.003, "validation_loss": 3.11, "step": 200}]
    (tmp_path / "sweeps/lr/results.json").write_text(json.dumps({"space": ["optimizer.lr"], "trials": trials}))
    (tmp_path / "evals/base/results.json").write_text(
        json.dumps({"name": "base", "time": 9.9, "validation_loss": 3.045, "mmlu": {"all": 0.2513, "by": {"law": 0.3}}})
    )
    return str(tmp_path)


def test_the_page_tells_the_whole_story_and_needs_nothing_beside_itself(workspace):
    uri = report.build_report(workspace, "base")
    assert uri == f"{workspace}/runs/base/report.html"
    text = Path(uri).read_text()
    page = parse(text)
    assert page.fetched == []
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    shown = " ".join(" ".join(page.text).split())
    for fact in (
        "base finished",
        "1.1M parameters",
        "1 rollback, 1 restart",
        "rollback from step 131 to 120: loss; data steps 125 to 134 skipped",
        "worker restart at step 60: resumed from step 40",
        "2,000",  # documents in
        "gopher quality: mean word length",
        "3.21 bytes per token",
        "9.1M tokens of 1,200 documents, 29.0 MB of text",
        "return x < 3 & y",
        "validation loss 3.045",
        "mmlu all 0.2513",
        "def f(x): return",
        "optimizer.lr",
        "poisoned",
        "<the worker> died & was lost",
    ):
        assert fact in shown, fact


def test_only_a_run_that_is_there_is_drawn_and_a_new_one_can_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run of this name; `ingot pretrain --name x` makes it"):
        report.build_report(str(tmp_path), "x")
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/run.json").write_text('{"name": "x"}')
    (tmp_path / "sweeps/lr/trials").mkdir(parents=True)  # a sweep that has not ended
    page = parse(Path(report.build_report(str(tmp_path), "x")).read_text())
    assert "x unfinished" in " ".join(" ".join(page.text).split())


def test_a_stopped_run_shows_its_diagnosis(workspace):
    run = StoredRun(f"{workspace}/runs/base")
    run.append_line("events.jsonl", json.dumps({"time": 2e6, "event": "stop", "step": 210, "diagnosis": "3 rollbacks"}))
    text = Path(report.build_report(workspace, "base")).read_text()
    assert '<p class="alert">3 rollbacks</p>' in text


def test_undone_steps_are_those_that_a_later_row_replaced(workspace):
    rows = StoredRun(f"{workspace}/runs/base").metrics()
    undone = undone_stretches(rows)
    assert [(xs[0], xs[-1], len(xs)) for xs, _ in undone] == [(41, 60, 20), (121, 131, 11)]
    chart = loss_chart(rows, [], [[125, 135]])
    lines = re.findall(r'class="line ([^"]*)" points="([^"]*)"', chart.svg())
    assert [css for css, _ in lines].count("undone dashed") == 2
    # The spike that was undone does not squeeze the rest: half of the picture's height is used by what counts.
    heights = [float(point.split(",")[1]) for css, points in lines if css == "train" for point in points.split()]
    assert max(heights) - min(heights) > 0.5 * (chart.bottom - chart.head)


def test_a_loss_that_is_not_finite_interrupts_the_line(workspace):
    rows = StoredRun(f"{workspace}/runs/base").metrics()
    bad = next(row for row in rows if row["step"] == 50)
    bad["loss"] = None
    svg = loss_chart(rows, [], []).svg()
    assert "nan" not in svg
    assert svg.count("undone dashed") == 3 + 1  # one of the two stretches in two pieces, and the legend


def test_pictures_stand_alone(workspace, tmp_path):
    from xml.etree import ElementTree as ET

    report.loss_picture(workspace, "base", str(tmp_path / "loss.svg"))
    report.funnel_picture(workspace, str(tmp_path / "funnel.svg"))
    for name in ("loss", "funnel"):
        root = ET.parse(tmp_path / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert int(root.get("height")) > 100
        assert "prefers-color-scheme: dark" in "".join(root.itertext())
    bars = [e for e in ET.parse(tmp_path / "funnel.svg").iter() if e.get("class") == "kept"]
    widths = [float(bar.get("width")) for bar in bars]
    # by hand: 1987 of 2000 documents after extract, 1290 of 2000 at the end
    assert widths[0] / widths[6] == pytest.approx(1987 / 1290, rel=1e-3)


def test_thinning_keeps_every_spike():
    y = np.zeros(100_000)
    y[[777, 43_210]] = 9, -9
    x, thinned = thin_out(np.arange(100_000.0), y)
    assert len(x) <= 1202
    assert thinned[x == 777] == 9
    assert thinned[x == 43_210] == -9


def test_numbers_read_well():
    assert [number(v) for v in (0, 0.25, 950, 1234, 12_345, 9_100_000, 3e-7)] == [
        *("0", "0.25", "950", "1,234", "12.3k", "9.1M", "3e-7"),
    ]
    assert [byte_size(v) for v in (0, 812, 24_100_000)] == ["0 B", "812 B", "24.1 MB"]
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert smooth(np.array([1.0, 2, 3, 4]), 3).tolist() == [1.5, 2, 3, 3.5]
