"""Exchange with the Hugging Face format: `config.json` and `safetensors` that `transformers` loads as they are.

A model without QK-norm is a `LlamaForCausalLM`, one with it a `Qwen3ForCausalLM`: the same block, with RMSNorm on
queries and keys per head. Rotary embedding has their layout already, so matrices are renamed, never permuted.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.config import ModelConfig, RopeScaling
from models.transformer import Transformer
from models.widths import output_multiplier

INDEX = "model.safetensors.index.json"

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
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def exported_names(config: ModelConfig) -> dict[str, str]:
    """Our name of every tensor that is stored, to theirs."""
    names = dict(_TOP)
    if config.tied_embeddings:
        del names["output.weight"]
    for layer in range(config.n_layers):
        for ours, theirs in _LAYER.items():
            if config.qk_norm or ours.split(".")[1] not in ("q_norm", "k_norm"):
                names[f"layers.{layer}.{ours}"] = f"model.layers.{layer}.{theirs}"
    return names


# Out


def save_pretrained(
    state_dict: Mapping[str, Tensor],
    config: ModelConfig,
    folder: str,
    *,
    eos_token_id: int | None = None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | None = None,
) -> None:
    """Write `config.json` and the weights, in one file or, with an index, in several.

    A model with muP's output multiplier is written as one without, of equal logits.

    Args:
        state_dict: of a `Transformer`, whole (not sharded), on any device.
        config: its shape.
        folder: a local folder; made if missing.
        eos_token_id: the id that ends a text.
        bos_token_id: the id that begins it; None is the one that ends it, as with `<|endoftext|>`.
        pad_token_id: the id that fills batches.
        dtype: of the weights in the files.
        max_shard_size: bytes of tensors in a file, where no single one is larger; None puts all into one file.

    Raises:
        ValueError: the state dict lacks a tensor of this shape, naming it.
    """
    os.makedirs(folder, exist_ok=True)
    for file, tensors in weight_files(state_dict, config, dtype, max_shard_size):
        if isinstance(tensors, dict):
            save_file(tensors, os.path.join(folder, file), metadata={"format": "pt"})
        else:
            _write_text(folder, file, tensors)
    content = config_content(config, eos_token_id, bos_token_id, pad_token_id, dtype)
    _write_text(folder, "config.json", json.dumps(content, indent=2) + "\n")


def weight_files(
    state_dict: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype, max_shard_size: int | None
) -> Iterator[tuple[str, dict[str, Tensor] | str]]:
    """Name and content of the files of `save_pretrained` that hold the weights: tensors, and last the index, a text.

    One file's tensors at a time are copied.
    """
    names = exported_names(config)
    missing = sorted(names.keys() - state_dict.keys())
    if missing:
        raise ValueError(f"the weights lack {missing[0]} and {len(missing) - 1} others that the model's shape asks for")
    sizes = {ours: state_dict[ours].numel() * dtype.itemsize for ours in names}
    parts: list[list[str]] = [[]]
    filled = 0
    for ours, size in sizes.items():
        if max_shard_size is not None and parts[-1] and filled + size > max_shard_size:
            parts.append([])
            filled = 0
        parts[-1].append(ours)
        filled += size
    files = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    if len(parts) == 1:
        files = ["model.safetensors"]
    for file, part in zip(files, parts, strict=True):
        yield file, {names[ours]: _exported(state_dict[ours], ours, config, dtype) for ours in part}
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {names[ours]: file for file, part in zip(files, parts, strict=True) for ours in part},
        }
        yield INDEX, json.dumps(index, indent=2) + "\n"


def _exported(tensor: Tensor, name: str, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU: safetensors refuses tensors that share memory."""
    tensor = tensor.detach()
    if name == "norm.weight":
        # A multiplied output is the same as multiplied final norm weights, and those are there whether the head is tied
        # or not. Before the cast, as the weights are fp32: exact when the ratio of widths is a power of two, else each
        # weight is rounded once.
        tensor = tensor * output_multiplier(config)
    return tensor.to(device="cpu", dtype=dtype, copy=True).contiguous()


def config_content(
    config: ModelConfig,
    eos_token_id: int | None,
    bos_token_id: int | None,
    pad_token_id: int | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What `config.json` says; the arguments are those of `save_pretrained`."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = dataclasses.asdict(config.rope_scaling)
        rope = {
            "rope_type": "llama3",
            "original_max_position_embeddings": scaling.pop("original_max_seq_len"),
        } | scaling
    return {
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
        # transformers 5 reads the first, older ones and other programs the second and third
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        **({"rope_scaling": rope} if config.rope_scaling is not None else {}),
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": eos_token_id if bos_token_id is None else bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _write_text(folder: str, file: str, text: str) -> None:
    with open(os.path.join(folder, file), "w", encoding="utf-8") as out:
        out.write(text)


# In


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor, or some of its rows and columns, in a safetensors file: 1 or 2 dimensions, read when it is asked for.

    Attributes:
        open_file: opens the file, for reading bytes at any place.
        file: its name.
        name: of the tensor in it.
        dtype: of its values.
        whole: its shape there.
        begin: where it begins in the file, in bytes.
        ranges: first and number of what is taken, by dimension.
    """

    open_file: Callable[[str], BinaryIO]
    file: str
    name: str
    dtype: torch.dtype
    whole: tuple[int, ...]
    begin: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> torch.Size:
        """Of what is taken."""
        return torch.Size(length for _, length in self.ranges)

    def narrow(self, dim: int, start: int, length: int) -> "StoredTensor":
        """`length` rows (dim 0) or columns (dim 1) from `start` on."""
        ranges = list(self.ranges)
        ranges[dim] = (ranges[dim][0] + start, length)
        return dataclasses.replace(self, ranges=tuple(ranges))

    def read(self) -> Tensor:
        """The values, on the CPU; rows that are not taken are not read.

        Raises:
            ValueError: the file ends before them.
        """
        first, rows = self.ranges[0]
        row = self.dtype.itemsize
        for size in self.whole[1:]:
            row *= size
        data = bytearray(rows * row)
        with self.open_file(self.file) as source:
            source.seek(self.begin + first * row)
            at, view = 0, memoryview(data)
            while at < len(data) and (got := source.readinto(view[at:])):
                at += got
        if at < len(data):
            raise ValueError(f"{self.file}: ends within {self.name}; it is not whole")
        tensor = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        tensor = tensor.view(rows, *self.whole[1:])
        for dim, (start, length) in enumerate(self.ranges[1:], 1):
            tensor = tensor.narrow(dim, start, length)
        return tensor


class Pretrained:
    """A model in this format, whoever wrote it: its shape at once, its weights one at a time.

    Args:
        folder: where it is, for messages, and to open its files in unless `open_file` does that.
        open_file: opens one of its files by name, for reading bytes at any place; FileNotFoundError when it is missing.

    Attributes:
        content: of config.json.
        config: the shape.
        tensors: the weights by our names.

    Raises:
        FileNotFoundError: `config.json` or the weights are missing.
        ValueError: the model has something that ours has not, or a tensor is missing or of another shape than
            config.json makes it; naming it.
    """

    def __init__(self, folder: str, open_file: Callable[[str], BinaryIO] | None = None):
        self.open_file = open_file or (lambda name: open(os.path.join(folder, name), "rb"))  # noqa: SIM115
        self.content = self._json("config.json")
        try:
            self.config = _read_config(self.content, folder)
        except KeyError as error:
            raise ValueError(f"{folder}/config.json: lacks {error}") from None
        try:
            self.files = sorted(set(self._json(INDEX)["weight_map"].values()))
        except FileNotFoundError:
            self.files = ["model.safetensors"]
        stored = {tensor.name: tensor for file in self.files for tensor in self._tensors(file)}
        names = exported_names(self.config)
        missing = sorted(set(names.values()) - stored.keys())
        if missing:
            raise ValueError(
                f"{folder}: the weights lack {missing[0]} and {len(missing) - 1} others that config.json asks for"
            )
        # old files have the rotary frequencies, and those of tied models may have the head again
        unknown = sorted(
            name
            for name in stored.keys() - set(names.values())
            if not name.endswith("rotary_emb.inv_freq") and not (name == "lm_head.weight" and config_ties(self.content))
        )
        if unknown:
            raise ValueError(f"{folder}: the weights have {unknown[0]}, for which the model here has no place")
        self.tensors = {ours: stored[theirs] for ours, theirs in names.items()}
        with torch.device("meta"):
            model = Transformer(self.config, seed=None)
        for name, parameter in model.named_parameters():
            tensor = self.tensors[name]
            if tensor.shape != parameter.shape:
                shapes = f"{tuple(tensor.shape)}, but config.json makes it {tuple(parameter.shape)}"
                raise ValueError(f"{folder}/{tensor.file}: {tensor.name} is of shape {shapes}")
        if self.config.tied_embeddings:
            self.tensors["output.weight"] = self.tensors["tok_embeddings.weight"]

    def _json(self, name: str) -> Any:
        with self.open_file(name) as file:
            return json.loads(file.read())

    def _tensors(self, file: str) -> Iterator[StoredTensor]:
        """What a file has, by its header: 8 bytes with the length of a JSON text, which follows, then the values.

        Those of each tensor begin where those of another end, as the format wants it.
        """
        with self.open_file(file) as source:
            whole = source.seek(0, 2)
            source.seek(0)
            size = int.from_bytes(source.read(8), "little")
            text = source.read(size) if size < 100_000_000 else b""  # the format's own bound
        try:
            header = json.loads(text)
            header.pop("__metadata__", None)
            offsets = {name: tuple(map(int, facts["data_offsets"])) for name, facts in header.items()}
            entries = sorted((begin, end, name) for name, (begin, end) in offsets.items())
            shapes = {name: tuple(map(int, facts["shape"])) for name, facts in header.items()}
            dtypes = {name: facts["dtype"] for name, facts in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{file}: not a safetensors file") from None
        ended = 0
        for begin, end, name in entries:
            if dtypes[name] not in _DTYPES:
                raise ValueError(f"{file}: {name} is of dtype {dtypes[name]}; only {', '.join(_DTYPES)} can be read")
            dtype = _DTYPES[dtypes[name]]
            if (begin, end) != (ended, ended + math.prod(shapes[name]) * dtype.itemsize):
                raise ValueError(
                    f"{file}: data_offsets of {name} are {begin} and {end}, which do not fit its shape "
                    f"{shapes[name]} in {dtypes[name]} behind the {ended} bytes before it; the file is damaged"
                )
            if 8 + size + end > whole:
                raise ValueError(f"{file}: ends within {name}; it is not whole")
            ended = end
            ranges = tuple((0, length) for length in shapes[name])
            yield StoredTensor(self.open_file, file, name, dtype, shapes[name], 8 + size + begin, ranges)


def config_ties(content: dict[str, Any]) -> bool:
    """Whether config.json ties the head to the embedding; transformers takes no word for no."""
    return bool(content.get("tie_word_embeddings", False))


def load_pretrained(folder: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a local folder in this format, whoever wrote it; the weights may be split over several files.

    Returns:
        The shape, and a state dict for `Transformer(config, seed=None)`, on the CPU in the file's dtype.

    Raises:
        FileNotFoundError: `config.json` or the weights are missing.
        ValueError: the model has something that ours has not, or lacks a tensor; naming it.
    """
    model = Pretrained(folder)
    state = {name: tensor.read() for name, tensor in model.tensors.items() if name != "output.weight"}
    head = model.tensors["output.weight"]
    state["output.weight"] = state["tok_embeddings.weight"] if model.config.tied_embeddings else head.read()
    return model.config, state


def _read_config(content: dict[str, Any], folder: str) -> ModelConfig:
    def refuse(key: str, value: object, allowed: str) -> None:
        raise ValueError(f"{folder}/config.json: {key} is {value!r}, but only {allowed} can be loaded")

    kind = content.get("model_type")
    if kind not in ("llama", "qwen3"):
        refuse("model_type", kind, "llama or qwen3")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config"):
        if content.get(key):
            refuse(key, content[key], "false" if isinstance(content[key], bool) else "a model without it")
    if content.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", content["hidden_act"], "silu")
    if any(layer != "full_attention" for layer in content.get("layer_types") or ()):
        refuse("layer_types", content["layer_types"], "full_attention")
    rope = (content.get("rope_scaling") or {}) | (content.get("rope_parameters") or {})
    part = rope.get("partial_rotary_factor", content.get("partial_rotary_factor", 1.0))
    if part != 1:
        refuse("partial_rotary_factor", part, "1")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if rope_type == "llama3":
        length = rope.get("original_max_position_embeddings") or content["max_position_embeddings"]
        scaling = RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], length)
    elif rope_type != "default":
        refuse("rope_type", rope_type, "default or llama3")
    n_heads = content["num_attention_heads"]
    # Qwen3Config of transformers has heads of 128 where nothing is said
    head_dim = content.get("head_dim") or (128 if kind == "qwen3" else None)
    config = ModelConfig(
        vocab_size=content["vocab_size"],
        d_model=content["hidden_size"],
        n_layers=content["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=content.get("num_key_value_heads") or n_heads,
        d_ff=content["intermediate_size"],
        max_seq_len=content["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta") or content.get("rope_theta") or 10000.0),
        norm_eps=content.get("rms_norm_eps", 1e-6),
        qk_norm=kind == "qwen3",
        tied_embeddings=config_ties(content),
        head_width=None if head_dim is None or head_dim * n_heads == content["hidden_size"] else head_dim,
        rope_scaling=scaling,
    )
    config.validate()
    return config
