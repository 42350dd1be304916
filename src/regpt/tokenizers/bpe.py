"""Byte-level BPE trained on one's own text: learnt by `tokenizers`, saved in its format, encoded by tiktoken.

The only importer of `tokenizers`. tiktoken is several times as fast and gives the same ids: with merges in the
order in which they were learnt, the bytes of a token can come together in one way only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from regpt.errors import DataError
from regpt.tokenizers import END_OF_TEXT, check_entries
from regpt.tokenizers.base import well_formed
from regpt.tokenizers.byte_pairs import BYTE_OF_CHAR, BytePairTokenizer, token_bytes
from regpt.tokenizers.files import damaged, read_json
from regpt.tokenizers.pieces import training_pieces

FILE = "tokenizer.json"
MIN_FREQUENCY = 2
"""How often a pair must occur to be merged: what stands in the text once is not worth an id."""

log = logging.getLogger(__name__)


class BPETokenizer(BytePairTokenizer):
    """256 bytes, a token for each merge, `<|endoftext|>`.

    Args:
        merges: pairs of tokens as `tokenizers` writes them, each a byte's character or an earlier pair's token.
    """

    kind = "bpe"

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        self._merges = merges
        super().__init__(token_bytes(a + b) for a, b in merges)

    def _files(self) -> Mapping[str, bytes]:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        written = Tokenizer(models.BPE(vocab=_vocabulary(self._merges), merges=list(self._merges)))
        written.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        written.decoder = decoders.ByteLevel()
        written.add_special_tokens([END_OF_TEXT])
        return {FILE: written.to_str().encode()}


def _vocabulary(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Ids by token as `tokenizers` writes it."""
    return {t: i for i, t in enumerate([*sorted(BYTE_OF_CHAR), *(a + b for a, b in merges), END_OF_TEXT])}


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, progress: Callable[[int], None] | None = None
) -> BPETokenizer:
    """Learn merges from `texts`, read once, as a stream; memory grows with the number of distinct words.

    Pairs are counted inside the pre-tokens of GPT-2's split. The most frequent one is merged, of equals the
    one with the smaller ids; those under MIN_FREQUENCY never are. The order of the texts does not matter.

    Args:
        vocab_size: ids in all, `<|endoftext|>` included. Too little text gives fewer, which is logged.
        progress: told the number of characters read so far.

    Raises:
        ConfigError: vocab_size is out of range (`check_entries`).
        DataError: there is no text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    check_entries(vocab_size)
    characters = 0

    def stream() -> Iterator[str]:
        nonlocal characters
        for text in texts:
            yield from training_pieces(text if text.isascii() else well_formed(text))
            characters += len(text)
            if progress:
                progress(characters)

    counted = Tokenizer(models.BPE())
    counted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # one is kept for END_OF_TEXT
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    counted.train_from_iterator(stream(), trainer)
    if not characters:
        raise DataError("there is no text to train a bpe tokenizer on.")
    trained = BPETokenizer([(a, b) for a, b in json.loads(counted.to_str())["model"]["merges"]])
    if trained.vocab_size < vocab_size:
        log.warning(
            f"tokenizer.vocab_size is {trained.vocab_size:,} instead of {vocab_size:,}: "
            f"{characters:,} characters of text have no more pairs that occur {MIN_FREQUENCY} times"
        )
    return trained


def load(folder: Path) -> BPETokenizer:
    """The tokenizer saved in `folder`. Raises DataError where its file is missing, damaged or not ours."""
    path = folder / FILE
    content = read_json(path)
    match content:
        case {
            "model": {"merges": list(written), "vocab": vocabulary},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            "normalizer": None,
        }:
            pass
        case _:
            raise damaged(path, "it holds no BPE model with merges that splits text as GPT-2 does")
    merges: list[tuple[str, str]] = []
    known = set(BYTE_OF_CHAR)
    for merge in written:
        match merge:
            case [str(a), str(b)] if a in known and b in known and a + b not in known:
                merges.append((a, b))
                known.add(a + b)
            case _:
                raise damaged(
                    path, f"merge {len(merges)} does not follow from those before", got=repr(merge)[:80]
                )
    if vocabulary != _vocabulary(merges):
        raise damaged(path, "the vocabulary is not the one that the merges make")
    return BPETokenizer(merges)
