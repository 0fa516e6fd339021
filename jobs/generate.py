"""``ingot generate``: continue a text with a trained run, printed as it comes."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator

from jobs.placing import Write, place
from jobs.settings import GenerateJob, SettingsError
from jobs.trained import Trained, load, located


def run(settings: GenerateJob) -> None:
    """Print the prompt and its continuation.

    Raises:
        SettingsError: a setting is out of range, or there is no such run.
    """
    place(_generate, located(settings), _print, settings.device, settings.cpus)


def _print(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _generate(settings: GenerateJob, device: str, write: Write) -> None:
    pieces = text(load(settings, device), settings)
    write(settings.prompt)
    for piece in pieces:
        write(piece)
    write("\n")


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
            stop={tokenizer.eot_id},
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
