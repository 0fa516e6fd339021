import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from jobs.curation_report import build_report, histogram_chart
from pipelines import statistics, storage
from pipelines.dedup import clusters, published
from pipelines.documents import SCHEMA, SET_ASIDE_SCHEMA, to_table
from pipelines.filters import Measure


class Balanced(HTMLParser):
    """Checks that every tag is closed, and collects the text and whatever a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.fetched = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "rect", "line", "circle", "path", "polyline"):
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def corpus(tmp_path):
    """A corpus of two stages as curation leaves it: 100 documents in, 3 dropped, 97 kept."""
    kept = [{"id": f"k{i}", "text": f"kept text <{i}> & more", "source": "web", "language": "en"} for i in range(97)]
    gone = [
        {"id": f"g{i}", "text": "dropped text", "source": "web", "reason": "rules: short", "value": 2.0, "threshold": 5}
        for i in range(3)
    ]
    measured = statistics.of_measures([Measure("rules: short", np.array([2.0] * 3 + [50.0] * 97), minimum=5)])
    seen = {"documents": statistics.of_documents(to_table(kept)), "measures": measured}
    facts = {"documents_in": 100, "bytes_in": 9000, "documents_out": 97, "bytes_out": 8000, "seconds": 2.0}
    facts |= {"parts": [{"file": "part-0.parquet"}], "settings": {"min": 5}, "counts": {"lines cut": 7}}
    fingerprints = {}
    for stage, reasons in (("filter", {"rules: short": {"documents": 3, "bytes": 36}}), ("near", {})):
        folder = storage.join(str(tmp_path), stage)
        with storage.parquet_writer(storage.join(folder, "part-0.parquet"), SCHEMA) as out:
            out.write_table(to_table(kept))
        if reasons:
            with storage.parquet_writer(storage.join(folder, "set-aside", "part-0.parquet"), SET_ASIDE_SCHEMA) as out:
                out.write_table(to_table(gone, SET_ASIDE_SCHEMA))
        manifest = {"stage": stage, "fingerprint": stage, "set_aside": reasons, "statistics": seen, **facts}
        storage.write_json(storage.join(folder, "manifest.json"), manifest)
        fingerprints[stage] = stage
    largest = [{"size": 3, "kept": "k1", "members": [{"id": "k1", "text": "kept text"}, {"id": "d", "text": "copy"}]}]
    found = {"clusters": 1, "documents": 3, "sizes": {"3": 1}, "largest": largest}
    storage.write_json(storage.join(str(tmp_path), "near", published.FOLDER, clusters.REPORT), found)
    storage.write_json(storage.join(str(tmp_path), "manifest.json"), {"stages": fingerprints})
    return str(tmp_path)


def test_one_page_with_funnel_histograms_samples_and_clusters_that_fetches_nothing(corpus):
    page = Balanced()
    page.feed(storage.read_bytes(build_report(corpus)).decode())
    page.close()
    assert page.open == []
    assert page.fetched == []
    text = " ".join(page.text)
    for told in (
        "97.0%",
        "Documents through the stages",
        "What the rules measured",
        "rules: short (3)",
        "value 2, threshold 5",
        "kept text <0> & more",
        "Clusters of duplicates",
        "3 documents, kept k1",
        "lines cut",
    ):
        assert told in text, told


def test_bars_are_as_high_as_their_share_and_the_threshold_stands_between_its_bars():
    chart = histogram_chart("m", "shares", {"5": 10, "40": 40}, [(-math.inf, 0.3)])
    found = re.findall(r'class="(kept|dropped)" x="([\d.]+)".*?height="([\d.]+)"', chart)
    assert [css for css, _, _ in found] == ["kept", "dropped"]
    bars = [(float(x), float(height)) for _, x, height in found]
    assert len(bars) == 2
    assert bars[1][1] == pytest.approx(4 * bars[0][1], rel=0.01)
    mark = float(re.search(r'class="rule rollback" x1="([\d.]+)"', chart)[1])
    assert bars[0][0] < mark < bars[1][0]


@pytest.mark.parametrize("bins", [{}, {"-1000": 5}, {"-1000": 5, "30": 1}, {"-25": 3}])
def test_histograms_of_zeros_nothing_and_small_values_can_be_drawn(bins):
    assert histogram_chart("m", "decades", bins, [(0.0, 50.0)]).startswith("<svg")
