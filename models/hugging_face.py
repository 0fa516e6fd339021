"""Exchange with the Hugging Face format: `config.json` and `safetensors` that `transformers` loads as they are.

A model without QK-norm is a `LlamaForCausalLM`, one with it a `Qwen3ForCausalLM`: the same block, with RMSNorm on
queries and keys per head. Rotary embedding has their layout already, so matrices are renamed, never permuted.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.config import ModelConfig
from models.widths import output_multiplier

_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.w_q.weight": "self_attn.q_proj.weight",
    "attention.w_k.weight": "self_attn.k_proj.weight",
    "attention.w_v.weight": "self_attn.v_proj.weight",
    "attention.w_o.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w_gate.weight": "mlp.gate_proj.weight",
    "feed_forward.w_up.weight": "mlp.up_proj.weight",
    "feed_forward.w_down.weight": "mlp.down_proj.weight",
}


def _names(config: ModelConfig) -> dict[str, str]:
    """Our name of every stored tensor, to theirs."""
    names = dict(_TOP)
    if config.tied_embeddings:
        del names["output.weight"]
    for layer in range(config.n_layers):
        for ours, theirs in _LAYER.items():
            if config.qk_norm or ours.split(".")[1] not in ("q_norm", "k_norm"):
                names[f"layers.{layer}.{ours}"] = f"model.layers.{layer}.{theirs}"
    return names


def save_pretrained(
    state_dict: Mapping[str, Tensor],
    config: ModelConfig,
    folder: str,
    *,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `config.json` and `model.safetensors`.

    A model with muP's output multiplier is written as one without, of equal logits.

    Args:
        state_dict: of a `Transformer`, whole (not sharded), on any device.
        config: its shape.
        folder: a local folder; made if missing.
        eos_token_id: the id that ends a text, also the one that begins it, as `<|endoftext|>` does.
        pad_token_id: the id that fills batches.
        dtype: of the weights in the file.

    Raises:
        ValueError: the state dict lacks a tensor of this shape, naming it.
    """
    names = _names(config)
    missing = sorted(names.keys() - state_dict.keys())
    if missing:
        raise ValueError(f"the weights lack {missing[0]} and {len(missing) - 1} others that the model's shape asks for")
    # clones: safetensors refuses tensors that share memory
    tensors = {
        theirs: state_dict[ours].detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
        for ours, theirs in names.items()
    }
    # A multiplied output is the same as multiplied final norm weights, and those are there whether the head is tied or
    # not. Before the cast, as the weights are fp32.
    norm = state_dict["norm.weight"].detach() * output_multiplier(config)
    tensors[names["norm.weight"]] = norm.to(device="cpu", dtype=dtype).contiguous()
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    content: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        # transformers 5 reads the first, older ones and other programs the second
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")


def load_pretrained(folder: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a folder in this format, whoever wrote it; the weights may be split over several files.

    Returns:
        The shape, and a state dict for `Transformer(config, seed=None)`, on the CPU in the file's dtype.

    Raises:
        FileNotFoundError: `config.json` or the weights are missing.
        ValueError: the model has something that ours has not, or lacks a tensor; naming it.
    """
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        content = json.load(file)
    config = _read_config(content, folder)
    tensors = _read_tensors(folder)
    names = _names(config)
    missing = sorted(set(names.values()) - tensors.keys())
    if missing:
        raise ValueError(
            f"{folder}: the weights lack {missing[0]} and {len(missing) - 1} others that config.json asks for"
        )
    state = {ours: tensors[theirs] for ours, theirs in names.items()}
    if config.tied_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    return config, state


def _read_config(content: dict[str, Any], folder: str) -> ModelConfig:
    def refuse(key: str, value: object, allowed: str) -> None:
        raise ValueError(f"{folder}/config.json: {key} is {value!r}, but only {allowed} can be loaded")

    kind = content.get("model_type")
    if kind not in ("llama", "qwen3"):
        refuse("model_type", kind, "llama or qwen3")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if content.get(key):
            refuse(key, content[key], "false")
    if content.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", content["hidden_act"], "silu")
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        refuse("rope_type", rope_type, "default")
    n_heads = content["num_attention_heads"]
    config = ModelConfig(
        vocab_size=content["vocab_size"],
        d_model=content["hidden_size"],
        n_layers=content["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=content.get("num_key_value_heads") or n_heads,
        d_ff=content["intermediate_size"],
        max_seq_len=content["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta") or content.get("rope_theta") or 10000.0),
        norm_eps=content["rms_norm_eps"],
        qk_norm=kind == "qwen3",
        tied_embeddings=bool(content.get("tie_word_embeddings", False)),
    )
    head_dim = content.get("head_dim") or config.head_dim
    if head_dim * n_heads != config.d_model:
        refuse("head_dim", head_dim, f"hidden_size / num_attention_heads = {config.d_model / n_heads:g}")
    config.validate()
    return config


def _read_tensors(folder: str) -> dict[str, Tensor]:
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.exists(index):
        return load_file(os.path.join(folder, "model.safetensors"))
    with open(index, encoding="utf-8") as file:
        files = sorted(set(json.load(file)["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors.update(load_file(os.path.join(folder, name)))
    return tensors
