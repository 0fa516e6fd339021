"""``ingot generate``: continue a text with a trained model, printed as it comes; or many, from a file or a terminal."""

from __future__ import annotations

import codecs
import dataclasses
import os
import sys
from collections.abc import Iterator

from jobs import generate_many
from jobs.placing import Write, place
from jobs.settings import GenerateJob, SettingsError
from jobs.trained import Trained, load, located


def run(settings: GenerateJob) -> None:
    """Print the prompt and its continuation; or write the continuations of a file's prompts; or ask for prompts.

    Raises:
        SettingsError: a setting is out of range, or there is no such run.
        FileNotFoundError: there is no such file of prompts.
    """
    if settings.interactive and os.environ.get("RAY_ADDRESS"):
        raise SettingsError("interactive needs a terminal, which a job on a cluster has not: run it on a machine")
    settings = located(settings)
    if settings.prompts is not None:
        generate_many.run(settings)
    else:
        place(_talk if settings.interactive else _generate, settings, _print, settings.device, settings.cpus)


def _print(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _generate(settings: GenerateJob, device: str, write: Write) -> None:
    pieces = text(load(settings, device), settings)
    write(settings.prompt)
    for piece in pieces:
        write(piece)
    write("\n")


def _talk(settings: GenerateJob, device: str, write: Write) -> None:
    """Continue what is typed, line by line; Ctrl-C ends a text, Ctrl-D all. Each text has a seed of its own."""
    trained = load(settings, device)
    for number, prompt in enumerate(_typed(write)):
        asked = dataclasses.replace(settings, prompt=prompt, seed=settings.seed + number)
        try:
            for piece in text(trained, asked):
                write(piece)
        except SettingsError as error:  # this prompt is too long, the next may not be
            write(f"({error})")
        except KeyboardInterrupt:
            pass
        write("\n")


def _typed(write: Write) -> Iterator[str]:
    """Lines of the standard input, asked for where it is a terminal."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.removesuffix("\n")
        return
    import readline  # noqa: F401 - gives input() a history and editing

    while True:
        try:
            yield input("> ")
        except EOFError:
            write("\n")
            return


def text(trained: Trained, settings: GenerateJob) -> Iterator[str]:
    """The continuation of the prompt, in pieces; characters of several tokens come when they are whole.

    Raises:
        SettingsError: at the call, when prompt and continuation do not fit the model's context.
    """
    from models.generate import generate

    tokenizer = trained.tokenizer
    # a document begins where the one before it ended, unless the model has a token for that
    prompt = [tokenizer.bos_id, *tokenizer.encode(settings.prompt)]
    try:
        tokens = generate(
            trained.model,
            prompt,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            stop=trained.ends,
            vocab_size=tokenizer.vocab_size,
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None
    return _decoded(trained, tokens)


def _decoded(trained: Trained, tokens: Iterator[int]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if piece := decoder.decode(trained.tokenizer.token_bytes(token)):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
