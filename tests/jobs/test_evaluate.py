"""Evaluations: lm_eval's own backend for transformers is the judge of scores, and its writer of files."""

import csv
import dataclasses
import glob
import gzip
import importlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time

import lm_eval
import pytest
import test_trained_run
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from jobs import eval_cache, eval_workers, evaluate, export
from jobs.eval_cache import CachedWorkers, FinishedItems
from jobs.eval_code import CodeEval, pass_at_k
from jobs.eval_harness import rows
from jobs.eval_tasks import Tasks, _own_code_eval
from jobs.eval_workers import ManyModels, Model, ModelActor
from jobs.run_folder import StoredRun
from jobs.settings import EvaluateJob, ExportJob, FailedError, PretrainJob, ScoringBesideTraining, SettingsError
from jobs.worker import validation_due
from models.generate import Sampling
from models.training.ledger import LEDGER
from pipelines import storage

MMLU = "mmlu_anatomy,mmlu_virology"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few questions of each kind, as files that a user without a network has."""
    folder = tmp_path_factory.mktemp("data")
    header = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
    for subject, part in itertools.product(("anatomy", "virology"), ("dev", "test")):
        (folder / "mmlu" / part).mkdir(parents=True, exist_ok=True)
        with open(folder / "mmlu" / part / f"{subject}_{part}.csv", "w", newline="") as file:
            rows = [
                [f'Is {subject} {part} {i} old, or "wide"?', "a", "the river", "b, c", f"D{i}", i % 4] for i in range(6)
            ]
            csv.writer(file).writerows([header, *rows])
    (folder / "gsm8k").mkdir()
    for part in ("train", "test"):
        rows = [
            {"question": f"{i}\u2028 houses and {i} rivers?", "answer": f"{i} + {i}\n#### {2 * i}"} for i in range(8)
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "gsm8k" / f"{part}.jsonl").write_text(lines)
    (folder / "humaneval").mkdir()
    problems = [
        {
            "task_id": f"T/{i}",
            "prompt": f'def shift(x):\n    return x + {i}\n\n\ndef twice{i}(x: int) -> int:\n    """Shift."""\n',
            "canonical_solution": "    return shift(2 * x)\n",
            "test": f"def check(candidate):\n    assert candidate(3) == shift(6) == {6 + i}\n",
            "entry_point": f"twice{i}",
        }
        for i in range(3)
    ]
    with gzip.open(folder / "humaneval" / "HumanEval.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in problems)
    return str(folder)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_trained_run, "LENGTH", 640)
        return test_trained_run.make_workspace(tmp_path_factory.mktemp("workspace"), letters_are_tokens=True)


def job(workspace, data, **changes):
    return EvaluateJob(workspace=workspace, data_dir=data, validation_samples=0, **{"num_fewshot": 2, **changes})


def values(results):
    return {(row["task"], row["metric"], row["filter"]): row["value"] for row in results["scores"]}


def test_scores_and_samples_are_those_of_the_harness_with_transformers(workspace, data, tmp_path, capsys):
    results = evaluate.run(job(workspace, data, tasks=f"{MMLU},gsm8k"))
    export.run(ExportJob(workspace=workspace, output=str(tmp_path)))
    model = HFLM(pretrained=str(tmp_path), dtype="float32", device="cpu", batch_size=4)
    tasks = [*MMLU.split(","), "gsm8k"]
    theirs = lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=Tasks(data), num_fewshot=2)
    for (task, metric, kind), score in values(results).items():
        assert score == theirs["results"][task][f"{metric},{kind}"]
    assert {kind for task, _, kind in values(results) if task == "gsm8k"} == {"strict-match", "flexible-extract"}

    folder = f"{workspace}/evals/base/step-00000020"
    with open(*glob.glob(f"{folder}/results_*.json")) as file:
        written = json.load(file)
    for key in ("configs", "versions", "n-shot", "n-samples", "higher_is_better"):
        assert json.loads(json.dumps(written[key], default=str)) == json.loads(json.dumps(theirs[key], default=str))
    for task in tasks:
        with open(*glob.glob(f"{folder}/samples_{task}_*.jsonl")) as file:
            samples = {(s["doc_id"], s["filter"]): s for s in map(json.loads, file)}
        assert len(samples) == len(theirs["samples"][task])
        for their in theirs["samples"][task]:
            mine = samples[their["doc_id"], their["filter"]]
            for key in ("doc_hash", "prompt_hash", "target_hash"):
                assert mine[key] == their[key]
            if task == "gsm8k":
                assert mine["resps"] == [[text] for text in their["resps"][0]]
            else:
                for (own,), (other,) in zip(mine["resps"], their["resps"], strict=True):
                    assert float(own[0]) == pytest.approx(other[0], abs=1e-4)
    assert "|anatomy " in capsys.readouterr().out
    assert evaluate.run(job(workspace, data, tasks=f"{MMLU},gsm8k")) == results  # not scored again
    os.utime(f"{data}/gsm8k/test.jsonl", (1, 1))
    assert evaluate.run(job(workspace, data, tasks=f"{MMLU},gsm8k"))["time"] > results["time"]  # of other files


def test_what_older_code_scored_is_scored_anew_when_it_meant_something_else(workspace, data, monkeypatch):
    asked = []
    whole = Model.log_likelihoods
    monkeypatch.setattr(Model, "log_likelihoods", lambda self, r: (asked.append(len(r)), whole(self, r))[1])
    settings = job(workspace, data, tasks="mmlu_virology", limit=1, num_fewshot=1)
    for meaning, times in ((1, 1), (1, 1), (2, 2), (2, 2)):
        monkeypatch.setattr(eval_cache, "MEANING", meaning)
        monkeypatch.setattr(evaluate, "MEANING", meaning)
        evaluate.run(settings)
        assert asked == [4] * times


def test_documents_are_those_of_the_hub_in_either_form_of_the_files(data, tmp_path):
    (tmp_path / "mmlu" / "test").mkdir(parents=True)
    (tmp_path / "mmlu" / "dev").mkdir()
    for part in ("dev", "test"):  # as the paper's authors published them
        (tmp_path / "mmlu" / part / f"anatomy_{part}.csv").write_text('"Is, it?",a,b,c,d,C\nWas it?,1,2,3,4,A\n')
    task = Tasks(str(tmp_path)).load(["mmlu_anatomy"])["tasks"]["mmlu_anatomy"]
    assert list(task.test_docs()) == [
        {"question": "Is, it?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2},
        {"question": "Was it?", "subject": "anatomy", "choices": ["1", "2", "3", "4"], "answer": 0},
    ]
    task = Tasks(data).load(["mmlu_anatomy"])["tasks"]["mmlu_anatomy"]
    assert [doc["answer"] for doc in task.test_docs()] == [0, 1, 2, 3, 0, 1]
    with pytest.raises(SettingsError, match=r"there is no file .*/gsm8k/test.jsonl, which task gsm8k_cot reads"):
        Tasks(str(tmp_path)).load(["gsm8k_cot"])
    (tmp_path / "mmlu" / "test" / "anatomy_test.csv").write_text("Is it?,a,b,c,d,E\n")
    with pytest.raises(SettingsError, match=r"anatomy_test.csv: line 1 is not a question"):
        Tasks(str(tmp_path)).load(["mmlu_anatomy"])


def slowly(settings):
    """Evaluate, a tenth of a second for each item, in a process of its own, which is killed meanwhile."""
    whole = Model.log_likelihoods

    def slow(self, requests):
        for result in whole(self, requests):
            yield result
            time.sleep(0.1)

    Model.log_likelihoods = slow
    evaluate.run(settings)


def test_killed_evaluation_repeats_no_finished_item_and_ends_with_the_same_scores(data, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_trained_run, "LENGTH", 640)
        workspace = test_trained_run.make_workspace(tmp_path, letters_are_tokens=True)
    process = multiprocessing.get_context("fork").Process(target=slowly, args=(job(workspace, data, tasks=MMLU),))
    process.start()
    lines = []
    while len(lines) < 10 and process.is_alive():
        time.sleep(0.05)
        lines = read(f"{workspace}/evals/base/cache/*/*")
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finished = {json.loads(line)[0] for line in read(f"{workspace}/evals/base/cache/*/*")}
    assert not os.path.exists(f"{workspace}/evals/base/results.json")

    asked = []
    whole = Model.log_likelihoods
    monkeypatch.setattr(Model, "log_likelihoods", lambda self, r: (asked.extend(r), whole(self, r))[1])
    results = evaluate.run(job(workspace, data, tasks=MMLU))
    assert 0 < len(asked) == 2 * 6 * 4 - len(finished)
    samples = [json.loads(line) for line in read(f"{workspace}/evals/base/step-00000020/samples_*")]

    shutil.rmtree(f"{workspace}/evals")
    assert values(evaluate.run(job(workspace, data, tasks=MMLU))) == values(results)
    assert len(asked) == 2 * 6 * 4 - len(finished) + 2 * 6 * 4
    uninterrupted = [json.loads(line) for line in read(f"{workspace}/evals/base/step-00000020/samples_*")]
    for mine, other in zip(samples, uninterrupted, strict=True):
        assert (mine["doc_id"], mine["prompt_hash"]) == (other["doc_id"], other["prompt_hash"])
        for (one,), (two,) in zip(mine["resps"], other["resps"], strict=True):
            assert float(one[0]) == pytest.approx(float(two[0]), abs=1e-4)


def read(pattern):
    """Lines of all files of a pattern, in the order of their names."""
    lines = []
    for name in sorted(glob.glob(pattern)):
        with open(name) as file:
            lines += file.readlines()
    return lines


class Echo:
    """Workers that count what they are asked."""

    def __init__(self):
        self.asked = []

    def log_likelihoods(self, requests):
        self.asked += requests
        return ((i, (-float(len(c)), False, True)) for i, (c, _) in enumerate(requests))

    def rolling_log_likelihoods(self, texts):
        self.asked += texts
        return ((i, -float(len(text))) for i, text in enumerate(texts))

    def generate(self, requests):
        self.asked += requests
        return ((i, (f"{p} {s.seed}\u2028", False)) for i, (p, _, s) in reversed(list(enumerate(requests))))


def test_equal_requests_are_one_and_what_is_cut_short_is_asked_again(tmp_path):
    asked = [("ab", "c"), ("a", "bc"), ("ab", "c")]
    texts = [("a", ["\n"], Sampling(5, temperature=0.5, seed=seed)) for seed in (0, 1, 0)]
    continued = {0: ("a 0\u2028", False), 1: ("a 1\u2028", False), 2: ("a 0\u2028", False)}
    with FinishedItems(str(tmp_path / "f")) as finished:
        workers = CachedWorkers(Echo(), finished)
        first = {0: (-2.0, False, True), 1: (-1.0, False, True), 2: (-2.0, False, True)}
        assert dict(workers.log_likelihoods(asked)) == first
        assert dict(workers.rolling_log_likelihoods(["ab", "ab"])) == {0: -2.0, 1: -2.0}
        assert dict(workers.generate(texts)) == continued
        assert workers.workers.asked == [*asked[:2], "ab", *texts[:2]]
    (name,) = (tmp_path / "f").iterdir()
    name.write_text(name.read_text()[:-4])
    with FinishedItems(str(tmp_path / "f")) as finished:
        workers = CachedWorkers(Echo(), finished)
        assert dict(workers.log_likelihoods(asked)) == first
        assert dict(workers.rolling_log_likelihoods(["ab"])) == {0: -2.0}
        assert dict(workers.generate(texts)) == continued
        assert len(workers.workers.asked) == 1
        other = CachedWorkers(Echo(), finished)
        list(other.generate([("a", ["\n\n"], texts[0][2])]))  # ends elsewhere
        assert len(other.workers.asked) == 1


def test_a_task_that_fails_is_named_and_the_others_go_on(workspace, data, monkeypatch, capsys):
    load = Tasks.load

    def away(self, names):
        if "gsm8k" in names:
            raise ConnectionError("the hub is away")
        return load(self, names)

    monkeypatch.setattr(Tasks, "load", away)
    with pytest.raises(FailedError, match="task gsm8k failed: ConnectionError: the hub is away"):
        evaluate.run(job(workspace, data, tasks=["gsm8k", "mmlu_anatomy"], limit=3))
    with open(f"{workspace}/evals/base/results.json") as file:
        results = json.load(file)
    assert [row["items"] for row in results["scores"] if row["task"] == "mmlu_anatomy"] == [3]
    assert "gsm8k" in results["failed"]


def test_requests_longer_than_the_model_reads_are_told(workspace, data, monkeypatch, caplog):
    whole = Model.__init__, Model.facts

    def shorter(self, *args):
        whole[0](self, *args)
        self.workers.max_length = 60

    monkeypatch.setattr(Model, "__init__", shorter)
    monkeypatch.setattr(Model, "facts", lambda self: dataclasses.replace(whole[1](self), max_length=60))
    shutil.rmtree(f"{workspace}/evals")  # other tests asked the same of a model that reads more
    results = evaluate.run(job(workspace, data, tasks="mmlu_anatomy", limit=2))
    told = "8 of 8 requests were longer than max_seq_len 60"
    assert results["cut"] == {"mmlu_anatomy": told}
    assert f"task mmlu_anatomy: {told}; their beginnings were cut" in caplog.text


def test_evaluations_of_one_checkpoint_at_once_lose_nothing(tmp_path, monkeypatch):
    def measured(task, value, fingerprint="f"):
        row = {"task": task, "group": None, "value": value}
        return {"folder": str(tmp_path), "step": 5, "fingerprint": fingerprint, "time": 1.0, "scores": [row]}

    before = {"fingerprint": "f", "time": 0.5, "scores": [{"task": "c", "value": 4}]}  # as Ingot kept them once
    storage.write_json(str(tmp_path / "step-00000005" / "results.json"), before)
    evaluate.keep(measured("a", 1) | {"validation_loss": 3.0})
    evaluate.keep(measured("other weights", 9, "g"))
    write, others = storage.write_json, [measured("b", 2)]

    def write_late(uri, value):
        if others:  # another evaluation comes between what this one read and its writing
            evaluate.keep(others.pop())
        write(uri, value)

    monkeypatch.setattr(storage, "write_json", write_late)
    evaluate.keep(measured("a", 3))
    with open(tmp_path / "step-00000005" / "results.json") as file:
        results = json.load(file)
    assert {row["task"]: row["value"] for row in results["scores"]} == {"a": 3, "b": 2, "c": 4}
    assert results["validation_loss"] == 3.0


def test_rows_are_below_the_next_group_that_has_scores_and_hold_numbers_only():
    results = {
        "results": {
            "whole": {"alias": "whole", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 4},
            "inner": {"alias": "inner"},
            "one": {"alias": " - one", "acc,none": 0.25, "acc_stderr,none": "N/A", "texts,none": ["a"]},
            "alone": {"alias": "alone", "acc,none": 1},
        },
        "group_subtasks": {"whole": ["inner"], "inner": ["one"], "outer": ["alone"]},
        "configs": {"one": {"output_type": "multiple_choice", "doc_to_choice": ["A", "B"]}, "alone": {}},
        "n-shot": {"one": 5, "alone": 0},
        "n-samples": {"one": {"effective": 4}, "alone": {"effective": 2}},
    }
    facts = ("task", "group", "value", "stderr", "n_shot", "items", "chance")
    assert [tuple(row[fact] for fact in facts) for row in rows(results)] == [
        ("whole", None, 0.5, 0.1, 5, 4, 0.5),
        ("one", "whole", 0.25, None, 5, 4, 0.5),
        ("alone", None, 1.0, None, 0, 2, None),
    ]


# Programs


class Programmer(LM):
    """Writes each solution right as often as told."""

    def __init__(self, data, right):
        super().__init__()
        with gzip.open(f"{data}/humaneval/HumanEval.jsonl.gz", "rt") as file:
            self.solutions = {row["prompt"]: row["canonical_solution"] for row in map(json.loads, file)}
        self.left = dict(zip(self.solutions, right, strict=True))

    def generate_until(self, requests):
        texts = []
        for request in requests:
            prompt = request.args[0]
            self.left[prompt] -= 1
            texts.append(self.solutions[prompt] if self.left[prompt] >= 0 else "    return -1\n")
        return texts

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def test_humaneval_runs_in_the_sandbox_and_pass_at_k_is_unbiased(data):
    code = CodeEval(allowed=True, samples=4, ks=[1, 2, 4])
    tasks = Tasks(data, code)
    results = lm_eval.simple_evaluate(
        model=Programmer(data, [4, 1, 0]), tasks=["humaneval"], task_manager=tasks, confirm_run_unsafe_code=True
    )["results"]["humaneval"]
    for k in (1, 2, 4):
        # of all ways to try k of the 4 programs, the share that has a right one
        tries = [
            any(i < right for i in chosen) for right in (4, 1, 0) for chosen in itertools.combinations(range(4), k)
        ]
        assert results[f"pass@{k},create_test"] == pytest.approx(sum(tries) / len(tries))
    config = tasks.load(["humaneval"])["tasks"]["humaneval"].config
    assert (config.repeats, config.generation_kwargs["temperature"]) == (4, 0.2)


@pytest.mark.parametrize("samples", [1, 5, 9])
def test_pass_at_k_is_the_share_of_draws_with_a_right_program(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        draws = [any(i < right for i in chosen) for chosen in itertools.combinations(range(samples), k)]
        assert pass_at_k(samples, right, k) == pytest.approx(sum(draws) / len(draws))


def test_settings_that_would_do_nothing_are_refused(data):
    with pytest.raises(SettingsError, match="num_fewshot is .*of names that are in tasks"):
        EvaluateJob(tasks="mmlu", num_fewshot={"mmlu_anatomy": 5}).validate()
    with pytest.raises(SettingsError, match=r"pass_at_k is \[1, 10\], but humaneval draws 1 program"):
        Tasks(data, CodeEval(allowed=True, ks=[1, 10])).load(["humaneval"])


def test_no_program_runs_unless_that_was_allowed(data):
    with pytest.raises(SettingsError, match="allow_code_execution is False"):
        Tasks(data).load(["humaneval"])
    with pytest.raises(SettingsError, match="allow_code_execution is False"):
        Tasks(data).load(["mbpp"])


def test_tasks_of_checkpoints_are_checked_before_training_begins(workspace, data, tmp_path, monkeypatch):
    from jobs import eval_tasks, pretrain

    def refused(tasks, **changes):
        scoring = {"tasks": tasks, "every_steps": 10, **changes}
        settings = PretrainJob(workspace=workspace, evaluate=ScoringBesideTraining(**scoring))
        with pytest.raises(SettingsError) as error:
            pretrain.run(settings)
        return str(error.value)

    monkeypatch.setattr(pretrain, "_open", lambda settings: (settings, StoredRun(f"{workspace}/runs/new"), []))
    monkeypatch.setattr(pretrain, "ray_session", None)  # nothing is started
    assert "tasks has 'mmlu_anatomie'; the harness has no such task; near are" in refused("gsm8k,mmlu_anatomie")
    assert "there is no file" in refused("gsm8k", data_dir=str(tmp_path))
    assert "allow_code_execution is False" in refused("humaneval")
    fine = ScoringBesideTraining(tasks="mmlu_anatomy,hellaswag", data_dir=data)
    eval_tasks.check(fine)  # asks the hub for nothing


# Several devices, several checkpoints


def test_copies_in_actors_answer_as_one_does_and_survive_a_loss(workspace, ray_session, monkeypatch):
    monkeypatch.setattr(eval_workers, "_SMALLEST", 2)
    settings = EvaluateJob(workspace=workspace)
    text = test_trained_run.TEXT
    requests = [(f"The house {i % 5} is", f" old {i}") for i in range(40)]
    texts = [(text[i : i + 9], ["\n"], Sampling(8)) for i in range(6)]
    model = Model(settings, "cpu")
    expected = dict(model.log_likelihoods(requests)), dict(model.generate(texts))
    whole = dict(model.rolling_log_likelihoods([text[i:] for i in range(5)]))
    kind = ray_session.remote(ModelActor).options(num_cpus=0.5, max_restarts=3, max_concurrency=eval_workers._AT_ONCE)
    actors = [kind.remote(settings, "cpu") for _ in range(2)]
    many = ManyModels(actors)
    try:
        assert many.facts().fingerprint == model.facts().fingerprint
        found, killed = {}, False
        for index, value in many.log_likelihoods(requests):
            found[index] = value
            if not killed:
                ray_session.kill(actors[0], no_restart=False)
                killed = True
        assert found.keys() == expected[0].keys()
        for index, value in found.items():
            assert value[0] == pytest.approx(expected[0][index][0], abs=1e-5)
        assert dict(many.generate(texts)) == expected[1]
        assert dict(many.rolling_log_likelihoods([text[i:] for i in range(5)])) == pytest.approx(whole, abs=1e-5)
        with pytest.raises(ValueError, match="a continuation has 0 tokens"):
            list(many.log_likelihoods([("a", "")]))
    finally:
        for actor in actors:
            ray_session.kill(actor)


@pytest.mark.parametrize(
    ("changes", "copies", "on_gpu"),
    [
        ({}, 4, True),
        ({"workers": 2}, 2, True),
        ({"device": "cpu", "workers": 3}, 3, False),
        ({"device": "cpu"}, 1, False),
    ],
)
def test_a_job_on_a_cluster_has_a_copy_on_each_of_its_gpus(monkeypatch, changes, copies, on_gpu):
    import ray

    class Opened:
        def __init__(self, settings, *where):
            self.where = where

        __enter__, __exit__ = lambda self: self, lambda self, *_: None

    placed = []
    monkeypatch.setenv("RAY_ADDRESS", "of the driver, whose tasks do not have it")
    monkeypatch.setattr(evaluate, "_made_of", lambda settings: None)
    monkeypatch.setattr(evaluate, "keep", dict)
    monkeypatch.setattr(
        evaluate, "place", lambda work, settings, write, device, cpus: placed.append((work, device)) or {}
    )
    settings = EvaluateJob(model="somewhere", tasks="gsm8k", **changes)
    evaluate._one(settings)
    evaluate._one(EvaluateJob(model="somewhere", device="gpu"))
    assert placed == [(evaluate.score_by_copies, "cpu"), (evaluate.score, "gpu")]
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 4.0})
    monkeypatch.setattr(eval_workers, "_actors", Opened)
    monkeypatch.setattr(eval_workers, "Model", lambda settings, device: Opened(settings, 1, device != "cpu"))
    with eval_workers.open_on_cluster(settings) as opened:
        assert opened.where == (copies, on_gpu)


def test_checkpoints_become_curves_on_the_page_and_earlier_scores_stay(workspace, data):
    from jobs.eval_page import evaluation_sections

    evaluate.run(job(workspace, data, tasks="mmlu_virology", steps="all", limit=4))
    evaluate.run(job(workspace, data, tasks="mmlu_anatomy", step=10, limit=4))
    with open(f"{workspace}/evals/base/step-00000010/results.json") as file:
        assert {row["task"] for row in json.load(file)["scores"]} == {"mmlu_virology", "mmlu_anatomy"}
    page = evaluation_sections(workspace, "base")
    assert "Scores over checkpoints" in page
    assert "mmlu_virology acc (2-shot, 4 questions)" in page
    assert "step 10: " in page
    assert "step 20: " in page
    assert evaluate.run(job(workspace, data, tasks="mmlu_virology", step=30, limit=4))["step"] == 30  # poisoned
    assert evaluation_sections(workspace, "base") == page
    run = StoredRun(f"{workspace}/runs/base")
    before = run.read_json(LEDGER)
    try:  # the run went back from step 10 too, and has another checkpoint of it by now
        again = [entry | ({"time": time.time()} if entry["step"] == 10 else {}) for entry in before["checkpoints"]]
        run.write_json(LEDGER, before | {"checkpoints": again})
        assert "step 10: " not in evaluation_sections(workspace, "base")
    finally:
        run.write_json(LEDGER, before)


def test_scores_of_checkpoints_while_training_are_those_of_evaluate_and_failures_are_told(workspace, data, tmp_path):
    from ray.train import Checkpoint

    from jobs import validation

    shutil.rmtree(f"{workspace}/evals", ignore_errors=True)
    scoring = {"tasks": "mmlu_anatomy", "data_dir": data, "num_fewshot": 2, "limit": 3, "every_steps": 10}
    settings = PretrainJob(workspace=workspace, steps=30, evaluate=ScoringBesideTraining(**scoring))
    assert [step for step in range(31) if validation_due(settings, step)] == [0, 10, 20, 30]
    (tmp_path / "pointer.json").write_text(json.dumps({"folder": "checkpoints/step-00000010"}))
    validation.validate(Checkpoint.from_directory(str(tmp_path)), settings, f"{workspace}/runs/base")
    with open(f"{workspace}/evals/base/step-00000010/results.json") as file:
        beside = json.load(file)
    assert values(beside) == values(evaluate.run(job(workspace, data, tasks="mmlu_anatomy", step=10, limit=3)))
    run = StoredRun(f"{workspace}/runs/base")
    assert run.events()[-1]["scores"] == {"mmlu_anatomy acc": beside["scores"][0]["value"]}
    settings.evaluate.data_dir = f"{data}/nowhere"
    with pytest.raises(SettingsError, match="there is no file"):
        validation.validate(Checkpoint.from_directory(str(tmp_path)), settings, f"{workspace}/runs/base")
    assert "nowhere" in run.events()[-1]["error"]


@pytest.mark.parametrize("imported", [False, True])
def test_tasks_get_our_metric_for_code_and_all_others_of_the_package(imported, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate"]:
        monkeypatch.delitem(sys.modules, name)
    if imported:
        importlib.import_module("evaluate")
    code, finders = CodeEval(allowed=False), list(sys.meta_path)
    with _own_code_eval(code):
        pass
    assert ("evaluate" in sys.modules) == imported  # it takes seconds
    for _ in range(2):
        with _own_code_eval(code):
            package = importlib.import_module("evaluate")
            assert package.load("code_eval") is code
            with pytest.raises(FileNotFoundError):
                package.load("./no/such/metric")
        assert package.load is importlib.import_module("evaluate.loading").load
        assert importlib.import_module("evaluate") is package
    assert sys.meta_path == finders


def test_texts_end_where_asked_and_scores_of_other_questions_are_told_as_such(workspace, data, caplog):
    whole = job(workspace, data, tasks="gsm8k", max_gen_toks=3)
    evaluate.run(whole)
    file = max(glob.glob(f"{workspace}/evals/base/step-00000020/samples_gsm8k_*.jsonl"), key=os.path.getmtime)
    with open(file) as lines:
        texts = [json.loads(line)["resps"][0][0] for line in lines]
    assert texts
    assert max(map(len, texts)) <= 3  # letters are tokens
    with caplog.at_level("WARNING", "ingot"):
        evaluate.run(dataclasses.replace(whole, limit=1))
    assert "gsm8k of 1 questions with 2 examples takes the place of that of" in caplog.text
    caplog.clear()
    evaluate.run(dataclasses.replace(whole, limit=1, max_gen_toks=2))
    assert "takes the place" not in caplog.text
