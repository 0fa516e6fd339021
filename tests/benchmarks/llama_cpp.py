"""What llama.cpp makes of exported GGUF files: ids of texts, and greedy continuations, beside ours.

    pip install xllamacpp
    python tests/benchmarks/llama_cpp.py

llama.cpp's server runs in this process, on one core, with keys and values in fp32. Models are random, with weights of
the size of trained ones: their logits lie close together, so that values that are rounded soon give another text.

With xllamacpp 2026.10 on a CPU, 50 prompts: the ids of all are equal with all three pre-tokenizers. Greedy texts of 24
tokens: all equal in fp32, for llama (tied and not, with rope scaling) and for qwen3 with wide heads; 49 in f16, 36 in
bf16, 15 in q8_0.
"""

import argparse
import dataclasses
import json
import sysconfig
import tempfile
import urllib.request
from pathlib import Path

import torch

from jobs.gguf import write_gguf
from models.config import ModelConfig, RopeScaling
from models.generate import generate
from models.transformer import Transformer
from pipelines.tokenizer import TokenizerSettings, train_on_texts

SHAPE = ModelConfig(
    vocab_size=2048, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96, max_seq_len=256, base_width=48
)  # fmt: skip
ODD = "Größe, café, 東京 naïve “quotes” 1234567 12 3.14159 ½ ٣٤٥ don't DON'T we've\r\n\r\n  \t tabs 🙂🙂 <|endoftext|> "
CASES = {  # name: tokenizer, shape, kind
    "gpt2, llama": ({"pre_tokenizer": "gpt2"}, {}, "f32"),
    "gpt4 of 1 digit, llama": ({"digits": 1}, {}, "f32"),
    "gpt4, llama": ({}, {}, "f32"),
    "gpt4, llama, tied": ({}, {"tied_embeddings": True}, "f32"),
    "gpt4, llama, rope scaling": ({}, {"rope_scaling": RopeScaling(4.0, 1.0, 4.0, 32)}, "f32"),
    "gpt4, qwen3, wide heads": ({}, {"qk_norm": True, "head_width": 32}, "f32"),
    "gpt4, llama, f16": ({}, {}, "f16"),
    "gpt4, llama, bf16": ({}, {}, "bf16"),
    "gpt4, llama, q8_0": ({}, {}, "q8_0"),
}


def serve(path: str):
    """llama.cpp's server with a model, and a function that posts JSON to it."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 512, 1, False
    params.cpuparams.n_threads, params.verbosity, params.chat_template = 1, 0, "chatml"
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def post(where: str, body: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + where, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    return server, post


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sources[:60]] + [ODD * 3]
    prompts = [ODD, "  leading", *(text[500:600] for text in texts if len(text) > 600)][: options.prompts]
    print(f"{'':28}{'ids equal':>14}{'texts equal':>14}{'tokens equal':>16}")
    for name, (pre_tokenizer, shape, kind) in CASES.items():
        tokenizer = train_on_texts(texts, TokenizerSettings(vocab_size=2000, reserved_tokens=2, **pre_tokenizer))
        model = Transformer(dataclasses.replace(SHAPE, **shape), seed=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6 if parameter.ndim > 1 else 1)
        ids = texts_equal = tokens_equal = tokens = 0
        with tempfile.TemporaryDirectory() as folder:
            write_gguf(model, tokenizer, f"{folder}/model.gguf", kind, name="model")
            server, post = serve(f"{folder}/model.gguf")
            for prompt in prompts:
                own = [tokenizer.bos_id, *tokenizer.encode(prompt)]
                told = post("/tokenize", {"content": prompt, "add_special": True, "parse_special": False})["tokens"]
                ids += told == own
                asked = {"prompt": own, "n_predict": options.tokens, "temperature": 0, "cache_prompt": False}
                theirs = post("/completion", asked | {"return_tokens": True})["tokens"]
                settings = {"temperature": 0, "stop": {tokenizer.eot_id}, "vocab_size": tokenizer.vocab_size}
                ours = list(generate(model, own, max_new_tokens=options.tokens, **settings))
                theirs = [token for token in theirs if token != tokenizer.eot_id]
                first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
                texts_equal += ours == theirs
                tokens_equal += len(ours) if first is None else first
                tokens += len(ours)
            del server
        counts = (f"{ids}/{len(prompts)}", f"{texts_equal}/{len(prompts)}", f"{tokens_equal}/{tokens}")
        print(f"{name:28}{counts[0]:>14}{counts[1]:>14}{counts[2]:>16}", flush=True)


if __name__ == "__main__":
    main()
