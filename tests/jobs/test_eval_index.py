"""What is kept of the harness's descriptions of tasks is what the harness reads."""

import os
import shutil
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

from jobs import eval_index

HARNESS = Path(lm_eval.tasks.__file__).parent


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A few of the harness's tasks, of which nothing is kept yet."""
    for name in ("aclue", "gsm8k", "humaneval", "super_glue"):
        shutil.copytree(HARNESS / name, tmp_path / "tasks" / name)
    monkeypatch.setattr(lm_eval.tasks, "__file__", str(tmp_path / "tasks" / "__init__.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "tasks"


@pytest.fixture
def reads(monkeypatch):
    """How often the descriptions were read."""
    done, build = [], TaskIndex.build
    monkeypatch.setattr(
        TaskIndex, "build", staticmethod(lambda *args, **kwargs: done.append(1) or build(*args, **kwargs))
    )
    return done


def known():
    return vars(eval_index._manager.__wrapped__())["_index"]


def test_what_is_kept_is_what_the_harness_reads(root, reads):
    expected = vars(TaskManager(include_defaults=False, include_path=str(root)))["_index"]
    reads.clear()
    assert known() == expected
    assert known() == expected
    assert len(reads) == 1
    assert {"aclue", "gsm8k", "humaneval", "super-glue-lm-eval-v1"} <= set(expected)


@pytest.mark.parametrize("way", ["changed", "included", "added", "removed"])
def test_descriptions_are_read_again_when_one_changes(root, reads, way):
    known()
    of_one = root / "gsm8k" / "gsm8k.yaml"
    if way == "changed":
        of_one.write_text(of_one.read_text().replace("num_fewshot: 5", "num_fewshot: 7"))
    elif way == "included":
        (root / "aclue" / "_default_template_yaml").write_text("output_type: multiple_choice\n")
    elif way == "added":
        (root / "gsm8k" / "mine.yaml").write_text(of_one.read_text().replace("task: gsm8k", "task: mine"))
    else:
        of_one.unlink()
    found = known()
    assert len(reads) == 2
    assert found == vars(TaskManager(include_defaults=False, include_path=str(root)))["_index"]
    assert ("mine" in found) == (way == "added")
    assert ("gsm8k" in found) == (way != "removed")


@pytest.mark.parametrize("content", ["", "{}", '{"state": 1', '{"state": "x", "tasks": []}', "[]", "[" * 200_000])
def test_a_damaged_file_is_written_anew(root, reads, content, tmp_path):
    expected = known()
    (file,) = (tmp_path / "caches" / "ingot").iterdir()
    file.write_text(content)
    assert known() == expected
    assert known() == expected
    assert len(reads) == 2


def test_a_home_that_cannot_be_written_to_does_no_harm(root, reads, tmp_path, monkeypatch):
    (tmp_path / "caches").write_text("a file, where a folder is wanted")
    assert known() == known()
    assert len(reads) == 2


def test_links_and_names_of_any_kind_do_no_harm(root, reads):
    (root / "gsm8k" / ".#gsm8k.yaml").symlink_to("nowhere")
    (root / "loop").symlink_to(".")
    (root / "itself").symlink_to("itself")
    (root / os.fsdecode(b"caf\xe9")).write_text("")
    assert known() == known()
    assert len(reads) == 1


def test_a_user_without_a_home_keeps_nothing(root, reads, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    monkeypatch.chdir(tmp_path)
    assert known() == known()
    assert len(reads) == 2
    assert not (tmp_path / "caches").exists()
