"""What is done on another node looks as if it were done here: its words, its result, its errors."""

import logging
import os

import pytest

from jobs.placing import place
from jobs.settings import OfRun, SettingsError

log = logging.getLogger("ingot")


def count(settings, device, write):
    log.info("counts for %s on %s", settings.name, device)
    write("one ")
    write("two")
    return os.getpid()


def refuse(settings, device, write):
    write("before")
    raise SettingsError("step is 7; there is none")


def said(text):
    return [record.getMessage() for record in text.records if record.name == "ingot"]


def test_here_it_is_a_plain_call(monkeypatch, caplog):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = []
    assert place(count, OfRun(name="first"), words.append, "auto") == os.getpid()
    assert words == ["one ", "two"]
    assert said(caplog) == ["counts for first on cpu"]
    with pytest.raises(SettingsError, match="device is gpu, and this machine has none"):
        place(count, OfRun(), words.append, "gpu")


def test_in_a_job_on_a_cluster_it_is_a_task(ray_session, monkeypatch, caplog):
    monkeypatch.setenv("RAY_ADDRESS", "joined already")
    words = []
    assert place(count, OfRun(name="first"), words.append, "auto") != os.getpid()
    assert words == ["one ", "two"]
    assert said(caplog) == ["counts for first on cpu"]
    with pytest.raises(SettingsError, match="^step is 7; there is none$"):
        place(refuse, OfRun(), words.append)
    assert words[-1] == "before"
