"""A trained model out of a run directory, ready to evaluate and sample. Changes nothing on disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from regpt.config import ModelConfig, build
from regpt.errors import CheckpointError, nearest
from regpt.models import build_model
from regpt.models.count import count_parameters
from regpt.models.gpt2 import GPT2
from regpt.models.modern import Modern
from regpt.tokenizers import Tokenizer, load_tokenizer
from regpt.train.checkpoint import (
    MANIFEST,
    MODEL,
    STATE,
    Checkpoint,
    DamagedCheckpoint,
    checkpoint_name,
    checkpoint_step,
    list_checkpoints,
    read_checkpoint,
)
from regpt.train.named import load_model_tensors
from regpt.train.run import RunDirectory


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A trained model, ready to evaluate and sample."""

    model: GPT2 | Modern
    tokenizer: Tokenizer
    config: ModelConfig
    path: Path
    """The checkpoint that it came from."""
    step: int
    val_loss: float | None
    """Nats a token over the validation split at that step, where it was evaluated."""


def load_model(
    path: Path | str,
    *,
    device: str | torch.device = "cpu",
    which: Literal["best", "last"] = "best",
    say: Callable[[str], None] = warnings.warn,
) -> Loaded:
    """The model and tokenizer of a run, or of one checkpoint inside a run.

    Args:
        path: a run directory, or its checkpoints/step-NNNNNN.
        which: of a run, the checkpoint with the lowest validation loss, or the newest.
        say: told where a damaged checkpoint is passed over.

    Raises:
        CheckpointError: there is no such run, it has no checkpoint yet, or none that is valid.
    """
    found = _choose(Path(path), which, say)
    state = found.path / STATE
    config = build(ModelConfig, _fact(found, "model_config", dict), where=str(state), prefix="model.")
    vocab_size, fingerprint = _fact(found, "vocab_size", int), _fact(found, "tokenizer_fingerprint", str)
    tokenizer = load_tokenizer(RunDirectory(found.path.absolute().parent.parent).tokenizer)
    if tokenizer.fingerprint != fingerprint:
        raise CheckpointError(
            f"{found.path} was trained with another tokenizer than the one beside it.",
            got=tokenizer.fingerprint,
            expected=fingerprint,
        )
    tensors = found.model_tensors()
    stored, described = sum(t.numel() for t in tensors.values()), count_parameters(config, vocab_size).stored
    if stored != described:  # asked before a model of any size that the file names is built
        raise CheckpointError(
            f"{found.path} does not hold the model that it describes.",
            got=f"{stored:,} weights",
            expected=f"{described:,}",
        )
    model = build_model(config, vocab_size)
    load_model_tensors(model, tensors)
    return Loaded(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        config=config,
        path=found.path,
        step=found.step,
        val_loss=evaluated_loss(found),
    )


def evaluated_loss(found: Checkpoint) -> float | None:
    """The validation loss of these very weights, in nats a token; None where that step was not evaluated."""
    loss = found.state.get("val_loss") if found.state.get("evaluated_step") == found.step else None
    return float(loss) if isinstance(loss, float | int) else None


def _choose(path: Path, which: Literal["best", "last"], say: Callable[[str], None]) -> Checkpoint:
    """The checkpoint that `path` and `which` mean; its model is verified."""
    if not path.exists():
        raise CheckpointError(f"there is no run or checkpoint {path}.", hint=_nearby(path))
    if (path / STATE).exists() or checkpoint_step(path) is not None:
        return read_checkpoint(path, optimizer=False)
    run = RunDirectory(path)
    if not run.checkpoints.is_dir() and not run.begun:
        raise CheckpointError(
            f"{path} is neither a run nor a checkpoint.",
            expected=f"run.json or checkpoints/ in a run, {MANIFEST} and {MODEL} in a checkpoint",
            hint=_nearby(path),
        )
    checkpoints = list_checkpoints(run.checkpoints)
    if not checkpoints:
        if (saved := run.last_saved_step()) is not None:
            raise CheckpointError(f"the run {path} saved step {saved}, but its checkpoints were deleted.")
        raise CheckpointError(
            f"the run {path} has no checkpoint yet.", hint="let regpt train go on until it saves one"
        )
    for newest in reversed(checkpoints):
        try:
            best = read_checkpoint(newest, verify=False).state.get("best_step")
            if which == "best" and isinstance(best, int) and best != checkpoint_step(newest):
                try:
                    return read_checkpoint(run.checkpoints / checkpoint_name(best), optimizer=False)
                except CheckpointError as e:
                    say(f"{e}\n  It was the best checkpoint; the newest one is loaded in its place.")
            return read_checkpoint(newest, optimizer=False)
        except DamagedCheckpoint as e:
            say(f"{e}\n  The checkpoint before it is loaded.")
    raise CheckpointError(f"the run {path} has checkpoints, but none is valid.")


def _fact(found: Checkpoint, key: str, kind: type) -> Any:
    value = found.state.get(key)
    if type(value) is not kind:
        raise CheckpointError(
            f"{found.path / STATE} has no usable {key}.", got=repr(value), expected=kind.__name__
        )
    return value


def _nearby(path: Path) -> str | None:
    """A run whose name is close to what was asked for."""
    folders = [base for base in (path.parent, Path("runs")) if base.is_dir()]
    runs = {run.name: run for base in folders for run in base.iterdir() if RunDirectory(run).begun}
    close = nearest(path.name, runs)
    return str(runs[close]) if close else None
