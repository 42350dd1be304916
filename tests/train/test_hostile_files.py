"""Checkpoints made to do harm: nothing in them is executed, followed or believed."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from regpt.errors import CheckpointError
from regpt.train import checkpoint
from regpt.train.checkpoint import newest_valid, read_checkpoint, save_checkpoint


class Payload:
    """Unpickled, this makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.canary),)


def header(document: Any, data: bytes = b"") -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**other: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | other


def torch_zip(canary: Path) -> bytes:
    made = io.BytesIO()
    torch.save({"w": Payload(canary)}, made)
    return made.getvalue()


def object_array(canary: Path) -> bytes:
    made = io.BytesIO()
    np.save(made, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    return made.getvalue()


def slippery_zip(canary: Path) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("../../" + canary.name, b"x")
    return made.getvalue()


TENSOR_FILES: dict[str, Any] = {
    "pickle": lambda canary: pickle.dumps(Payload(canary)),
    "old pickle": lambda canary: pickle.dumps(Payload(canary), protocol=0),
    "torch zip": torch_zip,
    "object array": object_array,
    "zip that climbs out": slippery_zip,
    "pickle behind a header": lambda canary: header({}, pickle.dumps(Payload(canary))),
    "empty": lambda _: b"",
    "seven bytes": lambda _: b"\x01" * 7,
    "header of 2^63 bytes": lambda _: struct.pack("<Q", 2**63) + b"{}",
    "header longer than the file": lambda _: struct.pack("<Q", 100) + b"{}",
    "header of zero bytes": lambda _: struct.pack("<Q", 0),
    "header of ten million entries": lambda _: header(b'{"":' * 10_000_000),
    "header of many entries, cut short": lambda _: header(
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]' % i for i in range(100_000))
    ),
    "nested without end": lambda _: header(b'{"a":' * 100_000),
    "not JSON": lambda _: header(b"__import__('os').mkdir('canary')"),
    "a list": lambda _: header([]),
    "NaN in a shape": lambda _: header(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
    "negative shape": lambda _: header({"w": entry(shape=[-2])}, bytes(8)),
    "enormous shape": lambda _: header({"w": entry(shape=[2**62, 2**62])}, bytes(8)),
    "shape that is text": lambda _: header({"w": entry(shape="2")}, bytes(8)),
    "unknown dtype": lambda _: header({"w": entry(dtype="OBJECT")}, bytes(8)),
    "offsets outside": lambda _: header({"w": entry(data_offsets=[0, 800])}, bytes(8)),
    "offsets backwards": lambda _: header({"w": entry(data_offsets=[8, 0])}, bytes(8)),
    "negative offsets": lambda _: header({"w": entry(data_offsets=[-8, 0])}, bytes(8)),
    "overlapping tensors": lambda _: header({"w": entry(), "v": entry()}, bytes(8)),
    "a hole between tensors": lambda _: header({"w": entry(), "v": entry(data_offsets=[16, 24])}, bytes(24)),
    "data that nobody names": lambda _: header({"w": entry()}, bytes(64)),
    "the same name twice": lambda _: header(
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        bytes(16),
    ),
    "YAML": lambda canary: f"!!python/object/apply:os.mkdir ['{canary}']".encode(),
}


def put(path: Path, name: str, data: bytes) -> None:
    """Replace a file and make the manifest agree, as somebody who means harm would."""
    (path / name).write_bytes(data)
    _, files = checkpoint._read_manifest(path)
    files[name] = (len(data), xxhash.xxh3_128_hexdigest(data))
    (path / "manifest.json").write_bytes(checkpoint._manifest_bytes(10, files))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good checkpoint, in a folder that is also the working directory."""
    monkeypatch.chdir(tmp_path)
    made = {"w": torch.ones(2)}
    return save_checkpoint(
        tmp_path / "c", step=10, model=made, optimizer={"w.exp_avg": torch.ones(2)}, state={}
    )


@pytest.mark.parametrize("case", TENSOR_FILES)
def test_a_tensor_file_executes_nothing_and_is_refused_in_words(
    case: str, path: Path, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    for name in ("model.safetensors", "optimizer.safetensors"):
        put(path, name, TENSOR_FILES[case](canary))
        found = read_checkpoint(path)  # the manifest is in order
        with pytest.raises(CheckpointError, match=f"{name} is not a safetensors file"):
            found.model_tensors() if name.startswith("model") else found.optimizer_tensors()
        put(path, name, header({}))
    assert sorted(os.listdir(tmp_path)) == ["c"]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 1_000_000,
        b'{"step":10,"state":{"x":NaN}}',
        b'{"step":10,"state":{"x":-Infinity}}',
        b'{"step":10,"state":{"x":1e999}}',
        b'{"step":10,"state":{"x":' + b"9" * 5000 + b"}}",
        b'{"step":11,"state":{}}',
        b'{"step":10,"state":[]}',
        b'{"step":10}',
        b'{"step":10,"state":{"x":"' + b"a" * (9 << 20) + b'"}}',
        b"!!python/object/apply:os.mkdir ['canary']",
    ],
    ids=range(14),
)
def test_a_state_file_is_refused_in_words(text: bytes, path: Path, tmp_path: Path) -> None:
    put(path, "state.json", text)
    with pytest.raises(CheckpointError, match=r"state.json"):
        read_checkpoint(path)
    assert sorted(os.listdir(tmp_path)) == ["c"]


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "..", ".", "", "sub/file", "c:\\x", "a\0b", "extra.bin"]
)
def test_a_manifest_cannot_name_files_elsewhere(name: str, path: Path, tmp_path: Path) -> None:
    (tmp_path / "c" / "outside").write_bytes(b"x")
    _, files = checkpoint._read_manifest(path)
    files[name] = (1, xxhash.xxh3_128_hexdigest(b"x"))
    (path / "manifest.json").write_bytes(checkpoint._manifest_bytes(10, files))
    with pytest.raises(CheckpointError, match="names a file that no checkpoint has") as caught:
        read_checkpoint(path)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_links_are_not_followed(name: str, path: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (path / name).rename(outside)
    (path / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link"):
        read_checkpoint(path)
    (path / name).unlink()
    (path / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link"):
        read_checkpoint(path)


def test_a_link_set_aside_leaves_what_it_points_to(path: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="none is valid"):
        newest_valid(path.parent, say=lambda _: None)
    assert sorted(os.listdir(elsewhere)) == sorted(
        ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    )


def test_leftover_links_are_removed_and_not_followed(path: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_bytes(b"x")
    for name in (".tmp-x", ".trash-x"):
        (path.parent / name).symlink_to(precious)
    (path / "nested").symlink_to(precious)
    checkpoint._remove(path)
    newest_valid(path.parent, say=lambda _: None)
    assert os.listdir(path.parent) == [] and os.listdir(precious) == ["file"]
