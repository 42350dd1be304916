"""What can go wrong through no fault of ours, as a tree of exceptions; the command line turns each into one message.

    RegptError                   anything we say to a person; `exit_status` is what the shell sees
    ├── UsageError               the command line itself: an unknown command, a missing argument
    ├── ConfigError              a setting: unknown, of the wrong type, or at odds with another
    ├── DataError                text, shards, tokenizer files: missing, damaged, not what was asked for
    ├── CheckpointError          a checkpoint or run directory: damaged, missing, of another run
    ├── DeviceError              the machine: no such device, out of memory, a missing optional package
    ├── TrainingDiverged         a loss or gradient that is not finite (exit status 3)
    ├── PeerFailed               another process of the same run failed, died or fell silent (its exit status, or 4)
    └── Interrupted              stopped by a signal, after saving (exit status 128 + its number: 130, 143)

`assert` is for our own invariants only and never for what a user typed.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable

PEER_EXIT = 4  # the exit status where another process of the run was lost


class RegptError(Exception):
    """A sentence to a person: what is wrong, what was got, what was expected, what to try.

    Args:
        what: the fault, naming the setting or file in full.
        got: what was found instead, if that is not already in `what`.
        expected: what would have been right.
        hint: one thing to try, usually a command line that can be pasted.
    """

    exit_status = 2
    told = False
    """Another process of the same run says it, so this one need not."""
    shared = False
    """Every process of the run ends for the same reason: none is missed by the others."""

    def __init__(
        self, what: str, *, got: object = None, expected: object = None, hint: str | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.got, self.expected, self.hint = what, got, expected, hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.got is not None:
            lines.append(f"  got: {self.got}")
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.hint is not None:
            lines.append(f"  try: {self.hint}")
        return "\n".join(lines)


class UsageError(RegptError):
    """The command line itself is wrong."""


class ConfigError(RegptError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(RegptError):
    """Text, shards or tokenizer files are missing, damaged or not what was asked for."""


class CheckpointError(RegptError):
    """A checkpoint or a run directory is damaged, missing, or belongs to another run."""


class DeviceError(RegptError):
    """The machine lacks what was asked of it: a device, memory, an optional package."""


class TrainingDiverged(RegptError):
    """A loss, a gradient or a weight is not finite; no update was made with it, and no checkpoint."""

    exit_status = 3
    shared = True


class PeerFailed(RegptError):
    """Another process of the same run failed, died or fell silent; nothing is wrong with this one."""

    def __init__(self, what: str, *, exit_status: int, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.exit_status = exit_status


class Interrupted(RegptError):
    """A signal stopped the work after everything was saved."""

    shared = True

    def __init__(self, what: str, *, signum: int = signal.SIGINT, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.exit_status = 128 + signum


def missing_package(package: str, extra: str, purpose: str) -> DeviceError:
    """The error for an optional library that is not installed, with the command that installs it."""
    return DeviceError(
        f"{purpose} needs the package {package}, which is not installed.",
        hint=f"pip install {package} (all of that kind, in a clone: pip install -e '.[{extra}]')",
    )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None where nothing is close: `nearest("n_lyer", ["n_layer"])`."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' or an empty string, to put at the end of a sentence."""
    close = nearest(name, known)
    return f" Did you mean {close}?" if close else ""
