"""Corpora through gigatoken: the ids of tiktoken, a sample compared in every process, and a way out."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from sample_texts import FUZZ, HOSTILE, RHYME, plain_texts

from regpt.errors import ConfigError, DataError, DeviceError
from regpt.tokenizers import fast
from regpt.tokenizers.bpe import BPETokenizer, train_bpe
from regpt.tokenizers.gpt2 import GPT2Tokenizer
from regpt.tokenizers.patterns import PATTERNS


@pytest.fixture
def with_gigatoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped where it is not installed."""
    pytest.importorskip("gigatoken")
    monkeypatch.setenv(fast.VARIABLE, "gigatoken")


@pytest.fixture(scope="module")
def four() -> BPETokenizer:
    return train_bpe([RHYME * 3, "x  =\n\n  1\n;\n\n" * 9], 400, pattern="gpt4", special_tokens=["<|a|>"])


@pytest.mark.usefixtures("with_gigatoken")
def test_equal_ids_on_real_texts(gpt2: GPT2Tokenizer, four: BPETokenizer, test_data: Path) -> None:
    """The whole of each text, in one go and in many."""
    for tokenizer in (pickle.loads(pickle.dumps(gpt2)), four):  # noqa: S301
        for text in plain_texts(test_data).values():
            text = text[:300_000] + "<|endoftext|><|a|>"
            ids = tokenizer.encode_array(text)
            assert ids.dtype == np.uint32 and ids.tolist() == tokenizer.encode(text)
        assert tokenizer._fast._engine is not None


@pytest.mark.usefixtures("with_gigatoken")
@FUZZ
@given(text=HOSTILE)
def test_equal_ids_on_fuzzed_texts(small_bpe: BPETokenizer, four: BPETokenizer, text: str) -> None:
    for tokenizer in (small_bpe, four):
        assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)


class Engine:
    """Ids of code points, wrong from a given text on."""

    wrong_from = 10**9

    def __init__(self) -> None:
        self.texts = 0

    def encode(self, text: str) -> np.ndarray:
        self.texts += 1
        ids = np.array([ord(c) for c in text], dtype=np.uint32)
        if self.texts > self.wrong_from:
            ids[-1] += 1
        return ids


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Every engine that is made in place of gigatoken's."""
    engines: list[Engine] = []
    monkeypatch.setattr(fast, "backend", lambda: "gigatoken")

    def load(content: bytes) -> Engine:
        engines.append(Engine())
        return engines[-1]

    module = SimpleNamespace(load_hf_json=load)
    monkeypatch.setitem(sys.modules, "gigatoken", SimpleNamespace(gigatoken_rs=module))
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", module)
    return engines


def encoder(compared: list[str]) -> fast.FastEncoder:
    def plainly(text: str) -> np.ndarray:
        compared.append(text)
        return np.array([ord(c) for c in text], dtype=np.uint32)

    return fast.FastEncoder([("a", "b")], "gpt2", plainly, lambda ids: "".join(map(chr, ids)).encode())


def test_the_first_texts_are_all_compared_and_then_one_in_a_hundred(made: list[Engine]) -> None:
    compared: list[str] = []
    mine = encoder(compared)
    text = "x" * 1024
    for _ in range(256):
        mine.encode(text)
    assert len(compared) == 256
    for _ in range(5000):
        mine.encode(text)
    assert 20 < len(compared) - 256 < 90


@pytest.mark.parametrize("wrong_from", [0, 3, 1000])
def test_an_id_that_differs_stops_the_work(
    made: list[Engine], wrong_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it comes late: then within some hundred texts."""
    monkeypatch.setattr(Engine, "wrong_from", wrong_from)
    mine = encoder([])
    with pytest.raises(DataError) as e:
        for _ in range(wrong_from + 1000):
            mine.encode("ä" + "y" * 2000 + "é")
    assert e.value.what == (
        "gigatoken and tiktoken do not agree on the ids of a text, from character 2001 on: '"
        + "y" * 40
        + "é'"
    )
    assert (e.value.got, e.value.expected) == ("[234] by gigatoken", "[233] by tiktoken")
    assert (
        e.value.hint
        == "REGPT_TOKENIZER_BACKEND=tiktoken in the environment: slower, and what defines the ids"
    )


def test_a_shorter_answer_is_a_difference(made: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    mine = encoder([])
    monkeypatch.setattr(Engine, "encode", lambda self, text: np.array([97], dtype=np.uint32))
    with pytest.raises(DataError, match="from character 1 on"):
        mine.encode("ab")


def test_it_is_made_anew_now_and_then(made: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps every word that it has seen."""
    monkeypatch.setattr(fast, "REMADE_AFTER", 1000)
    mine = encoder([])
    for _ in range(40):
        mine.encode("z" * 100)
    assert [e.texts for e in made] == [10] * 4


def test_a_fault_in_rust_is_one_message(made: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3 raises it."""

    def panic(self: Engine, text: str) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(Engine, "encode", panic)
    with pytest.raises(DataError, match="gigatoken failed: index out of bounds") as e:
        encoder([]).encode("abc")
    assert e.value.hint is not None and e.value.hint.startswith("REGPT_TOKENIZER_BACKEND=tiktoken")


def test_what_gigatoken_does_not_take_is_left_to_tiktoken(
    made: list[Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(content: bytes) -> None:
        raise ValueError("Unknown pre_tokenizer")

    monkeypatch.setattr(sys.modules["gigatoken.gigatoken_rs"], "load_hf_json", refuse)
    compared: list[str] = []
    mine = encoder(compared)
    for _ in range(3):
        assert mine.encode("ab").tolist() == [97, 98]
    assert len(compared) == 3
    assert caplog.messages == [
        "gigatoken is installed and cannot be used (Unknown pre_tokenizer); tiktoken encodes instead"
    ]


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv(fast.VARIABLE, raising=False)
    assert fast.backend() == "tiktoken"
    monkeypatch.setenv(fast.VARIABLE, "gigatoken")
    with pytest.raises(DeviceError, match="REGPT_TOKENIZER_BACKEND=gigatoken needs the package gigatoken"):
        fast.backend()
    monkeypatch.setenv(fast.VARIABLE, "fast")
    with pytest.raises(ConfigError, match="REGPT_TOKENIZER_BACKEND is unknown"):
        fast.backend()
    monkeypatch.setattr(fast.importlib.util, "find_spec", lambda name: object())
    for asked, found in (("", "gigatoken"), ("auto", "gigatoken"), ("tiktoken", "tiktoken")):
        monkeypatch.setenv(fast.VARIABLE, asked)
        assert fast.backend() == found


@pytest.mark.slow
@pytest.mark.usefixtures("with_gigatoken")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_code_point_in_every_company(gpt2: GPT2Tokenizer, pattern: str) -> None:
    """Between letters, digits, blanks, punctuation, line ends and at the end: two Unicode tables that must agree."""
    tokenizer = BPETokenizer(gpt2.merges, pattern=pattern)
    for c in map(chr, [*range(0xD800), *range(0xE000, 0x110000)]):
        text = f"a{c}b {c} 1{c}{c}2{c} !{c}\n{c}x '{c} {c}{c}the{c}\r\n\n {c}"
        assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text), hex(ord(c))
