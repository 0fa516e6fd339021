"""Tasks of lm_eval by name, with local files in place of the hub's data where there are some.

Prompts, few-shot examples, filters and metrics are the harness's own; a task reads the same documents from either.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import gzip
import importlib.abc
import importlib.machinery
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from jobs import eval_index
from jobs.eval_code import METRIC, CodeEval, forget_modules
from jobs.settings import Scoring, SettingsError
from pipelines import storage

log = logging.getLogger("ingot")

_COLUMNS = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]


class Tasks(TaskManager):
    """The harness's ``TaskManager``, which also knows local files, and has programs run in a sandbox.

    Args:
        data_dir: folder or URI with ``mmlu/{dev,test}/SUBJECT_{dev,test}.csv``, ``gsm8k/{train,test}.jsonl`` and
            ``humaneval/HumanEval.jsonl.gz``, for tasks on those datasets; None takes the hub's.
        code: what runs generated programs.
    """

    def __init__(self, data_dir: str | None = None, code: CodeEval | None = None) -> None:
        vars(self).update(vars(eval_index.manager()))
        self.data_dir, self.code = data_dir, code or CodeEval(allowed=False)
        self._loaded: dict[tuple[str, ...], Any] = {}

    def load(self, task_list: Any) -> Any:
        """As in the harness; names that were loaded before are not read again.

        Raises:
            SettingsError: there is no task of that name, a local file is missing, or generated code may not run.
        """
        names = (task_list,) if isinstance(task_list, str) else tuple(task_list)
        if not all(isinstance(name, str) for name in names):
            return super().load(task_list)
        if names not in self._loaded:
            for name in names:
                if name not in self.all_tasks and not (name.endswith((".yaml", ".yml")) and os.path.isfile(name)):
                    raise SettingsError(f"tasks has {name!r}; the harness has no such task{_like(name, self)}")
            with _local_data(self.data_dir), _own_code_eval(self.code):
                loaded = super().load(list(names))
            for task in loaded["tasks"].values():
                self.code.adapt(task)
            self._loaded[names] = loaded
        return self._loaded[names]


def tasks_of(settings: Scoring) -> Tasks:
    """The tasks as the settings want them: their data, and how programs are drawn."""
    code = CodeEval(
        allowed=settings.allow_code_execution,
        samples=settings.samples_per_problem,
        ks=settings.pass_at_k,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    return Tasks(settings.data_dir, code)


def check(settings: Scoring) -> None:
    """Refuse what an evaluation would refuse, without fetching anything from the hub.

    Raises:
        SettingsError: there is no such task, a local file is missing, or generated code may not run.
    """
    tasks = tasks_of(settings)
    for name in settings.task_names():
        try:
            with mock.patch.object(ConfigurableTask, "download", _refuse):
                tasks.load([name])
        except _OfTheHubError:
            continue
        except SettingsError:
            raise
        except Exception as error:  # such as a package that is not installed; scoring tells it of this task alone
            log.warning("evaluate: task %s cannot be loaded here: %s: %s", name, type(error).__name__, error)


class _OfTheHubError(Exception):
    """A task's data would have to be fetched."""


def _refuse(*_: Any, **__: Any) -> None:
    raise _OfTheHubError


def _like(name: str, tasks: TaskManager) -> str:
    near = difflib.get_close_matches(name, tasks.all_tasks, n=3)
    return f"; near are {', '.join(near)}" if near else ""


# Data


@contextlib.contextmanager
def _local_data(folder: str | None) -> Iterator[None]:
    """Let tasks that are built meanwhile take what the folder has in place of the hub's."""
    hub = ConfigurableTask.download

    def download(self: ConfigurableTask, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        read = _READERS.get(self.DATASET_PATH or "")
        if read is None or callable(self.config.custom_dataset):
            hub(self, dataset_kwargs, **kwargs)
        else:
            self.dataset = DatasetDict({split: read(folder, self, split) for split in _splits(self)})

    if folder is None:
        yield
        return
    with mock.patch.object(ConfigurableTask, "download", download):
        yield


def _splits(task: Task) -> list[str]:
    """Splits of its dataset that a task reads."""
    config = task.config
    few_shot = [config.fewshot_split, getattr(config.fewshot_config, "split", None)]
    asked = [config.training_split, config.validation_split, config.test_split, *few_shot]
    return list(dict.fromkeys(split for split in asked if split))


def _mmlu(folder: str, task: Task, split: str) -> Dataset:
    """Rows as those of cais/mmlu: question, subject, choices, answer (0 to 3).

    Files have a line of column names and answers from 0 to 3, or, as the paper published them, neither and A to D.
    """
    part = {"validation": "val"}.get(split, split)
    subject = task.DATASET_NAME
    file = storage.join(folder, "mmlu", part, f"{subject}_{part}.csv")
    lines = list(csv.reader(io.StringIO(_bytes(folder, file, task).decode("utf-8-sig"), newline="")))
    named = bool(lines) and lines[0] == _COLUMNS
    rows = []
    for number, line in enumerate(lines[named:], 1 + named):
        if len(line) != 6 or line[5] not in (("0", "1", "2", "3") if named else ("A", "B", "C", "D")):
            raise SettingsError(
                f"{file}: line {number} is not a question, four choices and an answer; "
                f"columns have to be {', '.join(_COLUMNS)} (0 to 3)"
            )
        answer = int(line[5]) if named else "ABCD".index(line[5])
        rows.append({"question": line[0], "subject": subject, "choices": line[1:5], "answer": answer})
    return _dataset(rows, file)


def _gsm8k(folder: str, task: Task, split: str) -> Dataset:
    """Rows as those of openai/gsm8k: question, answer."""
    kind = "" if task.DATASET_NAME in (None, "main") else f"_{task.DATASET_NAME}"
    file = storage.join(folder, "gsm8k", f"{split}{kind}.jsonl")
    return _dataset(_json_lines(_bytes(folder, file, task), file, ("question", "answer")), file)


def _humaneval(folder: str, task: Task, split: str) -> Dataset:
    """Rows as those of openai/openai_humaneval, which has nothing but a test split."""
    file = storage.join(folder, "humaneval", "HumanEval.jsonl.gz")
    data = gzip.decompress(_bytes(folder, file, task))
    fields = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    return _dataset(_json_lines(data, file, fields), file)


_READERS: dict[str, Callable[[str, Task, str], Dataset]] = {
    "cais/mmlu": _mmlu,
    "hails/mmlu_no_train": _mmlu,
    "openai/gsm8k": _gsm8k,
    "gsm8k": _gsm8k,
    "openai/openai_humaneval": _humaneval,
    "openai_humaneval": _humaneval,
}


def _bytes(folder: str, file: str, task: Task) -> bytes:
    if not storage.exists(file):
        raise SettingsError(f"data_dir is {folder!r}; there is no file {file}, which task {task.config.task} reads")
    return storage.read_bytes(file)


def _json_lines(data: bytes, file: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(data.decode().rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            rows.append({name: row[name] for name in fields})
        except (ValueError, KeyError, TypeError):
            raise SettingsError(f"{file}: line {number} is no JSON object with {', '.join(fields)}") from None
    return rows


def _dataset(rows: list[dict[str, Any]], file: str) -> Dataset:
    if not rows:
        raise SettingsError(f"{file}: is empty")
    return Dataset.from_list(rows)


# Code


@contextlib.contextmanager
def _own_code_eval(code: CodeEval) -> Iterator[None]:
    """Let task modules that are imported meanwhile get ``code`` where they ask the hub for its metric code_eval.

    That metric is a script, so it needs the network at import, and it would run programs in a mere child process.
    """
    with contextlib.ExitStack() as stack:

        def adapt(package: Any) -> None:
            hub = package.load
            own = lambda path, *args, **kwargs: code if path == METRIC else hub(path, *args, **kwargs)  # noqa: E731
            stack.enter_context(mock.patch.object(package, "load", own))

        stack.callback(forget_modules)
        forget_modules()
        if "evaluate" in sys.modules:
            adapt(sys.modules["evaluate"])
        else:
            finder = _WhenImported("evaluate", adapt)
            sys.meta_path.insert(0, finder)
            stack.callback(sys.meta_path.remove, finder)
        yield


class _WhenImported(importlib.abc.MetaPathFinder):
    """Does something to a package once it is imported, which may take seconds and never be needed."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """As of the finder for files."""
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def and_then(module: Any) -> None:
                del spec.loader.exec_module
                execute(module)
                self.then(module)

            spec.loader.exec_module = and_then
        return spec
