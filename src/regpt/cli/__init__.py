"""The command line: finds the command, imports it alone, and turns what goes wrong into one message and an exit status."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, TextIO, cast

from regpt import __version__
from regpt.errors import PeerFailed, RegptError, UsageError, did_you_mean

COMMANDS = {
    "train": "train a model (no preset: demo): prepare if needed, train, evaluate, sample",
    "reproduce": "run a preset's whole recipe, and set its figures beside the published ones",
    "sample": "generate text from a run",
    "eval": "loss, WikiText, LAMBADA, HellaSwag, ARC-easy and PIQA of a run, with confidence intervals",
    "prepare": "turn text into token shards",
    "merge": "join slices that many machines prepared",
    "convert": "token files of other programs into one another, and into or out of our shards",
    "tokenizer": "train a tokenizer on text of one's own, or show what one is made of",
    "plan": "a dry run: parameters, memory, FLOPs, time; nothing is touched",
    "bench": "how fast this machine trains: time, arithmetic and memory of a step, and where they go",
    "inspect": "what a shard directory, checkpoint or run holds, verified",
    "report": "one HTML page of a run, or of several runs compared; --watch serves it while training",
    "presets": "the list of presets, or one preset's page",
    "doctor": "what this machine can do, and what is missing",
    "completion": "print a completion script for bash, zsh or fish",
}


STATUSES = """\
Exit status: 0 done; 1 a fault of ours; 2 a mistake in what was asked; 3 training diverged; 4 another process of the run
was lost; 129, 130, 138, 143 stopped by SIGHUP, SIGINT, SIGUSR1, SIGTERM, everything saved."""


def usage() -> str:
    """What `regpt --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            f"regpt {__version__}: GPT-2, from raw text to generated text.",
            "",
            "usage: regpt COMMAND [ARGUMENTS]      regpt COMMAND --help",
            "",
            *lines,
            "",
            "Every command takes --json, --quiet and --debug.",
            STATUSES,
            "Start here:  regpt train demo   (about two minutes on two CPU cores, nothing is downloaded)",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if (
        os.environ.get("WORLD_SIZE", "1") != "1"
    ):  # before torch is loaded: pages of C++ frames where a peer is gone
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if sys.stdout is None:  # closed by the shell: >&-
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character must not stop us
            stream.reconfigure(errors="replace")
    notes = cast(TextIO, _Notes(sys.stderr or io.StringIO()))  # None where the shell closed it: 2>&-
    with contextlib.redirect_stderr(notes):
        status = _run(words)
    if "RANK" in os.environ:
        from regpt.train.launch import leave_status

        leave_status(status)
    return status


def entry() -> None:
    """The `regpt` of the shell: `main`, and the end of the process."""
    status = main()
    if "torch.distributed.elastic" in sys.modules or os.environ.get("WORLD_SIZE", "1") != "1":
        # Threads of Gloo and torchrun that are still in C++ end Python's shutdown with an abort, or hold it up.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _run(words: list[str]) -> int:
    try:
        return _dispatch(words)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and _reader_gone():
            return 0
        if "--debug" in words:
            traceback.print_exc()
        return _report(error, "--json" in words)


def _report(error: BaseException, as_json: bool) -> int:
    """Say what went wrong, on standard error and as JSON where that was asked for; returns the exit status."""
    # The name of the nearest kind that is no file's own affair.
    kind, hint, status = (
        next(k.__name__ for k in type(error).__mro__ if not k.__name__.startswith("_")),
        None,
        1,
    )
    more: dict[str, str] = {}
    if isinstance(error, RegptError):
        what, hint, status = error.what, error.hint, error.exit_status
        text = f"{kind}: {error}"
        more = {k: str(v) for k, v in (("got", error.got), ("expected", error.expected)) if v is not None}
        if error.told:
            return status
    elif isinstance(error, KeyboardInterrupt):
        what, status = "stopped.", 130
        text = "\nstopped."
    elif isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        what, status = f"the system refuses: {error.filename or 'output'}: {error.strerror or error}.", 2
        text = f"{kind}: {what}"
    else:
        what, hint = f"internal error: {kind}: {error}", "the same command with --debug"
        text = f"regpt: {what}\n  this is a fault of regpt; {hint} shows where."
    print(text, file=sys.stderr, flush=True)
    if as_json and (os.environ.get("RANK", "0") == "0" or not isinstance(error, PeerFailed)):
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"error": {"kind": kind, "message": what, **more, "try": hint}}), flush=True)
    return status


class _Notes:
    """Standard error whose reader may go away (a closed pipe, a lost terminal): the work goes on unheard."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            _to_nowhere(self.stream)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            _to_nowhere(self.stream)


def _reader_gone() -> bool:
    """Whether a broken pipe was standard output, as with `| head`. An empty line tells, harmless to JSON too."""
    try:
        print(flush=True)
    except BrokenPipeError:
        _to_nowhere(sys.stdout)
        return True
    return False


def _to_nowhere(stream: TextIO) -> None:
    """Point `stream` at the null device, so that what it still holds makes no trouble when Python ends."""
    with contextlib.suppress(OSError):  # a stream without a file below it
        number, null = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"regpt {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}.{did_you_mean(name, COMMANDS)}", hint="regpt --help")
    return int(importlib.import_module(f"regpt.cli.{name}").main(rest) or 0)
