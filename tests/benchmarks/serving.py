"""`ingot serve` under 64 concurrent clients for a minute, beside transformers' own batch generation.

    python -m tests.benchmarks.serving [--shape nano 124m] [--device auto] [--clients 64] [--seconds 60] [--slots N]

A random model is exported and served by `ingot serve --model`, in a process of its own with its own Ray. Each client,
of the official `openai` package, asks again as soon as it has its answer: every other one streams; prompts have some 10
to 60 tokens, answers 64, drawn greedily. Then transformers continues the same prompts by as many tokens with the same
weights, as many at a time as there are clients, left-padded, without HTTP; on the GPU both compute in bf16.

Printed are answers, errors (there has to be none), tokens/s of answers, the time until a stream's first piece, and
transformers' tokens/s. The clients take cores too: one process for all of them, beside Ray's.
"""

import argparse
import asyncio
import os
import pydoc_data.topics
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import replace

import torch
import transformers

from models.config import PRESETS
from models.transformer import Transformer

NEW = 64
KEY = "the-key-of-the-benchmark"


def export(shape: str, folder: str) -> None:
    """A random model of a preset's shape, whose texts vary, with a tokenizer of Python's documentation."""
    from jobs.export import write
    from jobs.settings import ExportJob
    from jobs.trained import Trained
    from pipelines.tokenizer import TokenizerSettings, train_on_texts

    texts = list(pydoc_data.topics.topics.values())
    config = replace(PRESETS[shape], max_seq_len=512)
    tokenizer = train_on_texts(iter(texts), TokenizerSettings(vocab_size=4096))
    model = Transformer(config, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    ends = frozenset([tokenizer.eot_id])
    write(ExportJob(model=shape), Trained(model, tokenizer, ends, None, torch.device("cpu"), shape, "random"), folder)


def prompts(count: int) -> list[str]:
    """Beginnings of sentences of that documentation."""
    words = " ".join(pydoc_data.topics.topics.values()).split()
    chance = random.Random(0)
    starts = [chance.randrange(len(words) - 50) for _ in range(count)]
    return [" ".join(words[at : at + chance.randint(5, 30)]) for at in starts]


async def ask(url: str, model: str, clients: int, seconds: float) -> dict[str, object]:
    """Ask with so many clients for so long."""
    import openai

    texts = prompts(1000)
    counts = {"answers": 0, "tokens": 0}
    first: list[float] = []
    whole: list[float] = []
    errors: list[str] = []

    async def client(number: int) -> None:
        asking = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)
        turn = number
        while time.monotonic() < end:
            request = {"model": model, "prompt": texts[turn % len(texts)], "max_tokens": NEW, "temperature": 0.0}
            turn += clients
            began = time.monotonic()
            try:
                if number % 2:
                    answer = await asking.completions.create(**request)
                    usage = answer.usage
                else:
                    options = {"stream": True, "stream_options": {"include_usage": True}}
                    started = None
                    async for chunk in await asking.completions.create(**request, **options):
                        started = started or time.monotonic() - began
                        usage = chunk.usage
                    first.append(started)
                counts["answers"] += 1
                counts["tokens"] += usage.completion_tokens
                whole.append(time.monotonic() - began)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")

    began = time.monotonic()
    end = began + seconds
    await asyncio.gather(*map(client, range(clients)))
    return counts | {"errors": errors, "seconds": time.monotonic() - began, "first": first, "whole": whole}


def serve(folder: str, device: str, slots: int | None, log: str) -> tuple[subprocess.Popen, str]:
    """Start the server and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "jobs", "serve", "--model", folder, "--port", str(port), "--device", device]
    words += ["--api_key_env", "SERVING_KEY", *(["--slots", str(slots)] if slots else [])]
    with open(log, "w") as file:
        server = subprocess.Popen(words, env={**os.environ, "SERVING_KEY": KEY}, stdout=file, stderr=file)
    url = f"http://127.0.0.1:{port}"
    for _ in range(1200):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return server, url
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.25)
    server.terminate()
    with open(log) as file:
        raise SystemExit(f"the server did not start:\n{file.read()}")


@torch.inference_mode()
def theirs(folder: str, device: str, batch: int, seconds: float) -> float:
    """transformers' tokens/s on the same prompts, after one batch to warm up."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    texts = prompts(1000)
    tokens, began, at = 0, 0.0, 0
    while not began or time.monotonic() - began < seconds:
        part = [texts[i % len(texts)] for i in range(at, at + batch)]
        inputs = tokenizer([tokenizer.bos_token + text for text in part], padding=True, return_tensors="pt").to(device)
        new = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, inputs.input_ids.shape[1] :].cpu()
        if began:
            tokens += int((new != tokenizer.pad_token_id).sum() - (new == tokenizer.eos_token_id).sum())
            at += batch
        else:
            began = time.monotonic()
    return tokens / (time.monotonic() - began)


def main() -> None:
    """Measure each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(PRESETS), default=["nano"])
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--slots", type=int, help="of the server; its own choice by default")
    given = parser.parse_args()
    on_gpu = given.device == "gpu" or (given.device == "auto" and torch.cuda.is_available())
    for shape in given.shape:
        with tempfile.TemporaryDirectory() as scratch:
            folder = f"{scratch}/{shape}"
            export(shape, folder)
            server, url = serve(folder, "gpu" if on_gpu else "cpu", given.slots, f"{scratch}/log")
            try:
                asyncio.run(ask(url, shape, given.clients, 3.0))  # warm up
                found = asyncio.run(ask(url, shape, given.clients, given.seconds))
            finally:
                server.send_signal(signal.SIGTERM)
                ended = server.wait(60)
            ours = found["tokens"] / found["seconds"]
            print(
                f"{shape} on {'gpu' if on_gpu else 'cpu'}, {given.clients} clients, {found['seconds']:.0f} s: "
                f"{found['answers']} answers, {len(found['errors'])} errors, {ours:.0f} tokens/s; first piece after "
                f"{_spread(found['first'])}, whole answer of {NEW} tokens after {_spread(found['whole'])}; "
                f"the server ended with {ended}"
            )
            for error in sorted(set(found["errors"]))[:5]:
                print(f"  {error}")
            peer = theirs(folder, "cuda" if on_gpu else "cpu", given.clients, given.seconds / 3)
            print(f"transformers, batches of {given.clients}: {peer:.0f} tokens/s; ratio {ours / peer:.2f}", flush=True)


def _spread(seconds: list[float]) -> str:
    """Median and 95th percentile."""
    if len(seconds) < 2:
        return "-"
    return f"{statistics.median(seconds):.2f} s (95 %: {statistics.quantiles(seconds, n=20)[-1]:.2f} s)"


if __name__ == "__main__":
    main()
