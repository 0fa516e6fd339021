import json
import logging
import os

import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.documents import SCHEMA, SET_ASIDE_SCHEMA, document_id, to_table
from pipelines.stage import Output, Stage, Unit, read_manifest, read_part, run_stage

pytestmark = pytest.mark.usefixtures("ray_session")


def work(n: int, calls: str, fail: bool = False):
    """Keeps ``n`` documents and sets one aside; leaves a mark for every call."""
    storage.append_line(f"{calls}/{n}", "called")
    if fail and not os.path.exists(f"{calls}/mended"):
        raise RuntimeError("the worker fell over")
    kept = to_table([{"id": document_id("s", str(n), i), "text": "word " * i} for i in range(n)])
    yield Output(kept, to_table([{"id": f"bad {n}", "text": "bad", "reason": "rule"}], SET_ASIDE_SCHEMA), n + 1, 100)


def stage_and_units(tmp_path, **more):
    units = [Unit(f"part-{n:05d}", {"n": n, "calls": str(tmp_path / "calls"), **more}) for n in (1, 2, 3)]
    return Stage("filter", str(tmp_path / "filter"), {"min_words": 5}, {"extract": "abc"}), units


def calls(tmp_path):
    return {f: len((tmp_path / "calls" / f).read_text().splitlines()) for f in ("1", "2", "3")}


def test_counts_balance_and_set_aside_rows_keep_their_reason(tmp_path):
    stage, units = stage_and_units(tmp_path)
    manifest = run_stage(stage, units, work)
    assert (manifest["documents_in"], manifest["documents_out"]) == (9, 6)
    assert manifest["set_aside"] == {"rule": {"documents": 3, "bytes": 9}}
    assert [part["file"] for part in manifest["parts"]] == [f"part-0000{n}.parquet" for n in (1, 2, 3)]
    assert manifest["bytes_out"] == sum(5 * i for n in (1, 2, 3) for i in range(n))
    aside = pq.read_table(tmp_path / "filter" / "set-aside").to_pylist()
    assert sorted((row["id"], row["reason"]) for row in aside) == [(f"bad {n}", "rule") for n in (1, 2, 3)]
    assert not any(name.startswith(("_", ".")) for name in os.listdir(tmp_path / "filter"))


def test_finished_stage_is_skipped_and_a_changed_one_says_what_changed(tmp_path, caplog):
    stage, units = stage_and_units(tmp_path)
    run_stage(stage, units, work)
    assert stage.finished() == read_manifest(stage.folder)
    changed = Stage("filter", stage.folder, {"min_words": 7}, {"extract": "def"})
    with caplog.at_level(logging.INFO, "ingot"):
        assert changed.finished() is None
    assert "min_words changed from 5 to 7" in caplog.text
    assert "its input extract changed" in caplog.text


def test_a_failed_stage_goes_on_with_the_units_that_are_missing(tmp_path):
    stage, units = stage_and_units(tmp_path)
    units[1] = Unit("part-00002", {**units[1].arguments, "fail": True})
    with pytest.raises(Exception, match="the worker fell over"):
        run_stage(stage, units, work)
    assert stage.finished() is None
    # What had finished by then is known from its receipt, and is not done again.
    done = {json.loads(p.read_text())["name"][-1] for p in (tmp_path / "filter" / "_receipts").glob("*.json")}
    before = calls(tmp_path) if len(done) == 2 else None
    storage.write_bytes(str(tmp_path / "calls" / "mended"), b"")
    manifest = run_stage(stage, units, work)
    assert manifest["documents_out"] == 6
    if before is not None:
        assert calls(tmp_path) == before | {"2": before["2"] + 1}


def test_a_kill_while_a_stale_folder_is_emptied_leaves_no_manifest(tmp_path, monkeypatch):
    stage, units = stage_and_units(tmp_path)
    run_stage(stage, units, work)
    delete = storage.delete

    def killed_in_the_folder(uri):
        if uri == stage.folder:
            raise KeyboardInterrupt
        delete(uri)

    monkeypatch.setattr(storage, "delete", killed_in_the_folder)
    with pytest.raises(KeyboardInterrupt):
        Stage("filter", stage.folder, {"min_words": 7}, {"extract": "abc"}).begin()
    assert stage.finished() is None


def test_parts_are_read_in_the_batches_that_they_were_written_in(tmp_path):
    uri = str(tmp_path / "part.parquet")
    rows = [{"id": str(i), "text": "x"} for i in range(10)]
    with storage.parquet_writer(uri, SCHEMA) as writer:
        for batch in (rows[:3], rows[3:]):
            writer.write_table(to_table(batch))
    assert [table.num_rows for table in read_part(uri, 5)] == [3, 5, 2]
    assert [i for table in read_part(uri, columns=["id"]) for i in table["id"].to_pylist()] == [
        str(i) for i in range(10)
    ]


def test_a_sample_of_the_set_aside_rows_keeps_all_counts(tmp_path):
    stage, units = stage_and_units(tmp_path)
    manifest = run_stage(stage, units, work, set_aside_share=0.0)
    assert manifest["set_aside"]["rule"]["documents"] == 3
    assert pq.read_table(tmp_path / "filter" / "set-aside").num_rows == 0
