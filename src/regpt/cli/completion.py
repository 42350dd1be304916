"""Shell completion: prints a script that asks regpt itself for the words that fit.

bash:  eval "$(regpt completion bash)"      zsh:  eval "$(regpt completion zsh)"      fish:  regpt completion fish | source
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Literal

import tyro

from regpt.cli import COMMANDS
from regpt.cli.bench import BENCHES
from regpt.cli.parse import CommonArgs, Output, options, parse
from regpt.cli.tokenizer import ACTIONS
from regpt.config import preset_names

SCRIPTS = {
    "bash": """_regpt() { COMPREPLY=($(regpt completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)); }
complete -o default -F _regpt regpt""",
    "zsh": """_regpt() { local -a w; w=(${(f)"$(regpt completion words -- "${words[@]:1:$((CURRENT-1))}" 2>/dev/null)"})
  compadd -a w || _files; }
compdef _regpt regpt""",
    "fish": """complete -c regpt -a '(regpt completion words -- (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'""",
}
BELOW = {"bench": BENCHES, "tokenizer": ACTIONS}
TAKES_PRESET = ("train", "plan", "presets")


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt completion`."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """The shell to print a script for."""


def main(argv: list[str]) -> int:
    """`regpt completion`."""
    if argv[:2] == ["words", "--"]:  # what the scripts call
        print("\n".join(candidates(argv[2:])))
        return 0
    args = parse(Args, argv, prog="regpt completion", description=__doc__ or "")
    Output(args).result({"script": SCRIPTS[args.shell]}, SCRIPTS[args.shell])
    return 0


def candidates(words: list[str]) -> list[str]:
    """What may stand in place of the last word, which may be empty."""
    *before, last = words or [""]
    if not before:
        fitting = list(COMMANDS)
    elif before[0] not in COMMANDS:
        fitting = []
    elif last.startswith("-"):
        module = importlib.import_module(f"regpt.cli.{before[0]}")
        below = (
            f"{before[1].title()}Args"
            if len(before) > 1 and before[1] in BELOW.get(before[0], ())
            else "Args"
        )
        fitting = list(options(getattr(module, below)))
    elif before[0] == "tokenizer":
        fitting = list(ACTIONS) if len(before) == 1 else []
    elif before[0] == "bench":
        fitting = list(BENCHES) if len(before) == 1 else preset_names() if len(before) == 2 else []
    else:
        fitting = preset_names() if len(before) == 1 and before[0] in TAKES_PRESET else []
    return [word for word in fitting if word.startswith(last)]
