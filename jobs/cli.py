"""The command line: ``ingot <job> --config recipe.yaml --some.setting value``.

Settings are typed dataclasses; ``jsonargparse`` reads them from a recipe and from the command line, which wins. A
recipe either holds one job's settings, or a section for each job beside what all of them share (the workspace).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import os
import sys
import typing
from collections.abc import Iterator
from typing import Any

import yaml

JOBS = {
    "demo": ("DemoJob", "the whole flow on this machine in minutes"),
    "curate": ("CurateJob", "read, filter and deduplicate documents"),
    "tokenizer": ("TokenizerJob", "train a byte-level BPE tokenizer"),
    "tokenize": ("TokenizeJob", "turn the corpus into packed token shards"),
    "pretrain": ("PretrainJob", "pretrain a transformer, recovering by itself"),
    "tune": ("TuneJob", "search training settings"),
    "evaluate": ("EvaluateJob", "score a trained run"),
    "generate": ("GenerateJob", "continue a text"),
    "export": ("ExportJob", "write a folder that transformers loads"),
    "report": ("ReportJob", "draw a run as one HTML page"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one job; returns the exit status: 0 done, 2 settings refused, 1 failed."""
    lines = "\n".join(f"  {name:<10} {text}" for name, (_, text) in JOBS.items())
    top = argparse.ArgumentParser(
        prog="ingot",
        description="Raw text to a measured language model, each step a Ray job.",
        epilog=f"jobs:\n{lines}\n  submit     run any of them on a cluster\n\n"
        "`ingot JOB --help` shows every setting, `ingot JOB --print_config` their values as a recipe.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("job", choices=[*JOBS, "submit"], metavar="JOB", help="what to do; see below")
    top.add_argument("settings", nargs=argparse.REMAINDER, help="settings of the job")
    chosen = top.parse_args(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("ingot").setLevel(logging.INFO)
    from jobs.settings import SettingsError, checked
    from models.training.state import TrainingStoppedError
    from pipelines.documents import InputError

    try:
        if chosen.job == "submit":
            from jobs.submit import main as submit

            return submit(chosen.settings)
        settings = parse(chosen.job, chosen.settings)
        checked(settings)
        importlib.import_module(f"jobs.{chosen.job}").run(settings)
    except (SettingsError, FileNotFoundError) as error:
        print(f"ingot {chosen.job}: {error}", file=sys.stderr)
        return 2
    except (InputError, TrainingStoppedError) as error:
        print(f"ingot {chosen.job}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"ingot {chosen.job}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def parse(job: str, arguments: list[str]) -> Any:
    """A job's settings from its arguments; prints the error and exits with 2 when they are wrong.

    Raises:
        SystemExit: after ``--help`` and ``--print_config``, and on errors.
    """
    import jsonargparse

    from jobs import settings

    def recipe(text: str) -> Any:
        return job_section(yaml.safe_load(text), job)

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_loader("recipe", recipe, exceptions=(yaml.YAMLError,))
    kind = getattr(settings, JOBS[job][0])
    os.environ.setdefault("COLUMNS", "120")
    parser = jsonargparse.ArgumentParser(
        prog=f"ingot {job}",
        description=kind.__doc__,
        parser_mode="recipe",
        usage=f"ingot {job} [--config RECIPE] [--SETTING VALUE ...]",
    )
    parser.add_argument("--config", action="config", help="recipe: a YAML file with this job's settings, or sections")
    parser.add_class_arguments(kind, as_group=False)
    values = dict(vars(parser.instantiate(parser.parse_args(_spelled_out(_recipe_first(arguments), kind)))))
    values.pop("config", None)
    return kind(**values)


def _recipe_first(arguments: list[str]) -> list[str]:
    """``--config`` before everything else, so that the command line wins wherever the recipe stands in it."""
    recipes, others = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            recipes += [argument, *([value] if (value := next(rest, None)) is not None else [])]
        else:
            (recipes if argument.startswith("--config=") else others).append(argument)
    return recipes + others


def _spelled_out(arguments: list[str], kind: type) -> list[str]:
    """``--chaos`` alone means ``--chaos true``, as for any switch."""
    switches = {f"--{name}" for name in _switches(kind)}
    out = []
    for i, argument in enumerate(arguments):
        out.append(argument)
        if argument in switches and (i + 1 == len(arguments) or arguments[i + 1].startswith("--")):
            out.append("true")
    return out


def _switches(kind: type) -> Iterator[str]:
    """Dotted names of the settings that are true or false."""
    for name, hint in typing.get_type_hints(kind).items():
        if hint is bool:
            yield name
        elif dataclasses.is_dataclass(hint):
            yield from (f"{name}.{inner}" for inner in _switches(hint))


def job_section(recipe: Any, job: str) -> Any:
    """What a recipe says to one job.

    A recipe whose keys are jobs, beside ``workspace``, is one for the whole flow: a job gets its own section, tune
    trains what pretrain's section says unless its own says otherwise, and what uses a run takes the one that pretrain
    names.
    Any other recipe holds the one job's settings.
    """
    if not isinstance(recipe, dict) or not set(recipe) & set(JOBS) or set(recipe) - set(JOBS) - {"workspace"}:
        return recipe
    section = dict(recipe.get(job) or {})
    if "workspace" in recipe:
        section.setdefault("workspace", recipe["workspace"])
    training = recipe.get("pretrain") or {}
    if job == "tune" and training:
        section.setdefault("pretrain", training)
    if job in ("evaluate", "generate", "export", "report") and "name" in training:
        section.setdefault("name", training["name"])
    return section
