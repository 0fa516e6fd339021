"""pass@k of generated programs (Chen et al. 2021), which run in ``jobs.sandbox`` only when that was allowed.

Stands in for the metric "code_eval" of the hub, which the harness's tasks on code ask for: the same programs, the same
time limit, the same estimator.
"""

from __future__ import annotations

import ast
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jobs.sandbox import Outcome, Program, many
from jobs.settings import SettingsError

log = logging.getLogger("ingot")

METRIC = "code_eval"
SECONDS = 3.0  # for a program, as in the hub's metric
MEMORY = 1 << 30  # bytes for a program

Execute = Callable[[Sequence[Program]], Iterable[tuple[int, Outcome]]]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of ``k`` programs is right: 1 - C(n-c, k) / C(n, k).

    Args:
        samples: programs that were drawn, n; at least ``k``.
        right: those that passed, c.
        k: programs that may be tried.
    """
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - right + 1, samples + 1))


class CodeEval:
    """Runs programs against their tests and estimates pass@k.

    Args:
        allowed: whether generated code may run at all.
        samples: programs for each problem, null as the task has it.
        ks: which pass@k to tell; None those of the task.
        temperature: of the programs where there are several for a problem.
        top_p: likewise.
        execute: runs programs and yields the place and the outcome of each as they end; None takes the sandbox.
    """

    def __init__(
        self,
        *,
        allowed: bool,
        samples: int | None = None,
        ks: Sequence[int] | None = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        execute: Execute | None = None,
    ) -> None:
        self.allowed, self.samples, self.ks = allowed, samples, ks
        self.sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        self.execute = execute or in_sandbox
        self.outcomes: dict[tuple[str, str], Outcome] = {}  # by program and tests

    def adapt(self, task: Any) -> None:
        """Make a task that runs code draw as many programs as asked for, and run them all at the same time.

        Raises:
            SettingsError: the task would run code by itself, or draws fewer programs than ``ks`` has.
        """
        if not getattr(task, "UNSAFE_CODE", False):
            return
        metrics = [entry["metric"] for entry in task.config.metric_list or []]
        if not any(value is self for metric in metrics for value in getattr(metric, "__globals__", {}).values()):
            raise SettingsError(f"tasks has {task.config.task!r}, which would run generated code outside the sandbox")
        if self.samples is not None:
            task.set_config("repeats", self.samples)
            if self.samples > 1:
                task.set_config("generation_kwargs", self.sampling, update=True)
        drawn = task.config.repeats
        if max(self.ks or [1]) > drawn:
            raise SettingsError(
                f"pass_at_k is {list(self.ks or [])}, but {task.config.task} draws {drawn} program(s) for a problem; "
                "set samples_per_problem"
            )
        apply_filters = task.apply_filters

        def run_after_filters() -> Any:
            out = apply_filters()
            programs = []
            for instance in task.instances:
                test = str(task.doc_to_target(instance.doc))
                for predictions in instance.filtered_resps.values():
                    given = [predictions] if isinstance(predictions, str) else predictions
                    programs += [_program(prediction, test, instance.doc) for prediction in given]
            log.info("evaluate: %s, runs %d programs in the sandbox", task.config.task, len(programs))
            self._run(programs)
            return out

        task.apply_filters = run_after_filters

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,), **_: Any
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Mean pass@k over problems, and of each problem what came of its programs, as the hub's metric gives them.

        Args:
            references: the tests of each problem.
            predictions: the programs of each problem.
            k: as far as there are as many programs for every problem; ``ks`` goes first.

        Raises:
            SettingsError: generated code may not run.
        """
        if not self.allowed:
            raise SettingsError(
                "allow_code_execution is False; the task runs programs that the model writes, so it has to be true"
            )
        pairs = [[(solution, test) for solution in own] for test, own in zip(references, predictions, strict=True)]
        self._run([_program(*pair) for own in pairs for pair in own])
        details: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for problem, own in enumerate(pairs):
            outcomes = [self.outcomes[pair] for pair in own]
            details[problem] = [
                (i, {"task_id": problem, "passed": one.passed, "result": one.reason, "completion_id": i})
                for i, one in enumerate(outcomes)
            ]
        counts = [(len(own), sum(self.outcomes[pair].passed for pair in own)) for own in pairs]
        told = [each for each in self.ks or k if each <= min(n for n, _ in counts)]
        return {f"pass@{each}": sum(pass_at_k(n, c, each) for n, c in counts) / len(counts) for each in told}, details

    def _run(self, programs: Sequence[Program]) -> None:
        """Run those that did not run yet, equal ones once."""
        new = {(program.solution, program.tests): program for program in programs}
        new = {pair: program for pair, program in new.items() if pair not in self.outcomes}
        pairs = list(new)
        for place, outcome in self.execute(list(new.values())) if new else ():
            self.outcomes[pairs[place]] = outcome


def _program(solution: str, tests: str, doc: dict[str, Any] | None = None) -> Program:
    """A program as the sandbox takes it; HumanEval says which function is tested, and its tests use the prompt's."""
    if doc and "entry_point" in doc:
        return Program(solution, tests, doc["entry_point"], doc.get("prompt", ""))
    return Program(solution, tests, _tested(solution, tests))


def _tested(solution: str, tests: str) -> str:
    """The function of the solution that its tests name; the solution does not pass when there is none."""
    try:
        defined = {node.name for node in ast.parse(solution).body if isinstance(node, ast.FunctionDef)}
        named = [node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)]
    except (SyntaxError, ValueError):
        return "no_function"
    return next((name for name in named if name in defined), "no_function")


def in_sandbox(programs: Sequence[Program]) -> Iterable[tuple[int, Outcome]]:
    """Run programs in sandboxes, one on each core that this process may use."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return many(programs, workers=workers, seconds=SECONDS, memory=MEMORY)


def forget_modules() -> None:
    """Have the harness import its modules on code anew, which keep the metric that they got at import."""
    for name, module in list(sys.modules.items()):
        if name.startswith("lm_eval.tasks.") and any(
            isinstance(value, CodeEval) or getattr(value, "name", None) == METRIC for value in vars(module).values()
        ):
            del sys.modules[name]
