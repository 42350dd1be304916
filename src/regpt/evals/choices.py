"""Multiple choice: HellaSwag, ARC-easy and PIQA. The model takes the choice that it finds likeliest.

Prompts and scores are lm-eval's (0.4.13, lm_eval/tasks and lm_eval/api/task.py): `acc` of the summed log-probability,
`acc_norm` of that over the choice's characters, `acc_bytes` over its UTF-8 bytes. Of equal choices the first is taken.
`acc_norm_tokens` is the score that build-nanogpt (hellaswag.py) and llm.c (dev/data/hellaswag.py) print, on their own
prompt: the context as it stands in the file, the ending behind a space, the mean over its tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regpt.errors import DataError
from regpt.evals.figures import Figure, share
from regpt.evals.files import Files, Remote, Row, find, read_rows, read_text
from regpt.evals.likelihood import Request, Scored
from regpt.evals.task import Answers, Encoder, Parts, Task
from regpt.tokenizers import Tokenizer

CHOICES, TOKENS = "choices", "tokens"  # the parts: lm-eval's prompts, build-nanogpt's


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row."""

    query: str
    choices: tuple[str, ...]
    gold: int
    """Which of them is right."""
    plain: tuple[str, tuple[str, ...]] | None = None
    """Context and endings as they stand in the file, where the mean over tokens is asked for."""


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(Task):
    """Questions, each with choices of which one is right."""

    questions: Sequence[Question]

    @property
    def rows(self) -> int:
        return len(self.questions)

    def requests(self, tokenizer: Tokenizer, block_size: int) -> Parts:
        encoder = Encoder(tokenizer, self.name)
        parts: Parts = {
            CHOICES: [
                [encoder.pair(q.query, f" {choice}", number) for choice in q.choices]
                for number, q in enumerate(self.questions)
            ]
        }
        if all(q.plain for q in self.questions):
            parts[TOKENS] = [
                [_apart(encoder, q.plain[0], ending, number) for ending in q.plain[1]]
                for number, q in enumerate(self.questions)
                if q.plain
            ]
        return parts

    def figures(self, answers: Answers) -> dict[str, Figure]:
        def accuracy(part: str, weight: Callable[[str, Scored], float]) -> Figure:
            right = []
            for q, scored in zip(self.questions, answers[part], strict=True):
                found = [s.logprob / weight(c, s) for c, s in zip(q.choices, scored, strict=True)]
                right.append(float(found.index(max(found)) == q.gold))
            return share(right)

        figures = {
            "acc": accuracy(CHOICES, lambda choice, s: 1),
            "acc_norm": accuracy(CHOICES, lambda choice, s: len(choice)),
            "acc_bytes": accuracy(CHOICES, lambda choice, s: len(choice.encode())),
        }
        if TOKENS in answers:
            figures["acc_norm_tokens"] = accuracy(TOKENS, lambda choice, s: s.tokens)
        return figures


def _filled(row: Row, field: str, choices: Sequence[str], least: int = 2) -> tuple[str, ...]:
    """Choices as they are scored. Raises DataError where one is blank, so that it has no length to divide by, or alone."""
    if len(choices) < least:
        raise row.wrong(field, f"{least} choices at least")
    if not all(choice.strip() for choice in choices):
        raise row.wrong(field, "text in every choice, cleaned of WikiHow's marks where the task cleans it")
    return tuple(choices)


def _apart(encoder: Encoder, context: str, ending: str, number: int) -> Request:
    """Context and ending encoded each by itself, as build-nanogpt does."""
    before = encoder.ids(context, number) or (encoder.tokenizer.eot_id,)
    return Request(before, encoder.encoded(f" {ending}", number))


# --- HellaSwag --------------------------------------------------------------------------------------------------------

HELLASWAG = Files(
    task="hellaswag",
    names=("hellaswag_val.jsonl", "hellaswag.jsonl"),
    remote=(
        Remote(
            url="https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
            name="hellaswag_val.jsonl",
            sha256="0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
        ),
    ),
)


def open_hellaswag(data: Path | None, limit: int | None) -> MultipleChoice:
    """HellaSwag (Zellers et al. 2019), 10,042 rows of validation.

    Rows have `ctx_a`, `ctx_b`, `activity_label`, `endings`, `label` as published; or only `ctx` for both parts of the
    context, which lm-eval would begin the second part of with a capital; or `query`, `choices` and `gold` ready made, of
    which build-nanogpt's prompt is not known.
    """
    rows = read_rows(find(HELLASWAG, data), limit)
    return MultipleChoice(name="hellaswag", questions=[_hellaswag(row) for row in rows])


def _hellaswag(row: Row) -> Question:
    if "query" in row.values:
        choices = _filled(row, "choices", row.texts("choices"))
        return Question(query=row.get("query", str), choices=choices, gold=row.index("gold", len(choices)))
    endings = row.texts("endings")
    if "ctx_a" in row.values:
        first, second = row.get("ctx_a", str), row.get("ctx_b", str)
        context = f"{first} {second.capitalize()}"
        plain = row.get("ctx", str) if "ctx" in row.values else f"{first} {second}".strip()
    else:
        context = plain = row.get("ctx", str)
    return Question(
        query=cleaned(f"{row.get('activity_label', str)}: {context}"),
        choices=_filled(row, "endings", [cleaned(ending) for ending in endings]),
        gold=row.index("label", len(endings)),
        plain=(plain, endings),
    )


def cleaned(text: str) -> str:
    """Text without WikiHow's marks, as lm-eval has it (lm_eval/tasks/hellaswag/utils.py)."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


# --- ARC-easy and PIQA ------------------------------------------------------------------------------------------------

ARC_EASY = Files(
    task="arc_easy",
    names=("arc_easy_test.jsonl", "ARC-Easy-Test.jsonl", "arc_easy_test.parquet", "arc_easy.jsonl"),
    remote=(
        Remote(
            url="https://huggingface.co/datasets/allenai/ai2_arc/resolve/main/ARC-Easy/test-00000-of-00001.parquet",
            name="arc_easy_test.parquet",
        ),
    ),
)
PIQA = Files(
    task="piqa",
    names=("piqa_valid.jsonl", "valid.jsonl", "piqa.jsonl"),
    remote=(
        Remote(url="https://yonatanbisk.com/piqa/data/valid.jsonl", name="valid.jsonl"),
        Remote(url="https://yonatanbisk.com/piqa/data/valid-labels.lst", name="valid-labels.lst"),
    ),
)


def open_arc_easy(data: Path | None, limit: int | None) -> MultipleChoice:
    """ARC-easy (Clark et al. 2018), 2,376 rows of the test set: as on the hub, or as in AI2's own archive."""
    rows = read_rows(find(ARC_EASY, data), limit)
    return MultipleChoice(name="arc_easy", questions=[_arc(row) for row in rows])


def _arc(row: Row) -> Question:
    stem: Any = row.values.get("question")
    choices: Any = row.values.get("choices")
    if isinstance(stem, dict):  # AI2's: {"stem": …, "choices": [{"text": …, "label": …}, …]}
        stem, choices = stem.get("stem"), stem.get("choices")
    if isinstance(choices, list):
        each = [c for c in choices if isinstance(c, dict)]
        choices = {name: [c.get(name) for c in each] for name in ("text", "label")}
    if not isinstance(stem, str):
        row.get("question", str)
        raise row.wrong("question", "a text")
    if not isinstance(choices, dict):
        row.get("choices", dict)
        raise row.wrong("choices", "texts and labels")
    inner = Row(row.path, row.place, choices)
    texts = _filled(inner, "text", inner.texts("text"))
    labels, answer = inner.texts("label"), row.get("answerKey", str)
    if len(texts) != len(labels) or answer not in labels:
        raise row.wrong("answerKey", f"one of {', '.join(labels)}")
    return Question(query=f"Question: {stem}\nAnswer:", choices=texts, gold=labels.index(answer))


def open_piqa(data: Path | None, limit: int | None) -> MultipleChoice:
    """PIQA (Bisk et al. 2020), 1,838 rows of validation; right answers in the rows, or in `valid-labels.lst` beside them."""
    path = find(PIQA, data)
    rows = read_rows(path, limit)
    if rows and "label" not in rows[0].values:
        beside = path.with_name(path.name.partition(".")[0] + "-labels.lst")
        if not beside.exists():
            raise DataError(f"{path} has no field 'label', and beside it there is no {beside.name}.")
        labels = read_text(beside).split()
        if len(labels) < len(rows) or (limit is None and len(labels) > len(rows)):
            raise DataError(
                f"{beside} does not belong to {path}.",
                got=f"{len(labels):,} labels",
                expected=f"{len(rows):,}, one for each row",
            )
        rows = [
            Row(row.path, row.place, {**row.values, "label": label})
            for row, label in zip(rows, labels, strict=False)
        ]
    return MultipleChoice(name="piqa", questions=[_piqa(row) for row in rows])


def _piqa(row: Row) -> Question:
    return Question(
        query=f"Question: {row.get('goal', str)}\nAnswer:",
        choices=tuple(_filled(row, name, [row.get(name, str)], 1)[0] for name in ("sol1", "sol2")),
        gold=row.index("label", 2),
    )
