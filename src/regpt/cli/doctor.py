"""What this machine can do, and what is missing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regpt import __version__
from regpt.cli.parse import CommonArgs, Output, parse

# package -> what it is for, with the extra that brings it
OPTIONAL = {
    "pyarrow": ("parquet sources", "data"),
    "zstandard": (".zst sources", "data"),
    "pyyaml": ("data sets of the hub", "data"),
    "rustbpe": ("learning tokenizers in a quarter of the time", "fast"),
    "gigatoken": ("encoding corpora many times as fast", "fast"),
    "tensorboard": ("--track.tensorboard", "track"),
    "wandb": ("--track.wandb", "track"),
}


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt doctor`."""


def main(argv: list[str]) -> int:
    """`regpt doctor`."""
    args = parse(Args, argv, prog="regpt doctor", description=__doc__ or "")
    out = Output(args)
    facts = examine()
    out.result(facts, _page(facts))
    return 0


def examine() -> dict[str, Any]:
    """Everything the page shows, as plain values."""
    import torch

    from regpt.tokenizers.gpt2 import FOLDER_VARIABLE, gpt2_is_here
    from regpt.train.allocator import keep_memory
    from regpt.train.compile import cpp_compiler, inductor_folder
    from regpt.train.machine import measure_flops, probe

    machine = probe("auto")
    dtypes = ["float32", "bfloat16"]
    rates = {d: measure_flops(machine, d) for d in dtypes}
    packages = {}
    for name, (purpose, extra) in OPTIONAL.items():
        version = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
        packages[name] = {"version": version, "for": purpose, "extra": extra}
    missing = f"not here: downloaded when first needed (1.5 MB), or read from the folder {FOLDER_VARIABLE}"
    return {
        "regpt": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "device": machine.device,
        "device_name": machine.name,
        "memory_bytes": machine.memory_bytes,
        "cores": os.cpu_count(),
        "threads": machine.threads,
        "peak_flops": machine.peak_flops,
        "matmul_flops": rates,
        "fast_bf16": machine.fast_bf16,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "compiled_kept_in": str(inductor_folder()),
        "compiler": cpp_compiler(),
        "allocator_keeps_memory": keep_memory(),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "gpt2_vocabulary": "ready" if gpt2_is_here() else missing,
        "packages": packages,
    }


def _page(f: dict[str, Any]) -> str:
    rates = ", ".join(f"{d} {r / 1e9:,.0f} GFLOP/s" for d, r in f["matmul_flops"].items())
    peak = f"; data sheet {f['peak_flops'] / 1e12:,.0f} TFLOP/s" if f["peak_flops"] else ""
    lines = [
        f"regpt     {f['regpt']}, Python {f['python']}, torch {f['torch']}",
        f"system    {f['system']}",
        f"device    {f['device']}: {f['device_name']}, {f['memory_bytes'] / 2**30:.1f} GiB, {f['threads']} threads of "
        f"{f['cores']} cores, {f['cpu_capability']}",
        f"speed     matrix product: {rates}{peak}",
        f"bfloat16  {'has hardware of its own' if f['fast_bf16'] else 'has no hardware of its own; float32 is used'}",
        f"compiler  {f['compiler'] or 'no C++ compiler: torch.compile is not available on the CPU'}"
        + f"; compiled code is kept in {f['compiled_kept_in']}",
        "allocator "
        + (
            "glibc, told to keep freed memory (saves page faults, holds the peak)"
            if f["allocator_keeps_memory"]
            else "as the system has it"
        ),
        f"disk      {f['disk_free_bytes'] / 2**30:.1f} GiB free here",
        f"gpt2      vocabulary: {f['gpt2_vocabulary']}",
    ]
    for name, p in f["packages"].items():
        state = p["version"] or f"missing; pip install {name}"
        lines.append(f"{name:<12}{state}  ({p['for']})")
    return "\n".join(lines)
