"""Merges out of text: the most frequent pair becomes a token, again and again. rustbpe where it is installed, else
`tokenizers`: the same merges from both, by docs/decisions/0008-rustbpe-learns-where-it-is-installed.md.

Pairs are counted inside pre-tokens. Of pairs with equal counts the one with the smaller ids is merged, where a byte's id
is its value and merges count on from 256. The only importer of either library.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Iterable, Sequence

from regpt.errors import ConfigError, missing_package
from regpt.tokenizers.exchange import CHAR_OF_BYTE, Merge, token_bytes, written_token
from regpt.tokenizers.patterns import PATTERNS

LEARNERS = ("rustbpe", "tokenizers")
BUFFERED_TEXTS = 512  # of 64K characters at most, that rustbpe splits at a time, in parallel
MOST_BYTES = (1 << 31) - 1  # of text: both libraries count pairs in 32 bits


def learner(asked: str | None = None) -> str:
    """The library that learns here: rustbpe where it is installed, or the one asked for."""
    here = importlib.util.find_spec("rustbpe") is not None
    if asked is None:
        return "rustbpe" if here else "tokenizers"
    if asked not in LEARNERS:
        raise ConfigError(f"there is no learner {asked!r}.", expected=" or ".join(LEARNERS))
    if asked == "rustbpe" and not here:
        raise missing_package("rustbpe", "fast", "learning merges with rustbpe")
    return asked


def learn_with_rustbpe(texts: Iterable[str], n_merges: int, pattern: str) -> list[Merge]:
    """Up to `n_merges`, however rare the pairs."""
    import rustbpe

    engine = rustbpe.Tokenizer()
    engine.train_from_iterator(
        texts, 256 + n_merges, buffer_size=BUFFERED_TEXTS, pattern=PATTERNS[pattern].split
    )
    ranks = {bytes(token): rank for token, rank in engine.get_mergeable_ranks()}
    return [_merge_of(token, rank, ranks) for token, rank in ranks.items() if rank >= 256]


def _merge_of(token: bytes, rank: int, ranks: dict[bytes, int]) -> Merge:
    """The pair that made a token: what the merges before it leave of its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        made = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
        place = made.index(min(made))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return written_token(parts[0]), written_token(parts[1])


def learn_with_tokenizers(
    texts: Iterable[str], n_merges: int, pattern: str, min_frequency: int
) -> list[Merge]:
    """Up to `n_merges`, of pairs that occur `min_frequency` times."""
    from tokenizers import Tokenizer, models, trainers

    counted = Tokenizer(models.BPE())
    counted.pre_tokenizer = _splitter(pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + n_merges,
        min_frequency=min_frequency,
        # The alphabet, as special tokens: these get their ids in this order, by which ties are broken.
        special_tokens=[CHAR_OF_BYTE[b] for b in range(256)],
        show_progress=False,
    )
    counted.train_from_iterator(texts, trainer)
    return [(a, b) for a, b in json.loads(counted.to_str())["model"]["merges"]]


def pre_tokens(text: str, pattern: str) -> Sequence[bytes]:
    """The stretches of a text inside which pairs are counted."""
    return [token_bytes(written) for written, _ in _splitter(pattern).pre_tokenize_str(text)]


def _splitter(pattern: str):  # type: ignore[no-untyped-def]  # the library has no type for all of its pre-tokenizers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    from tokenizers import Regex

    regex = PATTERNS[pattern].json
    level = ByteLevel(add_prefix_space=False, use_regex=regex is None)
    return level if regex is None else Sequence([Split(Regex(regex), "isolated"), level])
