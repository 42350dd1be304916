from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from sample_texts import FUZZ, HOSTILE, VALID, lines_of, plain_texts

from regpt.errors import DataError
from regpt.tokenizers.gpt2 import GPT2Tokenizer

# The mapping itself, pinned: shards and checkpoints name it, so a change would disown them all.
FINGERPRINT = "49a5f20caafdecb50911f1c5e2ece5dc57eafa2cb9eb24592394a0619a42d9fa"


def test_constants(gpt2: GPT2Tokenizer) -> None:
    """The published sizes."""
    assert (gpt2.vocab_size, gpt2.eot_id, gpt2.kind) == (50257, 50256, "gpt2")
    assert gpt2.special_tokens == {"<|endoftext|>": 50256}
    assert gpt2.fingerprint == FINGERPRINT


def test_equals_tiktoken_on_every_plain_text(
    gpt2: GPT2Tokenizer, tiktoken_gpt2: tiktoken.Encoding, test_data: Path
) -> None:
    """Token for token, and back to the same bytes: English, German, addresses, web, stories, Wikipedia."""
    texts = plain_texts(test_data)
    assert {"tinyshakespeare.txt", "german.txt", "address.txt", "wiki.test.raw", "corpus.en"} <= set(texts)
    for name, text in texts.items():
        ids = gpt2.encode(text)
        assert ids == tiktoken_gpt2.encode_ordinary(text), name
        assert gpt2.decode(ids) == text, name
        assert gpt2.decode_bytes(ids) == text.encode(), name


@pytest.mark.parametrize("name", ["classics/val.jsonl.xz", "webdocs/val.jsonl.xz"])
def test_equals_tiktoken_on_documents(
    gpt2: GPT2Tokenizer, tiktoken_gpt2: tiktoken.Encoding, test_data: Path, name: str
) -> None:
    """Books and web pages, one by one and as a batch, which is large enough for threads."""
    texts = list(islice(lines_of(test_data / name), 250))
    assert sum(map(len, texts)) > 1_000_000
    ours = [gpt2.encode(text) for text in texts]
    assert ours == [tiktoken_gpt2.encode_ordinary(text) for text in texts]
    assert gpt2.encode_batch(texts) == ours
    assert [gpt2.decode(ids) for ids in ours] == texts


@pytest.mark.slow
def test_equals_tiktoken_on_all_shared_data(
    gpt2: GPT2Tokenizer, tiktoken_gpt2: tiktoken.Encoding, test_data: Path
) -> None:
    """Every document of every packed file, whole."""
    files = [*(test_data / "classics").glob("*.xz"), *(test_data / "webdocs").glob("*.xz")]
    assert len(files) == 10
    for path in files:
        for number, text in enumerate(lines_of(path)):
            assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text), (path.name, number)


def test_tiny_shakespeare_has_its_published_count(gpt2: GPT2Tokenizer, test_data: Path) -> None:
    """nanoGPT's 301,966 + 36,059 tokens, and 338,025 as one text."""
    text = (test_data / "small" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    cut = int(len(text) * 0.9)
    assert len(gpt2.encode(text)) == 338_025
    assert (len(gpt2.encode(text[:cut])), len(gpt2.encode(text[cut:]))) == (301_966, 36_059)


def test_equals_transformers(gpt2: GPT2Tokenizer, test_data: Path) -> None:
    """The Hugging Face tokenizer, from the same files, gives the same ids."""
    from transformers import GPT2TokenizerFast

    folder = test_data / "tokenizer"
    theirs = GPT2TokenizerFast(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))
    for name in ("german.txt", "address.txt", "corpus.en", "tinyshakespeare.txt"):
        text = plain_texts(test_data)[name][:200_000]
        assert gpt2.encode(text) == theirs.encode(text, verbose=False), name
    assert gpt2.encode("a<|endoftext|>b", allow_special=True) == theirs.encode("a<|endoftext|>b")


@FUZZ
@given(text=HOSTILE)
def test_equals_tiktoken_on_fuzzed_unicode(
    gpt2: GPT2Tokenizer, tiktoken_gpt2: tiktoken.Encoding, text: str
) -> None:
    """Lone surrogates included, which tiktoken replaces by U+FFFD; with control tokens asked for, too."""
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)
    assert gpt2.encode(text, allow_special=True) == tiktoken_gpt2.encode(text, allowed_special="all")


@FUZZ
@given(text=VALID)
def test_round_trip_of_fuzzed_unicode(gpt2: GPT2Tokenizer, text: str) -> None:
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.decode_bytes(gpt2.encode(text, allow_special=True)) == text.encode()


def test_every_id_decodes_as_tiktoken_does(gpt2: GPT2Tokenizer, tiktoken_gpt2: tiktoken.Encoding) -> None:
    """All 50,257, alone: most of those beyond ASCII are parts of characters, which decode to U+FFFD."""
    for i in range(50257):
        assert gpt2.decode_bytes([i]) == tiktoken_gpt2.decode_bytes([i])
        assert gpt2.decode([i]) == tiktoken_gpt2.decode([i])


def test_end_of_text_is_text_unless_asked_for(gpt2: GPT2Tokenizer) -> None:
    assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.encode("<|endoftext|>", allow_special=True) == [50256]
    assert gpt2.encode("a<|endoftext|>b", allow_special=True) == [64, 50256, 65]
    assert gpt2.encode_batch(["<|endoftext|>"] * 2, allow_special=True) == [[50256], [50256]]
    assert gpt2.decode([64, 50256, 65]) == "a<|endoftext|>b"


def test_partial_characters_decode_to_replacement_characters(gpt2: GPT2Tokenizer) -> None:
    ids = gpt2.encode("😀")
    assert len(ids) > 1
    assert gpt2.decode(ids[:-1]) == "\ufffd"
    assert gpt2.decode_bytes(ids[:-1]) + gpt2.decode_bytes(ids[-1:]) == "😀".encode()


@pytest.mark.parametrize("bad", [-1, 50257, 2**31, 2**64, -(2**64)])
def test_an_id_outside_the_vocabulary_is_named(gpt2: GPT2Tokenizer, bad: int) -> None:
    for decode in (gpt2.decode, gpt2.decode_bytes):
        with pytest.raises(DataError) as e:
            decode([1, 2, bad])
        assert str(e.value) == (
            f"id {bad}, at place 2, is not in the vocabulary of this gpt2 tokenizer.\n"
            "  expected: ids from 0 to 50256"
        )


@pytest.mark.parametrize("character", [" ", "\n", "\xa0", "a", "^", "1", "中"])
def test_a_million_of_one_character(
    gpt2: GPT2Tokenizer, character: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """tiktoken alone panics on a million blanks before a word (its regular expressions' stack overflows)."""
    text = character * 1_000_001 + "x and more"
    assert gpt2.decode(gpt2.encode(text)) == text
    assert capfd.readouterr().err == ""


def test_empty_text(gpt2: GPT2Tokenizer) -> None:
    assert gpt2.encode("") == gpt2.encode("", allow_special=True) == []
    assert gpt2.encode_batch([]) == []
    assert gpt2.decode([]) == ""
