"""The command line: recipes and overrides, refusals with exit status 2 before Ray starts, complete help."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs import cli, settings
from jobs.cli import JOBS, main, parse
from jobs.settings import PretrainJob, TuneJob

ROOT = Path(__file__).parents[2]
RECIPE = """
workspace: /data/project
curate:
  language: {languages: [en, de]}
tokenizer:
  vocab_size: 5000
pretrain:
  name: first
  steps: 77
  optimizer: {lr: 2e-3}
tune:
  trials: 3
"""


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch):
    """Nothing here may start Ray."""
    import ray

    def start(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", start)


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return str(file)


def printed(capsys, job, *arguments):
    """What the job prints to standard output before it exits with 0."""
    with pytest.raises(SystemExit) as exit_:
        main([job, *arguments])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def dotted(kind, prefix=""):
    """Names of all settings of a dataclass, nested ones included."""
    for field in dataclasses.fields(kind):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        yield prefix + field.name
        if dataclasses.is_dataclass(default):
            yield from dotted(type(default), f"{prefix}{field.name}.")


@pytest.mark.parametrize("job", JOBS)
def test_help_names_every_setting_and_says_what_it_is(job, capsys):
    text = printed(capsys, job, "--help")
    details = text[text.index("\noptions:") :]
    kind = getattr(settings, JOBS[job][0])
    assert kind.__doc__ in text
    for name in dotted(kind):
        assert f"--{name} " in details
    for line in details.split("\n  --")[1:]:  # an option is followed by its explanation, not by its type alone
        explanation = " ".join(line.split()[1:])
        assert "help" in line or len(explanation.split("(type:")[0]) > 15


@pytest.mark.parametrize("job", JOBS)
def test_printed_settings_are_a_recipe_for_the_same_settings(job, capsys, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(printed(capsys, job, "--workspace", "elsewhere", "--print_config"))
    kind = getattr(settings, JOBS[job][0])
    assert set(yaml.safe_load(file.read_text())) == {field.name for field in dataclasses.fields(kind)}
    assert parse(job, ["--config", str(file)]) == dataclasses.replace(kind(), workspace="elsewhere")
    assert printed(capsys, job, "--config", str(file), "--print_config") == file.read_text()


def test_a_printed_search_space_and_source_are_read_back(capsys, tmp_path):
    file = tmp_path / "settings.yaml"
    space = "{optimizer.lr: {values: [0.1, 0.2]}, model.n_layers: {low: 1, high: 4, scale: linear}}"
    sources = "[{kind: warc, path: crawl, name: web}, {kind: books, path: texts}]"
    for job, option, value in (("tune", "--space", space), ("curate", "--sources", sources)):
        file.write_text(printed(capsys, job, option, value, "--print_config"))
        assert parse(job, ["--config", str(file)]) == parse(job, [option, value])


def test_a_recipe_with_sections_gives_each_job_its_own_and_the_workspace(recipe):
    parsed = {job: parse(job, ["--config", recipe]) for job in JOBS}
    assert {job: s.workspace for job, s in parsed.items()} == dict.fromkeys(JOBS, "/data/project")
    assert parsed["curate"].language.languages == ["en", "de"]
    assert parsed["tokenizer"].vocab_size == 5000
    assert (parsed["pretrain"].name, parsed["pretrain"].steps) == ("first", 77)
    assert parsed["pretrain"].optimizer.lr == 0.002
    assert (parsed["tune"].trials, parsed["tune"].pretrain.steps, parsed["tune"].name) == (3, 77, "sweep")
    for job in ("evaluate", "generate", "export", "report"):
        assert parsed[job].name == "first"
    plain = dataclasses.asdict(parsed["tokenize"])
    assert plain == {**dataclasses.asdict(settings.TokenizeJob()), "workspace": "/data/project"}


@pytest.mark.parametrize("recipe_file", sorted((ROOT / "jobs" / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_recipes_that_come_along_are_accepted_by_the_jobs_they_speak_of(recipe_file):
    for job in JOBS:
        parsed = parse(job, ["--config", str(recipe_file)])
        if job not in ("curate", "flow"):  # whose sources may be left to the demo
            settings.checked(parsed)


def test_the_command_line_wins_over_the_recipe(recipe):
    parsed = parse("pretrain", ["--config", recipe, "--steps", "5", "--optimizer.betas", "[0.8, 0.9]"])
    assert (parsed.steps, parsed.optimizer.betas, parsed.optimizer.lr) == (5, (0.8, 0.9), 0.002)
    assert parse("pretrain", ["--config", recipe, "--workspace", "here"]).workspace == "here"


def test_what_is_not_said_keeps_the_default():
    assert parse("pretrain", []) == PretrainJob()
    assert parse("tune", []) == TuneJob()


def test_a_misspelt_section_is_not_passed_over(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text("workspace: w\npretrain:\n  steps: 3\npretraining:\n  steps: 4\n")
    with pytest.raises(SystemExit) as exit_:
        main(["pretrain", "--config", str(file)])
    assert exit_.value.code == 2
    assert "pretrain" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["pretrain", "--step", "3", "--speed", "9"], ["--speed"]),
        (["pretrain", "--optimizer.nesterov", "3"], ["--optimizer.nesterov"]),
        (["pretrain", "--steps", "many"], ["steps", "int", "many"]),
        (["pretrain", "--model.preset", "5b"], ["model.preset", "5b", "nano"]),
        (["pretrain", "--config", "/no/such/recipe.yaml"], ["/no/such/recipe.yaml"]),
        (["tune", "--space", "{optimizer.lr: {lowest: 3}}"], ["space"]),
        (["no-such-job"], ["no-such-job", "pretrain"]),
    ],
)
def test_an_unknown_option_or_a_wrong_type_ends_with_status_2_and_names_it(arguments, named, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert all(name in error for name in named), error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--steps", "0"], "ingot pretrain: steps is 0; it has to be at least 1"),
        (["pretrain", "--spikes.patience", "0"], "ingot pretrain: spikes.patience is 0; it has to be at least 1"),
        (["tune", "--pretrain.optimizer.lr", "-1"], "ingot tune: pretrain.optimizer.lr is -1.0, but must be above 0"),
        (["tune", "--space", "{optimizer.speed: {values: [1]}}"], "ingot tune: space is 'optimizer.speed'"),
        (["curate"], "ingot curate: sources is empty"),
        (["tokenizer", "--vocab_size", "10"], "ingot tokenizer: tokenizer.vocab_size is 10; it has to be at least"),
        (["tokenize", "--validation_share", "2"], "ingot tokenize: tokenize.validation_share is 2.0"),
        (["generate", "--top_p", "0"], "ingot generate: top_p is 0.0; it has to be above 0 and at most 1"),
        (["evaluate", "--batch", "0"], "ingot evaluate: batch is 0; it has to be at least 1"),
        (["demo", "--steps", "3"], "ingot demo: steps is 3; it has to be at least 20"),
    ],
)
def test_settings_that_cannot_work_end_with_status_2_before_ray_starts(arguments, message, capsys, tmp_path):
    assert main([*arguments, "--workspace", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("job", "needed"),
    [("tokenizer", "curate"), ("tokenize", "curate"), ("pretrain", "tokenize"), ("tune", "tokenize")],
)
def test_a_job_whose_input_is_missing_says_which_job_makes_it(job, needed, capsys, tmp_path):
    assert main([job, "--workspace", str(tmp_path)]) == 2
    assert f"run `ingot {needed}` first" in capsys.readouterr().err


def test_the_package_runs_as_a_program_and_lists_its_jobs():
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    for job, (_, text) in cli.JOBS.items():
        assert f"{job:<10} {text}" in done.stdout
    assert "submit" in done.stdout


def test_the_command_line_wins_wherever_the_recipe_stands_in_it(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 500\nname: recipe\n")
    for arguments in (["--steps", "200", "--config", str(recipe)], [f"--config={recipe}", "--steps", "200"]):
        settings = parse("pretrain", arguments)
        assert (settings.steps, settings.name) == (200, "recipe")
