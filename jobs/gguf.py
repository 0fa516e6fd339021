"""Export to GGUF, the format of llama.cpp, by its own library's writer.

A model without QK-norm is of the architecture llama, one with it qwen3. llama.cpp turns neighbouring pairs of a llama's
queries and keys where ours, as Hugging Face's, turns the halves of a head, so rows of w_q and w_k are reordered; those
of qwen3 stay. Norms are always fp32. Rows of the embedding that no token has are left out, so that none is ever drawn.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, Literal

from jobs.settings import SettingsError
from pipelines.pretokens import gpt4_pattern
from pipelines.tokenizer import Tokenizer, token_name

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from models.config import ModelConfig
    from models.transformer import Transformer

log = logging.getLogger("ingot")

Kind = Literal["f32", "f16", "bf16", "q8_0"]

# Splits that llama.cpp knows, by the regular expression that tokenizer.json has. The ways in which the first is
# encoded: with merges alone, or with words that are tokens taken whole, as Llama 3 has it.
_GPT4_3, _GPT4_1 = gpt4_pattern(3), gpt4_pattern(1)


def require_gguf() -> Any:
    """The package ``gguf``.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise SettingsError("gguf needs the package of that name: pip install 'ingot[gguf]'") from None
    return gguf


def require_architecture(config: ModelConfig) -> None:
    """Refuse what no architecture of llama.cpp has.

    Raises:
        SettingsError: QK-norm and scaled rotary frequencies: its qwen3 turns by the plain ones, and does not load a
            file that has others.
    """
    if config.qk_norm and config.rope_scaling is not None:
        raise SettingsError(
            "gguf: llama.cpp has no architecture with QK-norm whose rotary frequencies are scaled as Llama 3's are, "
            "and the model has both; export it without gguf"
        )


def pre_tokenizer(tokenizer: Tokenizer) -> str:
    """llama.cpp's name, ``tokenizer.ggml.pre``, of how the tokenizer cuts text before it merges.

    Raises:
        SettingsError: llama.cpp has none that cuts in the same places.
    """
    content = json.loads(tokenizer.backend.to_str())
    before, model = content["pre_tokenizer"] or {}, content["model"]
    steps = before.get("pretokenizers", [before])
    byte_level = bool(steps) and steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space")
    if model["type"] != "BPE" or not byte_level:
        raise SettingsError("gguf: only byte-level BPE tokenizers can be written, and the model's is another")
    if content["normalizer"] is not None:
        log.warning("gguf: llama.cpp does not normalize text as the tokenizer does (%s)", content["normalizer"]["type"])
    whole = bool(model.get("ignore_merges"))
    if len(steps) == 1 and steps[0].get("use_regex", True) and not whole:
        return "gpt-2"
    if len(steps) == 2 and steps[0]["type"] == "Split":
        pattern = steps[0]["pattern"].get("Regex")
        if pattern == _GPT4_3:
            return "llama-bpe" if whole else "dbrx"
        if pattern == _GPT4_1 and not whole:
            return "qwen2"
    raise SettingsError(
        "gguf: llama.cpp has no pre-tokenizer that cuts text where this tokenizer does; it has those of "
        "tokenizer.pre_tokenizer gpt2, and of gpt4 with tokenizer.digits 1 or 3"
    )


def write_gguf(model: Transformer, tokenizer: Tokenizer, path: str, kind: Kind, *, name: str) -> None:
    """Write a GGUF file; one tensor at a time is converted.

    Args:
        model: whole (not sharded), on any device.
        tokenizer: that its tokens were made with.
        path: of the file, on this machine.
        kind: of the matrices' values. q8_0: a matrix whose rows are no multiple of 32 values is f16.
        name: of the model.

    Raises:
        SettingsError: llama.cpp does not know the model's architecture or the tokenizer's way to cut text, or the
            package is not installed.
    """
    gguf = require_gguf()
    config = model.config
    require_architecture(config)
    arch = gguf.MODEL_ARCH.QWEN3 if config.qk_norm else gguf.MODEL_ARCH.LLAMA
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    try:
        writer.add_type("model")
        writer.add_name(name)
        of_kind = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
        writer.add_file_type(gguf.LlamaFileType[of_kind[kind]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, config)
        writer.add_vocab_size(tokenizer.vocab_size)
        _add_tokenizer(gguf, writer, tokenizer)
        tensors = _tensors(gguf, model, arch, kind, tokenizer.vocab_size)
        for tensor_name, (tensor, quantization) in tensors.items():
            shape = tuple(tensor.shape)
            as_bytes = gguf.quant_shape_to_byte_shape(shape, quantization)
            size = as_bytes[-1] * (shape[0] if len(shape) > 1 else 1)
            writer.add_tensor_info(tensor_name, shape, None, size, quantization)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, (tensor, quantization) in tensors.items():
            writer.write_tensor_data(gguf.quantize(_values(tensor_name, tensor, config), quantization))
    finally:
        writer.close()


def _add_shape(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def _add_tokenizer(gguf: Any, writer: Any, tokenizer: Tokenizer) -> None:
    backend = tokenizer.backend
    added = backend.get_added_tokens_decoder()
    tokens, types = [], []
    for i in range(tokenizer.vocab_size):
        token = backend.id_to_token(i)
        if token is None:  # some models have gaps
            tokens.append(f"[PAD{i}]")
            types.append(gguf.TokenType.UNUSED)
        else:
            tokens.append(token)
            kind = gguf.TokenType.CONTROL if i in added and added[i].special else gguf.TokenType.USER_DEFINED
            types.append(kind if i in added else gguf.TokenType.NORMAL)
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    # A text begins as `ingot generate` has it begin: with the token that ended the one before it, or the model's own;
    # models of others may have none.
    writer.add_add_bos_token(not tokenizer.config or token_name(tokenizer.config, "bos_token") is not None)
    writer.add_add_space_prefix(False)


def _tensors(gguf: Any, model: Transformer, arch: Any, kind: Kind, vocab_size: int) -> dict[str, tuple[Tensor, Any]]:
    """The tensors by llama.cpp's names, in our order of rows, and how each is stored."""
    from models.hugging_face import exported_names
    from models.transformer import frequency_factors

    config, state = model.config, model.state_dict()
    names = gguf.get_tensor_name_map(arch, config.n_layers)
    tensors: dict[str, tuple[Tensor, Any]] = {}
    wanted = gguf.GGMLQuantizationType[kind.upper()]
    for ours, theirs in exported_names(config).items():
        tensor = state[ours]
        if ours in ("tok_embeddings.weight", "output.weight"):
            tensor = tensor[:vocab_size]
        quantization = wanted if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        if kind == "q8_0" and tensor.ndim > 1 and tensor.shape[1] % 32:
            quantization = gguf.GGMLQuantizationType.F16
        tensors[f"{names.get_name(theirs.removesuffix('.weight'))}.weight"] = tensor, quantization
    if config.rope_scaling is not None:
        factors = frequency_factors(config.head_dim, config.rope_theta, config.rope_scaling)
        tensors["rope_freqs.weight"] = factors, gguf.GGMLQuantizationType.F32
    return tensors


def _values(name: str, tensor: Tensor, config: ModelConfig) -> np.ndarray:
    """A tensor's values as llama.cpp has them, fp32."""
    from models.widths import output_multiplier

    tensor = tensor.detach().float().cpu()
    if name == "output_norm.weight":
        tensor = tensor * output_multiplier(config)
    if name.endswith(("attn_q.weight", "attn_k.weight")) and not config.qk_norm:
        # (heads, halves, pairs, d_model): the two of a pair become neighbours
        tensor = tensor.view(-1, 2, config.head_dim // 2, config.d_model).transpose(1, 2).reshape(tensor.shape)
    return tensor.contiguous().numpy()
