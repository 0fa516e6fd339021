"""Log lines as text and as JSON."""

import json
import logging

import pytest

from jobs import logs


@pytest.fixture(autouse=True)
def _as_before():
    root, ingot = logging.getLogger(), logging.getLogger("ingot")
    before = root.handlers[:], root.level, ingot.level, logging.getLogRecordFactory()
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ingot.setLevel(before[2])
    logging.setLogRecordFactory(before[3])


def test_lines_are_text_for_people_unless_asked(monkeypatch, capsys):
    monkeypatch.delenv("RAY_LOGGING_CONFIG_ENCODING", raising=False)
    logs.configure()
    logs.mark(rank=3)
    logging.getLogger("ingot").info("curate: %d documents", 7)
    logging.getLogger("others").info("chatter")
    assert capsys.readouterr().err[8:] == " curate: 7 documents\n"
    assert "logging_config" not in logs.ray_arguments()


def test_json_lines_carry_what_their_process_is_marked_with(monkeypatch, capsys):
    monkeypatch.setenv("RAY_LOGGING_CONFIG_ENCODING", "JSON")
    logs.configure()
    log = logging.getLogger("ingot")
    log.info("curate: %d documents", 7)
    logs.mark(run="base", rank=3)
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        log.exception("step failed\nbadly")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["levelname"], first["message"], first["filename"]) == ("INFO", "curate: 7 documents", "test_logs.py")
    assert "rank" not in first
    assert (second["message"], second["run"], second["rank"]) == ("step failed\nbadly", "base", 3)
    assert "ZeroDivisionError" in second["exc_text"]
    assert logs.ray_arguments()["logging_config"].encoding == "JSON"
