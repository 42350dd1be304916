"""Checkpoints: bitwise round trips, every kind of damage noticed and named, retention that cannot lose work."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regpt.errors import CheckpointError
from regpt.train import checkpoint, durable
from regpt.train.checkpoint import (
    DamagedCheckpoint,
    SaveFailed,
    list_checkpoints,
    newest_valid,
    prune,
    read_checkpoint,
    save_checkpoint,
)

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
STATE = {"tokens": 12, "best_step": 3, "best_val_loss": 0.1 + 0.2, "scaler": {}, "list": [1, None, "é", True]}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(5, 3, generator=g) for name in ("wte.weight", "h.0.mlp.c_fc.weight")}


def save(folder: Path, step: int) -> Path:
    return save_checkpoint(
        folder, step=step, model=tensors(step), optimizer=tensors(-step), state={**STATE, "at": step}
    )


def silent(text: str) -> None:
    raise AssertionError(f"nothing was to be said, but: {text}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved once, since to sync takes time."""
    where = tmp_path_factory.mktemp("saved")
    for step in (10, 20, 30):
        save(where, step)
    return where


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Three good checkpoints, in a path with a space and an umlaut."""
    return Path(shutil.copytree(saved, tmp_path / "mein läuf" / "checkpoints"))


# --- what is saved comes back ------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_to_the_bit(folder: Path) -> None:
    found = newest_valid(folder, say=silent)
    assert found is not None and found.step == 30 and found.path == folder / "step-000030"
    assert found.state == {**STATE, "at": 30}
    assert all(torch.equal(t, tensors(30)[name]) for name, t in found.model_tensors().items())
    restored = found.optimizer_tensors()
    assert restored is not None and restored.keys() == tensors(0).keys()
    assert all(torch.equal(t, tensors(-30)[name]) for name, t in restored.items())
    assert sorted(os.listdir(found.path)) == sorted(FILES)


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=30, deadline=None)
def test_floats_survive_exactly(value: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        save_checkpoint(Path(name), step=1, model={}, optimizer=None, state={"x": value})
        back = read_checkpoint(Path(name) / "step-000001").state["x"]
    assert back.hex() == value.hex()


def test_weights_only_has_no_optimizer(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, step=7, model=tensors(1), optimizer=None, state={})
    assert read_checkpoint(path).optimizer_tensors() is None
    assert not (path / "optimizer.safetensors").exists()


def test_our_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    """Every dtype, scalars, empty tensors and views, read by the library; offsets aligned as it aligns them."""
    made = {
        f"{dtype}".removeprefix("torch."): torch.arange(6).to(dtype).reshape(2, 3)
        for dtype in checkpoint.DTYPES
    }
    made |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "ünï.code": torch.ones(1)}
    made |= {"view": torch.arange(12.0).reshape(3, 4).T[1:, ::2]}
    path = save_checkpoint(tmp_path, step=1, model=made, optimizer=None, state={})
    library = safetensors.torch.load_file(path / "model.safetensors")
    ours = read_checkpoint(path).model_tensors()
    assert library.keys() == ours.keys() == made.keys()
    for name, t in made.items():
        assert library[name].dtype == ours[name].dtype == t.dtype
        assert torch.equal(library[name], t) and torch.equal(ours[name], t)


def test_what_safetensors_writes_we_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(tensors(4), tmp_path / "other.safetensors")
    ours = checkpoint.read_tensors(tmp_path / "other.safetensors")
    assert all(torch.equal(t, tensors(4)[name]) for name, t in ours.items())


def test_tensors_read_do_not_depend_on_the_file(folder: Path) -> None:
    """A checkpoint may be pruned while its tensors are in use."""
    found = read_checkpoint(folder / "step-000010")
    loaded = found.model_tensors()
    with open(found.path / "model.safetensors", "r+b") as file:
        file.truncate(0)
    assert all(torch.equal(t, tensors(10)[name]) for name, t in loaded.items())


def test_saving_works_in_a_thread(tmp_path: Path) -> None:
    thread = threading.Thread(target=save, args=(tmp_path, 5))
    thread.start()
    thread.join()
    assert read_checkpoint(tmp_path / "step-000005").step == 5


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    save_checkpoint(folder, step=30, model=tensors(99), optimizer=None, state={})
    found = newest_valid(folder, say=silent)
    assert found is not None and torch.equal(found.model_tensors()["wte.weight"], tensors(99)["wte.weight"])
    assert sorted(os.listdir(folder)) == ["step-000010", "step-000020", "step-000030"]


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"best": {"val_loss": math.nan}}, "state.best.val_loss is nan"),
        ({"a": [0, math.inf]}, r"state.a\[1\] is inf"),
        ({"a": {1: 2}}, "state.a has the key 1"),
        ({"a": (1, 2)}, "state.a is of type tuple"),
        ({"a": torch.ones(1)}, "state.a is of type Tensor"),
    ],
)
def test_state_that_json_cannot_hold_is_refused(tmp_path: Path, state: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        save_checkpoint(tmp_path / "c", step=1, model={}, optimizer=None, state=state)
    assert not (tmp_path / "c").exists()


def test_a_dtype_that_the_format_lacks_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"odd has a dtype .*complex64"):
        save_checkpoint(tmp_path, step=1, model={"odd": torch.ones(1) * 1j}, optimizer=None, state={})
    assert os.listdir(tmp_path) == []


# --- order of system calls ---------------------------------------------------------------------------------------


def test_files_are_synced_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for a power loss: what is not synced in this order could vanish under a name that says finished."""
    calls: list[tuple[str, Any]] = []
    real = {name: getattr(os, name) for name in ("write", "fsync", "rename")}

    def by_inode(name: str) -> Callable[..., Any]:
        def call(fd: int, *rest: Any) -> Any:
            calls.append((name, os.fstat(fd).st_ino))
            return real[name](fd, *rest)

        return call

    def rename(src: Path, dst: Path) -> None:
        calls.append(("rename", Path(dst).name))
        real["rename"](src, dst)

    for name in ("write", "fsync"):
        monkeypatch.setattr(os, name, by_inode(name))
    monkeypatch.setattr(os, "rename", rename)
    path = save(tmp_path / "run" / "checkpoints", 10)
    monkeypatch.undo()

    named = calls.index(("rename", path.name))
    synced: dict[str, int] = {}
    for name in FILES:
        inode = (path / name).stat().st_ino
        last_write = max(i for i, call in enumerate(calls) if call == ("write", inode))
        synced[name] = calls.index(("fsync", inode), last_write)
        assert synced[name] < named
    first_manifest_write = calls.index(("write", (path / "manifest.json").stat().st_ino))
    assert max(synced[name] for name in FILES[:3]) < first_manifest_write
    assert synced["manifest.json"] < calls.index(("fsync", path.stat().st_ino)) < named
    assert named < calls.index(("fsync", path.parent.stat().st_ino), named)
    assert ("fsync", path.parent.parent.stat().st_ino) in calls[:named]  # checkpoints/ itself was new


# --- damage ------------------------------------------------------------------------------------------------------


def test_any_flipped_bit_is_noticed_and_the_file_named(folder: Path) -> None:
    """200 positions over all four files; neither torch nor safetensors nor DCP would say a word."""
    rng, path = random.Random(5), folder / "step-000030"
    for case in range(200):
        file = path / FILES[case % 4]
        whole = file.read_bytes()
        position, bit = rng.randrange(len(whole)), rng.randrange(8)
        flipped = whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :]
        file.write_bytes(flipped)
        with pytest.raises(DamagedCheckpoint) as caught:
            read_checkpoint(path)
        assert file.name in str(caught.value), f"byte {position}, bit {bit} of {file.name}"
        file.write_bytes(whole)
    assert read_checkpoint(path).step == 30


def truncate(path: Path, name: str) -> None:
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: len(data) // 2])


def extend(path: Path, name: str) -> None:
    with open(path / name, "ab") as file:
        file.write(b"\0")


def empty(path: Path, name: str) -> None:
    (path / name).write_bytes(b"")


def zero_page(path: Path, name: str) -> None:
    data = (path / name).read_bytes()
    (path / name).write_bytes(bytes(min(64, len(data))) + data[64:])


def delete(path: Path, name: str) -> None:
    (path / name).unlink()


def take_from_another_step(path: Path, name: str) -> None:
    shutil.copy(path.parent / "step-000020" / name, path / name)


def become_a_folder(path: Path, name: str) -> None:
    (path / name).unlink()
    (path / name).mkdir()


def become_a_link(path: Path, name: str) -> None:
    (path / name).unlink()
    (path / name).symlink_to(path.parent / "step-000030" / name)


def become_a_pipe(path: Path, name: str) -> None:
    (path / name).unlink()
    os.mkfifo(path / name)


DAMAGES = (
    *(truncate, extend, empty, zero_page, delete, take_from_another_step),
    *(become_a_folder, become_a_link, become_a_pipe),
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_is_named_set_aside_and_the_one_before_is_used(
    folder: Path, damage: Callable[[Path, str], None], name: str
) -> None:
    damage(folder / "step-000030", name)
    said: list[str] = []
    found = newest_valid(folder, say=said.append)
    assert found is not None and found.step == 20
    assert all(torch.equal(t, tensors(20)[n]) for n, t in found.model_tensors().items())
    assert len(said) == 1 and "corrupt-step-000030-1" in said[0]
    # A manifest of another step is itself whole; the first file that it does not fit is named then.
    assert name in said[0] or (name == "manifest.json" and "step-000030" in said[0])
    assert sorted(os.listdir(folder)) == ["corrupt-step-000030-1", "step-000010", "step-000020"]
    assert newest_valid(folder, say=silent) is not None


def test_an_extra_file_is_noticed_but_not_the_systems_own(folder: Path) -> None:
    (folder / "step-000030" / ".DS_Store").write_bytes(b"\0")
    read_checkpoint(folder / "step-000030")
    (folder / "step-000030" / "extra.safetensors").write_bytes(b"\0")
    with pytest.raises(DamagedCheckpoint, match=r"extra.safetensors is not in the manifest"):
        read_checkpoint(folder / "step-000030")


def test_a_renamed_checkpoint_does_not_pass_for_another_step(folder: Path) -> None:
    (folder / "step-000030").rename(folder / "step-000040")
    with pytest.raises(DamagedCheckpoint, match="belongs to another checkpoint"):
        read_checkpoint(folder / "step-000040")
    (folder / "step-000040").rename(folder / "my favourite")
    assert read_checkpoint(folder / "my favourite").step == 30


@pytest.mark.parametrize(
    "make", [lambda p: p.write_bytes(b"x"), lambda p: p.symlink_to("step-000020"), os.mkdir]
)
def test_other_things_with_a_checkpoints_name_are_set_aside(
    folder: Path, make: Callable[[Path], None]
) -> None:
    make(folder / "step-000040")
    said: list[str] = []
    found = newest_valid(folder, say=said.append)
    assert found is not None and found.step == 30 and len(said) == 1
    assert (folder / "step-000020").is_dir()


def test_none_valid_is_an_error_and_stays_one(folder: Path) -> None:
    """Never a silent new start, not even when the command is given again."""
    for path in list_checkpoints(folder):
        truncate(path, "model.safetensors")
    said: list[str] = []
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"none is valid: corrupt-step-000010-1, corr.*") as caught:
            newest_valid(folder, say=said.append)
        assert "--fresh" in str(caught.value)
    assert len(said) == 3


def test_no_checkpoint_yet_is_none(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "none", say=silent) is None
    assert newest_valid(tmp_path, say=silent) is None


def test_the_order_is_by_step_not_by_clock_or_text(folder: Path) -> None:
    save(folder, 1_000_000)
    os.utime(folder / "step-000010", (2**31, 2**31))
    os.utime(folder / "step-1000000", (1, 1))
    assert [p.name for p in list_checkpoints(folder)][-2:] == ["step-000030", "step-1000000"]
    found = newest_valid(folder, say=silent)
    assert found is not None and found.step == 1_000_000


def test_leftovers_of_dead_processes_are_removed(folder: Path) -> None:
    for name in (".tmp-step-000040-4711", ".trash-step-000005", ".replaced-step-000030"):
        shutil.copytree(folder / "step-000020", folder / name)
    newest_valid(folder, say=silent)
    assert sorted(os.listdir(folder)) == ["step-000010", "step-000020", "step-000030"]


def test_a_newer_format_is_said_and_not_set_aside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save(folder, 40)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="does not read") as caught:
        newest_valid(folder, say=silent)
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert (folder / "step-000040").exists()


def test_a_file_that_may_not_be_read_is_not_taken_for_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "_hash", refuse)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors cannot be read: Permission denied"
    ) as caught:
        newest_valid(folder, say=silent)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_a_broken_disk_is_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint._hash

    def broken(path: Path) -> str:
        if path.parent.name == "step-000030":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(checkpoint, "_hash", broken)
    said: list[str] = []
    found = newest_valid(folder, say=said.append)
    assert found is not None and found.step == 20 and "Input/output error" in said[0]


def test_without_verification_only_names_sizes_and_state_are_checked(folder: Path) -> None:
    path = folder / "step-000030"
    zero_page(path, "optimizer.safetensors")
    assert read_checkpoint(path, verify=False).step == 30
    assert read_checkpoint(path, optimizer=False).step == 30
    zero_page(path, "model.safetensors")
    assert read_checkpoint(path, verify=False).step == 30
    with pytest.raises(DamagedCheckpoint, match=r"model.safetensors has changed"):
        read_checkpoint(path, optimizer=False)
    truncate(path, "optimizer.safetensors")
    with pytest.raises(DamagedCheckpoint, match=r"optimizer.safetensors has the wrong size"):
        read_checkpoint(path, verify=False)


# --- space -------------------------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(folder))(10**9, 10**9 - 2**20, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(durable, "write_synced", lambda *_: pytest.fail("something was written"))
    with pytest.raises(
        SaveFailed, match=r"no space for a checkpoint.\n  got: 1.0 MB free\n  expected: 1.0"
    ) as e:
        save(folder, 40)
    assert e.value.no_space and len(os.listdir(folder)) == 3


# --- retention ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten checkpoints to copy from."""
    folder = tmp_path_factory.mktemp("template")
    for step in range(1, 11):
        save_checkpoint(folder, step=step, model={"w": torch.ones(2)}, optimizer=None, state={})
    return folder


@given(
    health=st.dictionaries(st.integers(1, 10), st.booleans(), max_size=8),
    keep=st.integers(-1, 4),
    best=st.none() | st.integers(1, 10),
)
@settings(max_examples=80, deadline=None)
def test_retention(template: Path, health: dict[int, bool], keep: int, best: int | None) -> None:
    """The newest `keep` good ones and the best stay, the last good one always; only older ones go."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step, good in health.items():
            path = folder / f"step-{step:06d}"
            shutil.copytree(template / path.name, path)
            if not good:
                zero_page(path, "model.safetensors")
        gone = {checkpoint.checkpoint_step(p) for p in prune(folder, keep=keep, best=best)}
        left = {checkpoint.checkpoint_step(p) for p in list_checkpoints(folder)}
        good_steps = sorted((s for s, ok in health.items() if ok), reverse=True)
        kept = good_steps[: max(keep, 1)]
        assert left | gone == health.keys() and not left & gone
        assert set(kept) <= left
        assert best not in gone
        assert not gone or (len(kept) == max(keep, 1) and all(s < min(kept) for s in gone if s))
        if len(kept) == max(keep, 1):
            assert all(s in gone for s in health if s < min(kept) and s != best)
        assert len(os.listdir(folder)) == len(left)
        assert prune(folder, keep=keep, best=best) == []


def test_pruning_does_not_hash_again_what_this_process_wrote(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = checkpoint._hash
    monkeypatch.setattr(checkpoint, "_hash", lambda path: hashed.append(path.name) or real(path))
    prune(folder, keep=2)
    assert hashed.count("model.safetensors") == 2  # another process wrote them
    save(folder, 40)
    prune(folder, keep=2)
    assert hashed.count("model.safetensors") == 2 and len(list_checkpoints(folder)) == 2


def test_a_checkpoint_that_lost_a_file_after_it_was_written_does_not_count(folder: Path) -> None:
    delete(folder / "step-000030", "model.safetensors")
    assert prune(folder, keep=1) == [folder / "step-000010"]
    assert {p.name for p in list_checkpoints(folder)} == {"step-000020", "step-000030"}


# --- what others may have written --------------------------------------------------------------------------------


def test_wrong_json_types_are_refused(folder: Path) -> None:
    """A manifest whose own hash is right, but which is not what we write."""

    path = folder / "step-000030"
    good = json.loads((path / "manifest.json").read_text())
    del good["xxh3_128"]
    entry = good["files"]["state.json"]
    wrong: list[Any] = [
        good | {"step": "30"},
        good | {"step": True},
        good | {"step": None},
        good | {"files": []},
        good | {"files": {}},
        good | {"files": good["files"] | {"state.json": None}},
        good | {"files": good["files"] | {"state.json": entry | {"bytes": "9"}}},
        good | {"files": good["files"] | {"state.json": {"bytes": 9}}},
        *(
            good | {"files": good["files"] | {name: entry}}
            for name in ("../x", "/etc/passwd", "..", "a/b", "a\\b")
        ),
        *(good | {"files": {k: v for k, v in good["files"].items() if k != name}} for name in FILES[:3]),
    ]
    for document in wrong:
        (path / "manifest.json").write_bytes(durable.json_bytes(durable.sealed(document)))
        with pytest.raises(DamagedCheckpoint, match=path.name):
            read_checkpoint(path)
    for text in (
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b"1" * 10_000,
    ):
        (path / "manifest.json").write_bytes(text)
        with pytest.raises(DamagedCheckpoint, match=r"manifest.json"):
            read_checkpoint(path)
