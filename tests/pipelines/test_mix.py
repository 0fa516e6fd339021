import json
import random
from collections import Counter

import pyarrow.parquet as pq
import pytest
import xxhash

import pipelines.mix
from pipelines import storage
from pipelines.documents import SCHEMA, copy_id, document_id, original_id, to_table
from pipelines.mix import MixSettings, mix, repeated, spans
from pipelines.stage import Output, Stage, Unit, part_uris, run_stage

pytestmark = pytest.mark.usefixtures("ray_session")


def documents(n, sources=("web", "books", "code")):
    draw = random.Random(0)
    return [
        {
            "id": document_id("s", "f", i),
            "text": f"document {i} " + "word " * draw.randrange(40),
            "source": draw.choice(sources),
            "url": f"http://x/{i}",
            "metadata": {"i": i},
        }
        for i in range(n)
    ]


def write(part):
    for start in range(0, len(part), 50):
        table = to_table(part[start : start + 50])
        yield Output(table, None, table.num_rows, 1)


def corpus(folder, rows, parts):
    """A finished stage with the rows dealt out to so many parts."""
    stage = Stage("near", str(folder), {"parts": parts}, {})
    units = [Unit(f"part-{i:05d}", {"part": rows[i::parts]}, {"source": 0}) for i in range(parts)]
    return stage.folder, run_stage(stage, units, write)


def read(folder, manifest):
    return [row for uri in part_uris(str(folder), manifest) for row in pq.read_table(uri).to_pylist()]


def key(seed, document):
    return xxhash.xxh3_64_intdigest(f"order\0{seed}\0{document}".encode())


def test_the_shuffle_holds_every_document_once_in_the_order_of_their_hashes(tmp_path):
    rows = documents(700)
    before, manifest = corpus(tmp_path / "near", rows, 3)
    done = mix(str(tmp_path / "mix"), before, manifest, MixSettings(seed=5, part_bytes=9000), {})
    out = read(tmp_path / "mix", done)
    assert [row["id"] for row in out] == sorted((row["id"] for row in rows), key=lambda i: key(5, i))
    by_id = {row["id"]: row for row in to_table(rows).to_pylist()}
    assert all(row == by_id[row["id"]] for row in out)
    sizes = [part["bytes"] for part in done["parts"]]
    assert len(sizes) == round(manifest["bytes_out"] / 9000)
    assert max(sizes) < 2 * 9000
    assert (done["documents_in"], done["documents_out"], done["bytes_out"]) == (700, 700, manifest["bytes_out"])
    assert not storage.exists(str(tmp_path / "mix/_shuffle"))
    assert pq.read_schema(part_uris(str(tmp_path / "mix"), done)[0]).equals(SCHEMA)


@pytest.mark.parametrize("ranges", [2, 3, 256])
def test_the_order_is_the_same_however_the_corpus_was_spread_and_however_many_passes(tmp_path, monkeypatch, ranges):
    monkeypatch.setattr(pipelines.mix, "RANGES", ranges)
    rows = documents(300)
    weights = {"web": 2.0, "code": 0.5}
    expected = None
    for parts, shuffled in ((1, rows), (7, random.Random(1).sample(rows, len(rows)))):
        before, manifest = corpus(tmp_path / f"near-{parts}", shuffled, parts)
        done = mix(str(tmp_path / f"mix-{parts}"), before, manifest, MixSettings(part_bytes=4000), weights)
        assert len(done["parts"]) == 9  # four passes of 2 ranges, two of 3, one of 256
        out = [read(tmp_path / f"mix-{parts}", {"parts": [part]}) for part in done["parts"]]
        expected = expected or out
        assert out == expected
    order = [row["id"] for part in expected for row in part]
    assert order == sorted(order, key=lambda i: key(0, i))
    assert len(order) == len(set(order))


def test_passes_split_the_parts_until_a_range_is_one_part():
    assert spans(1) == [1]
    assert spans(256) == [1]
    assert spans(257) == [2, 1]
    assert spans(256**2 + 1) == [257, 2, 1]


def test_weights_repeat_and_thin_out_by_a_hash_of_the_id(tmp_path):
    rows = documents(3000)
    had = Counter(row["source"] for row in rows)
    weights = {"web": 2.0, "books": 0.25, "code": 1.5, "unknown": 7.0}
    before, manifest = corpus(tmp_path / "near", rows, 2)
    counted = {}
    for shuffle in (True, False):
        folder = tmp_path / f"mix-{shuffle}"
        done = mix(str(folder), before, manifest, MixSettings(shuffle=shuffle), weights)
        out = read(folder, done)
        assert len({row["id"] for row in out}) == len(out) == done["documents_out"]
        counted[shuffle] = Counter(row["id"] for row in out)
        copies = Counter(original_id(row["id"]) for row in out)
        for row in rows:
            allowed = {"web": {2}, "books": {0, 1}, "code": {1, 2}}[row["source"]]
            assert copies[row["id"]] in allowed
        now = done["statistics"]["documents"]["sources"]
        for source, weight in list(weights.items())[:3]:
            assert now[source]["documents"] == pytest.approx(had[source] * weight, rel=0.12)
            assert done["sources_in"][source]["documents"] == had[source]
        assert done["documents_in"] == 3000
    assert counted[True] == counted[False]
    # without a shuffle the order stays, copies next to each other, and parts what they are
    inputs = [row["id"] for row in read(before, manifest)]
    originals = [original_id(row["id"]) for row in out]
    assert originals == sorted(originals, key={i: n for n, i in enumerate(inputs)}.get)
    assert [part["source"] for part in done["parts"]] == [0, 0]


def test_another_seed_chooses_and_orders_anew_and_a_larger_weight_only_adds():
    table = to_table(documents(500, ["web"]))

    def chosen(seed, weight):
        return repeated(table, seed, {"web": weight})["id"].to_pylist()

    assert set(chosen(0, 0.3)) < set(chosen(0, 0.6)) < set(chosen(0, 1.0)) < set(chosen(0, 1.5))
    assert set(chosen(0, 0.5)) != set(chosen(1, 0.5))
    assert repeated(table, 0, {})["key"] != repeated(table, 1, {})["key"]
    assert chosen(0, 0.0) == []


def test_copies_have_ids_of_their_own_that_lead_back():
    assert [copy_id("ab", i) for i in range(3)] == ["ab", "ab#2", "ab#3"]
    assert [original_id(i) for i in ("ab", "ab#2", "ab#31", "#2", "a#b", "x#2#3")] == [
        "ab",
        "ab",
        "ab",
        "#2",
        "a#b",
        "x#2",
    ]


def test_a_killed_mix_goes_on_with_the_files_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(pipelines.mix, "RANGES", 3)
    rows = documents(400)
    before, manifest = corpus(tmp_path / "near", rows, 5)
    settings = MixSettings(part_bytes=3000)
    undisturbed = read(tmp_path / "whole", mix(str(tmp_path / "whole"), before, manifest, settings, {"web": 1.5}))
    folder = tmp_path / "mix"
    ran = Counter()
    for_each = pipelines.mix.for_each

    def counted(units, task):
        for state in for_each(units, task):
            ran[state["name"]] += state["finished"]
            yield state
            if state["finished"] and ran.total() in (2, 5, 9, 20):
                raise KeyboardInterrupt  # the driver

    monkeypatch.setattr(pipelines.mix, "for_each", counted)
    kills = 0
    while True:
        try:
            done = mix(str(folder), before, manifest, settings, {"web": 1.5})
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills == 4
    assert read(folder, done) == undisturbed
    # what had ended by the time of a kill was not done again; a task that ended unseen at that moment may have been
    assert max(ran.values()) <= 2
    assert mix(str(folder), before, manifest, settings, {"web": 1.5}) == done


def test_a_damaged_input_ends_the_mix_and_what_was_written_is_kept(tmp_path):
    rows = documents(200)
    before, manifest = corpus(tmp_path / "near", rows, 3)
    part = tmp_path / "near" / "part-00001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-20])
    settings = MixSettings(part_bytes=1000)
    with pytest.raises(Exception, match=r"part-00001\.parquet"):
        mix(str(tmp_path / "mix"), before, manifest, settings, {})
    assert not storage.exists(str(tmp_path / "mix/manifest.json"))
    part.write_bytes(whole)
    done = mix(str(tmp_path / "mix"), before, manifest, settings, {})
    assert sorted(json.loads(row["metadata"])["i"] for row in read(tmp_path / "mix", done)) == list(range(200))


def test_an_empty_corpus_stays_empty(tmp_path):
    before, manifest = corpus(tmp_path / "near", [], 1)
    done = mix(str(tmp_path / "mix"), before, manifest, MixSettings(), {"web": 2.0})
    assert done["documents_out"] == 0
    assert read(tmp_path / "mix", done) == []


def test_parts_that_hold_nothing_are_refused():
    MixSettings().validate()
    with pytest.raises(ValueError, match="part_bytes is 0"):
        MixSettings(part_bytes=0).validate()
