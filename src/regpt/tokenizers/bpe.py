"""Byte-level BPE trained on one's own text, saved so that `tokenizers`, transformers and tiktoken give the same ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from regpt.config import TokenizerConfig
from regpt.errors import ConfigError, DataError
from regpt.tokenizers import END_OF_TEXT, MAX_BYTES, check_entries
from regpt.tokenizers.base import well_formed
from regpt.tokenizers.byte_pairs import BytePairTokenizer
from regpt.tokenizers.exchange import (
    ALPHABET,
    CONFIG_FILE,
    JSON_FILE,
    RANKS_FILE,
    Merge,
    splitting,
    tiktoken_ranks,
    tokenizer_json,
    transformers_config,
    vocabulary,
)
from regpt.tokenizers.files import damaged, read_json
from regpt.tokenizers.learn import (
    MOST_BYTES,
    learn_with_rustbpe,
    learn_with_tokenizers,
    learner,
    pre_tokens,
)
from regpt.tokenizers.patterns import PATTERNS
from regpt.tokenizers.pieces import training_pieces

MIN_FREQUENCY = TokenizerConfig.min_frequency
"""How often a pair must occur to be merged: what stands in the text once is not worth an id."""
MOST_SPECIAL = 10_000

log = logging.getLogger(__name__)


class BPETokenizer(BytePairTokenizer):
    """256 bytes, a token for each merge, special tokens, `<|endoftext|>`.

    Raises:
        ConfigError: a special token cannot be told from a token that was learnt.
    """

    kind = "bpe"

    def __init__(
        self, merges: Sequence[Merge], *, pattern: str = "gpt2", special_tokens: Sequence[str] = ()
    ) -> None:
        if both := set(special_tokens) & vocabulary(merges).keys():
            raise _like_a_word(min(both))
        super().__init__(merges, pattern=pattern, special_tokens=special_tokens)

    def _files(self) -> Mapping[str, bytes]:
        return {
            JSON_FILE: tokenizer_json(self._merges, self._special, splitting(self.pattern)),
            CONFIG_FILE: transformers_config([t for t in self._special if t != END_OF_TEXT]),
            RANKS_FILE: tiktoken_ranks(self._tokens),
        }


def check_special_tokens(special_tokens: Sequence[str], pattern: str = "gpt2") -> None:
    """Refuse special tokens that are not told apart from text or from each other.

    Raises:
        ConfigError: naming the one that is empty, twice there, part of another, or one word of text.
    """
    name = "tokenizer.special_tokens"
    if len(special_tokens) > MOST_SPECIAL:
        raise ConfigError(
            f"{name} are too many.", got=len(special_tokens), expected=f"{MOST_SPECIAL:,} at most"
        )
    for n, token in enumerate(special_tokens):
        others = [END_OF_TEXT, *special_tokens[:n], *special_tokens[n + 1 :]]
        if not token or well_formed(token) != token:
            raise ConfigError(f"{name} has one that is empty or no text.", got=repr(token))
        if token == END_OF_TEXT:
            raise ConfigError(f"{name} need not have {END_OF_TEXT}: every tokenizer has it, as its last id.")
        if token in others:
            raise ConfigError(f"{name} has {token!r} twice.")
        if inside := next((other for other in others if token in other), None):
            raise ConfigError(
                f"{name}: {token!r} is a part of {inside!r}, so a text could be read in two ways."
            )
        if len(pre_tokens(token, pattern)) < 2:
            raise _like_a_word(token)


def _like_a_word(token: str) -> ConfigError:
    return ConfigError(
        f"tokenizer.special_tokens: {token!r} is one word, and such tokens are learnt from text.",
        hint=f"'<|{token}|>'",
    )


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    pattern: str = "gpt2",
    special_tokens: Sequence[str] = (),
    min_frequency: int = MIN_FREQUENCY,
    max_bytes: int = MAX_BYTES,
    learn_with: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> BPETokenizer:
    """Learn merges from `texts`, as a stream; memory grows with the number of distinct words, up to `max_bytes` of text.

    Pairs are counted inside pre-tokens. The most frequent one is merged, of equals the one with the smaller ids, where a
    byte's is its value. The order of the texts does not matter.

    Args:
        texts: read once; twice, the second time seldom to the end, if it can be iterated over again, and faster so.
        vocab_size: ids in all, special tokens and `<|endoftext|>` included. Too little text gives fewer, which is logged.
        pattern: what splits text into pre-tokens: gpt2 or gpt4.
        special_tokens: control tokens besides `<|endoftext|>`: never learnt, never met in plain text.
        min_frequency: how often a pair must occur to be merged.
        max_bytes: what lies behind so many bytes of text is not read, which is logged.
        learn_with: rustbpe or tokenizers. None: rustbpe where it is installed; the merges are the same.
        progress: told the number of characters read so far.

    Raises:
        ConfigError: vocab_size (`check_entries`), special_tokens or another argument is out of range.
        DataError: there is no text.
    """
    check_training(vocab_size, pattern, special_tokens, min_frequency, max_bytes)
    n_merges = vocab_size - 257 - len(special_tokens)
    read = _Reading(texts, pattern, max_bytes, progress)
    library = learner(learn_with)
    if library == "rustbpe" and (min_frequency == 1 or iter(texts) is not texts):
        merges = learn_with_rustbpe(read, n_merges, pattern)
        if min_frequency > 1 and not _occurs(merges, read.again(), pattern, min_frequency):
            merges = learn_with_tokenizers(read.again(), n_merges, pattern, min_frequency)
    else:
        merges = learn_with_tokenizers(read, n_merges, pattern, min_frequency)
    if not read.characters:
        raise DataError("there is no text to train a bpe tokenizer on.")
    if read.cut:
        log.warning(f"the tokenizer is learnt from the first {max_bytes:,} bytes of the text")
    trained = BPETokenizer(merges, pattern=pattern, special_tokens=special_tokens)
    if trained.vocab_size < vocab_size:
        log.warning(
            f"tokenizer.vocab_size is {trained.vocab_size:,} instead of {vocab_size:,}: "
            f"{read.characters:,} characters of text have no more pairs that occur {min_frequency} times"
        )
    return trained


def check_training(
    vocab_size: int,
    pattern: str = "gpt2",
    special_tokens: Sequence[str] = (),
    min_frequency: int = MIN_FREQUENCY,
    max_bytes: int = MAX_BYTES,
) -> None:
    """Refuse, before any text is read, what `train_bpe` cannot do. Raises ConfigError."""
    check_entries(vocab_size, len(special_tokens))
    if pattern not in PATTERNS:
        raise ConfigError(f"there is no split pattern {pattern!r}.", expected=" or ".join(PATTERNS))
    check_special_tokens(special_tokens, pattern)
    if not 1 <= min_frequency <= MOST_BYTES:
        raise ConfigError("tokenizer.min_frequency is out of range.", got=min_frequency, expected="1 or more")
    if not 1 <= max_bytes <= MOST_BYTES:
        raise ConfigError(
            "the text to learn from is out of range.",
            got=f"{max_bytes:,} bytes",
            expected=f"1 to {MOST_BYTES:,}: pairs are counted in 32 bits",
        )


@dataclass
class _Reading:
    """Texts on their way to whoever learns: mended, in pieces, up to so many bytes."""

    texts: Iterable[str]
    pattern: str
    max_bytes: int
    progress: Callable[[int], None] | None = None
    characters: int = 0
    """Of what was read."""
    cut: bool = False
    """Whether there was more."""

    def again(self) -> _Reading:
        """The same text once more, unheard."""
        return _Reading(self.texts, self.pattern, self.max_bytes)

    def __iter__(self) -> Iterator[str]:
        left = self.max_bytes
        for text in self.texts:
            if not text.isascii():
                text = well_formed(text)
            size = len(text) if text.isascii() else len(text.encode())
            if size > left:
                self.cut = True
                text = text.encode()[:left].decode(errors="ignore")
            left -= size
            yield from training_pieces(text, self.pattern)
            self.characters += len(text)
            if self.progress:
                self.progress(self.characters)
            if left < 0:
                return


def _occurs(merges: Sequence[Merge], pieces: Iterable[str], pattern: str, min_frequency: int) -> bool:
    """Whether the last merge, and so every one, was of a pair that occurs so often. Reads no further than needed."""
    if not merges:
        return True
    tokenizer, found = BPETokenizer(merges, pattern=pattern), 0
    last = tokenizer.vocab_size - 2
    for piece in pieces:
        found += tokenizer.encode(piece).count(last)
        if found >= min_frequency:
            return True
    return False


def load(folder: Path) -> BPETokenizer:
    """The tokenizer saved in `folder`. Raises DataError where its file is missing, damaged or not ours."""
    path = folder / JSON_FILE
    content = read_json(path)
    match content:
        case {
            "model": {"merges": list(written), "vocab": ids},
            "pre_tokenizer": dict(splits),
            "normalizer": None,
        } if pattern := _pattern_of(splits):
            pass
        case _:
            raise damaged(path, "it holds no BPE model with merges that splits text as GPT-2 or GPT-4 does")
    merges: list[Merge] = []
    known = set(ALPHABET)
    for merge in written:
        match merge:
            case [str(a), str(b)] if a in known and b in known and a + b not in known:
                merges.append((a, b))
                known.add(a + b)
            case _:
                raise damaged(
                    path, f"merge {len(merges)} does not follow from those before", got=repr(merge)[:80]
                )
    special = _special_tokens(content, first=len(known))
    if special is None or ids != vocabulary(merges) | {t: len(known) + n for n, t in enumerate(special)}:
        raise damaged(path, "the vocabulary is not the one that the merges make")
    try:
        return BPETokenizer(merges, pattern=pattern, special_tokens=special[:-1])
    except ConfigError as e:
        raise damaged(path, e.what) from None


def _pattern_of(splits: Mapping[str, object]) -> str | None:
    """The name of the pattern that a saved `pre_tokenizer` has; what it leaves out is as the format has it."""
    for name in PATTERNS:
        ours = splitting(name)
        if all(splits.get(k) == v for k, v in ours.items() if k != "trim_offsets"):
            return name
    return None


def _special_tokens(content: Mapping[str, object], first: int) -> list[str] | None:
    """Those of a saved file, `<|endoftext|>` last; None where they are not what `first` and those after it can be."""
    match content.get("added_tokens"):
        case list(added):
            pass
        case _:
            return None
    special: list[str] = []
    for token in added:
        match token:
            case {"content": str(text), "id": int(i)} if i == first + len(special) and text not in special:
                special.append(text)
            case _:
                return None
    return special if special and special[-1] == END_OF_TEXT else None
