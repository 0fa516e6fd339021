"""``ingot export``: a trained run as a folder that ``transformers`` loads: weights, shape and tokenizer."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
import tempfile

from jobs.placing import Write, place
from jobs.settings import ExportJob
from jobs.trained import Trained, load, located
from pipelines import storage
from pipelines.tokenizer import END_OF_TEXT, PAD

log = logging.getLogger("ingot")


def run(settings: ExportJob) -> None:
    """Write the folder.

    Raises:
        SettingsError: there is no such run or checkpoint.
    """
    settings = located(settings)
    # On a cluster it is done in another process, whose working directory is another.
    output = settings.output and storage.absolute(settings.output)
    settings = dataclasses.replace(settings, output=output)
    place(_export, settings, sys.stdout.write)


def _export(settings: ExportJob, device: str, _: Write) -> None:
    from models.hugging_face import save_pretrained

    trained = load(settings, device)
    tokenizer, config = trained.tokenizer, trained.model.config
    output = settings.output or storage.join(settings.workspace, "exports", settings.name)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(
            trained.model.state_dict(), config, folder, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id
        )
        _save_tokenizer(trained, folder)
        for name in sorted(os.listdir(folder)):
            with open(os.path.join(folder, name), "rb") as source, storage.open_output(f"{output}/{name}") as target:
                shutil.copyfileobj(source, target, 1 << 24)
    log.info("export: step %d of run %s is in %s", trained.step, settings.name, output)


def _save_tokenizer(trained: Trained, folder: str) -> None:
    with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as out:
        out.write(trained.tokenizer.backend.to_str(pretty=True))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": trained.model.config.max_seq_len,
    }
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as out:
        json.dump(settings, out, indent=2)
        out.write("\n")
