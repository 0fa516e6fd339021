"""MMLU (Hendrycks et al. 2021) from local CSV files, scored by the likelihood of the answer's letter.

Prompts are those of the paper's own code and of lm_eval: a line that names the subject, solved questions of the dev
file, then the question with its choices and "Answer:". The letter that the model finds likeliest next is its answer.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.settings import SettingsError
from pipelines import storage

if TYPE_CHECKING:
    from jobs.trained import Trained

LETTERS = "ABCD"
_COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")


@dataclass
class Question:
    """One question with its four choices; ``answer`` is the index of the right one."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int

    def prompt(self) -> str:
        """The question, its choices, and "Answer:"."""
        choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return f"{self.question.strip()}\n{choices}Answer:"


def read_questions(file: str, subject: str) -> list[Question]:
    """The questions of one CSV file.

    Raises:
        SettingsError: a column is missing or an answer is not 0 to 3.
    """
    rows = csv.DictReader(io.StringIO(storage.read_bytes(file).decode("utf-8-sig"), newline=""))
    if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
        raise SettingsError(f"{file}: has no column {missing[0]}; it has to have {', '.join(_COLUMNS)}")
    questions = []
    for number, row in enumerate(rows, 1):
        if row["answer"] not in ("0", "1", "2", "3"):
            raise SettingsError(f"{file}: the answer of question {number} is {row['answer']!r}; it has to be 0 to 3")
        choices = tuple(row[f"choice{i}"] for i in range(4))
        questions.append(Question(subject, row["question"], choices, int(row["answer"])))
    return questions


def read_folder(folder: str, few_shot: int, limit: int | None) -> Iterator[tuple[str, list[Question], list[Question]]]:
    """Each subject of a folder with its solved questions and its test questions, by name.

    Raises:
        SettingsError: there are no test files, or a dev file is missing that ``few_shot`` asks for.
    """
    files = [f.uri for f in storage.list_files(storage.join(folder, "test")) if f.uri.endswith("_test.csv")]
    if not files:
        raise SettingsError(f"mmlu is {folder!r}; there is no file {folder}/test/SUBJECT_test.csv")
    for file in files:
        subject = storage.file_name(file).removesuffix("_test.csv")
        solved: list[Question] = []
        if few_shot:
            dev = storage.join(folder, "dev", f"{subject}_dev.csv")
            if not storage.exists(dev):
                raise SettingsError(f"few_shot is {few_shot}; it has to be 0, because there is no file {dev}")
            solved = read_questions(dev, subject)[:few_shot]
        yield subject, solved, read_questions(file, subject)[:limit]


def prompt_tokens(trained: Trained, solved: Sequence[Question], question: Question, room: int) -> list[int]:
    """Token ids of the prompt, at most ``room``: with as many solved questions as fit.

    A question that is too long alone loses its beginning, as in lm_eval.
    """
    tokenizer = trained.tokenizer
    head = f"The following are multiple choice questions (with answers) about {question.subject.replace('_', ' ')}.\n\n"
    for shots in range(len(solved), -1, -1):
        examples = "".join(f"{q.prompt()} {LETTERS[q.answer]}\n\n" for q in solved[:shots])
        tokens = [tokenizer.eot_id, *tokenizer.encode(head + examples + question.prompt())]
        if len(tokens) <= room:
            return tokens
    return tokens[-room:]


def answer(trained: Trained, prompts: list[list[int]], batch: int) -> Any:
    """Log-likelihood of each letter after each prompt, (questions, 4), float64 numpy."""
    import numpy as np

    letters = [trained.tokenizer.encode(f" {letter}") for letter in LETTERS]
    scores = np.zeros((len(prompts), len(letters)))
    # of like length together, the longest first: least padding, and what does not fit fails at once
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        scores[rows] = _score(trained, [prompts[i] for i in rows], letters)
    return scores


def _score(trained: Trained, prompts: list[list[int]], letters: list[list[int]]) -> Any:
    import torch

    model, device = trained.model, trained.device
    with torch.inference_mode():
        if all(len(tokens) == 1 for tokens in letters):  # one pass gives the likelihood of all four
            last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
            logits = model(_padded(prompts, trained.tokenizer.pad_id).to(device), positions=last).double()
            return logits.log_softmax(-1)[:, [tokens[0] for tokens in letters]].cpu().numpy()
        columns = []
        for tokens in letters:
            inputs = _padded([(prompt + tokens)[:-1] for prompt in prompts], trained.tokenizer.pad_id)
            targets = torch.full_like(inputs, -100)
            for row, prompt in enumerate(prompts):
                targets[row, len(prompt) - 1 : len(prompt) - 1 + len(tokens)] = torch.tensor(tokens)
            columns.append(-model(inputs.to(device), targets.to(device), reduction="none").double().sum(1))
        return torch.stack(columns, dim=1).cpu().numpy()


def _padded(rows: list[list[int]], pad_id: int) -> Any:
    """Rows filled up at their end, where a causal model's earlier positions cannot see it."""
    import torch

    longest = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])
