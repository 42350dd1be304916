"""A saved tokenizer gives the same ids in `tokenizers`, transformers and tiktoken, special tokens included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import example, given, settings
from sample_texts import FUZZ, RHYME, VALID, plain_texts
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext import openai_public
from transformers import AutoTokenizer

import tokenizers
from regpt.tokenizers import load_tokenizer
from regpt.tokenizers.bpe import BPETokenizer, train_bpe
from regpt.tokenizers.exchange import splitting, token_bytes, tokenizer_json
from regpt.tokenizers.patterns import PATTERNS

SPECIAL = ["<|im_start|>", "<|im_end|>", "<tool é>"]
# As tiktoken publishes them: tiktoken_ext/openai_public.py.
PUBLISHED = {
    "gpt2": openai_public.r50k_pat_str,
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s",
}


@dataclass
class Elsewhere:
    """One tokenizer, and the same from its folder in three other programs."""

    ours: BPETokenizer
    tokenizers: tokenizers.Tokenizer
    transformers: object
    tiktoken: tiktoken.Encoding


@pytest.fixture(scope="module", params=PATTERNS)
def elsewhere(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    folder: Path = tmp_path_factory.mktemp(request.param)
    ours = train_bpe(
        [RHYME, RHYME.upper(), "x  =  1\n\n  y\t= 22222!\n" * 9],
        500,
        pattern=request.param,
        special_tokens=SPECIAL,
    )
    ours.save(folder)
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = True  # a special token written in a text is text
    in_tiktoken = tiktoken.Encoding(
        "mine",
        pat_str=PUBLISHED[request.param],
        mergeable_ranks=load_tiktoken_bpe(str(folder / "ranks.tiktoken")),
        special_tokens=dict(ours.special_tokens),
    )
    return Elsewhere(ours, plain, AutoTokenizer.from_pretrained(str(folder)), in_tiktoken)


def assert_equal(e: Elsewhere, text: str) -> None:
    ids = e.ours.encode(text)
    assert ids == e.tiktoken.encode_ordinary(text)
    assert ids == e.tokenizers.encode(text).ids
    with_special = e.ours.encode(text, allow_special=True)
    assert with_special == e.transformers.encode(text)  # type: ignore[attr-defined]
    assert with_special == e.tiktoken.encode(text, allowed_special="all")
    assert e.ours.decode(ids) == e.ours.decode(with_special) == text
    assert e.transformers.decode(with_special) == e.tiktoken.decode(with_special) == text  # type: ignore[attr-defined]


def test_sizes_and_ids_of_special_tokens(elsewhere: Elsewhere) -> None:
    ours = elsewhere.ours
    assert list(ours.special_tokens) == [*SPECIAL, "<|endoftext|>"]
    assert list(ours.special_tokens.values()) == list(range(ours.vocab_size - 4, ours.vocab_size))
    assert ours.eot_id == ours.vocab_size - 1
    assert len(elsewhere.transformers) == elsewhere.tiktoken.n_vocab == ours.vocab_size  # type: ignore[arg-type]
    assert elsewhere.transformers.eos_token_id == ours.eot_id  # type: ignore[attr-defined]
    assert elsewhere.tokenizers.get_vocab_size() == ours.vocab_size


def test_equal_ids_on_the_rhyme_and_on_control_tokens(elsewhere: Elsewhere) -> None:
    assert_equal(elsewhere, RHYME)
    assert_equal(elsewhere, f"<|im_start|>user\n{RHYME}<|im_end|>\n<tool é><|endoftext|><|im_start|")


def test_equal_ids_on_real_texts(elsewhere: Elsewhere, test_data: Path) -> None:
    for text in plain_texts(test_data).values():
        assert_equal(elsewhere, text[:60_000])


@FUZZ
@given(text=VALID)
def test_equal_ids_on_fuzzed_texts(elsewhere: Elsewhere, text: str) -> None:
    assert_equal(elsewhere, text)


@pytest.mark.parametrize(
    "text", ["a\n  ", " \n \n x", "!\n\n  y", "x'ſ 'LL've", "12345 1234567", "\r\n\r\n\t z ", "\u1e9e's"]
)
def test_equal_ids_where_the_patterns_are_subtle(elsewhere: Elsewhere, text: str) -> None:
    assert_equal(elsewhere, text)


def split_by_tiktoken(regex: str, text: str) -> list[bytes]:
    """The pre-tokens: of a vocabulary of every stretch of the text, each of them is one token."""
    data = text.encode()
    stretches = {data[i:j] for i in range(len(data)) for j in range(i + 1, len(data) + 1)}
    ranks = {stretch: rank for rank, stretch in enumerate(sorted(stretches, key=len))}
    encoding = tiktoken.Encoding("all", pat_str=regex, mergeable_ranks=ranks, special_tokens={})
    return [encoding.decode_single_token_bytes(i) for i in encoding.encode_ordinary(text)]


def split_by_tokenizers(pre_tokenizer: Mapping[str, Any], text: str) -> list[bytes]:
    plain = tokenizers.Tokenizer.from_str(tokenizer_json([], {}, pre_tokenizer).decode())
    return [token_bytes(piece) for piece, _ in plain.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(FUZZ, max_examples=150)
@given(text=VALID)
@example("a\n  ")
@example(" \n \n x 's'S'ſ 'LL've")
@example("!\n\n  y\r\n\r\n\t z \x1c\x85 \u3000")
@example("12345 ½٣๑ _^\u1e9e's")
def test_every_spelling_of_a_pattern_splits_alike(pattern: str, text: str) -> None:
    """Not only where a merge would show it: before any vocabulary."""
    text = text[:30] or "a"
    published = split_by_tiktoken(PUBLISHED[pattern], text)
    assert b"".join(published) == text.encode()
    assert split_by_tiktoken(PATTERNS[pattern].split, text) == published
    assert split_by_tokenizers(splitting(pattern), text) == published
    if (spelled := PATTERNS[pattern].gigatoken) is not None:
        assert split_by_tiktoken(spelled, text) == published


def test_special_tokens_survive_saving_and_are_text_unless_allowed(
    elsewhere: Elsewhere, tmp_path: Path
) -> None:
    elsewhere.ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.special_tokens, again.fingerprint) == (
        elsewhere.ours.special_tokens,
        elsewhere.ours.fingerprint,
    )
    text = "a<|im_start|>b"
    assert again.encode(text, allow_special=True) == [
        *again.encode("a"),
        again.special_tokens["<|im_start|>"],
        *again.encode("b"),
    ]
    assert max(again.encode(text)) < again.special_tokens["<|im_start|>"]
    assert again.decode(again.encode(text)) == text


def test_fingerprints_tell_patterns_and_special_tokens_apart() -> None:
    merges = [("a", "b")]
    made = [
        BPETokenizer(merges),
        BPETokenizer(merges, pattern="gpt4"),
        BPETokenizer(merges, special_tokens=["<|a|>"]),
        BPETokenizer(merges, special_tokens=["<|b|>"]),
        BPETokenizer(merges, special_tokens=["<|a|>", "<|b|>"]),
        BPETokenizer(merges, special_tokens=["<|b|>", "<|a|>"]),
        BPETokenizer([*merges, ("<", "|")], special_tokens=["<|a|>"]),
    ]
    assert len({t.fingerprint for t in made}) == len(made)


def test_a_file_written_by_tokenizers_itself_loads(tmp_path: Path) -> None:
    """As earlier versions wrote it: the same fingerprint."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ours = train_bpe([RHYME], 300)
    ours.save(tmp_path)
    vocabulary = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab()
    written = Tokenizer(models.BPE(vocab=vocabulary, merges=list(ours.merges)))
    written.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    written.decoder = decoders.ByteLevel()
    written.add_special_tokens(["<|endoftext|>"])
    written.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).fingerprint == ours.fingerprint
