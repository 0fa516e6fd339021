"""The command line: ``ingot <job> --config recipe.yaml --some.setting value``.

Settings are typed dataclasses; ``jsonargparse`` reads them from a recipe and from the command line, which wins. A
recipe either holds one job's settings, or a section for each job beside what all of them share (the workspace).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import sys
import typing
from collections.abc import Iterator
from typing import Any

import yaml

from jobs import logs

JOBS = {
    "demo": ("DemoJob", "the whole flow on this machine in minutes"),
    "flow": ("FlowJob", "all steps of a recipe, from curate to evaluate"),
    "curate": ("CurateJob", "read, filter and deduplicate documents"),
    "tokenizer": ("TokenizerJob", "train a byte-level BPE tokenizer"),
    "tokenize": ("TokenizeJob", "turn the corpus into packed token shards"),
    "pretrain": ("PretrainJob", "pretrain a transformer, recovering by itself"),
    "tune": ("TuneJob", "search training settings"),
    "ladder": ("LadderJob", "predict a big run from small ones; also called `tune ladder`"),
    "evaluate": ("EvaluateJob", "score a trained run"),
    "generate": ("GenerateJob", "continue a text"),
    "serve": ("ServeJob", "answer requests over HTTP as OpenAI does, with a page to try it"),
    "export": ("ExportJob", "write a folder that transformers loads"),
    "report": ("ReportJob", "draw a run as one HTML page"),
}

FLOW = ("curate", "tokenizer", "tokenize", "pretrain", "evaluate")  # the steps of the job flow

# What is no job: modules with a command line of their own.
COMMANDS = {
    "submit": ("submit", "run any of them on a cluster"),
    "jobs": ("submitted", "list, follow or stop what was submitted"),
    "status": ("status", "what a cluster runs, how far it is, what it costs"),
    "cluster": ("cluster", "check a cluster's YAML before anything is started"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one job; returns the exit status: 0 done, 2 settings refused, 1 failed."""
    lines = "\n".join(f"  {name:<10} {text}" for name, (_, text) in JOBS.items())
    commands = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    top = argparse.ArgumentParser(
        prog="ingot",
        description="Raw text to a measured language model, each step a Ray job.",
        epilog=f"jobs:\n{lines}\n\nclusters:\n{commands}\n\n"
        "`ingot JOB --help` shows every setting, `ingot JOB --print_config` their values as a recipe.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("job", choices=[*JOBS, *COMMANDS], metavar="JOB", help="what to do; see below")
    top.add_argument("settings", nargs=argparse.REMAINDER, help="settings of the job")
    words = list(sys.argv[1:] if arguments is None else arguments)
    for at in (0, 1):  # also after submit
        if words[at : at + 2] == ["tune", "ladder"]:
            del words[at]
    chosen = top.parse_args(words)
    logs.configure()
    from jobs.settings import SettingsError

    try:
        if chosen.job in COMMANDS:
            return importlib.import_module(f"jobs.{COMMANDS[chosen.job][0]}").main(chosen.settings)
        return _run(chosen.job, chosen.settings)
    except (SettingsError, FileNotFoundError) as error:
        print(f"ingot {chosen.job}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ingot {chosen.job}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _run(job: str, arguments: list[str]) -> int:
    """Run a job; returns the exit status, 1 for what it has to say itself why it failed."""
    from jobs.settings import FailedError, checked
    from pipelines.documents import InputError

    settings = parse(job, arguments)
    checked(settings)
    try:
        importlib.import_module(f"jobs.{job}").run(settings)
    except (InputError, RuntimeError) as error:
        from models.training.state import TrainingStoppedError  # here, because it brings torch, which takes seconds

        if not isinstance(error, (InputError, FailedError, TrainingStoppedError)):
            raise
        print(f"ingot {job}: {error}", file=sys.stderr)
        return 1
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
    if job == "tokenizer":  # `from` cannot be a field's name
        arguments = [re.sub(r"^--from(?==|$)", "--from_model", argument) for argument in arguments]
    takes_sources = "sources" in typing.get_type_hints(kind)
    os.environ.setdefault("COLUMNS", "120")
    parser = jsonargparse.ArgumentParser(
        prog=f"ingot {job}",
        description=kind.__doc__,
        parser_mode="recipe",
        usage=f"ingot {job} [--config RECIPE] [--SETTING VALUE ...]",
        epilog=_SHORT_SOURCES if takes_sources else None,
    )
    parser.add_argument("--config", action="config", help="recipe: a YAML file with this job's settings, or sections")
    parser.add_class_arguments(kind, as_group=False)
    try:
        given = _spelled_out(_recipe_first(_long_sources(arguments) if takes_sources else arguments), kind)
    except ValueError as error:
        parser.error(str(error))
    values = dict(vars(parser.instantiate(parser.parse_args(given))))
    values.pop("config", None)
    return kind(**values)


_SHORT_SOURCES = """A source may be given in short: --source KIND, then its fields, as in `--source common-crawl --crawl
CC-MAIN-2026-04 --kind wet --limit 10 --source books --path texts`; after common-crawl, --kind means archives. Up to the
next --source, an option that is a field of a source belongs to it, so settings of the job that are called the same come
before; dicts are given whole or key by key (--columns.text content). Such sources take the place of the recipe's."""


def _long_sources(arguments: list[str]) -> list[str]:
    """``--source KIND --FIELD VALUE …`` as entries of ``--sources``.

    Raises:
        ValueError: a value is missing, or sources are given both ways.
    """
    from pipelines.sources import Source

    hints = typing.get_type_hints(Source)
    sources: list[dict[str, Any]] = []
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        name, _, key = option.removeprefix("--").partition(".")
        if option == "--source":
            name = "kind"
            sources.append({})
        elif not sources or not option.startswith("--") or name not in hints:
            others.append(argument)
            continue
        elif option == "--kind" and sources[-1]["kind"] == "common-crawl":
            name = "archives"
        value = value if equals else next(rest, None)
        if value is None or (not equals and value.startswith("--")):
            raise ValueError(f"{option} wants a value")
        parsed = value if hints[name] is str else yaml.safe_load(value)
        if key:
            sources[-1].setdefault(name, {})[key] = parsed
        else:
            sources[-1][name] = parsed
    if sources and any(argument.partition("=")[0] == "--sources" for argument in others):
        raise ValueError("give sources either as --sources or as --source KIND, not both ways")
    return [*others, "--sources", json.dumps(sources)] if sources else others


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
    and ladder train what pretrain's section says unless their own says otherwise, flow gets the sections of its
    steps, and what uses a run takes the one that pretrain names.
    Any other recipe holds the one job's settings.
    """
    if not isinstance(recipe, dict) or not set(recipe) & set(JOBS) or set(recipe) - set(JOBS) - {"workspace"}:
        return recipe
    section = dict(recipe.get(job) or {})
    if "workspace" in recipe:
        section.setdefault("workspace", recipe["workspace"])
    training = recipe.get("pretrain") or {}
    if job in ("tune", "ladder") and training:
        section.setdefault("pretrain", training)
    if job == "flow":
        section |= {step: recipe[step] or {} for step in FLOW if step in recipe}
    if job in ("evaluate", "generate", "serve", "export", "report") and "name" in training:
        section.setdefault("name", training["name"])
    return section
