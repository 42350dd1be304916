from __future__ import annotations

import itertools
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given
from sample_texts import FUZZ, HOSTILE, RHYME, VALID, plain_texts

import tokenizers
from regpt.errors import ConfigError, DataError
from regpt.tokenizers import load_tokenizer
from regpt.tokenizers.bpe import BPETokenizer, train_bpe
from regpt.tokenizers.exchange import BYTE_OF_CHAR, token_bytes

Pair = tuple[str, str]
# GPT-2's split as OpenAI first wrote it (gpt-2/src/encoder.py), under yet another regular expression engine.
SPLIT = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


@pytest.fixture(scope="module")
def reference(test_data: Path) -> tuple[str, list[Pair], dict[str, int]]:
    """The corpus, the merges and the vocabulary of the shared reference."""
    folder = test_data / "small" / "bpe_reference"
    written = (folder / "train-bpe-reference-merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [(a, b) for a, b in (line.split(" ") for line in written)]
    vocabulary = json.loads((folder / "train-bpe-reference-vocab.json").read_text(encoding="utf-8"))
    return (folder / "corpus.en").read_bytes().decode(), merges, vocabulary


def plain_training(text: str, n_merges: int, preferred: Callable[[Pair, dict[str, int]], Any]) -> list[Pair]:
    """BPE as it is defined, slow and plain: everything is counted anew for every merge.

    Of the pairs with the highest count, the one that `preferred` (given the ids so far) puts last is merged.
    """
    char_of_byte = {b: c for c, b in BYTE_OF_CHAR.items()}
    words = Counter(tuple(char_of_byte[b] for b in word.encode()) for word in SPLIT.findall(text))
    ids = dict(BYTE_OF_CHAR)
    merges: list[Pair] = []
    while len(merges) < n_merges:
        counts: Counter[Pair] = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(word):
                counts[pair] += times
        highest = max(counts.values())
        chosen = max((p for p in counts if counts[p] == highest), key=lambda p: preferred(p, ids))
        merges.append(chosen)
        ids["".join(chosen)] = len(ids)
        words = Counter({merge(word, chosen): times for word, times in words.items()})
    return merges


def merge(word: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    made: list[str] = []
    for part in word:
        if made and (made[-1], part) == pair:
            made[-1] += part
        else:
            made.append(part)
    return tuple(made)


def test_merges_equal_the_reference_but_for_ties(reference: tuple[str, list[Pair], dict[str, int]]) -> None:
    """Ours and theirs differ in one thing: which of several most frequent pairs, equal in count, comes first.

    The same plain training gives ours to the last merge if it takes the smaller ids (a byte's is its value), and theirs
    if it takes the greater bytes. So wherever a merge differs, either choice was one of the most frequent pairs of its moment.
    """
    text, theirs, vocabulary = reference
    trained = train_bpe([text], 500)
    ours = list(trained._merges)
    assert trained.vocab_size == len(vocabulary) == 500
    assert len(ours) == len(theirs) == 243
    assert ours == plain_training(text, 243, lambda pair, ids: (-ids[pair[0]], -ids[pair[1]]))
    assert theirs == plain_training(text, 243, lambda pair, ids: (token_bytes(pair[0]), token_bytes(pair[1])))


def test_the_first_merge_that_differs_from_the_reference_is_a_tie(
    reference: tuple[str, list[Pair], dict[str, int]],
) -> None:
    """Counted directly, where both have come the same way; and ties only swap: few pairs are in one list alone."""
    text, theirs, _ = reference
    ours = list(train_bpe([text], 500)._merges)
    first = next(i for i in range(243) if ours[i] != theirs[i])
    assert first == 31
    char_of_byte = {b: c for c, b in BYTE_OF_CHAR.items()}
    words = [tuple(char_of_byte[b] for b in word.encode()) for word in SPLIT.findall(text)]
    for pair in ours[:first]:
        words = [merge(word, pair) for word in words]
    counts = Counter(pair for word in words for pair in itertools.pairwise(word))
    assert counts[ours[first]] == counts[theirs[first]] == max(counts.values())
    assert len(set(ours) ^ set(theirs)) == 8


def test_ids_are_laid_out_as_gpt2_lays_them_out(small_bpe: BPETokenizer) -> None:
    """All 256 bytes in GPT-2's order, then the merges, then `<|endoftext|>`."""
    assert small_bpe.decode_bytes([0]) == b"!"
    assert sorted(small_bpe.decode_bytes([i]) for i in range(256)) == [bytes([b]) for b in range(256)]
    assert small_bpe.decode_bytes([256]) == "".join(small_bpe._merges[0]).replace("Ġ", " ").encode()
    assert (small_bpe.eot_id, small_bpe.vocab_size) == (319, 320)


def saved_elsewhere(tokenizer: BPETokenizer, folder: Path) -> tokenizers.Tokenizer:
    tokenizer.save(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True  # `<|endoftext|>` is text
    return theirs


def test_equals_the_tokenizers_library_on_real_texts(test_data: Path, tmp_path: Path) -> None:
    """A vocabulary of 2,000 from stories, on all texts: the saved file gives, in `tokenizers`, the ids of ours."""
    texts = plain_texts(test_data)
    trained = train_bpe([texts["tinystories_v2_train_head.txt"], texts["german.txt"]], 2000)
    theirs = saved_elsewhere(trained, tmp_path)
    for name, text in texts.items():
        ids = trained.encode(text[:400_000])
        assert ids == theirs.encode(text[:400_000]).ids, name
        assert trained.decode(ids) == text[:400_000], name


@pytest.fixture(scope="module")
def small_elsewhere(
    small_bpe: BPETokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tokenizers.Tokenizer:
    return saved_elsewhere(small_bpe, tmp_path_factory.mktemp("bpe"))


@FUZZ
@given(text=VALID)
def test_equals_the_tokenizers_library_on_fuzzed_unicode(
    small_bpe: BPETokenizer, small_elsewhere: tokenizers.Tokenizer, text: str
) -> None:
    ids = small_bpe.encode(text)
    assert ids == small_elsewhere.encode(text).ids
    assert small_bpe.decode(ids) == small_elsewhere.decode(ids, skip_special_tokens=False) == text


@FUZZ
@given(text=HOSTILE)
def test_surrogates_do_not_stop_it(small_bpe: BPETokenizer, text: str) -> None:
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert small_bpe.encode(text) == small_bpe.encode(mended)


def test_saved_file_serves_transformers(small_bpe: BPETokenizer, tmp_path: Path) -> None:
    """`<|endoftext|>` included, which transformers reads as the control token."""
    from transformers import PreTrainedTokenizerFast

    small_bpe.save(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = RHYME + "<|endoftext|>" + RHYME
    assert theirs.encode(text) == small_bpe.encode(text, allow_special=True)
    assert len(theirs) == small_bpe.vocab_size


def fingerprint_of_training(texts: list[str]) -> str:
    return train_bpe(texts, 400).fingerprint


def test_training_is_deterministic_over_processes_and_orders() -> None:
    """Three fresh processes, and the texts the other way round."""
    texts = [RHYME, "the quick brown fox jumps over the lazy dog " * 3, "aaaa bbbb abab " * 5]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(fingerprint_of_training, [texts, texts, texts[::-1]])
    assert set(found) == {fingerprint_of_training(texts)}


def test_training_reads_a_stream_and_tells_how_far_it_is() -> None:
    told: list[int] = []
    train_bpe((text for text in [RHYME, "", RHYME]), 300, progress=told.append)
    assert told == [len(RHYME), len(RHYME), 2 * len(RHYME)]


def test_end_of_text_can_be_in_training_text_and_never_becomes_a_merge() -> None:
    trained = train_bpe(["<|endoftext|>" * 50], 257 + 40)
    assert b"<|endoftext|>" not in [trained.decode_bytes([i]) for i in range(trained.eot_id)]
    assert trained.eot_id not in trained.encode("<|endoftext|>")
    assert trained.encode("<|endoftext|>", allow_special=True) == [trained.eot_id]


def test_too_small_a_vocabulary_is_refused() -> None:
    assert train_bpe([RHYME], 257).vocab_size == 257
    with pytest.raises(ConfigError) as e:
        train_bpe([RHYME], 256)
    assert str(e.value) == (
        "tokenizer.vocab_size is too small for a bpe tokenizer.\n  got: 256\n"
        "  expected: 257 or more: 256 bytes, <|endoftext|>, and the merges; at most 4,194,304"
    )


def test_too_little_text_gives_a_smaller_vocabulary_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """minbpe stops with an error from max() here. A pair must occur twice."""
    trained = train_bpe(["abab cd"], 5000)
    assert trained.vocab_size == 258
    assert caplog.messages == [
        "tokenizer.vocab_size is 258 instead of 5,000: "
        "7 characters of text have no more pairs that occur 2 times"
    ]
    assert trained.decode(trained.encode("abab cd!")) == "abab cd!"


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_text_is_an_error(texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"^there is no text to train a bpe tokenizer on\.$"):
        train_bpe(texts, 300)


@pytest.mark.parametrize(
    "text",
    [" " * 300_000 + "x", "a" * 300_000, "\n" * 300_000 + "\ud800", "中" * 100_000],
    ids=["blanks", "letters", "newlines", "Chinese"],
)
def test_training_on_endless_runs_takes_no_time(text: str) -> None:
    """`tokenizers` alone is quadratic in the length of one word: a million blanks took it nine minutes."""
    trained = train_bpe([text], 280)
    assert trained.vocab_size > 257
    assert trained.decode(trained.encode(text[:-1])) == text[:-1]


def test_encoding_survives_saving(small_bpe: BPETokenizer, tmp_path: Path) -> None:
    """minbpe lost its split pattern in load(), and encoded 22 of 108 lines otherwise."""
    small_bpe.save(tmp_path)
    again = load_tokenizer(tmp_path)
    for line in RHYME.splitlines(keepends=True):
        assert again.encode(line) == small_bpe.encode(line)
