"""The machine that a run is on: which device, how much memory, which arithmetic it is fast at, and how fast."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from regpt.config import ModelConfig
from regpt.errors import ConfigError, DeviceError
from regpt.models import attention

# Dense peak FLOP/s with bf16 or fp16 inputs, no sparsity; from the vendors' data sheets. Matched as
# whole words of the device name, the first that fits.
MOST_THREADS = 1024
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 4080": 97e12,
    "RTX 3090": 71e12,
}
# bf16 pays on a CPU with hardware for it where matrices are large: a training step is 1.1x as fast at 32 channels, 1.2x at
# 64, 1.3x to 1.6x at 128, 1.5x at 192, 1.8x to 3.1x at 384, 2.3x at 768 (AVX-512 BF16, attention by products).
CPU_BF16_FROM_CHANNELS = 128
BF16_FLAGS = {"amx_bf16", "avx512_bf16"}  # what /proc/cpuinfo calls instructions that multiply bf16


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One rank's share of the hardware."""

    device: str
    """cpu, cuda:0 or mps."""
    name: str
    """What the vendor calls it."""
    memory_bytes: int
    """Memory that a run may use: of the GPU, or of the host."""
    threads: int
    """CPU threads of arithmetic."""
    peak_flops: float | None
    """From the data sheet, with 16-bit inputs (it says nothing of float32); None where none is known."""
    fast_bf16: bool
    """bfloat16 has hardware of its own (compute capability 8, AMX, AVX-512 BF16)."""

    @property
    def kind(self) -> str:
        """cpu, cuda or mps."""
        return self.device.partition(":")[0]


def probe(device: str = "auto", threads: int | None = None, *, setting: str = "train.device") -> Machine:
    """The machine as `device` asks for it; messages call that `setting`.

    Raises:
        DeviceError: the device is not here, naming what is.
        ConfigError: `device` or `threads` is not of the right form.
    """
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ConfigError("train.threads is out of range.", got=threads, expected=f"1 to {MOST_THREADS}")
    name = device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or not re.fullmatch("[0-9]{0,4}", index):
        raise ConfigError(
            f"{setting} is not a device.", got=repr(device), expected="auto, cpu, cuda, cuda:N or mps"
        )
    local_rank, local_world = (
        int(os.environ.get(k, d)) for k, d in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    )
    n_threads = threads or max(
        1, torch.get_num_threads() if local_world == 1 else (os.cpu_count() or 1) // local_world
    )
    if kind == "cuda" and index and local_world > 1:
        raise ConfigError(
            f"{setting}={device}: each of {local_world} processes needs a GPU of its own.",
            hint="--train.device cuda",
        )
    if kind == "cuda" and not index:
        index = str(local_rank)  # each rank of a host has its own
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise DeviceError(
                f"{setting}={device}: this machine has {count or 'no'} CUDA device{'s' if count != 1 else ''}"
                f" that PyTorch {torch.__version__} can use.",
                hint=f"--{setting.removeprefix('--')} auto"
                if local_world == 1 or not count
                else f"at most {count} processes on this machine: this is local rank {local_rank}",
            )
        torch.cuda.set_device(int(index or 0))  # what says only "cuda", and every library, means this one
        facts = torch.cuda.get_device_properties(int(index or 0))
        return Machine(
            device=f"cuda:{int(index or 0)}",
            name=facts.name,
            memory_bytes=facts.total_memory,
            threads=n_threads,
            peak_flops=data_sheet_flops(facts.name),
            fast_bf16=facts.major >= 8,  # is_bf16_supported() also says yes where it is only emulated
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(
            f"{setting}={device}: this machine has no Apple GPU that PyTorch can use.",
            hint=f"--{setting.removeprefix('--')} auto",
        )
    return Machine(
        device=kind,
        name=_cpu_name(),
        memory_bytes=host_memory_bytes() // local_world,
        threads=n_threads,
        peak_flops=None,
        fast_bf16=kind == "cpu" and bool(BF16_FLAGS & _cpu_flags()),
    )


def data_sheet_flops(name: str) -> float | None:
    """PEAK_FLOPS of the device that its vendor calls `name`: an L40 is no L4, a laptop's chip not the desktop's."""
    fits = (flops for part, flops in PEAK_FLOPS.items() if re.search(rf"\b{part}\b(?! Laptop)", name))
    return next(fits, None)


def choose_dtype(asked: str, machine: Machine, model: ModelConfig) -> str:
    """The dtype of matrix products: what was asked for, or what is fast here and safe."""
    if asked == "float16" and machine.kind == "cpu":
        raise ConfigError("train.dtype=float16 needs a GPU.", hint="--train.dtype auto")
    if asked != "auto":
        return asked
    if machine.kind == "cuda":
        return "bfloat16" if machine.fast_bf16 else "float16"
    large = model.n_embd >= CPU_BF16_FROM_CHANNELS
    return "bfloat16" if machine.kind == "cpu" and machine.fast_bf16 and large else "float32"


def autocast(machine: Machine, dtype: str) -> contextlib.AbstractContextManager[object]:
    """Matrix products in `dtype` while this is open; weights stay float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(machine.kind, dtype=getattr(torch, dtype))


def measure_flops(machine: Machine, dtype: str, size: int | None = None, tries: int = 4) -> float:
    """FLOP/s of a square matrix product here and now, the best of a few tries; a second or two at most.

    On a GPU the matrices are large and several products stand between two waits: a small one measures the launch.
    """
    size = size or (8192 if machine.kind == "cuda" else 1024)
    products = 1 if machine.kind == "cpu" else 4
    a = torch.randn(size, size, device=machine.device).to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(tries + 1):
        begun = time.perf_counter()
        for _ in range(products):
            c = a @ a
        c[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begun)
    if machine.kind == "cuda":
        del a, c
        torch.cuda.reset_peak_memory_stats(machine.device)  # this is no part of what a run needs
    return 2 * size**3 * products / best


def measure_copy(machine: Machine, size_bytes: int | None = None, tries: int = 4) -> float:
    """Bytes per second of a large tensor's copy here and now, read and written, the best of a few tries.

    Large, so that no cache holds it; what lies in one is faster.
    """
    size_bytes = size_bytes or (1 << 30 if machine.kind == "cuda" else 1 << 28)
    a = torch.ones(size_bytes // 4, device=machine.device)
    b = torch.empty_like(a)
    best = float("inf")
    for _ in range(tries + 1):
        wait(machine)
        begun = time.perf_counter()
        b.copy_(a)
        wait(machine)
        best = min(best, time.perf_counter() - begun)
    if machine.kind == "cuda":
        del a, b
        torch.cuda.reset_peak_memory_stats(machine.device)
    return 2 * size_bytes / best


def wait(machine: Machine) -> None:
    """Until the device has done what it was given; at once on a CPU."""
    if machine.kind == "cuda":
        torch.cuda.synchronize(machine.device)
    elif machine.kind == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def using(machine: Machine, *, exact: bool = False) -> Iterator[None]:
    """Compute as is best on the machine while this is open: its threads, and products of float32 matrices.

    Args:
        exact: float32 to the last bit on CUDA, too: what evaluation asks for, whose figures say float32.

    CUDA: TF32 (10 bits of mantissa). CPU: float32 to the last bit, but by oneDNN where MKL is slow: on AMD processors it
    leaves AVX-512 unused, and oneDNN is twice as fast (Zen 5, two cores: 479 against 225 GFLOP/s). PyTorch hands products
    to oneDNN when bfloat16 would do ("medium"); oneDNN makes use of that only where there is AMX, so this is for processors
    without, and only once a product has come out as float32's own.
    """
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), attention.products_in_float32
    try:
        torch.set_num_threads(machine.threads)
        _choose_float32_products(machine, exact)
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        attention.products_in_float32 = before[2]


def _choose_float32_products(machine: Machine, exact: bool) -> None:
    torch.set_float32_matmul_precision("high" if machine.kind == "cuda" and not exact else "highest")
    flags = _cpu_flags()
    if machine.kind != "cpu" or _cpu_info("vendor_id") != "AuthenticAMD":
        return
    if "avx512f" not in flags or "amx_bf16" in flags:
        return
    torch.set_float32_matmul_precision("medium")
    x = 1 + 2**-12  # bfloat16 has no such number, and all 64 partial sums are exact in float32
    if not torch.equal(torch.full((64, 64), x) @ torch.ones(64, 64), torch.full((64, 64), 64 * x)):
        torch.set_float32_matmul_precision("highest")
        return
    attention.products_in_float32 = True


def peak_memory_bytes(machine: Machine) -> int:
    """The most memory this process has used: allocated on the GPU, or resident on the host."""
    if machine.kind == "cuda":
        return torch.cuda.max_memory_allocated(machine.device)
    if machine.kind == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024  # macOS counts bytes, Linux kibibytes


def host_memory_bytes() -> int:
    """Memory of this host, or of the container where that is less; 0 where it cannot be told."""
    total = 0
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


def _cpu_info(key: str) -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return ""


def _cpu_flags() -> set[str]:
    return set(_cpu_info("flags").split())


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()
