"""Shards of chosen ids, without text or tokenizer; a hub of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest
import xxhash

import regpt.data.hub
from regpt.data.shards import MANIFEST, Manifest, ShardFile, Shards, SourceFacts, SplitFacts, TokenizerFacts

if TYPE_CHECKING:
    from hub_server import HubServer

MakeShards = Callable[..., Shards]


@pytest.fixture
def make_shards(tmp_path_factory: pytest.TempPathFactory) -> MakeShards:
    """make_shards(ids, shard_tokens=None, ends=None, vocab_size=None) -> Shards with one split, train."""

    def make(
        ids: Sequence[int],
        *,
        shard_tokens: int | None = None,
        ends: Sequence[int] | None = None,
        vocab_size: int = 50257,
    ) -> Shards:
        path = tmp_path_factory.mktemp("shards")
        dtype = np.dtype("<u2" if vocab_size <= 65536 else "<u4")
        every = np.array(ids, dtype=dtype)
        stops = np.array([len(every)] if ends is None else ends, dtype="<u8")
        size = shard_tokens or len(every)
        files = []
        for number, start in enumerate(range(0, len(every), size)):
            part = every[start : start + size]
            inside = stops[(stops > start) & (stops <= start + len(part))] - start
            name = f"train-{number:05d}.bin"
            (path / name).write_bytes(part.tobytes())
            (path / name).with_suffix(".idx").write_bytes(inside.astype("<u8").tobytes())
            hashes = (xxhash.xxh3_128_hexdigest(part.tobytes()), xxhash.xxh3_128_hexdigest(inside.tobytes()))
            files.append(ShardFile(name, "train", len(part), len(inside), part.nbytes, *hashes))
        manifest = Manifest(
            tokenizer=TokenizerFacts("bytes", "f" * 64, vocab_size, int(every[-1])),
            max_id=int(every.max()),
            dtype=dtype.name,
            source=SourceFacts("made", "made", "0"),
            val_source=None,
            request={},
            splits={"train": SplitFacts(len(every), len(stops), len(every), len(every))},
            files=tuple(files),
            skipped={},
        )
        (path / MANIFEST).write_text(manifest.to_json())
        return Shards.open(path)

    return make


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """What would have been waited, in seconds; no time passes."""
    waited: list[float] = []
    monkeypatch.setattr(regpt.data.hub, "sleep", waited.append)
    return waited


@pytest.fixture
def hub(tmp_path, monkeypatch, slept) -> Iterator[HubServer]:
    """The server, as the hub that regpt asks; an empty cache; in an empty folder."""
    pytest.importorskip("pyarrow")  # what makes its files
    from hub_server import hub_server

    for name in ("http_proxy", "HTTP_PROXY", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
