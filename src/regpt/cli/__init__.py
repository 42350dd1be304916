"""The command line: finds the command, imports it alone, and turns what goes wrong into one message and an exit status.

Exit status: 0 done; 1 a fault of ours; 2 the user's mistake; 3 training diverged; 130 or 143 stopped by a signal after saving.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence

from regpt import __version__
from regpt.errors import RegptError, UsageError, did_you_mean

COMMANDS = {
    "train": "train a model: prepare if needed, train, evaluate, sample",
    "sample": "generate text from a run",
    "prepare": "turn text into token shards",
    "plan": "a dry run: parameters, memory, FLOPs, time; nothing is touched",
    "inspect": "what a shard directory, checkpoint or run holds, verified",
    "presets": "the list of presets, or one preset's page",
    "doctor": "what this machine can do, and what is missing",
    "completion": "print a completion script for bash, zsh or fish",
}


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
            "Start here:  regpt train demo   (about two minutes on two CPU cores, nothing is downloaded)",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug, as_json = "--debug" in words, "--json" in words
    try:
        return _dispatch(words)
    except RegptError as error:
        if debug:
            raise
        _report(error, as_json)
        return error.exit_status
    except KeyboardInterrupt:
        print("\nstopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        print(f"regpt: internal error: {type(error).__name__}: {error}", file=sys.stderr)
        print("  this is a fault of regpt; the same command with --debug shows where.", file=sys.stderr)
        return 1


def _report(error: RegptError, as_json: bool) -> None:
    kind = type(error).__name__
    print(f"{kind}: {error}", file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps({"error": {"kind": kind, "message": error.what, "try": error.hint}}), flush=True)


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
