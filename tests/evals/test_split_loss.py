"""The loss over a split: against Hugging Face, window by window, under any batch size, stride and number of ranks."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_likelihood import SHAPES, made
from torch import Tensor

from harness import as_hugging_face
from regpt.config import ModelConfig, ModernConfig
from regpt.data.prepare import prepare
from regpt.data.shards import Shards
from regpt.data.sources import open_source
from regpt.data.split import IdsFile, TokenSplit
from regpt.errors import ConfigError, DataError
from regpt.evals.loss import TextSplit, split_loss
from regpt.tokenizers.bytes import ByteTokenizer
from regpt.train.dist import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, CONTEXT = 211, 48


def split_of(folder: Path, tokens: int, source_bytes: int = 1234) -> TokenSplit:
    ids = np.random.default_rng(0).integers(0, VOCAB, tokens).astype("<u2")
    (folder / "ids.bin").write_bytes(ids.tobytes())
    files = [IdsFile(folder / "ids.bin", 0, tokens, np.dtype("<u2"))]
    return TokenSplit(
        "val", files, document_ends=lambda: np.array([tokens]), source_bytes=lambda: source_bytes
    )


def by_hand(logits_of: Any, ids: Tensor, context: int, stride: int) -> tuple[float, int]:
    """Target by target: the window that scores it, its own pass."""
    total, count, begin = 0.0, 0, 0
    for target in range(1, len(ids)):
        while target > begin + context:
            begin += stride
        with torch.no_grad():
            logits = logits_of(ids[None, begin:target])[0, -1, :VOCAB].double()
        total, count = total + float(F.cross_entropy(logits, ids[target])), count + 1
    return total / count, count


@pytest.mark.parametrize(
    ("context", "stride"), [(None, None), (16, None), (16, 5), (48, 1), (20, 20), (7, 6)]
)
def test_equals_hugging_face_target_by_target(
    context: int | None, stride: int | None, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    ours = made(SHAPES["gpt2"])
    theirs = as_hugging_face(ours)
    split = split_of(tmp_path, 150)
    expected, count = by_hand(
        lambda ids: theirs(ids).logits,
        torch.from_numpy(split.read(0, 150)),
        context or CONTEXT,
        stride or context or CONTEXT,
    )
    for rows in (1, 3, 100):
        found = split_loss(ours, split, rows=rows, context=context, stride=stride)
        assert found.nats == pytest.approx(expected, rel=1e-6) and found.tokens == count == 149
        assert found.bits_per_byte == pytest.approx(expected * 149 / math.log(2) / 1234, rel=1e-6)
        assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


@pytest.mark.parametrize("stride", [None, 11])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_it_to_the_bit(stride: int | None, world: int, tmp_path: Path) -> None:
    model, split = made(SHAPES["modern"]), split_of(tmp_path, 500)
    alone = split_loss(model, split, rows=2, stride=stride)
    shares: list[Tensor] = []

    class Telling(Ranks):
        """Keeps what it would send."""

        def gathered(self, values: Tensor) -> list[Tensor]:
            shares.append(values)
            return [values]

        def total(self, values: Tensor) -> Tensor:
            return values

    for rank in range(world):
        split_loss(model, split, rows=2, stride=stride, ranks=Telling(rank=rank, world=world))
    assert len({len(share) for share in shares}) == 1  # all make equally many passes
    total = sum(torch.stack(shares, dim=1).flatten().tolist())
    assert total / 499 == alone.nats


def test_rotary_positions_go_on_beyond_the_context(tmp_path: Path) -> None:
    """As the same weights in a model that was built with the longer context."""
    config = ModelConfig(
        arch="modern", n_layer=2, n_head=2, n_embd=32, block_size=24, modern=ModernConfig(window=9)
    )
    longer = ModelConfig(
        arch="modern", n_layer=2, n_head=2, n_embd=32, block_size=60, modern=ModernConfig(window=9)
    )
    model, large = made(config), made(longer)
    large.load_state_dict(model.state_dict())
    split = split_of(tmp_path, 200)
    found = split_loss(model, split, rows=2, context=60, stride=30)
    assert found == split_loss(large, split, rows=2, stride=30)
    assert model.config.block_size == 24 and model.turns.shape[1] == 24
    with pytest.raises(ConfigError, match="do not fit the model's context of 24"):
        model(torch.zeros(1, 60, dtype=torch.int64))


@pytest.mark.parametrize(
    ("context", "stride", "message"),
    [
        (49, None, "--context 49 does not fit the model: its positions are learned, and end there.\n"
                   "  expected: 1 to 48\n  try: --context 48"),
        (0, None, "--context 0 does not fit the model: a window needs a token."),
        (16, 17, "--stride 17 is out of range.\n  expected: 1 to the context, 16"),
        (16, 0, "--stride 0 is out of range."),
    ],
)  # fmt: skip
def test_windows_that_the_model_cannot_see_are_refused(
    context: int, stride: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        split_loss(made(SHAPES["gpt2"]), split_of(tmp_path, 100), rows=2, context=context, stride=stride)
    assert str(caught.value).startswith(message)


def test_a_model_whose_positions_go_on_has_no_largest_window(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        split_loss(made(SHAPES["modern"]), split_of(tmp_path, 100), rows=2, context=0)
    assert "expected: 1 or more; positions go on beyond the 48 of training" in str(caught.value)


@pytest.mark.parametrize("name", ["one.txt", "several.txt", "rows.jsonl", "rows.jsonl.gz"])
def test_a_text_file_is_read_as_prepare_reads_it(name: str, tmp_path: Path) -> None:
    """Ids, documents and bytes of the shards that `regpt prepare` makes of it."""
    texts = ["Little ducks went out.\nOver the hills", "ein Löwe 漢\n\n", " \n", "and far away. " * 40]
    rows = "".join(json.dumps({"text": text, "nope": "x"}) + "\n" for text in texts).encode()
    content = {
        "one.txt": "".join(texts).encode(),
        "several.txt": "\n<|endoftext|>\n".join(texts).encode(),
        "rows.jsonl": rows,
        "rows.jsonl.gz": gzip.compress(rows),
    }
    path, tokenizer = tmp_path / name, ByteTokenizer()
    path.write_bytes(content[name])
    prepare(open_source(str(path)), tokenizer, tmp_path / "shards", val_fraction=0.0)
    expected = Shards.open(tmp_path / "shards").split("train")
    found = TextSplit(path, tokenizer)
    assert found.n_tokens == expected.n_tokens > 100 and found.name == name
    assert (found.read(0, found.n_tokens) == expected.read(0, expected.n_tokens)).all()
    assert found.document_ends.tolist() == expected.document_ends.tolist()
    assert found.source_bytes == expected.source_bytes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "FILE is empty.\n  got: skipped: 1 empty\n  expected: text"),
        ("a.txt", b" \n", "FILE is empty.\n  got: skipped: 1 empty\n  expected: text"),
        ("a.txt", b"\0\0", "FILE is empty.\n  got: skipped: 1 binary"),
        ("a.jsonl", b'{"txt": "a"}\n', "FILE:1 has no field 'text'."),
    ],
)
def test_a_text_file_without_text_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        TextSplit(path, ByteTokenizer())
    assert str(caught.value).startswith(message.replace("FILE", str(path)))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        split_loss(made(SHAPES["gpt2"]), split_of(tmp_path, 1), rows=2)
    assert str(caught.value) == "the split val has no target.\n  got: 1 tokens\n  expected: at least 2"
