"""`regpt bench`: what it prints, what it counts and what it refuses. Nothing is timed: the figures only have to be there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from regpt.cli import main
from regpt.cli.bench import DEFAULT_TRACE
from regpt.models import build_model
from regpt.models.attention import by_products
from regpt.train.machine import Machine, autocast, measure_copy
from regpt.train.operators import operators, product_flops
from tiny import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = Machine(
    device="cpu", name="a laptop", memory_bytes=1 << 34, threads=1, peak_flops=None, fast_bf16=False
)
TINY = (
    *("--model.n-layer", "2", "--model.n-head", "2", "--model.n-embd", "32", "--model.block-size", "32"),
    *(
        "--tokenizer.name",
        "bytes",
        "--train.batch-tokens",
        "256",
        "--train.threads",
        "1",
        "--train.device",
        "cpu",
    ),
)
MODERN = ("--model.arch", "modern", "--optim.name", "muon", "--train.micro-rows", "2")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small ceilings, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("regpt.train.bench.measure_flops", lambda *_: 1e9)
    monkeypatch.setattr("regpt.train.bench.measure_copy", lambda m: measure_copy(m, size_bytes=1 << 12))


@pytest.mark.parametrize("more", [(), MODERN], ids=["gpt2", "modern, four micro-batches"])
def test_train(more: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "demo", *TINY, *more, "--steps", "2", "--profile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["preset"] == "demo" and found["steps"] == 2 and found["vocabulary_known"]
    assert found["plan"]["n_micro"] == (4 if more else 1)
    assert found["step_p10_s"] <= found["step_s"] <= found["step_p90_s"]
    assert found["tokens_per_second"] == pytest.approx(256 / found["step_s"])
    flops = found["plan"]["flops_per_token"] * found["tokens_per_second"]
    assert found["flops_per_second"] == pytest.approx(flops)
    assert found["share_of_ceiling"] == pytest.approx(flops / 1e9)
    assert found["planned_memory_bytes"] <= found["plan"]["memory"]["total"]
    for key in ("forward_s", "backward_s", "update_s", "peak_memory_bytes", "ceiling_flops_per_second"):
        assert found[key] > 0, key

    profiled = found["profile"]
    assert profiled["copy_bytes_per_second"] > 0 and "float32" in profiled["product_flops_per_second"]
    products = [o for o in profiled["operators"] if o["flops"]]
    assert {"aten::mm"} <= {o["name"] for o in products} and all(o["share_of_ceiling"] for o in products)
    assert 0 < sum(o["share_of_step"] for o in profiled["operators"]) <= 1
    times = [o["self_s"] for o in profiled["operators"]]
    assert times == sorted(times, reverse=True)
    assert json.loads(Path(DEFAULT_TRACE).read_text())["traceEvents"]


def test_what_a_person_sees(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", *TINY, "--steps", "1", "--profile", "here.json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert not err
    rows = " ".join(line.split()[0] for line in out.splitlines()[:10])
    assert rows == "model batch machine step forward backward update speed products memory"
    assert "the 10 costliest operators" in out and "The trace lies in here.json" in out
    assert list(Path().iterdir()) == [Path("here.json")]  # no run was begun


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_products_are_counted_as_pytorch_counts_them(arch: str, dtype: str) -> None:
    """Forward and backward pass. Of attention's fused kernel for CPUs, which PyTorch's counter does not know, its formulas."""
    config = dataclasses.replace(tiny_config().model, arch=arch)
    model = build_model(config, 257)
    ids = torch.zeros(4, config.block_size, dtype=torch.int64)

    def step() -> None:
        with autocast(CPU, dtype):
            loss = model(ids, ids)
        loss.backward()

    with FlopCounterMode(display=False) as counter:
        step()
    with profile(record_shapes=True) as record:
        step()
    found = operators(record.events(), on_device=False)
    fused = [o for o in found if "scaled_dot_product" in o.name and o.flops]
    assert sum(o.flops for o in found if o not in fused) == counter.get_total_flops() > 0
    assert bool(fused) != by_products("cpu", getattr(torch, dtype), config.block_size) or config.dropout


def test_attention_is_counted_by_its_products() -> None:
    q = [2, 3, 8, 4]  # B, H, T, D: a product is of 2 B H T T D
    one = 2 * 2 * 3 * 8 * 8 * 4
    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert product_flops(name, [q, q, q]) == 2 * one
    assert product_flops(name + "_backward", [q, q, q, q]) == 5 * one  # the scores again, and four gradients


def test_bytes_are_those_of_the_inputs() -> None:
    """Broadcast numbers once, a table only where it is read, lists of tensors as float32."""
    table, ids = torch.zeros(1000, 8), torch.zeros(5, dtype=torch.int64)
    a, b = torch.zeros(6, 4), torch.zeros(4)
    with profile(record_shapes=True) as record:
        a.bfloat16()
        a.add(b.expand(6, 4))
        table.index_select(0, ids)
        torch._foreach_add_([a, b], 1.0)
    found = {(o.name.removeprefix("aten::"), o.bytes) for o in operators(record.events(), on_device=False)}
    assert found >= {
        ("copy_", 24 * 2 + 24 * 4),
        ("add", 24 * 4 + 4 * 4),
        ("index_select", 5 * 8 * 4 + 5 * 8),
        ("_foreach_add_", 28 * 4),
    }


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    assert "regpt bench train  a training step" in capsys.readouterr().out
    assert main(["bench", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["benches"]) == ["train", "data"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "UsageError: there is no bench 'trian'. Did you mean train?\n  try: regpt bench\n"),
        (["train", "--steps", "0"], "ConfigError: --steps must be at least 1.\n  got: 0\n"),
        (
            ["train", "--stesp", "3"],
            "ConfigError: there is no option --stesp. Did you mean --steps?\n  try: regpt bench train --help\n",
        ),
        (
            ["train", "--profile", "no/trace.json"],
            "UsageError: the trace no/trace.json cannot be written: No such file or directory.\n"
            "  try: --profile another.json\n",
        ),
        (
            ["train", "--profile"],
            f"UsageError: {DEFAULT_TRACE} is there already; a trace overwrites nothing.\n  try: --profile another.json\n",
        ),
        (
            ["train", "--quiet", "demo"],
            "UsageError: unexpected argument 'demo'; a preset stands before every option.\n"
            "  try: regpt bench train demo --quiet\n",
        ),
    ],
)
def test_mistakes_give_one_message_and_exit_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(DEFAULT_TRACE).write_text("mine")
    assert main(["bench", *words]) == 2
    assert capsys.readouterr() == ("", message)
    assert Path(DEFAULT_TRACE).read_text() == "mine"


def test_not_under_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["bench", "train", *TINY]) == 2
    assert "does not run under torchrun" in capsys.readouterr().err


def test_a_trace_that_came_to_nothing_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("regpt.train.bench.measure_flops", stopped)
    assert main(["bench", "train", *TINY, "--profile"]) == 130
    assert not Path(DEFAULT_TRACE).exists()


def test_bench_data_measures_a_text(tmp_path, monkeypatch, capsys) -> None:
    """Every figure is there, the counts are those of the text, and nothing is left behind."""
    monkeypatch.setattr("regpt.data.bench.TIMED_S", 0.0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    texts = [f"Story {i}. " + "once upon a time, " * 20 for i in range(30)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert main(["bench", "data", str(path), "--tokenizer", "bytes", "--workers", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    size = sum(map(len, texts))
    assert (found["text_bytes"], found["documents"], found["tokens"]) == (size, 30, size + 30)
    assert (found["workers"], found["batch_rows"], found["block_size"]) == (1, 64, 1024)
    rates = ("read", "tokenizer", "prepare")
    assert all(found[f"{name}_bytes_per_second"] > 0 for name in rates) and found["batch_s"] > 0
    assert main(["bench", "data", str(path), "--tokenizer", "bytes", "--workers", "1"]) == 0
    assert "in one process, by itself (bytes)" in capsys.readouterr().out
    assert list((tmp_path / "temporary").iterdir()) == []


def test_bench_data_takes_the_beginning_of_a_large_source(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("regpt.data.bench.TIMED_S", 0.0)
    monkeypatch.setattr("regpt.data.bench.MOST_BYTES", 1000)
    monkeypatch.setattr("regpt.data.sources.PART_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 50}) + "\n" for i in range(100)))
    assert main(["bench", "data", str(path), "--tokenizer", "bytes", "--json"]) == 0
    assert 15 <= json.loads(capsys.readouterr().out)["documents"] <= 20


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no text"), ('{"text": ""}\n', "holds no text"), ("{", "is not valid JSON")],
)
def test_bench_data_refuses_what_holds_no_text(tmp_path, capsys, content, message) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    assert main(["bench", "data", str(path), "--tokenizer", "bytes"]) == 2
    assert message in capsys.readouterr().err
