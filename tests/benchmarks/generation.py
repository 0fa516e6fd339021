"""Generation: whether its tokens are transformers' own, and how many come in a second beside transformers' generate.

    python -m tests.benchmarks.generation [--parts equal graph speed] [--shape 124m 1b] [--batch 32] [--model FOLDER]

equal   200 prompts of 1 to 300 tokens, 16 at a time, against transformers' greedy generate of each, one by one, in
        fp32, token for token: of a random model whose texts vary, or of a model in Llama format (--model), whose
        prompts then are from the documentation of Python's modules. On the GPU where there is one, else on the CPU.
graph   GPU: the compiled, recorded step against the plain one, both in fp32, on prompts of 1 to 600 tokens that come
        and go.
speed   tokens/s, reading prompts included, against transformers' generate with its default cache and attention and the
        same batch; in bf16 on a GPU, in fp32 on the CPU (where --shape nano --batch 16 takes a minute). "plain" is one
        batch of prompts of 256 random tokens, continued by 256; "shared" is what a few-shot benchmark asks: four
        batches of prompts that share up to 1000 tokens and end in 40 to 200 of their own, continued by 30 to 256, where
        transformers goes on until the longest text of a batch has ended.

Where tokens differ, the gap between the two likeliest tokens' logits at the first that does is printed: by rounding
alone, tokens whose gap is some 1e-5 may.
"""

import argparse
import contextlib
import importlib
import pkgutil
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import transformers

from models.config import PRESETS, ModelConfig
from models.generate import Engine, Sampling
from models.hugging_face import save_pretrained
from models.parallel import parallelize
from models.transformer import Transformer

SMALL = ModelConfig(vocab_size=2048, d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=256, max_seq_len=512)
NEW = 64  # tokens for each prompt where tokens are compared


def varied(config: ModelConfig) -> Transformer:
    """A random model with weights so large that its greedy texts vary."""
    model = Transformer(config, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.eval()


def in_transformers(model: Transformer, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The same model as transformers' own, on the same device."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model.state_dict(), model.config, folder, dtype=dtype)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return theirs.to(model.tok_embeddings.weight.device).eval()


def continued(engine: Engine, requests: list[tuple[list[int], Sampling]]) -> list[list[int]]:
    """The texts of an engine, in the order of the requests."""
    texts: dict[int, list[int]] = {engine.submit(*request): [] for request in requests}
    while engine.busy:
        for token in engine.step():
            if token.token is not None:
                texts[token.request].append(token.token)
    return list(texts.values())


def their_text(theirs: transformers.PreTrainedModel, prompt: list[int], stop: int | None, vocab_size: int) -> list[int]:
    """transformers' greedy continuation of one prompt, without the id that ends it."""
    ids = torch.tensor([prompt], device=theirs.device)
    text = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
        eos_token_id=stop, suppress_tokens=list(range(vocab_size, theirs.config.vocab_size)) or None,
    )[0, len(prompt) :].tolist()  # fmt: skip
    return text[: text.index(stop)] if stop in text else text


def compare(
    name: str, model: Transformer, prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]]
) -> None:
    """Print how many texts are equal, and where others part."""
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    kinds = len({tuple(text) for text in theirs})
    print(f"{name}: {equal} of {len(ours)} texts equal, {sum(map(len, theirs))} tokens, {kinds} different texts")
    for i, (prompt, a, b) in enumerate(zip(prompts, ours, theirs, strict=True)):
        if a != b:
            at = next((k for k, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
            with torch.no_grad():
                ids = torch.tensor([prompt + b[:at]], device=model.tok_embeddings.weight.device)
                first, second = model(ids)[0, -1].float().topk(2).values.tolist()
            print(f"  text {i} parts at token {at}, where the two likeliest are {first - second:.1e} apart")


def documentation(count: int) -> list[str]:
    """Beginnings of the documentation of Python's own modules."""
    draws, texts = random.Random(0), []
    for module in pkgutil.iter_modules():
        if module.name in sys.stdlib_module_names and module.name not in ("antigravity", "this", "idlelib", "turtle"):
            with contextlib.suppress(Exception):
                words = (importlib.import_module(module.name).__doc__ or "").split(" ")
                texts += [" ".join(words[: draws.randint(1, 60)]) for _ in range(2) if len(words) > 3]
    return texts[:count]


def equal(device: str, folder: str | None) -> None:
    """200 prompts against transformers."""
    draws = random.Random(0)
    if folder is None:
        model, stop, vocab_size = varied(SMALL).to(device), 7, 2000
        prompts = [[draws.randrange(vocab_size) for _ in range(draws.randint(1, 300))] for _ in range(200)]
        theirs = in_transformers(model, torch.float32)
    else:
        from jobs.settings import OfRun
        from jobs.trained import load

        trained = load(OfRun(model=folder), device)
        model, tokenizer = trained.model, trained.tokenizer
        model.compute_dtype = None  # fp32 on a GPU too
        stop, vocab_size = tokenizer.eot_id, tokenizer.vocab_size
        prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in documentation(200)]
        prompts = [prompt[: model.config.max_seq_len - NEW] for prompt in prompts]
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    sampling = Sampling(NEW, stop=frozenset({stop}))
    length = max(map(len, prompts)) + NEW
    engine = Engine(model, slots=16, length=min(length, model.config.max_seq_len), vocab_size=vocab_size)
    began = time.perf_counter()
    ours = continued(engine, [(prompt, sampling) for prompt in prompts])
    middle = time.perf_counter()
    truth = [their_text(theirs, prompt, stop, vocab_size) for prompt in prompts]
    compare("equal", model, prompts, ours, truth)
    print(f"  {middle - began:.1f} s; transformers, one prompt at a time: {time.perf_counter() - middle:.1f} s")


def graph() -> None:
    """The recorded step against the plain one."""
    draws = random.Random(0)
    for name, changes in {
        "grouped heads": {},
        "heads of 64, as many of keys": {"d_model": 256, "n_kv_heads": 4},
        "qk-norm, heads of 128": {"d_model": 512, "qk_norm": True, "tied_embeddings": True},
    }.items():
        model = varied(replace(SMALL, max_seq_len=1024, **changes)).cuda()
        prompts = [[draws.randrange(2048) for _ in range(draws.randint(1, 600))] for _ in range(50)]
        prompts += [prompts[0] + prompt[:50] for prompt in prompts[1:30]]
        requests = [(prompt, Sampling(draws.randint(1, NEW))) for prompt in prompts]
        plain, fast = (continued(Engine(model, slots=12, compiled=c), requests) for c in (False, True))
        compare(f"graph, {name}", model, prompts, fast, plain)


def speed(shape: str, batches: list[int], device: str) -> None:
    """Tokens a second."""
    on_gpu = device == "cuda"
    model = parallelize(Transformer(PRESETS[shape], seed=0), None, device).eval()
    theirs = in_transformers(model, torch.bfloat16 if on_gpu else torch.float32)
    draws = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draws.randrange(model.config.vocab_size) for _ in range(count)]

    where = f"{torch.cuda.get_device_name()}, bf16" if on_gpu else f"{torch.get_num_threads()} cores, fp32"
    print(f"{shape} on {where}, thousand tokens/s")
    for batch in batches:
        plain = [(ids(256), Sampling(256)) for _ in range(batch)]
        length = min(1456, model.config.max_seq_len)
        beginning = ids(length - 456)
        few_shot = [
            (beginning + ids(draws.randint(40, 200)), Sampling(draws.randint(30, 256))) for _ in range(4 * batch)
        ]
        began = time.perf_counter()
        engine = Engine(model, slots=batch, length=length)
        continued(engine, [(ids(20), Sampling(3))])
        ready = time.perf_counter() - began
        for name, requests in {"plain": plain, "shared": few_shot}.items():
            tokens = sum(sampling.max_new_tokens for _, sampling in requests)
            warm = [(prompt[::-1], Sampling(4)) for prompt, _ in requests]  # kernels for these sizes
            continued(engine, warm)
            _their_batches(theirs, warm[:batch], batch)
            ours = _seconds(lambda requests=requests, engine=engine: continued(engine, requests))
            peer = _seconds(lambda requests=requests, batch=batch: _their_batches(theirs, requests, batch))
            figures = (
                f"Ingot {tokens / ours / 1e3:7.2f}  transformers {tokens / peer / 1e3:7.2f}  ratio {peer / ours:5.1f}"
            )
            print(f"  batch {batch:4} {name:6}  {figures}  (the engine was ready after {ready:.0f} s)", flush=True)
        steps = [(ids(256), Sampling(65)) for _ in range(batch)]
        for request in steps:
            engine.submit(*request)
        engine.step()
        took = _seconds(lambda engine=engine: [engine.step() for _ in range(60)]) / 60
        print(f"  batch {batch:4} a step of {batch} texts with some 300 keys takes {took * 1e3:.2f} ms", flush=True)
        del engine


def _their_batches(
    theirs: transformers.PreTrainedModel, requests: list[tuple[list[int], Sampling]], batch: int
) -> None:
    """transformers' generate of sorted batches, padded on the left, each until its longest text has ended."""
    requests = sorted(requests, key=lambda request: len(request[0]))
    for start in range(0, len(requests), batch):
        some = requests[start : start + batch]
        longest = max(len(prompt) for prompt, _ in some)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in some], device=theirs.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in some], device=theirs.device)
        new = max(sampling.max_new_tokens for _, sampling in some)
        theirs.generate(
            ids, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, do_sample=False, pad_token_id=0
        )


def _seconds(work: Callable[[], object]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def main() -> None:
    """Print what the parts found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    parts = ["equal", "graph", "speed"] if has_gpu else ["equal"]
    parser.add_argument("--parts", nargs="+", choices=["equal", "graph", "speed"], default=parts)
    parser.add_argument("--shape", nargs="+", choices=sorted(PRESETS), default=["124m", "1b"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32, 128])
    parser.add_argument("--model", help="folder in Llama format, for equal")
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if "equal" in asked.parts:
        equal("cuda" if has_gpu else "cpu", asked.model)
    if "graph" in asked.parts:
        graph()
    if "speed" in asked.parts:
        for shape in asked.shape:
            speed(shape, asked.batch, "cuda" if has_gpu else "cpu")


if __name__ == "__main__":
    main()
