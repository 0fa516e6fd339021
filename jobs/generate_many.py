"""Continuations of a file's prompts, many at once, as one file of JSON lines.

What is finished is kept beside the output in parts, so that a run that was killed goes on where it was; the output
appears whole, at the end.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import xxhash

from jobs.placing import Write, place
from jobs.settings import GenerateJob, SettingsError
from jobs.trained import load
from pipelines import storage
from pipelines.stage import ingot_version

log = logging.getLogger("ingot")

_KEEP_EVERY = 5.0  # seconds of work that a kill may cost
_TELL_EVERY = 10.0


@dataclass
class Asked:
    """What the process that has the model gets.

    Attributes:
        settings: of the job.
        prompts: all of them.
        finished: by the fingerprint of a model, the prompts that it has continued already.
    """

    settings: GenerateJob
    prompts: list[str]
    finished: dict[str, list[int]] = field(default_factory=dict)


def run(settings: GenerateJob) -> None:
    """Continue the prompts of a file and write a record for each, in their order.

    A record is that of the prompt (`{"prompt": ...}` for a line of text) with `completion`, its number of `tokens`,
    and `finished`: "stop" where the model ended the document, "length" after max_new_tokens.

    Raises:
        SettingsError: a line has no prompt, or one that is too long; or the output would replace the prompts.
        FileNotFoundError: there is no such file.
    """
    source = storage.absolute(settings.prompts)
    data = storage.read_bytes(source)
    records = _records(source, data)
    name = storage.file_name(source).rpartition(".")[0] or storage.file_name(source)
    output = storage.absolute(settings.output or storage.join(settings.workspace, "generated", f"{name}.jsonl"))
    if output == source:
        raise SettingsError(f"output is {output}, which is the file of prompts; name another")
    kept = _Kept(output + ".unfinished", _made_of(settings, data), len(records))
    place(
        _continue,
        Asked(settings, [record["prompt"] for record in records], kept.finished()),
        kept.take,
        settings.device,
        settings.cpus,
    )
    kept.save()
    with storage.open_output(output) as out:
        for i, record in enumerate(records):
            out.write(json.dumps({**record, **kept.results[i]}, ensure_ascii=False).encode() + b"\n")
    storage.delete(kept.folder)
    log.info("generate: %d continuations are in %s", len(records), output)


def _records(source: str, data: bytes) -> list[dict[str, Any]]:
    if not data:
        raise SettingsError(f"prompts is {source}, which is empty")
    try:
        lines = data.decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise SettingsError(f"prompts is {source}, which is not UTF-8 ({error})") from None
    if not source.endswith(".jsonl"):
        return [{"prompt": line.removesuffix("\r")} for line in lines]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise SettingsError(f"prompts: line {number} of {source} is not JSON ({error})") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise SettingsError(f"prompts: line {number} of {source} has no field prompt with a text")
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # JSON can say it, UTF-8 cannot, so neither could the output
            raise SettingsError(f"prompts: line {number} of {source} has half of a surrogate pair") from None
        records.append(record)
    return records


def _made_of(settings: GenerateJob, data: bytes) -> dict[str, Any]:
    """What the results follow from, beside the model."""
    sampling = ("max_new_tokens", "temperature", "top_p", "seed")
    return {
        "prompts": xxhash.xxh3_128_hexdigest(data),
        "settings": {name: getattr(settings, name) for name in sampling},
        "version": ingot_version(),
    }


class _Kept:
    """Results in the order in which they come, kept in a folder of parts.

    Attributes:
        results: of prompts by their numbers.
    """

    def __init__(self, folder: str, made_of: dict[str, Any], total: int) -> None:
        self.folder, self.total = folder, total
        self.results: dict[int, dict[str, Any]] = {}
        self.before: dict[str, dict[int, dict[str, Any]]] = {}
        self.new: list[str] = []
        self.parts = self.generated = 0
        self.model = ""
        now = time.monotonic()
        self.began = self.saved = self.told = now
        made = storage.join(folder, "made_of.json")
        if storage.json_if_there(made) != made_of:
            storage.delete(folder)
            storage.write_json(made, made_of)
            return
        for file in storage.list_files(folder):
            model, _, number = storage.file_name(file.uri).removesuffix(".jsonl").rpartition("-")
            if model:
                self.parts = max(self.parts, int(number) + 1)
                lines = map(json.loads, storage.read_bytes(file.uri).splitlines())
                self.before.setdefault(model, {}).update({line.pop("index"): line for line in lines})

    def finished(self) -> dict[str, list[int]]:
        """By model, what is there from before."""
        return {model: list(results) for model, results in self.before.items()}

    def take(self, line: str) -> None:
        """Take what `_continue` writes: first the model's fingerprint, then results."""
        said = json.loads(line)
        if "model" in said:
            self.model = said["model"]
            self.results = dict(self.before.get(self.model, {}))
            if self.results:
                log.info("generate: goes on after %d of %d prompts", len(self.results), self.total)
            self.began = self.told = time.monotonic()
            return
        self.new.append(line)
        self.results[said.pop("index")] = said
        self.generated += said["tokens"]
        now = time.monotonic()
        if now - self.saved >= _KEEP_EVERY:
            self.save()
        if now - self.told >= _TELL_EVERY or len(self.results) == self.total:
            self.told = now
            speed = self.generated / max(now - self.began, 1e-3)
            log.info("generate: %d of %d prompts, %d tokens/s", len(self.results), self.total, speed)

    def save(self) -> None:
        """Write what is new as one more part."""
        if self.new:
            part = storage.join(self.folder, f"{self.model}-{self.parts:06d}.jsonl")
            storage.write_bytes(part, "".join(self.new).encode())
            self.parts, self.new = self.parts + 1, []
        self.saved = time.monotonic()


def _continue(asked: Asked, device: str, write: Write) -> None:
    """Write the model's fingerprint, then a line of JSON for each prompt as soon as it is continued."""
    from models.generate import Engine, Sampling, slots_that_fit

    settings, trained = asked.settings, load(asked.settings, device)
    tokenizer = trained.tokenizer
    done = set(asked.finished.get(trained.fingerprint, ()))
    prompts = {
        i: [tokenizer.bos_id, *tokenizer.encode(prompt)] for i, prompt in enumerate(asked.prompts) if i not in done
    }
    most = trained.model.config.max_seq_len + 1 - settings.max_new_tokens
    for i, prompt in prompts.items():
        if len(prompt) > most:
            raise SettingsError(
                f"prompts: number {i + 1} has {len(prompt)} tokens, but with max_new_tokens {settings.max_new_tokens} "
                f"at most {max(0, most)} fit the model's max_seq_len of {trained.model.config.max_seq_len}"
            )
    write(json.dumps({"model": trained.fingerprint}) + "\n")
    if not prompts:
        return
    length = max(map(len, prompts.values())) + settings.max_new_tokens - 1
    slots = min(settings.batch or slots_that_fit(trained.model, length), len(prompts))
    engine = Engine(trained.model, slots=slots, length=length, vocab_size=tokenizer.vocab_size)
    numbers, texts = {}, {}
    # prompts that begin alike follow each other, so that the beginning is read once
    for i in sorted(prompts, key=prompts.__getitem__):
        # a seed for each, which depends neither on the others nor on what a run before had finished
        sampling = Sampling(
            settings.max_new_tokens, settings.temperature, settings.top_p, settings.seed + i,
            trained.ends,
        )  # fmt: skip
        number = engine.submit(prompts[i], sampling)
        numbers[number], texts[number] = i, []
    while engine.busy:
        for token in engine.step():
            if token.token is not None:
                texts[token.request].append(token.token)
            if token.finished:
                ids = texts.pop(token.request)
                text = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")
                result = {"completion": text, "tokens": len(ids), "finished": token.finished}
                write(json.dumps({"index": numbers[token.request], **result}) + "\n")
