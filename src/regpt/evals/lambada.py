"""LAMBADA (Paperno et al. 2016): the last word of a passage, which only the whole of it lets one guess.

OpenAI's version of the test set, 5,153 passages, as lm-eval's lambada_openai scores it: the text up to the last space is the
context, the space and the last word are the continuation. `acc` counts passages whose last word is greedily right in all
its tokens, `perplexity` is exp of the mean over passages of minus the word's log-probability (per word, not per token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regpt.evals.figures import Figure, exponential, mean, share
from regpt.evals.files import Files, Remote, Row, find, read_rows
from regpt.evals.task import Answers, Encoder, Parts, Task
from regpt.tokenizers import Tokenizer

LAMBADA = Files(
    task="lambada",
    names=("lambada_openai_test.jsonl", "lambada_test_en.jsonl", "lambada_test.jsonl", "lambada.jsonl"),
    remote=(
        Remote(
            url="https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
            name="lambada_openai_test.jsonl",
            sha256="4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
        ),
    ),
)
WORDS = "words"


@dataclass(frozen=True, kw_only=True)
class Lambada(Task):
    """Passages."""

    texts: Sequence[str]

    @property
    def rows(self) -> int:
        return len(self.texts)

    def requests(self, tokenizer: Tokenizer, block_size: int) -> Parts:
        encoder = Encoder(tokenizer, self.name)
        cut = (text.rpartition(" ") for text in self.texts)
        return {
            WORDS: [
                [encoder.pair(before, f" {word}", number)] for number, (before, _, word) in enumerate(cut)
            ]
        }

    def figures(self, answers: Answers) -> dict[str, Figure]:
        scored = [row[0] for row in answers[WORDS]]
        return {
            "acc": share([float(s.greedy) for s in scored]),
            "perplexity": exponential(mean([-s.logprob for s in scored])),
        }


def open_lambada(data: Path | None, limit: int | None) -> Lambada:
    """LAMBADA from rows with the field `text`."""
    rows = read_rows(find(LAMBADA, data), limit)
    return Lambada(name="lambada", texts=[_passage(row) for row in rows])


def _passage(row: Row) -> str:
    text: str = row.get("text", str)
    before, _, word = text.rpartition(" ")
    if not before.strip() or not word.strip():
        raise row.wrong("text", "a passage, and behind its last space the word to guess")
    return text
