"""train.compile=auto on a CPU: whether compiling the model gains more time than it takes, and where its results are kept.

Measured with torch 2.13 on one busy machine, one thread of an AMD EPYC (Zen 5), bfloat16, processor time beside the eager form
in the same process. Forward and backward pass: `modern` 4 x 128 takes 0.68 to 0.64 compiled, `gpt2` 4 x 128 0.87; `gpt2` 6 x
384 with dropout takes 1.4: there auto never compiles, nor at others unmeasured. The first step took 76, 46 and 65 s, or 8, 3
and 5 s once results were kept; the rule counts a cold start always. The presets for a CPU are too short for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
from pathlib import Path

from regpt.config import Config
from regpt.models.loss import CHUNKED_FROM
from regpt.tokenizers.download import cache_folder
from regpt.train.machine import Machine
from regpt.train.plan import Plan

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# Of the time of steps, what compiling saves at least; half of what was measured, as updates are not compiled.
GAIN = {"gpt2": 0.06, "modern": 0.15}
GAIN_TO_CHANNELS = 128  # the widest that was seen to gain
COLD_S_PER_LAYER = {"gpt2": 12.0, "modern": 20.0}
MARGIN = 2.0  # how many times its cost compiling must gain


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor calls on a CPU; None where it is not installed."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    words = shlex.split(os.environ.get("CXX", "")) or [default]
    return shutil.which(words[0])


def with_compile(plan: Plan, config: Config, machine: Machine, *, compiler: str | None) -> Plan:
    """The plan with train.compile=auto decided on a CPU; as it is elsewhere, and where the setting says it.

    Args:
        plan: its `time_s` is that of eager steps.
        compiler: `cpp_compiler()`.
    """
    if machine.kind != "cpu" or config.train.compile != "auto":
        return plan
    arch, small = config.model.arch, config.model.n_embd <= GAIN_TO_CHANNELS and not config.model.dropout
    cost_s = COLD_S_PER_LAYER[arch] * config.model.n_layer
    gain_s = GAIN[arch] * (plan.time_s or 0.0)
    if plan.world > 1:
        why = "over several ranks compiling is left to train.compile=on"
    elif not small or plan.padded_vocab_size >= CHUNKED_FROM:
        why = "compiling gains nothing at this shape"
    elif plan.time_s is None:
        why = "the time of a step is not known"
    elif gain_s <= MARGIN * cost_s:
        why = f"compiling would cost about {cost_s:.0f} s and gain {gain_s:.0f}"
    elif compiler is None:
        why = f"there is no C++ compiler; it would gain about {gain_s:.0f} s"
    else:
        why = f"it costs about {cost_s:.0f} s and gains {gain_s:.0f}"
        return dataclasses.replace(plan, compile=True, compile_why=why)
    return dataclasses.replace(plan, compile=False, compile_why=why)


def as_recorded(
    plan: Plan, before: dict[str, object] | None, config: Config, machine: Machine, *, compiler: str | None
) -> Plan:
    """The plan with what was decided when its run was begun, so that it goes on to the same bits.

    Args:
        before: the plan in the run's run.json; None for a new run.
    """
    auto = machine.kind == "cpu" and config.train.compile == "auto"
    if not auto or plan.world > 1 or before is None or not isinstance(before.get("compile"), bool):
        return plan
    if before["compile"] and compiler is None:
        return dataclasses.replace(plan, compile=False, compile_why="there is no C++ compiler any more")
    return dataclasses.replace(
        plan, compile=bool(before["compile"]), compile_why="as when this run was begun"
    )


def inductor_folder() -> Path:
    """Where Inductor keeps what it has compiled: as its own variable says, else in regpt's cache folder, which outlives a
    restart of the machine, as its default in the folder of temporary files does not."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else cache_folder() / "inductor"


def keep_compiled() -> None:
    """Let Inductor, and the processes it starts, use `inductor_folder`; before anything is compiled. Where nothing can be
    written there, its own choice holds."""
    folder = inductor_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ[CACHE_VARIABLE] = str(folder)
