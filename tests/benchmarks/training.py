"""Training speed on one GPU: Ingot, in bf16 and fp8, beside a plain 60-line Llama and transformers' Llama, all of them
compiled and at their best microbatch; where a step's time goes.

    python -m tests.benchmarks.training [--shape 1b 124m] [--parts plain hf ingot fp8 step step-fp8] [--seconds 240]

Tokens are random. plain, hf, ingot and fp8 are a microbatch (forward and backward pass, gradients added up in fp32)
and an optimizer's step with clipping, charged once for 2^19 tokens. step and step-fp8 are whole steps of 2^19 tokens as
the training loop takes them (`models.training.step`): tokens from the host, guard, norm, batch hash, and all. The loop
itself, under Ray Train, with checkpoints and real tokens, and the losses of fp8 beside bf16, are in
`tests.benchmarks.pretraining`. MFU is (6·N + 12·L·d·T) · tokens/s over 989.5 TFLOP/s. Medians; each configuration runs
in a process of its own. With cold caches a configuration takes about a minute, most of it compilation.

Measured on one H200 (torch 2.11, CUDA 13.0, cuDNN 9.19; Ingot with FlashAttention-4), thousand tokens/s; loop is
`tests.benchmarks.pretraining --parts loop` with steps of 2^19 real tokens under Ray Train:

    shape  microbatch  plain        transformers  Ingot bf16    step          loop          fp8            step, fp8
    1b     8           76.7-77.0    74.5-74.7     81.3 (1.056x) 81.0 (1.052x) 82.5 (1.071x) 115.1 (1.42x)  115.2 (1.42x)
    124m   64          567.0        532.6         611.0 (1.078x) 594.7 (1.049x) 602.1 (1.062x)

Of bf16, ratios to plain; of fp8, to Ingot's bf16. Without FlashAttention-4 step does 78.8 (1.024x) and 587.8 (1.037x).
A microbatch of 16 at 1b: plain 77.0.

On one H100 (80 GB, 3.0 TB/s copied):

    shape  microbatch  plain        Ingot bf16         + FlashAttention-4   Ingot fp8   + FlashAttention-4
    1b     8           74.4-75.3    76.5-77.3          78.7 (1.05x)         103.5       108.0 (1.37x bf16, 1.44x plain)
    124m   64          514.6-515.2  549.6-551.9        565.5 (1.10x)
    124m   32          510.3        536.0

(The two figures of fp8 are from before its kernels were corrected, see below, which costs them 0.2 %.)

The GPU is limited by its power when it is warm: the same product of 32768x2048x2048 ran at 785 and at 665 TFLOP/s a
minute apart. Differences below 2 % need both sides run in turn. On the H200, us a token at 1b: matrix products 8.6 (725
TFLOP/s; plain 8.5), attention 2.35 (plain 2.80, cuDNN), everything else 1.12 (plain 1.30); in fp8 4.5, 2.2 and 1.5. At
124m 1.03, 0.25 and 0.33 (plain 1.05, 0.28 and 0.42). On the H100 everything else took 1.5, for its slower memory.

What was tried, with what it did (us a token at 1b, microbatch 8, unless said otherwise):

- Joined matrices: q, k, v as one product, gate and up as one. Matrix products 8.57 to 8.43. But torch.compile writes
  the gradient of gate and up into one tensor at 2.1 TB/s (0.62 us, plain: 0.43), and rotates and joins dq, dk, dv in
  two passes (0.19): Triton kernels for both (2.9 TB/s, 0.45; 0.07).
- Sum and norm in one kernel, the norm's weight gradient summed in its backward kernel: 0.38, torch.compile 0.42. With
  the sum left to the compiler, one graph of the whole model added up to five layers' results lazily (0.5).
- The loss: one Triton kernel turns logits into their gradient in place: 0.057 (124m 0.096), plain 0.094 (124m 0.14).
  Its speed alone: 8 warps a row 2.03 ms, 32 warps 1.72 ms, as more rows in flight fall out of the L2 between the two
  readings. A scalar argument of a Triton kernel that torch.compile passes on becomes fp64: as tl.constexpr the kernel
  took 1.88 instead of 2.50 ms within the model.
- One compiled block for all layers: ready in 9-12 s, the whole model as one graph in 25-38 s, and not faster (77.3 and
  75.9). From a warm cache 4 s. The first block's input is two halves, as two forms of the block would be compiled.
- Weights' gradients leave the product in fp32 (torch.mm with out_dtype): one cast of all weights less, 0.123 to 0.065.
- Attention: cuDNN 446 forward and 365 TFLOP/s backward (heads of 64), torch's flash backend 295 and 244; grouped heads
  expanded, strided or in another layout: no difference. FlashAttention-4 (flash-attn-4, a beta that compiles itself in
  5 s): 480 and 415; attention with all helpers 2.87 to 2.32, a layer at 124m 0.0215 to 0.0195, with heads of 128 0.128
  to 0.119. torch 2.11's own hook for it does not fit its present signature, so it is called directly.
- fp8, all three products of every linear layer in the blocks, one scale a tensor: cuBLAS reaches 1200-1480 TFLOP/s with
  fast accumulation, 1010-1270 without; rowwise scales 1283 where tensorwise ones reach 1266. Scales from bounds instead
  of measured maxima, so that rounding needs no pass of its own; rounding and transposing in one kernel at 2.6-2.9 TB/s.
  Products 8.4 to 4.6.
- fp8's losses (`pretraining --parts precision`, H100, 300 steps of 32k tokens in one microbatch): with the weights'
  gradients, sums over all tokens of the microbatch, in fast accumulation 1.9 % above bf16 over the last 30 steps; with
  exact sums 0.34 % (validation 0.43 %). The whole job is 1.33 times as fast as in bf16 with them, 1.36 times without.
  The figures of fp8's steps above are from before.
- Triton 3.6 packed values of 8 bits in a wrong order (a transposed fp8 tile of fp32 input; bytes both stored and
  packed). The kernels in `models.float8` convert twice instead, and were compared bit by bit.
- Masks of documents by FlexAttention at the 1b shape, forward and backward: documents of 4096 tokens 6.8 ms, of 1024
  4.0, of 256 2.4; cuDNN without a mask 5.0. Making the mask 0.13 ms a microbatch.
- Not used: cublasLt instead of cuBLAS (no difference that stands out of the noise); the SwiGLU inside the products
  (quack-kernels 0.6.5 does not run on the present cutlass-dsl); CUDA graphs (at microbatches of 32k tokens kernels add
  up to 98 % of the time); weights cast once a step (they cost 0.065 now, and a copy can go stale).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from models.config import PRESETS, ModelConfig, OptimizerConfig
from models.optimizer import build_optimizer, grad_norm
from models.parallel import compile_model, parallelize
from models.training.spikes import Limits
from models.training.step import Stepper
from models.transformer import Transformer

Loss = Callable[[Tensor, Tensor], Tensor]

PEAK = 989.5e12  # dense bf16 of an H100 or H200 by its data sheet, FLOP/s
TOKENS_PER_STEP = 2**19  # the optimizer is charged once for these
SEQUENCE = {"1b": 4096, "124m": 1024}
MICROBATCHES = {"1b": {0: (8,), 100e9: (8, 16)}, "124m": {0: (64, 128)}}  # by the GPU's memory, bytes, at least


# The plain Llama: what one writes in an afternoon


class PlainBlock(nn.Module):
    """Attention and SwiGLU, each behind a norm."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.hd, kv = c.head_dim, c.n_kv_heads * c.head_dim
        self.n1, self.n2 = (nn.RMSNorm(c.d_model, eps=c.norm_eps) for _ in range(2))
        self.wq, self.wk, self.wv, self.wo = (
            nn.Linear(c.d_model, n, bias=False) for n in (c.d_model, kv, kv, c.d_model)
        )
        self.w1, self.w3 = (nn.Linear(c.d_model, c.d_ff, bias=False) for _ in range(2))
        self.w2 = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (B, T, d_model) to the same shape."""
        b, t, _ = x.shape
        h = self.n1(x)
        q, k, v = (w(h).view(b, t, -1, self.hd).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
        x = x + self.wo(a.transpose(1, 2).reshape(b, t, -1))
        h = self.n2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, (B, heads, T, head_dim)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class PlainLlama(nn.Module):
    """Tokens to mean loss."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.emb = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(PlainBlock(c) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.tied_embeddings:
            self.head.weight = self.emb.weight
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        angles = torch.arange(c.max_seq_len)[:, None] / c.rope_theta ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in nats."""
        with torch.autocast(tokens.device.type, torch.bfloat16):
            x = self.emb(tokens).bfloat16()
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# The configurations


def make_plain(config: ModelConfig, device: str, precision: str) -> tuple[nn.Module, Loss]:
    """The plain Llama as one compiled graph."""
    model = PlainLlama(config).to(device)
    return model, torch.compile(model)


def make_hugging_face(config: ModelConfig, device: str, precision: str) -> tuple[nn.Module, Loss]:
    """transformers' Llama with is_causal: under torch.compile it would build an explicit mask."""
    import transformers
    from transformers.models.llama import modeling_llama

    modeling_llama.create_causal_mask = lambda *args, **kwargs: None
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim,
            max_position_embeddings=config.max_seq_len, tie_word_embeddings=config.tied_embeddings,
            attn_implementation="sdpa", use_cache=False, dtype=torch.float32,
        )
    ).to(device)  # fmt: skip

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            logits = model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return model, torch.compile(loss)


def make_ingot(config: ModelConfig, device: str, precision: str) -> tuple[Transformer, Loss]:
    """Ingot's model as the training loop runs it."""
    with torch.device("meta"):
        model = Transformer(config, seed=None)
    model = parallelize(model, None, torch.device(device), precision=precision)
    model.init_weights(0)
    if device == "cuda":
        compile_model(model)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        total, _ = model(tokens, targets, reduction="sum", token_losses=True)
        return total / targets.numel()

    return model, loss


MAKERS = {
    "plain": (make_plain, "bf16"), "hf": (make_hugging_face, "bf16"), "ingot": (make_ingot, "bf16"),
    "fp8": (make_ingot, "fp8"), "step": (make_ingot, "bf16"), "step-fp8": (make_ingot, "fp8"),
}  # fmt: skip


def measure(
    part: str,
    shape: str,
    microbatch: int,
    exclusive: AbstractContextManager[Any] | None = None,
    config: ModelConfig | None = None,
    repeats: int = 11,
) -> dict[str, Any]:
    """Time a configuration.

    Args:
        part: of `MAKERS`.
        shape: of `PRESETS`.
        microbatch: sequences.
        exclusive: held while the GPU is timed.
        config: instead of the shape's.
        repeats: timed microbatches.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = config or PRESETS[shape]
    length = SEQUENCE.get(shape, config.max_seq_len)
    torch.manual_seed(0)
    began = time.perf_counter()
    make, precision = MAKERS[part]
    model, loss_of = make(config, device, precision)
    if isinstance(model, Transformer):
        optimizer = build_optimizer(model, OptimizerConfig())
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    built = time.perf_counter() - began
    if part.startswith("step"):
        result = whole_steps(model, optimizer, device, microbatch, length, exclusive)
    else:
        run = Microbatches(model, optimizer, loss_of, device, (microbatch, length), config.vocab_size)
        result = run.measure(exclusive, repeats)
    return {
        "part": part, "shape": shape, "microbatch": microbatch, "build_s": built,
        "mfu": config.flops_per_token(length) * result["tokens_per_second"] / PEAK,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0, **result,
    }  # fmt: skip


class Microbatches:
    """Forward and backward passes, and now and then the optimizer's step."""

    def __init__(
        self, model: nn.Module, optimizer: Any, loss_of: Loss, device: str, shape: tuple[int, int], vocab_size: int
    ):
        self.model, self.optimizer, self.loss_of = model, optimizer, loss_of
        self.device, self.shape, self.vocab_size = device, shape, vocab_size
        self.generator = torch.Generator(device).manual_seed(1)
        self.marks: list[Any] = []  # events between the parts of a microbatch, when they are wanted

    def measure(self, exclusive: AbstractContextManager[Any] | None, repeats: int) -> dict[str, Any]:
        """Medians, in the units that the names end with."""
        began = time.perf_counter()
        first = self.step().item()
        compiled = time.perf_counter() - began
        tokens = self.shape[0] * self.shape[1]
        with exclusive or nullcontext():
            self.step()
            self.optimize()
            self.step()  # leaves gradients: the timed ones are added to them
            micro = timed([self.step] * repeats)
            optimizing = timed([self.clip, self.update, self.step] * 3)
            parts = self.parts() if self.device == "cuda" else {}
            classes, kernels = profile(self.step) if self.device == "cuda" else ({}, [])
        seconds = statistics.median(micro)
        clip, update = statistics.median(optimizing[::3]), statistics.median(optimizing[1::3])
        return {
            "compile_s": compiled, "first_loss": first, "microbatch_ms": 1e3 * seconds,
            "spread_ms": 1e3 * (max(micro) - min(micro)), "clip_ms": 1e3 * clip, "optimizer_ms": 1e3 * update,
            "tokens_per_second": 1 / (seconds / tokens + (clip + update) / TOKENS_PER_STEP),
            "ms_per_step": {name: ms * TOKENS_PER_STEP / tokens for name, ms in parts.items()},
            "us_per_token": {name: us / tokens for name, us in classes.items()},
            "kernels": [(name, calls, us / tokens) for name, calls, us in kernels],
        }  # fmt: skip

    def step(self) -> Tensor:
        """One microbatch."""
        rows, length = self.shape
        sample = torch.randint(0, self.vocab_size, (rows, length + 1), device=self.device, generator=self.generator)
        self.mark()
        loss = self.loss_of(sample[:, :-1].contiguous(), sample[:, 1:].contiguous())
        self.mark()
        loss.backward()
        self.mark()
        return loss.detach()

    def clip(self) -> None:
        """The gradient's norm; Ingot's optimizer scales by it as it reads gradients, the others' are scaled here."""
        if isinstance(self.model, Transformer):
            self.optimizer.grad_scale = grad_norm(self.model).clamp(min=1)
            self.optimizer.found_inf = torch.zeros((), device=self.device)
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def update(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def optimize(self) -> None:
        """Clip and update."""
        self.clip()
        self.update()

    def mark(self) -> None:
        """Note the time on the GPU."""
        if self.marks:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()

    def parts(self) -> dict[str, float]:
        """Milliseconds of the parts of a microbatch; the head, which makes its gradients at once, only of Ingot's."""
        names = ["draw tokens", "forward", "backward"]
        if isinstance(self.model, Transformer):
            names[1:2] = ["blocks forward", "norm, head and loss", "sum"]
            compiled = self.model.loss_of

            def marked(*args: Any) -> Any:
                self.mark()
                result = compiled(*args)
                self.mark()
                return result

            self.model.loss_of = marked
        self.marks = [torch.cuda.Event(enable_timing=True)]
        self.marks[0].record()
        self.step()
        torch.cuda.synchronize()
        if isinstance(self.model, Transformer):
            self.model.loss_of = compiled
        times = [before.elapsed_time(after) for before, after in itertools.pairwise(self.marks)]
        self.marks = []
        return dict(zip(names, times, strict=True))


def whole_steps(
    model: Transformer,
    optimizer: Any,
    device: str,
    microbatch: int,
    length: int,
    exclusive: AbstractContextManager[Any] | None,
    repeats: int = 3,
) -> dict[str, Any]:
    """Steps of 2^19 tokens as the loop takes them, numbers read when the step after has been issued."""
    stepper = Stepper(model, optimizer, torch.device(device), microbatch=microbatch, grad_clip=1.0, data_world=1)
    rows = max(microbatch, TOKENS_PER_STEP // length) if device == "cuda" else 2 * microbatch
    generator = torch.Generator().manual_seed(1)
    vocab_size, limits = model.config.vocab_size, Limits(float("inf"), float("inf"))

    def issue(step: int) -> Any:
        samples = torch.randint(0, vocab_size, (rows, length + 1), generator=generator)
        return stepper.step(samples.pin_memory() if device == "cuda" else samples, [step], limits)

    began = time.perf_counter()
    first = issue(0).read().loss
    compiled = time.perf_counter() - began
    times = []
    with exclusive or nullcontext():
        pending = issue(1)
        for step in range(repeats + 1):
            following = issue(step + 2)
            pending.read()
            times.append(time.perf_counter())
            pending = following
        pending.read()
    seconds = statistics.median(after - before for before, after in itertools.pairwise(times))
    return {"compile_s": compiled, "first_loss": first, "tokens_per_second": rows * length / seconds}


def timed(functions: list[Any]) -> list[float]:
    """Seconds that the GPU, or the CPU, takes for each call; the GPU is not waited for in between."""
    if not torch.cuda.is_available():
        times = [time.perf_counter()]
        for function in functions:
            function()
            times.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(functions) + 1)]
    events[0].record()
    for function, event in zip(functions, events[1:], strict=True):
        function()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


CLASSES = (
    ("attention", ("sdpa", "flash", "fmha", "flex", "cudnn::fusion")),
    ("matrix products", ("nvjet", "gemm", "cutlass", "xmma", "splitk", "cublas")),
    ("elementwise", ("triton", "_kernel", "elementwise")),
)


def profile(function: Any) -> tuple[dict[str, float], list[tuple[str, int, float]]]:
    """Microseconds of a call by class of kernel, and its kernels (name, calls, microseconds), longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as result:
        function()
        torch.cuda.synchronize()
    classes: dict[str, float] = {}
    kernels = []
    for event in result.key_averages():
        microseconds = getattr(event, "self_device_time_total", 0)
        if not microseconds:
            continue
        kernels.append((event.key, event.count, microseconds))
        name = next((c for c, words in CLASSES if any(w in event.key.lower() for w in words)), "other")
        classes[name] = classes.get(name, 0) + microseconds
    return classes, sorted(kernels, key=lambda kernel: -kernel[2])


def main() -> None:
    """Measure each configuration in a process of its own and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["1b", "124m"], choices=sorted(SEQUENCE))
    parser.add_argument("--parts", nargs="+", default=list(MAKERS), choices=list(MAKERS))
    parser.add_argument("--microbatch", nargs="+", type=int, help="instead of those that the GPU's memory suggests")
    parser.add_argument("--seconds", type=float, default=240, help="for each configuration")
    parser.add_argument("--details", help="file for all numbers and kernels, JSON lines")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print("RESULT " + json.dumps(measure(**json.loads(given.one))), flush=True)
        return
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    results = []
    for shape in given.shape:
        sizes = given.microbatch or next(s for least, s in sorted(MICROBATCHES[shape].items())[::-1] if memory >= least)
        for microbatch in sizes:
            # in turn, so that a GPU that grows warm slows all alike
            for part in given.parts:
                result = in_a_process({"part": part, "shape": shape, "microbatch": microbatch}, given.seconds)
                print(line(result), flush=True)
                results.append(result)
                if given.details:
                    with open(given.details, "a") as file:
                        file.write(json.dumps(result) + "\n")
    for shape in given.shape:
        summarise(shape, [r for r in results if r["shape"] == shape and "error" not in r])


def in_a_process(task: dict[str, Any], seconds: float) -> dict[str, Any]:
    """`measure` in a process of its own, so that a failure or an endless compilation costs one row."""
    command = [sys.executable, "-m", "tests.benchmarks.training", "--one", json.dumps(task)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {**task, "error": f"took more than {seconds:.0f} s"}
    for text in done.stdout.splitlines():
        if text.startswith("RESULT "):
            return json.loads(text[7:])
    return {**task, "error": " ".join(done.stderr.splitlines()[-1:])[-200:] or f"exit status {done.returncode}"}


def line(result: dict[str, Any]) -> str:
    """One configuration as a line."""
    name = f"{result['shape']:>5} {result['part']:<9} microbatch {result['microbatch']:>3}"
    if "error" in result:
        return f"{name}  {result['error']}"
    return (
        f"{name}  {result['tokens_per_second'] / 1e3:7.1f}k tokens/s  MFU {100 * result['mfu']:5.1f} %  "
        f"{result['memory_gb']:5.1f} GB  compiled in {result['compile_s']:.0f} s"
    )


def summarise(shape: str, results: list[dict[str, Any]]) -> None:
    """The best microbatch of each part, against the better peer, and where its time goes."""
    best = {}
    for result in results:
        if (
            result["tokens_per_second"] > best.get(result["part"], result)["tokens_per_second"]
            or result["part"] not in best
        ):
            best[result["part"]] = result
    peers = [best[part]["tokens_per_second"] for part in ("plain", "hf") if part in best]
    bf16 = best.get("ingot", {}).get("tokens_per_second")
    print(f"\n{shape}: best microbatch of each")
    for part, result in best.items():
        speed = result["tokens_per_second"]
        ratios = [f"{speed / max(peers):.3f}x the better peer"] if peers and part not in ("plain", "hf") else []
        ratios += [f"{speed / bf16:.3f}x Ingot's bf16"] if bf16 and part.endswith("fp8") else []
        print(line(result), "", ", ".join(ratios))
    for part, result in best.items():
        if result.get("ms_per_step"):
            parts = {**result["ms_per_step"], "clipping": result["clip_ms"], "optimizer": result["optimizer_ms"]}
            print(
                f"{shape} {part}, ms of a step of 2^19 tokens: " + ", ".join(f"{n} {ms:.0f}" for n, ms in parts.items())
            )
            print(
                f"{shape} {part}, us a token by kernel: "
                + ", ".join(f"{name} {us:.3f}" for name, us in sorted(result["us_per_token"].items()))
            )


if __name__ == "__main__":
    main()
