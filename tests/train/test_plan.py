"""The plan: arithmetic that follows from the settings, against published figures and what the machine can hold."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from regpt.config import Config, ModelConfig, TrainConfig, load_preset
from regpt.errors import ConfigError, DeviceError
from regpt.train.estimate import with_time
from regpt.train.machine import (
    PEAK_FLOPS,
    Machine,
    choose_dtype,
    data_sheet_flops,
    measure_flops,
    probe,
    using,
)
from regpt.train.plan import as_dict, make_plan

LAPTOP = Machine(
    device="cpu", name="a laptop", memory_bytes=16 << 30, threads=2, peak_flops=None, fast_bf16=False
)
A100 = Machine(
    device="cuda:0",
    name="NVIDIA A100-SXM4-80GB",
    memory_bytes=80 << 30,
    threads=8,
    peak_flops=312e12,
    fast_bf16=True,
)


def test_gpt2_124m_on_eight_gpus() -> None:
    """build-nanogpt's arithmetic: 2^19 tokens a step over 8 GPUs is one micro-batch of 64 rows each."""
    config = load_preset("gpt2-124m-fineweb-edu").config
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_rows=64))
    plan = make_plan(config, A100, vocab_size=50257, train_tokens=9_900_000_000, world=8)
    assert (plan.batch_rows, plan.micro_rows, plan.n_micro) == (512, 64, 1)
    assert plan.parameters == 124_439_808
    assert plan.padded_vocab_size == 50304
    assert plan.total_tokens == 19_073 * 2**19
    assert plan.epochs == pytest.approx(1.01, abs=0.001)
    assert plan.dtype == "bfloat16" and plan.compile
    one = make_plan(config, A100, vocab_size=50257, world=1)
    assert (one.batch_rows, one.n_micro) == (512, 8)
    assert one.total_flops == plan.total_flops
    assert plan.time_s is not None and one.time_s == pytest.approx(8 * plan.time_s)


def test_an_automatic_micro_batch_keeps_the_global_batch_and_fits() -> None:
    config = load_preset("gpt2-124m-openwebtext").config
    for gib in (8, 24, 80):
        machine = dataclasses.replace(A100, memory_bytes=gib << 30)
        plan = make_plan(config, machine, vocab_size=50257)
        assert plan.micro_rows * plan.n_micro == 480
        assert plan.memory.total <= machine.memory_bytes
    sizes = [
        make_plan(config, dataclasses.replace(A100, memory_bytes=g << 30), vocab_size=50257).micro_rows
        for g in (8, 24, 80)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_a_plan_is_pure() -> None:
    config = load_preset("demo").config
    a, b = (make_plan(config, LAPTOP, vocab_size=4096) for _ in range(2))
    assert a == b
    assert as_dict(a)["memory"]["total"] == a.memory.total  # type: ignore[index]
    assert a.time_s is None


def test_time_is_measured_where_no_data_sheet_tells_it() -> None:
    """In proportion to the steps, touching neither the plan's other fields nor the random numbers of the run."""
    config = load_preset("demo").config
    machine, before = probe("cpu"), torch.get_rng_state()
    plan = make_plan(config, machine, vocab_size=512)
    timed = with_time(plan, config, machine)
    assert timed.time_s is not None and 0 < timed.time_s < math.inf
    assert dataclasses.replace(timed, time_s=None) == plan
    assert torch.equal(torch.get_rng_state(), before)
    sheet = make_plan(config, A100, vocab_size=512)
    assert with_time(sheet, config, A100) is sheet and sheet.time_s is not None


def test_time_of_a_run_from_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer takes 3 s a pass and 0.5 s an update, all else 2 and 1; the pass was of half the rows."""
    from regpt.train import estimate

    monkeypatch.setattr(estimate, "_pass_and_update_s", lambda n, *_: (2.0 + 3.0 * n, 1.0 + 0.5 * n))
    config = load_preset("demo").config  # 4 layers
    plan = dataclasses.replace(make_plan(config, LAPTOP, vocab_size=512), n_micro=4, micro_rows=32, steps=10)
    assert estimate.with_time(plan, config, LAPTOP).time_s == pytest.approx(10 * (4 * 14.0 * 2 + 3.0))


@pytest.mark.parametrize(
    ("train", "world", "message"),
    [
        (
            TrainConfig(batch_tokens=500_000, micro_rows=16),
            2,
            "train.batch_tokens=500000 is not a multiple of 2 ranks x 16 rows x 1024 tokens = 32768.\n"
            "  try: --train.batch-tokens 491520 or 524288",
        ),
        (
            TrainConfig(batch_tokens=1000),
            1,
            "train.batch_tokens=1000 is not a multiple of 1024 tokens.\n  try: --train.batch-tokens 1024",
        ),
        (
            TrainConfig(batch_tokens=1024),
            3,
            "train.batch_tokens=1024 is not a multiple of 3 ranks x 1024 tokens = 3072.\n"
            "  try: --train.batch-tokens 3072",
        ),
    ],
)
def test_batches_that_do_not_divide(train: TrainConfig, world: int, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        make_plan(Config(train=train), A100, vocab_size=50257, world=world)
    assert str(e.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": TrainConfig(steps=-1)}, "train.steps must be at least 1."),
        ({"seed": -1}, r"seed must lie in \[0, 2\^63\)."),
        ({"model": ModelConfig(n_head=5)}, "model.n_embd=768 is not a multiple of model.n_head=5."),
        ({"model": ModelConfig(dropout=1.0)}, r"model.dropout must lie in \[0, 1\)."),
    ],
)
def test_settings_out_of_range(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(dataclasses.replace(Config(), **change), LAPTOP, vocab_size=257)  # type: ignore[arg-type]


def test_dtype_by_hardware() -> None:
    small, large = ModelConfig(n_embd=96), ModelConfig(n_embd=768)
    amx = dataclasses.replace(LAPTOP, fast_bf16=True)
    t4 = dataclasses.replace(A100, fast_bf16=False)
    assert choose_dtype("auto", LAPTOP, large) == "float32"
    assert (choose_dtype("auto", amx, small), choose_dtype("auto", amx, large)) == ("float32", "bfloat16")
    assert (choose_dtype("auto", A100, small), choose_dtype("auto", t4, small)) == ("bfloat16", "float16")
    assert choose_dtype("float32", A100, large) == "float32"
    with pytest.raises(ConfigError, match=r"train.dtype=float16 needs a GPU"):
        choose_dtype("float16", LAPTOP, large)


def test_probe_finds_this_machine() -> None:
    machine = probe("cpu", threads=1)
    assert (machine.device, machine.kind, machine.threads) == ("cpu", "cpu", 1)
    assert machine.memory_bytes > 1 << 28
    assert measure_flops(machine, "float32", size=64, tries=1) > 0
    assert probe("auto").kind in ("cpu", "cuda", "mps")


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        (
            "tpu",
            ConfigError,
            "train.device is not a device.\n  got: 'tpu'\n  expected: auto, cpu, cuda, cuda:N or mps",
        ),
        ("cuda:x", ConfigError, "train.device is not a device."),
        ("cuda:63", DeviceError, "train.device=cuda:63: this machine has"),
    ],
)
def test_devices_that_are_not_here(device: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as e:
        probe(device)
    assert str(e.value).startswith(message)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has an Apple GPU")
def test_no_apple_gpu_is_said() -> None:
    with pytest.raises(DeviceError, match="no Apple GPU"):
        probe("mps")


def test_peak_flops_prefer_the_longer_name() -> None:
    """'H100 PCIe' must not be taken for 'H100', nor 'A10G' for 'A10'."""
    names = list(PEAK_FLOPS)
    for i, name in enumerate(names):
        assert not any(name in later and name != later for later in names[i + 1 :]), name
    assert all(math.isfinite(v) for v in PEAK_FLOPS.values())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", None),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_the_data_sheet_is_found_by_whole_words(name: str, part: str | None) -> None:
    assert data_sheet_flops(name) == (PEAK_FLOPS[part] if part else None)


def test_float32_products_stay_float32() -> None:
    """Whatever library multiplies inside, the error is float32's: far from that of bfloat16 operands."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with using(probe("cpu", threads=1)):
        assert torch.get_num_threads() == 1
        a, b = torch.randn(256, 256), torch.randn(256, 256)
        exact = a.double() @ b.double()
        assert (a @ b - exact).abs().max() < 1e-4 < (a.bfloat16() @ b.bfloat16() - exact).abs().max()
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
