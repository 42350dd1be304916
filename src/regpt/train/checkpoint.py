"""Checkpoints: directories of safetensors and JSON that are whole and verified, or not there at all.

    checkpoints/step-000250/  model.safetensors  optimizer.safetensors  state.json  manifest.json

Saving writes into a temporary directory, syncs every file, writes the manifest with the size and xxh3_128 of
every other file, and renames the directory into place. So a name `step-NNNNNN` always stands for a finished
checkpoint, and a bit that flips later is noticed on loading. Nothing here unpickles what it reads.

Names that begin with a dot are work under way or its leftovers; `corrupt-…` are damaged, kept for a person.
Whoever saves, prunes or calls `newest_valid` holds the run's lock (`train/run.py`); reading needs none.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import stat
import struct
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import xxhash
from torch import Tensor

from regpt.errors import CheckpointError
from regpt.train.durable import (
    CHUNK_BYTES,
    json_bytes,
    make_folder,
    sealed,
    sync_folder,
    unsealed,
    write_synced,
)

FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MANIFEST = "manifest.json"
TEMPORARY, TRASH, REPLACED, CORRUPT = ".tmp-", ".trash-", ".replaced-", "corrupt-"
MAX_JSON_BYTES = 8 << 20  # ours are some hundred KB at 1.5 B parameters; more is not ours, and slow to parse
SPACE_MARGIN_BYTES = 1 << 20  # for state, manifest and the file system's own blocks
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
DAMAGE = (errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # other OSErrors say nothing about the file
DTYPES = {  # as the safetensors format calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# What this process wrote or verified, with its manifest's inode and time: not hashed again to be counted.
_known_good: dict[Path, tuple[int, int]] = {}


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not as it was written: its files are missing, changed, or of another checkpoint."""


class SaveFailed(CheckpointError):
    """A checkpoint could not be written, and nothing of the attempt remains; older ones are untouched."""

    def __init__(self, what: str, folder: Path, *, no_space: bool, **more: object) -> None:
        verb = "free some space on" if no_space else "look at"
        hint = f"{verb} the disk of {folder}; older checkpoints are untouched"
        super().__init__(what, hint=hint, **more)
        self.no_space = no_space


# --- saving --------------------------------------------------------------------------------------------


def checkpoint_name(step: int) -> str:
    """250 -> step-000250."""
    return f"step-{step:06d}"


def checkpoint_step(path: Path) -> int | None:
    """step-000250 -> 250; None where the name is not a checkpoint's."""
    match = re.fullmatch(r"step-([0-9]{6,18})", path.name)
    return int(match[1]) if match and checkpoint_name(int(match[1])) == path.name else None


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor] | None,
    state: Mapping[str, Any],
) -> Path:
    """Write `folder`/step-NNNNNN; it is durable when this returns. One of the same step is replaced.

    Safe to call from a thread, with tensors that nobody changes meanwhile.

    Args:
        model: every tensor of the model by name (`train/named.py`).
        optimizer: the optimizer's tensors; None writes weights only.
        state: JSON values; floats come back to the last bit. `load_model` needs `model_config` (as a dict),
            `vocab_size` and `tokenizer_fingerprint`, and reads `best_step`, `best_val_loss`, `val_loss`.

    Raises:
        SaveFailed: the disk is full or broken.
        CheckpointError: `state` holds what JSON cannot, NaN and infinities included.
    """
    what = f"the checkpoint of step {step} could not be written"
    try:
        _require_json(state, "state")
    except ValueError as e:
        raise CheckpointError(f"{what}: {e}.") from None
    tensors = {MODEL: model} if optimizer is None else {MODEL: model, OPTIMIZER: optimizer}
    final = folder / checkpoint_name(step)
    temporary = folder / f"{TEMPORARY}{final.name}-{os.getpid()}"
    try:
        make_folder(folder)
        _remove(temporary)
        require_space(folder, sum(t.nbytes for group in tensors.values() for t in group.values()))
        temporary.mkdir()
        files = {name: write_synced(temporary / name, _safetensors(group)) for name, group in tensors.items()}
        files[STATE] = write_synced(temporary / STATE, [json_bytes({"step": step, "state": state})])
        write_synced(temporary / MANIFEST, [_manifest_bytes(step, files)])
        sync_folder(temporary)
        _publish(temporary, final)
        _known_good[final.absolute()] = _identity(final)
    except OSError as e:
        _remove(temporary)
        raise SaveFailed(f"{what}: {e.strerror or e}.", folder, no_space=e.errno in DISK_FULL) from e
    except BaseException:
        _remove(temporary)
        raise
    return final


def require_space(folder: Path, n_bytes: int) -> None:
    """Refuse, before anything is written, what the file system of `folder` has no room for."""
    free, needed = shutil.disk_usage(folder).free, n_bytes + SPACE_MARGIN_BYTES
    if free < needed:
        got, expected = f"{free / 1e6:,.1f} MB free", f"{needed / 1e6:,.1f} MB"
        raise SaveFailed(
            "there is no space for a checkpoint.", folder, no_space=True, got=got, expected=expected
        )


def prune(folder: Path, *, keep: int, best: int | None = None) -> list[Path]:
    """Delete old checkpoints: all but the newest `keep` verified ones, and the one of step `best`.

    A damaged one does not count, so the last good one is never deleted. What this process wrote or verified
    is not hashed again. Returns what was deleted; raises SaveFailed where the disk does not let us.
    """
    keep = max(keep, 1)
    removable: list[Path] = []
    try:
        found, valid = list_checkpoints(folder), 0
        for path in reversed(found):
            if valid == keep and checkpoint_step(path) != best:
                removable.append(path)
            elif valid < keep < len(found):
                # a damaged one that is this new stays: `newest_valid` sets it aside, aloud
                valid += _is_valid(path)
        for path in reversed(removable):  # the oldest first
            trash = folder / f"{TRASH}{path.name}"
            _remove(trash)
            path.rename(trash)
        if removable:
            sync_folder(folder)  # a deletion cut short must not look like a checkpoint
        _clean_up(folder, (TRASH, REPLACED))
    except OSError as e:
        what = f"old checkpoints could not be deleted: {e.strerror or e}."
        raise SaveFailed(what, folder, no_space=e.errno in DISK_FULL) from e
    return removable


def _publish(temporary: Path, final: Path) -> None:
    """Give a finished checkpoint its name. One that has the name steps aside for an instant: killed in it,
    `_clean_up` puts the old one back."""
    replaced = final.with_name(f"{REPLACED}{final.name}")
    with contextlib.suppress(FileNotFoundError):
        os.lstat(final)  # not lexists, for which a disk that cannot be read means that there is nothing
        _remove(replaced)
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        if os.path.lexists(replaced):
            replaced.rename(final)
        raise
    sync_folder(final.parent)
    _remove(replaced)


def _clean_up(folder: Path, prefixes: tuple[str, ...]) -> None:
    """Remove what a killed process left behind, and undo a replacement that it left half done."""
    for replaced in folder.glob(f"{REPLACED}*"):
        final = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if not os.path.lexists(final):
            replaced.rename(final)
    for prefix in prefixes:
        for leftover in folder.glob(f"{prefix}*"):
            _remove(leftover)


def _remove(path: Path) -> None:
    """Delete a file or a tree as far as that is possible; what remains is tried again another time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The safetensors format piece by piece, so that only one tensor at a time is copied to host memory.

    Source: the README of safetensors: length of the header (u64), JSON header, data without holes.
    """
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # keeps each aligned
    header, offset = {}, 0
    for name, t in order:
        if t.dtype not in DTYPES:
            raise CheckpointError(f"{name} has a dtype that safetensors lacks: {t.dtype}.")
        span = [offset, offset + t.nbytes]
        header[name], offset = (
            {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": span},
            span[1],
        )
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, t in order:
        if t.numel():
            yield t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _manifest_bytes(step: int, files: Mapping[str, tuple[int, str]]) -> bytes:
    """The manifest, with the hash of itself in it."""
    entries = {name: {"bytes": size, "xxh3_128": digest} for name, (size, digest) in files.items()}
    return json_bytes(sealed({"format": FORMAT, "step": step, "files": entries}))


def _require_json(value: object, where: str) -> None:
    """ValueError where JSON would change the value or cannot hold it, naming its place."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}, which is not text")
            _require_json(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _require_json(inner, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, which JSON cannot hold")
    elif not isinstance(value, (str, int, float, type(None))):
        raise ValueError(f"{where} is of type {type(value).__name__}, which is not a JSON value")


# --- reading -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found to be as written. Tensors are read when asked for."""

    path: Path
    step: int
    state: dict[str, Any]
    """What `save_checkpoint` was given."""
    files: dict[str, tuple[int, str]]
    """Size in bytes and xxh3_128 of each file."""

    def model_tensors(self) -> dict[str, Tensor]:
        """Weights by name, on the CPU."""
        return read_tensors(self.path / MODEL)

    def optimizer_tensors(self) -> dict[str, Tensor] | None:
        """The optimizer's tensors by name, on the CPU; None in a checkpoint of weights only."""
        return read_tensors(self.path / OPTIMIZER) if OPTIMIZER in self.files else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Everything in `folder` with a checkpoint's name, by step. Clocks are not asked: they jump."""
    found = [(checkpoint_step(p), p) for p in folder.iterdir()] if folder.is_dir() else []
    return [path for _, path in sorted((step, path) for step, path in found if step is not None)]


def read_checkpoint(path: Path, *, verify: bool = True, optimizer: bool = True) -> Checkpoint:
    """The checkpoint at `path`.

    Args:
        verify: hash the tensor files. False still checks names, sizes, manifest and state.
        optimizer: hash the optimizer's file too; False where only the model will be used.

    Raises:
        DamagedCheckpoint: something is not as it was written; the message names the file.
        CheckpointError: it cannot be read for another reason: permissions, another format.
    """
    hashed = {STATE, *([MODEL] if verify else []), *([OPTIMIZER] if verify and optimizer else [])}
    try:
        found = _read(path, hashed)
        if verify and optimizer:
            _known_good[path.absolute()] = _identity(path)
        return found
    except OSError as e:
        kind = DamagedCheckpoint if e.errno in DAMAGE else CheckpointError
        raise kind(f"{e.filename or path} cannot be read: {e.strerror or e}.") from e


def newest_valid(folder: Path, *, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None where there has never been one.

    A damaged one is renamed to `corrupt-step-NNNNNN-<n>`, which `say` is told, and the one before is tried.
    Leftovers of killed processes are removed, so the caller holds the run's lock and has no save under way.

    Raises:
        CheckpointError: there were checkpoints and none is valid. Starting anew is for a person to decide.
    """
    if not folder.is_dir():
        return None
    try:
        _clean_up(folder, (TEMPORARY, TRASH, REPLACED))
        for path in reversed(list_checkpoints(folder)):
            try:
                return read_checkpoint(path)
            except DamagedCheckpoint as damage:
                aside = _set_aside(path)
                say(f"{damage}\n  It was set aside as {aside.name}, and the checkpoint before it is used.")
    except OSError as e:
        raise CheckpointError(f"{folder} cannot be put in order: {e}.") from e
    if corrupt := sorted(p.name for p in folder.glob(f"{CORRUPT}*")):
        raise CheckpointError(
            f"{folder} has checkpoints, but none is valid: {', '.join(corrupt)}.",
            hint="restore one from a backup, or begin anew with --fresh",
        )
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, each in memory of its own. Raises DamagedCheckpoint."""
    size = _plain_file_size(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MAX_JSON_BYTES, size - 8):
        raise DamagedCheckpoint(f"{path} is not a safetensors file: its header would have {length} bytes.")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 (no dict)
    except safetensors.SafetensorError as e:
        raise DamagedCheckpoint(f"{path} is not a safetensors file: {e}.") from None


def _read(path: Path, hashed: Container[str]) -> Checkpoint:
    if not os.path.lexists(path):
        raise CheckpointError(f"there is no checkpoint {path}.")
    if path.is_symlink() or not path.is_dir():
        raise DamagedCheckpoint(f"{path} is not a directory.")
    step, files = _read_manifest(path)
    # Names with a dot are the system's (.DS_Store, .nfs…), and we never read them.
    present = {name for name in os.listdir(path) if not name.startswith(".")} - {MANIFEST}
    for name in sorted(present - files.keys()):
        raise DamagedCheckpoint(f"{path / name} is not in the manifest.")
    for name, (size, digest) in files.items():
        found = _plain_file_size(path / name)
        if found != size:
            raise DamagedCheckpoint(f"{path / name} has the wrong size.", got=f"{found} bytes", expected=size)
        if name in hashed and (actual := _hash(path / name)) != digest:
            what = f"{path / name} has changed since it was written."
            raise DamagedCheckpoint(what, got=f"xxh3_128 {actual}", expected=digest)
    document = _parse_json(path / STATE)
    if document.get("step") != step or not isinstance(document.get("state"), dict):
        raise DamagedCheckpoint(f"{path / STATE} does not hold the state of step {step}.")
    return Checkpoint(path, step, document["state"], files)


def _read_manifest(path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """The step and the files that the manifest promises. Only names that a checkpoint has come out of it."""
    file = path / MANIFEST
    document = unsealed(_parse_json(file))
    if document is None:
        raise DamagedCheckpoint(f"{file} has changed since it was written.")
    if document.get("format") != FORMAT:
        what = f"{file} has a format that this version of regpt does not read."
        raise CheckpointError(what, got=document.get("format"), expected=FORMAT)
    step, entries = document.get("step"), document.get("files")
    if type(step) is not int or not isinstance(entries, dict):
        raise DamagedCheckpoint(f"{file} is not a checkpoint's manifest.")
    if checkpoint_step(path) not in (None, step):
        raise DamagedCheckpoint(
            f"{file} belongs to another checkpoint.", got=f"step {step}", expected=path.name
        )
    missing, foreign = {MODEL, STATE} - entries.keys(), entries.keys() - {MODEL, OPTIMIZER, STATE}
    for name in sorted(missing | foreign):
        problem = "does not name" if name in missing else "names a file that no checkpoint has:"
        raise DamagedCheckpoint(f"{file} {problem} {name!r}.")
    for name, entry in entries.items():
        match entry:
            case {"bytes": int(), "xxh3_128": str()}:
                continue
        raise DamagedCheckpoint(f"{file} has a wrong entry for {name}.", got=repr(entry))
    return step, {name: (entry["bytes"], entry["xxh3_128"]) for name, entry in entries.items()}


def _parse_json(path: Path) -> dict[str, Any]:
    """A JSON object of a reasonable size."""
    if (size := _plain_file_size(path)) > MAX_JSON_BYTES:
        raise DamagedCheckpoint(f"{path} is too large to be ours.", got=f"{size} bytes")
    try:
        document = json.loads(path.read_bytes())
        _require_json(document, "it")  # Python reads NaN and 1e999 without a word
    except (ValueError, RecursionError) as e:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DamagedCheckpoint(f"{path} is not valid JSON: {e}.") from None
    if not isinstance(document, dict):
        raise DamagedCheckpoint(f"{path} is not a JSON object.")
    return document


def _plain_file_size(path: Path) -> int:
    """Size in bytes of a file that is no link, pipe or device, any of which can trick a reader."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing.") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a plain file"
        raise DamagedCheckpoint(f"{path} is {kind}.")
    return status.st_size


def _hash(path: Path) -> str:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
    return digest.hexdigest()


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path / MANIFEST)
    return status.st_ino, status.st_mtime_ns


def _is_valid(path: Path) -> bool:
    try:
        read_checkpoint(path, verify=_known_good.get(path.absolute()) != _identity(path))
    except (CheckpointError, OSError):
        return False
    return True


def _set_aside(path: Path) -> Path:
    """Rename to corrupt-<name>-<n>, the first number that is free."""
    n = 1
    while os.path.lexists(aside := path.with_name(f"{CORRUPT}{path.name}-{n}")):
        n += 1
    path.rename(aside)
    sync_folder(path.parent)
    return aside
