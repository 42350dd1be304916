"""Merges are those of the definition, and the same from either library; what cannot be learnt is refused before."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from sample_texts import RHYME, VALID, plain_texts

from regpt.errors import ConfigError, DataError, DeviceError
from regpt.tokenizers import bpe, learn
from regpt.tokenizers.bpe import BPETokenizer, check_special_tokens, train_bpe
from regpt.tokenizers.exchange import written_token
from regpt.tokenizers.patterns import PATTERNS

Pair = tuple[str, str]
# As OpenAI wrote them first (gpt-2/src/encoder.py) and tiktoken publishes the second, under another engine.
SPLITS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
}


@pytest.fixture(params=learn.LEARNERS)
def library(request: pytest.FixtureRequest) -> str:
    """Each in turn; rustbpe where it is installed."""
    if request.param == "rustbpe":
        pytest.importorskip("rustbpe")
    return str(request.param)


def words_of(text: str, pattern: str) -> Counter[tuple[str, ...]]:
    """How often each pre-token occurs, as characters that stand for bytes."""
    found = regex.findall(SPLITS[pattern], text)
    return Counter(tuple(written_token(word.encode())) for word in found)


def merged(word: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    made: list[str] = []
    for part in word:
        if made and (made[-1], part) == pair:
            made[-1] += part
        else:
            made.append(part)
    return tuple(made)


def counted(words: Counter[tuple[str, ...]]) -> Counter[Pair]:
    counts: Counter[Pair] = Counter()
    for word, times in words.items():
        for pair in itertools.pairwise(word):
            counts[pair] += times
    return counts


def assert_each_has_the_highest_count(words: Counter[tuple[str, ...]], merges: list[Pair]) -> list[int]:
    """Counted anew for every merge, which is then made; returns the counts."""
    seen = []
    for pair in merges:
        counts = counted(words)
        assert counts[pair] == max(counts.values()), pair
        seen.append(counts[pair])
        words = Counter({merged(word, pair): times for word, times in words.items()})
    return seen


@pytest.fixture(scope="module")
def reference(test_data: Path) -> tuple[str, list[Pair]]:
    """The shared corpus and merges. They take `<|endoftext|>` for a control token, and the corpus has none of it."""
    folder = test_data / "small" / "bpe_reference"
    lines = (folder / "train-bpe-reference-merges.txt").read_text(encoding="utf-8").splitlines()
    text = (folder / "corpus.en").read_bytes().decode()
    assert "<|endoftext|>" not in text
    return text, [(a, b) for a, b in (line.split(" ") for line in lines)]


def test_every_merge_has_the_highest_count_and_so_has_the_references(
    reference: tuple[str, list[Pair]], library: str
) -> None:
    """Ours at every step, and theirs: where they first differ, it is by the order of equals."""
    text, theirs = reference
    ours = list(train_bpe([text], 500, learn_with=library).merges)
    if library != "tokenizers":  # the same in a moment, without counting
        assert ours == train_bpe([text], 500, learn_with="tokenizers").merges
        return
    words = words_of(text, "gpt2")
    counts = assert_each_has_the_highest_count(words, ours)
    same = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    assert counts[: same + 1] == assert_each_has_the_highest_count(words, theirs)[: same + 1]


def test_gpt4s_split_too(reference: tuple[str, list[Pair]], library: str) -> None:
    text = reference[0][:40_000]
    merges = list(train_bpe([text], 400, pattern="gpt4", learn_with=library).merges)
    assert_each_has_the_highest_count(words_of(text, "gpt4"), merges)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_both_libraries_learn_the_same_on_real_texts(pattern: str, test_data: Path) -> None:
    """To the last pair that occurs twice; five times; at all."""
    pytest.importorskip("rustbpe")
    texts = [text[:100_000] for text in plain_texts(test_data).values()]
    for size, often in ((3000, 2), (30_000, 5), (30_000, 1)):
        found = [
            train_bpe(texts, size, pattern=pattern, min_frequency=often, learn_with=name).merges
            for name in learn.LEARNERS
        ]
        assert found[0] == found[1]


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(texts=VALID.map(lambda text: [text, text[::2], RHYME]))
def test_both_libraries_learn_the_same_on_fuzzed_texts(texts: list[str]) -> None:
    pytest.importorskip("rustbpe")
    for pattern in PATTERNS:
        for often in (1, 2, 3):
            found = [
                train_bpe(texts, 600, pattern=pattern, min_frequency=often, learn_with=name).merges
                for name in learn.LEARNERS
            ]
            assert found[0] == found[1]


def test_a_minimum_frequency_ends_the_merges(library: str) -> None:
    text = "ab " * 9 + "cd " * 4 + "ef"
    for often, merges in ((1, 6), (2, 4), (4, 4), (5, 2), (8, 2), (9, 1), (10, 0)):
        trained = train_bpe([text], 400, min_frequency=often, learn_with=library)
        assert len(trained.merges) == merges, often


def test_a_stream_that_cannot_be_read_again_gives_the_same(library: str) -> None:
    again = train_bpe(iter([RHYME, RHYME]), 320, learn_with=library)
    assert again.merges == train_bpe([RHYME, RHYME], 320, learn_with=library).merges


def test_texts_are_read_no_further_than_asked(library: str, caplog: pytest.LogCaptureFixture) -> None:
    """In bytes of UTF-8; a character that is cut counts for nothing. What is left out is said."""
    read: list[int] = []

    def texts() -> Iterator[str]:
        for n, text in enumerate(("abab ", "größe ", "cdcd " * 9)):
            read.append(n)
            yield text

    limited = train_bpe(texts(), 300, max_bytes=8, min_frequency=1, learn_with=library)
    assert limited.merges == train_bpe(["abab ", "gr"], 300, min_frequency=1, learn_with=library).merges
    assert read == [0, 1]
    assert "the tokenizer is learnt from the first 8 bytes of the text" in caplog.messages
    caplog.clear()
    train_bpe(["abab "] * 2, 258, max_bytes=10, learn_with=library)
    assert caplog.messages == []


def test_an_error_in_the_text_is_raised_as_it_is(library: str) -> None:
    def texts() -> Iterator[str]:
        yield RHYME
        raise DataError("the file is cut short.")

    with pytest.raises(DataError, match="cut short"):
        train_bpe(texts(), 300, min_frequency=1, learn_with=library)


def test_lone_surrogates_are_mended(library: str) -> None:
    trained = train_bpe(["a\ud800b" * 20], 300, learn_with=library)
    assert trained.merges == train_bpe(["a\ufffdb" * 20], 300, learn_with=library).merges


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn.importlib.util, "find_spec", lambda name: None)
    assert learn.learner() == "tokenizers"
    with pytest.raises(DeviceError) as e:
        train_bpe([RHYME], 300, learn_with="rustbpe")
    assert str(e.value).startswith(
        "learning merges with rustbpe needs the package rustbpe, which is not installed."
    )
    with pytest.raises(ConfigError, match="there is no learner 'minbpe'"):
        learn.learner("minbpe")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("special", "said"),
    [
        ([""], "tokenizer.special_tokens has one that is empty or no text.\n  got: ''"),
        (["<|\ud800|>"], "tokenizer.special_tokens has one that is empty or no text.\n  got: '<|\\ud800|>'"),
        (["<|a|>", "<|a|>"], "tokenizer.special_tokens has '<|a|>' twice."),
        (
            ["<|endoftext|>"],
            "tokenizer.special_tokens need not have <|endoftext|>: every tokenizer has it, as its last id.",
        ),
        (
            ["<|a|>", "x<|a|>y"],
            "tokenizer.special_tokens: '<|a|>' is a part of 'x<|a|>y', so a text could be read in two ways.",
        ),
        (
            ["<|"],
            "tokenizer.special_tokens: '<|' is a part of '<|endoftext|>', so a text could be read in two ways.",
        ),
        (
            ["user"],
            "tokenizer.special_tokens: 'user' is one word, and such tokens are learnt from text.\n  try: '<|user|>'",
        ),
        ([f"<|{n}|>" for n in range(10_001)], "tokenizer.special_tokens are too many.\n  got: 10001"),
    ],
)
def test_special_tokens_that_are_refused(special: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        check_special_tokens(special)
    assert str(e.value).startswith(said)


def test_a_special_token_that_is_a_learnt_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="'ab' is one word"):
        BPETokenizer([("a", "b")], special_tokens=["ab"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"vocab_size": 258, "special_tokens": ["<|a|>", "<|b|>"]}, "tokenizer.vocab_size is too small"),
        ({"pattern": "gpt3"}, "there is no split pattern 'gpt3'.\n  expected: gpt2 or gpt4"),
        ({"min_frequency": 0}, "tokenizer.min_frequency is out of range.\n  got: 0"),
        ({"max_bytes": 0}, "the text to learn from is out of range.\n  got: 0 bytes"),
        ({"max_bytes": 1 << 31}, "the text to learn from is out of range.\n  got: 2,147,483,648 bytes"),
    ],
)
def test_arguments_are_refused_before_any_text_is_read(words: dict[str, object], said: str) -> None:
    def texts() -> Iterator[str]:
        pytest.fail("it was read")
        yield ""

    with pytest.raises(ConfigError) as e:
        train_bpe(texts(), **{"vocab_size": 300, **words})  # type: ignore[arg-type]
    assert str(e.value).startswith(said)


def test_room_for_special_tokens_is_said() -> None:
    with pytest.raises(ConfigError) as e:
        train_bpe([RHYME], 258, special_tokens=["<|a|>", "<|b|>"])
    assert "259 or more: 256 bytes, <|endoftext|>, 2 special tokens, and the merges" in str(e.value)


def test_too_little_text_says_the_frequency(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        bpe.train_bpe(["abab"], 300, min_frequency=3)
    assert caplog.messages[-1].endswith("4 characters of text have no more pairs that occur 3 times")


def test_ranks_give_back_the_merges(reference: tuple[str, list[Pair]]) -> None:
    """The pair behind each token follows from the order of the tokens alone."""
    merges = list(train_bpe([reference[0]], 3000, learn_with="tokenizers").merges)
    tokens = [bytes([b]) for b in range(256)] + [learn.token_bytes(a + b) for a, b in merges]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    assert [learn._merge_of(token, ranks[token], ranks) for token in tokens[256:]] == merges


def test_saved_files_are_json_without_surprises(tmp_path: Path) -> None:
    train_bpe([RHYME], 300, special_tokens=["<|ü|>"]).save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_bytes())["additional_special_tokens"] == [
        "<|ü|>"
    ]
