import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jobs import report
from jobs.charts import bucketed, byte_size, number, smooth, thin_out, ticks
from jobs.provenance import data_facts
from jobs.run_folder import StoredRun


class Page(HTMLParser):
    """Checks that tags are closed as they were opened, and collects what a browser would fetch or run."""

    void = frozenset({"meta", "line", "polyline", "polygon", "path"})

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
    hurt = [
        {"loss": 9.25, "data_step": 127, "sample": 3, "id": "d1", "source": "web", "url": "a.example/1"}
        | {"excerpt": "<b>qqqq qqqq", "others": ["d7", "d8"]},
        {"loss": None, "data_step": 126, "sample": 0, "id": "d2", "source": "books", "url": None, "excerpt": "AAAA"},
    ]
    event(
        "rollback", step=131, from_step=131, to_step=120, checkpoint_status="clean", source="memory", seconds=0.5,
        skipped=[125, 135], reason="loss far above its median", documents=hurt,
    )  # fmt: skip
    train(121, 125, 120)
    train(126, 200, 135)
    event("checkpoint", step=200)
    event("end", step=200, validation_loss=3.1)
    for i, chunk in enumerate((rows[:90], rows[90:])):
        (run / "metrics" / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chunk))
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
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
        ("clean", {}),
    ):
        gone = sum(reasons.values())
        aside = {reason: {"documents": n, "bytes": n * 9000} for reason, n in reasons.items()}
        manifest = {
            "fingerprint": f"of {stage}",
            "stage": stage,
            "documents_in": documents,
            "documents_out": documents - gone,
            "set_aside": aside,
        }
        manifest |= {"bytes_in": size, "bytes_out": size - gone * 9000}
        documents, size = documents - gone, size - gone * 9000
        (tmp_path / "corpus" / stage).mkdir(parents=True)
        (tmp_path / "corpus" / stage / "manifest.json").write_text(json.dumps(manifest))
    made = {"fingerprint": "of tokens", "inputs": {"corpus": "of clean"}}
    for name, manifest in (
        ("tokenizer", {"vocab_size": 4096, "bytes_per_token": 3.21}),
        ("tokens/train", {"tokens": 9_100_000, "documents": 1200, "bytes": 29_000_000} | made),
        ("tokens/validation", {"tokens": 190_000, "documents": 25, "bytes": 610_000} | made),
        ("sweeps/lr", None),
        ("evals/base/step-00000200", None),
    ):
        (tmp_path / name).mkdir(parents=True)
        if manifest:
            (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    trials = [{"trial": "a", "optimizer.lr": 0.003, "validation_loss": 3.11, "step": 200}]
    (tmp_path / "sweeps/lr/results.json").write_text(json.dumps({"space": ["optimizer.lr"], "trials": trials}))
    row = {"task": "gsm8k", "alias": "gsm8k", "group": None, "metric": "exact_match", "filter": "strict-match"}
    row |= {"value": 0.2513, "stderr": 0.0119, "n_shot": 5, "items": 1319, "chance": None}
    (tmp_path / "evals/base/step-00000200/results.json").write_text(
        json.dumps({"name": "base", "step": 200, "time": 9.9, "validation_loss": 3.045, "scores": [row]})
    )
    facts = {"name": "base", "n_params": 1_100_000, "device": "cpu", "world_size": 2, "tokens_manifest": "older tokens"}
    facts |= {"settings": {"steps": 200}, "model": {}, "data": data_facts(str(tmp_path))}
    (run / "run.json").write_text(json.dumps(facts))
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
        "step 131: went back from step 131 to 120 from memory in 0.5 s; data steps 125 to 134 are skipped for good",
        "step 60: goes on from the checkpoint of step 40 with 2 workers; workers were lost",
        "step 200: checkpoint of step 200 is safe",
        "The tokens that this run was trained on are not in the workspace any more.",
        "2,000",  # documents in
        "gopher quality: mean word length",
        "3.21 bytes per token",
        "9.1M tokens of 1,200 documents, 29.0 MB of text",
        "return x < 3 & y",
        "validation loss 3.045",
        "gsm8k 5 1,319 exact_match strict-match 0.2513 0.0119",
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


def test_a_run_that_goes_on_is_drawn_as_it_is_now_and_looked_at_again(workspace):
    page = report.RunPage(workspace, StoredRun(f"{workspace}/runs/base"), "base")
    text = Path(page.write(again=30.0)).read_text()
    assert '<meta http-equiv="refresh" content="30">' in text
    assert "running" in " ".join(parse(text).text)
    text = Path(page.write()).read_text()
    assert "http-equiv" not in text
    assert "finished" in " ".join(parse(text).text)


def test_the_data_section_is_the_runs_own_when_the_corpus_was_made_anew(workspace):
    stages = Path(workspace, "corpus")
    for stage in ("exact", "clean"):
        manifest = json.loads((stages / stage / "manifest.json").read_text())
        (stages / stage / "manifest.json").write_text(
            json.dumps(manifest | {"documents_in": 77_777, "fingerprint": "x"})
        )
    shown = Path(report.build_report(workspace, "base")).read_text()
    assert "77,777" not in shown
    assert "<td>exact</td>" in shown
    assert data_facts(workspace)["stages"] == {}  # for the tokens were made of another corpus


def test_what_made_the_run_go_back_is_shown_with_its_text(workspace):
    shown = " ".join(Path(report.build_report(workspace, "base")).read_text().split())
    assert "Step 131: 2 sequences of data steps 125 to 134, a.example/1 first" in shown
    assert "loss 9.250 · web · a.example/1 · id d1 · data step 127, sample 3 · and parts of 2 other documents" in shown
    assert "&lt;b&gt;qqqq qqqq" in shown


def test_only_words_of_state_are_coloured(workspace):
    shown = Path(report.build_report(workspace, "base")).read_text()
    assert '<td class="good">clean</td>' in shown  # a checkpoint
    assert "<td>clean</td>" in shown  # the stage of that name


def test_only_the_newest_of_many_events_are_in_the_table(workspace):
    run = StoredRun(f"{workspace}/runs/base")
    lines = [json.dumps({"time": 2e6 + i, "event": "validation_failed", "step": i, "error": "x"}) for i in range(1000)]
    run.append_line("events.jsonl", "\n".join(lines))
    text = Path(report.build_report(workspace, "base")).read_text()
    assert 800 <= text.count("could not be measured") < 1200  # in two tables, and in few notes of marks
    assert "earlier ones are in events.jsonl" in text


def test_pictures_stand_alone(workspace, tmp_path):
    from xml.etree import ElementTree as ET

    report.training_picture(workspace, "base", str(tmp_path / "loss.svg"), only=("Loss",))
    report.training_picture(workspace, "base", str(tmp_path / "all.svg"))
    report.funnel_picture(workspace, str(tmp_path / "funnel.svg"))
    for name in ("loss", "all", "funnel"):
        root = ET.parse(tmp_path / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert int(root.get("height")) > 100
        assert "prefers-color-scheme: dark" in "".join(root.itertext())
    titles = ["".join(ET.parse(tmp_path / f"{name}.svg").getroot().itertext()) for name in ("loss", "all")]
    assert ["Learning rate" in title for title in titles] == [False, True]
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


def test_buckets_have_lowest_median_and_highest_of_their_points():
    rng = np.random.default_rng(0)
    x, y = np.sort(rng.uniform(0, 50, 3000)), rng.normal(size=3000)
    y[::7] = np.nan
    few = bucketed(x, y, (0.0, 50.0), 20)
    for place, (low, median, high) in enumerate(zip(few.low, few.median, few.high, strict=True)):
        mine = np.sort(y[(x >= 2.5 * place) & (x < 2.5 * (place + 1)) & np.isfinite(y)])
        assert (low, high) == (mine[0], mine[-1])
        assert median == mine[(len(mine) - 1) // 2]
        assert 2.5 * place <= few.x[place] <= 2.5 * (place + 1)
    assert [len(part) for part in bucketed(x[:0], y[:0], (0.0, 1.0), 5)] == [0, 0, 0, 0]


def test_numbers_read_well():
    assert [number(v) for v in (0, 0.25, 950, 1234, 12_345, 9_100_000, 3e-7)] == [
        *("0", "0.25", "950", "1,234", "12.3k", "9.1M", "3e-7"),
    ]
    assert [number(v) for v in (999_499, 999_999, -999_999, 999_999_999)] == ["999k", "1M", "-1M", "1G"]
    assert [byte_size(v) for v in (0, 812, 24_100_000)] == ["0 B", "812 B", "24.1 MB"]
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert smooth(np.array([1.0, 2, 3, 4]), 3).tolist() == [1.5, 2, 3, 3.5]
