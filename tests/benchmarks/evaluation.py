"""Evaluation against lm-evaluation-harness's own backend for transformers (HFLM): the same numbers, only sooner.

    python -m tests.benchmarks.evaluation --data_dir D --parts equal [--tasks mmlu gsm8k humaneval] [--limit N]
    python -m tests.benchmarks.evaluation --data_dir D --parts speed --shape 124m --device cuda [--gpus 2]

D has mmlu, gsm8k and humaneval, as `ingot evaluate --data_dir` reads them. Models are made on the spot, with a
tokenizer trained on D's questions, and exported to a temporary folder, where HFLM takes them from; nothing is fetched.

equal  two small models, one trained for a minute on D's text and a random one, in fp32: each item's log-likelihood to
       1e-4, each item's prediction, and all scores. Greedy texts can part where two tokens are as likely as each other
       to rounding: where texts differ, the difference of the two logits of transformers is shown.
speed  MMLU (5-shot) and GSM8K (5-shot), seconds of Ingot's LM class and of HFLM at the fastest of several batch sizes,
       from text to results, in the same run on the same requests, bf16 on CUDA. Weights are as they are initialized,
       so that all texts are as long as the task lets them be, or (--models trained) of a model whose texts end. With
       --gpus 2, Ingot's on two GPUs through Ray actors against one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from models.config import PRESETS, ModelConfig
from models.hugging_face import save_pretrained
from models.parallel import parallelize
from models.transformer import Transformer
from pipelines.tokenizer import TokenizerSettings, train_on_texts

SHAPES = {
    # for the comparison of all items on few cores
    "tiny": ModelConfig(
        vocab_size=2048, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=160, max_seq_len=2048,
    ),
    # has room for five-shot prompts
    "small": ModelConfig(
        vocab_size=8192, d_model=256, n_layers=6, n_heads=8, n_kv_heads=4, d_ff=704, max_seq_len=2048,
        tied_embeddings=True,
    ),
    "124m": PRESETS["124m"],
    "1b": PRESETS["1b"],
}  # fmt: skip
TASKS = ("mmlu", "gsm8k", "humaneval")


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--parts", nargs="+", choices=("equal", "speed"), default=["equal", "speed"])
    parser.add_argument("--tasks", nargs="+", help=f"of {', '.join(TASKS)}, or a subject of MMLU such as mmlu_anatomy")
    parser.add_argument(
        "--models", nargs="+", choices=("initial", "random", "trained"),
        help="equal: random trained; speed: initial, of which no text ends before it must",
    )  # fmt: skip
    parser.add_argument("--shape", choices=tuple(SHAPES), help="equal: tiny; speed: small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=int, help="questions of each task, of MMLU of each subject; all without")
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes that HFLM is tried with")
    parser.add_argument("--gpus", type=int, default=1, help="speed: Ingot's on so many against one, without HFLM")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        if "equal" in args.parts:
            for name in args.models or ("random", "trained"):
                equal(args, name, os.path.join(folder, name))
        if "speed" in args.parts:
            for name in args.models or ("initial",):
                (speed if args.gpus == 1 else gpus)(args, name, os.path.join(folder, "speed"))


def kind_of(task: str) -> str:
    """The method of the harness's LM class that the task calls."""
    return "loglikelihood" if task.startswith("mmlu") else "generate_until"


def shots(task: str) -> int | None:
    """Solved examples in front of a question."""
    return None if task == "humaneval" else 5


# Models


def questions(data_dir: str) -> list[str]:
    """Text of the benchmarks, to train a tokenizer and a model on."""
    mmlu = [path.read_text("utf-8-sig") for path in sorted(Path(data_dir, "mmlu").glob("*/*.csv"))]
    lines = Path(data_dir, "gsm8k", "train.jsonl").read_text("utf-8").splitlines()
    solved = [json.loads(line) for line in lines]
    return mmlu + [f"Question: {one['question']}\nAnswer: {one['answer']}\n\n" for one in solved]


def trained_briefly(model: Transformer, tokens: Sequence[int], steps: int = 400) -> None:
    """Steps of AdamW on windows of the text."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    text, generator = torch.tensor(tokens, device=model.rotary.device), torch.Generator().manual_seed(0)
    size = 513 if text.device.type == "cpu" else model.config.max_seq_len + 1
    for step in range(steps):
        starts = torch.randint(0, len(text) - size, (4,), generator=generator)
        window = torch.stack([text[start : start + size] for start in starts.tolist()])
        loss = model(window[:, :-1], window[:, 1:])
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained for {steps} steps, loss {loss.item():.3f}", flush=True)


def make(shape: str, data_dir: str, folder: str, device: str, kind: str, precision: str = "fp32") -> Any:
    """A model with its tokenizer, also exported to the folder."""
    config, texts = SHAPES[shape], questions(data_dir)
    tokenizer = train_on_texts(texts, TokenizerSettings(vocab_size=min(config.vocab_size, 32768)))
    model = Transformer(config, seed=1).to(device)
    with torch.no_grad():
        if kind == "random":  # so that the likeliest token changes along a text
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(3)
    if kind == "trained":
        trained_briefly(model, list(itertools.chain(*(tokenizer.encode(text) for text in texts[-3000:]))))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    save_pretrained(
        model.state_dict(), config, folder, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id, dtype=dtype
    )
    Path(folder, "tokenizer.json").write_text(tokenizer.backend.to_str(), "utf-8")
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_seq_len,
    }
    Path(folder, "tokenizer_config.json").write_text(json.dumps(content), "utf-8")
    model = parallelize(model, None, device, precision=precision).eval()
    ends, where = frozenset([tokenizer.eot_id]), torch.device(device)
    return SimpleNamespace(model=model, tokenizer=tokenizer, ends=ends, device=where, folder=folder, dtype=dtype)


def ours(trained: Any) -> Any:
    """Ingot's LM class."""
    from jobs.harness import IngotLM
    from jobs.local_workers import LocalWorkers

    return IngotLM(LocalWorkers(trained), trained.model.config.max_seq_len)


def theirs(trained: Any, batch: int) -> Any:
    """The harness's own."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=trained.folder, device=trained.device.type, dtype=trained.dtype, batch_size=batch)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


# Equality


def equal(args: argparse.Namespace, name: str, folder: str) -> None:
    """Compare all items of the tasks on one model."""
    trained = make(args.shape or "tiny", args.data_dir, folder, args.device, name)
    mine, reference = ours(trained), theirs(trained, (args.batches or [16])[0])
    for task in args.tasks or TASKS:
        seconds, results = [], []
        for lm in (reference, mine):
            results.append(scored(lm, task, args.data_dir, args.limit))
            seconds.append(results[-1]["seconds"])
        compare(f"{name} model, {task}", trained, task, reference, *results)
        print(f"  seconds of the model's work: HFLM {seconds[0]:.0f}, Ingot {seconds[1]:.0f}", flush=True)


def scored(lm: Any, task: str, data_dir: str, limit: int | None) -> dict[str, Any]:
    """The harness's results and samples, and each request with its answer."""
    from lm_eval import simple_evaluate

    from jobs.eval_code import CodeEval
    from jobs.eval_tasks import Tasks

    kind = kind_of(task)
    original, asked, seconds = getattr(lm, kind), [], []

    def recorded(requests: list[Any], **kwargs: Any) -> list[Any]:
        began = time.monotonic()
        answers = original(requests, **kwargs)
        seconds.append(time.monotonic() - began)
        asked.extend(zip([request.args for request in requests], answers, strict=True))
        return answers

    setattr(lm, kind, recorded)
    try:
        with quiet():
            found = simple_evaluate(
                model=lm,
                tasks=[task],
                task_manager=Tasks(data_dir, CodeEval(allowed=True)),
                num_fewshot=shots(task),
                limit=limit,
                bootstrap_iters=0,
                confirm_run_unsafe_code=True,
            )
    finally:
        setattr(lm, kind, original)
    return {"results": found["results"], "samples": found["samples"], "asked": asked, "seconds": sum(seconds)}


def compare(title: str, trained: Any, task: str, reference: Any, a: dict[str, Any], b: dict[str, Any]) -> None:
    """Print in how many items two evaluations differ."""
    assert [args for args, _ in a["asked"]] == [args for args, _ in b["asked"]], "the requests differ"
    pairs = [(args, x, y) for (args, x), (_, y) in zip(a["asked"], b["asked"], strict=True)]
    print(f"{title}: {len(pairs)} requests", flush=True)
    if kind_of(task) == "loglikelihood":
        worst = max(abs(x[0] - y[0]) for _, x, y in pairs)
        over = sum(abs(x[0] - y[0]) > 1e-4 for _, x, y in pairs)
        flags = sum(x[1] != y[1] for _, x, y in pairs)
        print(f"  log-likelihoods: largest difference {worst:.2e}, {over} above 1e-4; {flags} greedy flags differ")
    else:
        differ = [(args, x, y) for args, x, y in pairs if x != y]
        print(f"  texts: {len(differ)} differ, {len({x for _, x, _ in pairs})} distinct")
        for args, x, y in differ[:20]:
            print(f"    {parted(trained, reference, args, x, y)}")
    samples = [
        (one, other) for name in a["samples"] for one, other in zip(a["samples"][name], b["samples"][name], strict=True)
    ]
    metrics = sum(any(one[m] != other[m] for m in one["metrics"]) for one, other in samples)
    extracted = 0
    if kind_of(task) != "loglikelihood":
        extracted = sum(one["filtered_resps"] != other["filtered_resps"] for one, other in samples)
    print(f"  predictions: of {len(samples)}, {metrics} are scored differently, {extracted} extracted answers differ")
    names = [name for name in a["results"] if a["results"][name] != b["results"][name]]
    print(f"  scores: {len(a['results'])} tasks and groups, {len(names)} differ")
    for name in [task, *names]:
        print(f"    {name}: HFLM {numbers(a['results'][name])}, Ingot {numbers(b['results'][name])}", flush=True)


def numbers(results: dict[str, Any]) -> dict[str, float]:
    """The metrics of a task."""
    return {name: float(value) for name, value in results.items() if "," in name and isinstance(value, float)}


def parted(trained: Any, reference: Any, args: tuple[Any, ...], x: str, y: str) -> str:
    """How near each other the two likeliest tokens come, in transformers' own text of the prompt alone, before two
    texts part.
    """
    same = next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))
    ids = torch.tensor([reference.tok_encode(args[0])], device=trained.device)
    with torch.no_grad():
        found = reference.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(x) + 1, do_sample=False,
            output_logits=True, return_dict_in_generate=True, pad_token_id=trained.tokenizer.pad_id,
        )  # fmt: skip
    own = found.sequences[0, ids.shape[1] :].tolist()
    until = next((i for i in range(1, len(own)) if len(trained.tokenizer.decode(own[:i])) > same), len(own))
    values = torch.stack(found.logits)[:until, 0].float().topk(2).values
    gap, at = (values[:, 0] - values[:, 1]).min(0)
    return (
        f"within {until} tokens, the two likeliest come as near as {gap:.1e} (token {int(at)}): {x[-30:]!r} {y[-30:]!r}"
    )


# Speed


def requests_of(task: str, data_dir: str, limit: int | None) -> list[Any]:
    """All requests of a task, as the harness builds them."""
    from jobs.eval_harness import lean
    from jobs.eval_tasks import Tasks

    found = []
    with quiet(), lean():
        for one in Tasks(data_dir).load([task])["tasks"].values():
            one.set_config("num_fewshot", shots(task))
            one.set_fewshot_seed(1234)
            one.build_all_requests(limit=limit)
            found += one.instances
    return found


class Seconds(NamedTuple):
    """On the clock, and of the CPU, which other programs on the machine change little."""

    clock: float
    cpu: float


def timed(lm: Any, kind: str, requests: list[Any]) -> Seconds:
    """Seconds from text to results."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    began, cpu = time.monotonic(), time.process_time()
    with quiet(), contextlib.redirect_stdout(None):
        getattr(lm, kind)(requests)
    return Seconds(time.monotonic() - began, time.process_time() - cpu)


def of_others(requests: list[Any]) -> list[Any]:
    """The requests with contexts that begin otherwise: of those, an engine may still hold what it read."""
    found = [copy.copy(one) for one in requests]
    for one in found:
        one.arguments = ("~ " + one.args[0], *one.args[1:])
    return found


def warm_up(lm: Any, kind: str, requests: list[Any]) -> None:
    """Have kernels compiled and memory laid out: the longest request and some others, or all of texts' beginnings."""
    others = of_others(requests)
    longest = max(others, key=lambda one: len(one.args[0]))
    if kind == "loglikelihood":
        timed(lm, kind, [longest, *others[: len(others) // 20]])
        return
    begun = [copy.copy(one) for one in others]
    for one in begun:
        one.arguments = (one.args[0], {**one.args[1], "max_gen_toks": 2})
    timed(lm, kind, [longest, *begun, longest])


def spread(requests: list[Any], parts: int) -> list[Any]:
    """One of so many questions of MMLU, each with its four choices, from all over."""
    return [one for start in range(0, len(requests), 4 * parts) for one in requests[start : start + 4]]


def of_text(lm: Any, kind: str, requests: list[Any]) -> Seconds:
    """Seconds of those that the text takes, all but the model's work: ten times those of a tenth."""
    if kind != "loglikelihood":
        return Seconds(0.0, 0.0)
    requests = spread(requests, 10)
    if hasattr(lm, "workers"):
        left_out = mock.patch.object(lm.workers, "_scored", lambda asked: ((i, 0.0, False) for i in range(len(asked))))
    else:
        left_out = mock.patch.object(lm, "_loglikelihood_tokens", lambda asked, **_: [(0.0, False)] * len(asked))
    with left_out:
        return Seconds(*(10 * seconds for seconds in timed(lm, kind, requests)))


def fastest(trained: Any, kind: str, requests: list[Any], batches: list[int]) -> Any:
    """HFLM at the batch size that is fastest on some of the requests: of texts on one batch each."""
    lm, best = theirs(trained, batches[0]), (float("inf"), 0)
    some = spread(requests, max(1, len(requests) // (8 * batches[-1])))
    timed(lm, kind, requests[: batches[0]])
    for batch in batches:
        lm.batch_size_per_gpu = batch
        if kind == "generate_until":
            some = requests[:batch]
        try:
            best = min(best, (timed(lm, kind, some).clock / len(some), batch))
        except torch.OutOfMemoryError:
            break
    lm.batch_size_per_gpu = best[1]
    return lm


def timed_in_memory(lm: Any, kind: str, requests: list[Any]) -> Seconds:
    """Seconds at the largest batch size, of those that halve the given one, at which the longest requests fit."""
    while True:
        try:
            return timed(lm, kind, requests)
        except torch.OutOfMemoryError:
            lm.batch_size_per_gpu //= 2


def speed(args: argparse.Namespace, name: str, folder: str) -> None:
    """Seconds of both, and their ratio."""
    shape = args.shape or "small"
    precision = "bf16" if args.device == "cuda" else "fp32"
    trained = make(shape, args.data_dir, folder, args.device, name, precision)
    batches = args.batches or ([32, 64, 128, 256, 512] if args.device == "cuda" else [1, 4, 16])
    for task in args.tasks or ["mmlu", "gsm8k"]:
        kind, requests = kind_of(task), requests_of(task, args.data_dir, args.limit)
        mine = ours(trained)
        warm_up(mine, kind, requests)
        own = timed(mine, kind, requests)
        own_text = of_text(mine, kind, requests)
        del mine
        lm = fastest(trained, kind, requests, batches)
        other, other_text = timed_in_memory(lm, kind, requests), of_text(lm, kind, requests)
        print(
            f"{task}, {shape} ({name}) on {device_name(args.device)}: {len(requests)} requests; HFLM "
            f"{other.clock:.1f} s (batch {lm.batch_size_per_gpu}; {other_text.clock:.1f} s of it tokenization), "
            f"Ingot {own.clock:.1f} s ({own_text.clock:.1f} s): {other.clock / own.clock:.1f} times as fast; without "
            f"tokenization {(other.clock - other_text.clock) / (own.clock - own_text.clock):.1f} times",
            flush=True,
        )
        if args.device == "cpu":
            print(
                f"  seconds of the CPU: HFLM {other.cpu:.1f} ({other_text.cpu:.1f}), Ingot {own.cpu:.1f} "
                f"({own_text.cpu:.1f}): {other.cpu / own.cpu:.1f} times; without tokenization "
                f"{(other.cpu - other_text.cpu) / (own.cpu - own_text.cpu):.1f} times",
                flush=True,
            )
        del lm


def device_name(device: str) -> str:
    """What the figures are of."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads of a CPU"


def gpus(args: argparse.Namespace, name: str, folder: str) -> None:
    """Ingot's seconds on several GPUs (or CPU cores) through Ray actors, and on one."""
    from jobs.eval_workers import open_model
    from jobs.harness import IngotLM
    from jobs.settings import EvaluateJob

    shape = args.shape or "small"
    trained = make(shape, args.data_dir, folder, args.device, name, "bf16" if args.device == "cuda" else "fp32")
    length = trained.model.config.max_seq_len
    del trained
    requests = {task: requests_of(task, args.data_dir, args.limit) for task in args.tasks or ["mmlu", "gsm8k"]}
    seconds: dict[tuple[str, int], float] = {}
    for count in (1, args.gpus):
        settings = replace(EvaluateJob(model=folder, workers=count), device="gpu" if args.device == "cuda" else "cpu")
        with open_model(settings, args.device) as model:
            for task, own in requests.items():
                # the first time, memory is laid out
                timed(IngotLM(model, length), kind_of(task), of_others(own))
                seconds[task, count] = timed(IngotLM(model, length), kind_of(task), own).clock
                print(f"{task}, {shape}: {seconds[task, count]:.1f} s on {count}", flush=True)
        del model  # another one takes its GPU
    for task in requests:
        one, several = seconds[task, 1], seconds[task, args.gpus]
        print(f"{task}, {shape}: {one:.1f} s on one, {several:.1f} s on {args.gpus}: {one / several:.2f} times as fast")


if __name__ == "__main__":
    main()
