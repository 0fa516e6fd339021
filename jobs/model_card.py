"""README.md of an exported model: what its run was, from the run's own facts; what is not known is left out."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.charts import byte_size, number
from jobs.evaluate import RESULTS, evals_folder, step_folder
from jobs.events import counted, seconds
from jobs.history import History
from jobs.run_folder import StoredRun
from jobs.settings import ExportJob
from jobs.trained import Trained, find
from pipelines import storage
from pipelines.stage import ingot_version

if TYPE_CHECKING:
    from models.config import ModelConfig

_REASONS = 3  # why documents went: the most frequent of each stage


def model_card(settings: ExportJob, trained: Trained, files: list[str]) -> str:
    """The text, Markdown with the metadata that a hub reads.

    Args:
        settings: of the export.
        trained: what is exported.
        files: names of the exported files.
    """
    config = trained.model.config
    facts: dict[str, Any] = {}
    if settings.model is None:
        folder, facts, entry = find(settings)
        parts = [_training(folder, facts, entry.step), _data(facts.get("data", {})), _scores(settings, trained)]
    else:
        parts = []
    kind = "Qwen3" if config.qk_norm else "Llama"
    source = facts.get("init_from") or ({"model": settings.model} if settings.model else None)
    about = f"A base model of {number(config.n_params())} parameters in the {kind} architecture. It continues text: it "
    about += "was not tuned to follow instructions and has no chat template. "
    version = facts.get("version") or ingot_version()
    if settings.model is not None:
        about += f"Converted by Ingot {version} from {source['model']}."
    elif source:
        about += f"Pretraining went on from {source['model']} with Ingot {version}."
    else:
        about += f"Trained from scratch with Ingot {version}."
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ingot", kind.lower()],
        **({"base_model": source["model"]} if source and source.get("repository") else {}),
    }
    return "\n\n".join(
        [
            "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items()) + "---",
            f"# {trained.name}",
            about,
            _use(settings, trained, files),
            _shape(config, settings),
            *filter(None, parts),
        ]
    ) + ("\n")


def _use(settings: ExportJob, trained: Trained, files: list[str]) -> str:
    where, tokenizer = settings.push_to or "FOLDER", trained.tokenizer
    first = "" if tokenizer.backend.encode("").ids else tokenizer.backend.id_to_token(tokenizer.bos_id)
    text = f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
text = {json.dumps(first + "The")}
ids = tokenizer(text, return_tensors="pt", split_special_tokens=False).input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50, do_sample=False)[0]))
```"""
    begin = json.dumps(tokenizer.backend.id_to_token(tokenizer.bos_id))
    end = json.dumps(tokenizer.backend.id_to_token(tokenizer.eot_id))
    added = "the first of them" if tokenizer.backend.encode("").ids else "neither"
    text += f"\n\nA text begins with {begin} and ends with {end}; the tokenizer adds {added} by itself."
    if not tokenizer.config or tokenizer.config.get("split_special_tokens"):
        text += " Special tokens that are written out in a text are text, unless it is loaded with "
        text += "`split_special_tokens=False`."
    for file in files:
        if file.endswith(".gguf"):
            text += f"\n\n`{file}` is for llama.cpp: `llama-completion -m {file} -p TEXT`."
    return text


def _shape(config: ModelConfig, settings: ExportJob) -> str:
    heads = f"{config.n_heads} of {config.head_dim}, {config.n_kv_heads} for keys and values"
    rows = [
        ("parameters", f"{config.n_params():,}"),
        ("layers", f"{config.n_layers}"),
        ("width", f"{config.d_model}, feed-forward {config.d_ff}"),
        ("attention heads", heads + (", queries and keys normalized" if config.qk_norm else "")),
        ("vocabulary", f"{config.vocab_size:,}" + (", embeddings tied" if config.tied_embeddings else "")),
        ("context", f"{config.max_seq_len:,} tokens"),
        ("weights", {"fp32": "float32", "bf16": "bfloat16"}[settings.dtype]),
    ]
    return "## Shape\n\n" + _table(["", ""], rows)


def _training(folder: StoredRun, facts: dict[str, Any], step: int) -> str:
    """What was trained until the checkpoint, on what, and what it came to."""
    settings, history = facts.get("settings", {}), History(folder)
    history.update()
    counts = history.counts & (history.steps["step"] <= step)
    trained = {name: column[counts] for name, column in history.steps.items()}
    rows: list[tuple[str, str]] = [
        ("steps", f"{step:,}" + (f" of {settings['steps']:,}" if "steps" in settings else ""))
    ]
    if len(trained["tokens"]):
        tokens = float(np.nanmax(trained["tokens"]))
        in_split = facts.get("data", {}).get("tokens", {}).get("train", {}).get("tokens")
        epochs = f", {tokens / in_split:.2f} epochs" if in_split else ""
        rows.append(("tokens", f"{number(tokens)}{epochs}"))
    if settings:
        length = settings.get("sequence_length") or facts["model"]["max_seq_len"]
        batch = settings["global_batch"]
        rows.append(("batch", f"{batch:,} sequences of {length:,} tokens"))
        optimizer, schedule = settings["optimizer"], settings["schedule"]
        rows.append(("optimizer", f"{optimizer['kind']}, weight decay {optimizer['weight_decay']:g}"))
        warmup = f"{schedule['warmup_steps']:,} steps of warmup, {schedule['kind']}"
        rows.append(("learning rate", f"{optimizer['lr']:g}, {warmup}"))
        if base := facts["model"].get("base_width"):
            rows.append(("parametrization", f"muP from width {base}; its output multiplier is in the exported weights"))
    hardware = folder.read_json("hardware.json") or {}
    workers = hardware.get("workers", facts.get("world_size"))
    if workers:
        kind = hardware.get("device") or facts.get("device", "").upper()
        rows.append(("hardware", f"{counted(workers, 'worker')} on {kind}"))
        precision = settings.get("precision", "auto")
        by_device = "bf16" if facts.get("device") == "gpu" else "fp32"
        rows.append(("precision", f"{by_device if precision == 'auto' else precision}; weights and optimizer in fp32"))
    took = trained["seconds"][np.isfinite(trained["seconds"])]
    if len(took):
        rows.append(("time in steps", seconds(float(took.sum()))))
    for name, column, form in (("tokens a second", "tokens_per_second", number), ("MFU", "mfu", "{:.1%}".format)):
        if np.isfinite(trained[column]).any():
            rows.append((name, form(float(np.nanmedian(trained[column]))) + " (median)"))
    loss = trained["loss"][np.isfinite(trained["loss"])]
    if len(loss):
        last = loss[-max(1, len(loss) // 50) :]
        rows.append(("training loss", f"{last.mean():.4f} (mean of the last {counted(len(last), 'step')})"))
    measured = history.validation["step"] <= step
    if measured.any():
        at, value, bits = (
            history.validation[key][measured][-1] for key in ("step", "validation_loss", "validation_bits_per_byte")
        )
        told = f"{value:.4f} nats a token" + (f", {bits:.4f} bits a byte" if math.isfinite(bits) else "")
        rows.append(("validation loss", f"{told}, at step {at:,.0f}"))
    events = [event["event"] for event in folder.events()]
    recovered = [counted(events.count("rollback"), "rollback"), counted(events.count("resume"), "restart")]
    rows.append(("recoveries", ", ".join(recovered)))
    return "## Training\n\n" + _table(["", ""], rows)


def _data(data: dict[str, Any]) -> str:
    """The funnel of the curation, the tokenizer and the token counts."""
    out = []
    if stages := data.get("stages"):
        rows = []
        for stage, m in stages.items():
            why = sorted(m.get("set_aside", {}).items(), key=lambda item: -item[1]["documents"])[:_REASONS]
            kept = f"{100 * m['documents_out'] / max(m['documents_in'], 1):.1f} %"
            reasons = ", ".join(f"{reason} {counts['documents']:,}" for reason, counts in why)
            documents = [f"{m['documents_in']:,}", f"{m['documents_out']:,}"]
            rows.append((stage, *documents, byte_size(m["bytes_out"]), kept, reasons))
        out.append(_table(["stage", "documents in", "out", "text out", "kept", "dropped most for"], rows))
    rows = []
    if tokenizer := data.get("tokenizer"):
        compression = tokenizer.get("bytes_per_token")
        told = f"{tokenizer['vocab_size']:,} tokens" + (f", {compression:.2f} bytes a token" if compression else "")
        rows.append(("tokenizer", f"byte-level BPE, {told}"))
    for split, m in data.get("tokens", {}).items():
        told = f"{number(m['tokens'])} tokens of {m['documents']:,} documents, {byte_size(m['bytes'])} of text"
        rows.append((split, told))
    if rows:
        out.append(_table(["", ""], rows))
    return "## Data\n\n" + "\n\n".join(out) if out else ""


def _scores(settings: ExportJob, trained: Trained) -> str:
    """What was measured of these very weights by ``ingot evaluate``: a run that went back has others of the step."""
    folder = storage.join(evals_folder(settings.workspace, settings.name), step_folder(trained.step))
    found = storage.json_if_there(storage.join(folder, RESULTS)) or {}
    if not found.get("fingerprint", "").startswith(trained.fingerprint):
        return ""
    rows = []
    for score in found.get("scores", []):
        if score["group"] is None:  # those of its parts are in the results
            error = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
            shots = "" if score["n_shot"] is None else f"{score['n_shot']}"
            rows.append((score["task"], score["metric"], score["filter"], shots, f"{score['value']:.4f}{error}"))
    for name, key in (("validation loss", "validation_loss"), ("bits a byte", "validation_bits_per_byte")):
        if key in found:
            rows.append(("validation split", name, "", "", f"{found[key]:.4f}"))
    if not rows:
        return ""
    note = "By the lm-evaluation-harness's tasks and metrics, run by `ingot evaluate`; ± is the standard error."
    return f"## Evaluation\n\n{note}\n\n" + _table(["task", "metric", "filter", "shots", "value"], rows)


def _table(header: list[str], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
