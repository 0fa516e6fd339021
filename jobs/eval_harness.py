"""Runs lm_eval over a model and keeps what it says, in the harness's own files and as rows that are easy to draw."""

from __future__ import annotations

import contextlib
import functools
import logging
import numbers
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.utils
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import make_table

from jobs.eval_cache import CachedWorkers, FinishedItems, cache_folder
from jobs.eval_pictures import tasks_picture
from jobs.eval_tasks import tasks_of
from jobs.eval_workers import Facts
from jobs.harness import IngotLM, Workers
from jobs.settings import Scoring, SettingsError
from pipelines import storage
from pipelines.stage import ingot_version

log = logging.getLogger("ingot")

# Of what the harness returns for a task, what is by name of tasks and groups.
_BY_NAME = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples",
    "samples")  # fmt: skip


class Harness:
    """The tasks of an evaluation, ready to be asked of models.

    Args:
        settings: which tasks, and how.

    Raises:
        SettingsError: there is no such task, a local file is missing, or the task needs code to run.
    """

    def __init__(self, settings: Scoring) -> None:
        self.settings = settings
        self.tasks = tasks_of(settings)
        self.failed: dict[str, str] = {}
        for name in settings.task_names():
            self._try(name, lambda name=name: self.tasks.load([name]))

    def run(self, model: Workers, known: Facts, folder: str, step: str) -> dict[str, Any]:
        """Score a model; the tasks that fail are named, and the others go on.

        Args:
            model: that is asked.
            known: of the model.
            folder: what was measured of the run or model before; gets its finished items.
            step: name of the folder in it that gets the results and samples.

        Returns:
            scores, rows as of ``rows``; failed, the reasons by task; cut, the requests by task that were longer than
            the model can read, where there were some; table, for people; files, the harness's.
        """
        failed, found, cut = dict(self.failed), [], {}
        with FinishedItems(cache_folder(folder, known.fingerprint)) as finished:
            workers = CachedWorkers(model, finished)
            lm = IngotLM(workers, known.max_length)
            for name in self.settings.task_names():
                if name in failed:
                    continue
                log.info("evaluate: task %s", name)
                lm.asked = lm.cut = 0
                try:
                    found.append(self._evaluate(name, lm))
                except Exception as error:
                    log.exception("evaluate: task %s failed", name)
                    failed[name] = _reason(error)
                if lm.cut:
                    cut[name] = f"{lm.cut:,} of {lm.asked:,} requests were longer than max_seq_len {lm.max_length:,}"
                    log.warning("evaluate: task %s: %s; their beginnings were cut", name, cut[name])
        out: dict[str, Any] = {"scores": [], "table": "", **({"failed": failed} if failed else {})}
        out |= {"cut": cut} if cut else {}
        if found:
            whole = _merged(found)
            whole["config"] |= self._about(known)
            out["scores"] = rows(whole)
            out["table"] = make_table(whole) + (make_table(whole, "groups") if whole.get("groups") else "")
            out["files"] = _keep(whole, known, storage.join(folder, step))
            for task, svg in tasks_picture(out["scores"]).items():
                storage.write_bytes(storage.join(folder, step, f"{task}.svg"), svg.encode())
        return out

    def _try(self, name: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except SettingsError:
            raise
        except Exception as error:  # such as a hub that is away
            log.exception("evaluate: task %s failed", name)
            self.failed[name] = _reason(error)

    def _evaluate(self, name: str, lm: IngotLM) -> dict[str, Any]:
        with lean():
            return simple_evaluate(
                model=lm,
                tasks=[name],
                task_manager=self.tasks,
                num_fewshot=self.settings.shots(name),
                limit=self.settings.limit,
                gen_kwargs={"max_gen_toks": most} if (most := self.settings.max_gen_toks) else None,
                confirm_run_unsafe_code=self.settings.allow_code_execution,
            )

    def _about(self, known: Facts) -> dict[str, Any]:
        """What the harness's results say of the model."""
        return {
            "model": "ingot",
            "model_args": {"model": known.name, "step": known.step, "fingerprint": known.fingerprint},
            "model_num_parameters": known.parameters,
            "model_dtype": known.dtype,
            "device": known.device,
            "data_dir": self.settings.data_dir,
            "ingot_version": ingot_version(),
        }


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """The harness as it is, but quick and quiet.

    It compiles the template of a prompt for each document and each example anew, minutes on MMLU: here, once. There are
    no bars between the lines of the log, and no git that complains of a folder without history.
    """
    env = lm_eval.utils.env
    with contextlib.ExitStack() as stack:
        compiled = functools.lru_cache(maxsize=1024)(env.from_string)
        stack.enter_context(mock.patch.object(env, "from_string", compiled))
        for module in (lm_eval.api.task, lm_eval.api.model):
            stack.enter_context(mock.patch.object(module, "tqdm", lambda items, **_: items))
        stack.enter_context(mock.patch.object(lm_eval.evaluator, "get_git_commit_hash", ingot_version))
        # a warning for each task that it does as it was told
        stack.enter_context(mock.patch.object(lm_eval.evaluator.eval_logger, "disabled", True))
        yield


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}"[:300] if text else type(error).__name__


def _merged(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The results of several tasks as if the harness had been asked for all at once."""
    whole = dict(found[0])
    for key in _BY_NAME:
        merged = {name: value for one in found for name, value in one.get(key, {}).items()}
        if merged or key in whole:
            whole[key] = merged
    return whole


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the harness's results say, a row for each metric of each task or group.

    Returns:
        Rows with task, alias, group (the next above it that has scores of its own, or None), metric, filter, value,
        stderr (None where there is none), n_shot (None where tasks of a group differ), items, chance (of the right one
        among the choices, where all questions have as many).
    """
    group_of = {child: group for group, children in results["group_subtasks"].items() for child in children}
    measured = {task: found for task, found in results["results"].items() if any(_numbers(found))}
    out = []
    for task, found in measured.items():
        group = group_of.get(task)
        while group is not None and group not in measured:  # it has no score of its own
            group = group_of.get(group)
        for metric, filtered, value in _numbers(found):
            stderr = found.get(f"{metric}_stderr,{filtered}")
            out.append(
                {
                    "task": task,
                    "alias": found.get("alias", task),
                    "group": group,
                    "metric": metric,
                    "filter": filtered,
                    "value": value,
                    "stderr": None if stderr in (None, "N/A") else float(stderr),
                    "n_shot": _common(results, task, results["n-shot"].get),
                    "items": found.get("sample_len") or results.get("n-samples", {}).get(task, {}).get("effective"),
                    "chance": _common(results, task, lambda one: _chance(results, one)),
                }
            )
    return out


def _numbers(found: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Metrics, filters and values of a task; what is no number is in the harness's files alone."""
    for name, value in found.items():
        metric, comma, filtered = name.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, numbers.Real):
            yield metric, filtered, float(value)


def _chance(results: dict[str, Any], task: str) -> float | None:
    config = results["configs"][task]
    choices = config.get("doc_to_choice")
    several = config.get("output_type") == "multiple_choice" and isinstance(choices, list)
    return 1 / len(choices) if several else None


def _common(results: dict[str, Any], task: str, fact: Callable[[str], Any]) -> Any:
    """A fact of a task, or what is equal in all tasks of a group, else None."""
    if task not in results["group_subtasks"]:
        return fact(task)
    below = {_common(results, child, fact) for child in results["group_subtasks"][task]}
    return below.pop() if len(below) == 1 else None


def _keep(results: dict[str, Any], known: Facts, folder: str) -> list[str]:
    """Write results_DATE.json and samples_TASK_DATE.jsonl by the harness's own writer; returns their names."""
    samples = results.pop("samples", {})
    names = []
    with tempfile.TemporaryDirectory() as local:
        tracker = EvaluationTracker(output_path=local)
        tracker.general_config_tracker.log_experiment_args(
            model_source="ingot",
            model_args={"model": known.name},
            system_instruction=None,
            chat_template=None,
            fewshot_as_multiturn=False,
        )
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, own in samples.items():
            tracker.save_results_samples(task_name=task, samples=own)
        for at, _, files in os.walk(local):
            for name in sorted(files):
                with open(os.path.join(at, name), "rb") as file:
                    storage.write_bytes(storage.join(folder, name), file.read())
                names.append(name)
    if not names:
        raise RuntimeError("the harness wrote no results")
    return names
