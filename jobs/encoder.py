"""Text to the token ids that evaluation is about: those that lm-evaluation-harness's own backend gives, only sooner.

Special tokens that are written out in a text are control, as for ``transformers`` by default; that backend takes them
for text where an exported tokenizer says so (``split_special_tokens``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.pretokens import gpt4_pattern

if TYPE_CHECKING:
    from pipelines.tokenizer import Tokenizer


class Encoder:
    """Text to the token ids that ``transformers`` gives, fast where texts have lines in common.

    Few-shot prompts consist of the same lines again and again; where the tokenizer cuts texts at them anyway, each is
    encoded once. It does where a line begins with a letter and the one before ends with what is no white space: no
    pre-token crosses that, and what is on one side does not change the pre-tokens of the other.

    Attributes:
        prefix_id: the token in front of a text that has no context.
        by_lines: whether lines are encoded each by itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers import Tokenizer as Backend

        content = tokenizer.backend.to_str()
        backend = Backend.from_str(content)  # one of our own: here, special tokens in a text are control
        backend.no_padding()
        backend.no_truncation()
        plain, special = (backend.encode("a", add_special_tokens=flag).ids for flag in (False, True))
        self._backend = backend
        self._before = np.array(special[: len(special) - len(plain)], np.int32)
        self.by_lines = _cuts_at_lines(json.loads(content)) and special == self._before.tolist() + plain
        self.prefix_id = tokenizer.bos_id
        self._prefix = self.written(self.prefix_id)

    def written(self, token: int) -> str:
        """A token as text, special ones too."""
        return self.text([token])

    def text(self, tokens: Sequence[int]) -> str:
        """Text of token ids, with special tokens."""
        return self._backend.decode(list(tokens), skip_special_tokens=False)

    def texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of whole texts, int32."""
        return self._many([(text, self._begins(text)) for text in texts])

    def pairs(self, requests: Sequence[tuple[str, str]]) -> list[tuple[np.ndarray, list[int]]]:
        """Ids of contexts, int32, and of their continuations.

        Spaces at the end of a context belong to its continuation. Without a context, the continuation's first token is
        the one in front of texts, or becomes the context where it is that token. Neighbours with the same context get
        the same array.
        """
        texts: dict[tuple[str, bool], int] = {}  # in their order; most ends of texts are alike
        places: list[tuple[int, int, int]] = []  # of the context up to the cut, of the rest, of that and what continues
        last, end, tail, head, at = None, 0, "", -1, -1
        for context, continuation in requests:
            if not context:
                places.append((-1, -1, texts.setdefault((continuation, False), len(texts))))
                continue
            size = len(context.rstrip())
            if context[:size] != last:  # choices of a question follow each other
                last = context[:size]
                end = self._last_cut(last)
                tail = last[end:]
                head = texts.setdefault((last[:end], self._begins(last)), len(texts)) if end else -1
                # special tokens are added to the beginning alone
                at = texts.setdefault((tail, not end and self._begins(last)), len(texts))
            whole = tail + context[size:] + continuation
            places.append((head, at, texts.setdefault((whole, not end and self._begins(whole)), len(texts))))
        ids = self._many(list(texts))
        found: list[tuple[np.ndarray, list[int]]] = []
        known: tuple[int, int, np.ndarray] = (-1, -1, self._before)  # the last context
        rests: dict[tuple[int, int], list[int]] = {}
        for head, at, whole in places:
            if at < 0:
                alone = ids[whole].tolist()
                if alone[:1] == [self.prefix_id]:
                    found.append((ids[whole][:1], alone[1:]))
                else:
                    found.append((np.array([self.prefix_id], np.int32), alone))
                continue
            if (head, at) != known[:2]:
                known = head, at, ids[at] if head < 0 else np.concatenate([ids[head], ids[at]])
            if (at, whole) not in rests:
                rests[at, whole] = ids[whole][len(ids[at]) :].tolist()
            found.append((known[2], rests[at, whole]))
        return found

    def _begins(self, text: str) -> bool:
        """Whether the tokenizer's special tokens are added to a text: not where they are written out."""
        return not text.startswith(self._prefix)

    def _many(self, texts: Sequence[tuple[str, bool]]) -> list[np.ndarray]:
        """Ids of texts, int32, of each with those that the tokenizer adds where it says so; on all cores."""
        if not self.by_lines:
            return self._whole(texts)
        groups: list[list[str]] = [[]]  # lines of the examples in front of questions
        rows: list[tuple[bool, int, list[str]]] = []
        last = ""
        for text, special in texts:
            # up to the last paragraph: questions of a subject have the same examples, and follow each other
            end = self._last_cut(text, text.rfind("\n\n"))
            if end and text[:end] != last:
                last = text[:end]
                groups.append(_CUT.split(last))
            rows.append((special, len(groups) - 1 if end else 0, _CUT.split(text[end:])))
        known = self._each(list({line for lines in (*groups, *(lines for *_, lines in rows)) for line in lines}))
        examples, none = [_ids(lines, known) for lines in groups], self._before[:0]
        return [
            np.concatenate([self._before if special else none, examples[group], _ids(lines, known)])
            for special, group, lines in rows
        ]

    def _whole(self, texts: Sequence[tuple[str, bool]]) -> list[np.ndarray]:
        found: list[np.ndarray] = [self._before] * len(texts)
        for flag in (False, True):
            places = [place for place, (_, special) in enumerate(texts) if special == flag]
            for start in range(0, len(places), _TEXTS_TOGETHER):
                some = places[start : start + _TEXTS_TOGETHER]
                ids = self._backend.encode_batch_fast([texts[place][0] for place in some], add_special_tokens=flag)
                for place, one in zip(some, ids, strict=True):
                    found[place] = np.array(one.ids, np.int32)
        return found

    def _each(self, lines: list[str]) -> dict[str, list[int]]:
        known: dict[str, list[int]] = {}
        for start in range(0, len(lines), _LINES_TOGETHER):
            some = lines[start : start + _LINES_TOGETHER]
            found = self._backend.encode_batch_fast(some, add_special_tokens=False)
            known.update(zip(some, (one.ids for one in found), strict=True))
        return known

    def _last_cut(self, text: str, before: int | None = None) -> int:
        """Where the last line, of those that begin up to there, begins that can be encoded apart; 0 is none."""
        end = text.rfind("\n", 0, before) if self.by_lines and before != -1 else -1
        while end > 0:
            if _CUT.match(text, end + 1):
                return end + 1
            end = text.rfind("\n", 0, end)
        return 0


def _ids(lines: list[str], known: dict[str, list[int]]) -> np.ndarray:
    ids: list[int] = []
    for line in lines:
        ids += known[line]
    return np.array(ids, np.int32)


_LINES_TOGETHER, _TEXTS_TOGETHER = 1 << 14, 1 << 10  # what the backend says of each takes much memory
_CUT = re.compile(r"(?<=[!-~]\n)(?=[A-Za-z])")


def _cuts_at_lines(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is of byte-level BPE behind GPT-2's or GPT-4's split, which never crosses `_CUT`."""
    if content["model"]["type"] != "BPE" or content["model"].get("dropout") or content.get("normalizer"):
        return False
    if any(
        token["lstrip"] or token["rstrip"] or token["single_word"] or "\n" in token["content"]
        for token in content["added_tokens"]
    ):
        return False
    split = content["pre_tokenizer"] or {}
    parts = split["pretokenizers"] if split.get("type") == "Sequence" else [split]
    *first, last = parts
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return False
    if not first:
        return last["use_regex"]
    known = [gpt4_pattern(digits) for digits in (1, 2, 3)]
    return (
        len(first) == 1
        and not last["use_regex"]
        and first[0].get("type") == "Split"
        and first[0]["behavior"] == "Isolated"
        and not first[0]["invert"]
        and first[0]["pattern"].get("Regex") in known
    )
