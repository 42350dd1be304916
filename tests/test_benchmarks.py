"""The ablations' table of variants: each is a run that can be begun, and every switch of the modern model is in it; and
the table of peers, as far as it needs none."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from regpt.cli.parse import parse
from regpt.cli.plan import Args as PlanArgs
from regpt.config import ModelConfig, ModernConfig, load_preset
from regpt.models.count import count_parameters, flops_per_token
from regpt.optim.groups import check_optimizer
from regpt.optim.schedule import check_schedule
from regpt.train.machine import Machine
from regpt.train.plan import make_plan

LAPTOP = Machine(
    device="cpu", name="a laptop", memory_bytes=16 << 30, threads=2, peak_flops=None, fast_bf16=False
)


def script(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ablate() -> ModuleType:
    return script("ablate")


@pytest.fixture(scope="module")
def train_peers() -> ModuleType:
    return script("train_peers")


@pytest.mark.parametrize("preset", ["modern-char", "modern-30m"])
@pytest.mark.parametrize("steps", [None, 100])
def test_every_variant_can_be_run(ablate: ModuleType, preset: str, steps: int | None) -> None:
    base = load_preset(preset).config
    names = ablate.variants(base)
    assert len(names) > 30
    for name in names:
        config = ablate.variant(base, name, steps)
        make_plan(config, LAPTOP, vocab_size=65)
        check_optimizer(config.optim)
        check_schedule(config.optim, config.train.steps)


def test_every_switch_of_the_modern_model_is_turned_over(ablate: ModuleType) -> None:
    base = load_preset("modern-char").config
    turned = {setting for name in ablate.variants(base) for setting in ablate.VARIANTS[name]}
    assert {f"model.modern.{f.name}" for f in dataclasses.fields(ModernConfig)} <= turned


def test_what_is_counted_in_steps_is_fitted_to_them(ablate: ModuleType) -> None:
    base = ablate.changed(load_preset("modern-char").config, {"optim.muon_momentum_steps": 50})
    assert ablate.fitted(base, base.train.steps) == base
    half = ablate.fitted(base, base.train.steps // 2).optim
    assert (half.muon_momentum_steps, half.warmup_steps, half.decay_steps) == (25, 0, None)


def test_a_ramp_is_compared_at_equal_tokens(ablate: ModuleType) -> None:
    """Of more steps: a fifth with three eighths of the tokens. What reads no other batches has the base's steps."""
    base = load_preset("modern-char").config
    steps = ablate.steps_of_tokens(base, "batch_ramp=on")
    config = ablate.variant(base, "batch_ramp=on", steps)
    assert (steps, config.train.batch_ramp_steps) == (274, 54)
    assert 0 <= ablate.tokens(config) - ablate.tokens(base) < base.train.batch_tokens
    assert ablate.steps_of_tokens(base, "norm=layer") == base.train.steps
    assert ablate.steps_of_tokens(config, "batch_ramp=off") in (240, 241)
    assert ablate.fitted(config, 137).train.batch_ramp_steps == 27


def test_verdicts(ablate: ModuleType) -> None:
    """Two pooled deviations decide; seeds that only one side has do not count; a failure is one."""

    def runs(*losses: float) -> dict[int, dict[str, object]]:
        return {
            seed: {"loss": loss, "failed": None if math.isfinite(loss) else "exit 3"}
            for seed, loss in enumerate(losses)
        }

    base = runs(1.00, 1.02, 1.04, 9.0)
    clear = ablate.Compared(runs(0.90, 0.92, 0.94), base)
    assert (clear.difference, clear.spread) == (pytest.approx(-0.1), pytest.approx(0.02))
    assert (clear.verdict, clear.unsure, clear.seeds) == ("pays", False, "3")
    assert ablate.Compared(runs(1.10, 1.12, 1.14), base).verdict == "costs"
    assert ablate.Compared(runs(1.03, 1.05, 1.07), base).verdict == "within noise"
    failed = ablate.Compared(runs(0.90, math.inf, 0.94), base)
    assert (failed.verdict, failed.unsure, failed.seeds) == ("fails", False, "2 + 1 failed")
    assert failed.difference == pytest.approx(-0.1)


def test_our_row_among_peers(
    train_peers: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    words = [
        "--shape",
        "tiny",
        "--peers",
        "regpt,nanogpt",
        "--dtypes",
        "float32",
        "--rounds",
        "1",
        "--steps",
        "2",
    ]
    train_peers.main([*words, "--threads", "1", "--json", str(file)])
    out = capsys.readouterr().out
    assert "nanogpt left out: --nanogpt names no checkout" in out
    row = next(line for line in out.splitlines() if line.startswith("| regpt float32 |"))
    assert row.endswith("| 1.00 |") and "MiB" in row
    found = json.loads(file.read_text())["rows"]["regpt float32"][0]
    shape = train_peers.SHAPES["tiny"]
    assert (found["plan"]["batch_rows"], found["plan"]["n_micro"], found["steps"]) == (shape.rows, 1, 2)
    assert found["plan"]["dtype"] == "float32" and found["machine"]["threads"] == 1


def test_a_peer_that_fails_is_left_out_with_its_own_words(
    train_peers: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.py").write_text("raise ImportError('no such thing')")
    words = ["--shape", "tiny", "--peers", "nanogpt", "--dtypes", "float32", "--rounds", "2", "--steps", "1"]
    train_peers.main([*words, "--nanogpt", str(tmp_path)])
    assert capsys.readouterr().out.count("nanogpt float32 left out: ImportError: no such thing\n") == 1


def test_peers_share_is_by_the_flops_that_we_count(train_peers: ModuleType) -> None:
    """But for the norms' weights, which are in no product."""
    for shape in train_peers.SHAPES.values():
        model = ModelConfig(
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_embd=shape.n_embd,
            block_size=shape.block_size,
            bias=False,
        )
        norms = 6 * (2 * shape.n_layer + 1) * shape.n_embd
        assert shape.flops_per_token == flops_per_token(model, shape.vocab_size) - norms


def test_a_law_is_found_again_in_what_it_says() -> None:
    """Losses by a known law, half a percent off at most: its exponents come back to a tenth, what it says to a percent."""
    scaling = script("scaling")
    e, a, b, alpha, beta = 1.8, 40.0, 400.0, 0.3, 0.4
    points = [
        {"n": n, "d": d, "loss": (e + a / n**alpha + b / d**beta) * (1 + 0.005 * ((i * 7) % 5 - 2) / 2)}
        for i, (n, d) in enumerate((n, d) for n in (1e5, 4e5, 1.6e6, 6e6) for d in (2e5, 8e5, 3e6, 1e7))
    ]
    law, off = scaling.fit(points)
    assert law.alpha == pytest.approx(alpha, abs=0.1) and law.beta == pytest.approx(beta, abs=0.1)
    assert law.loss(2e7, 4e7) == pytest.approx(e + a / 2e7**alpha + b / 4e7**beta, rel=0.03)
    assert off < 0.005
    for told, reached in scaling.held_out(points):
        assert told == pytest.approx(reached, rel=0.03)


def test_every_run_of_the_scaling_series_can_be_planned() -> None:
    scaling = script("scaling")
    runs = scaling.series(["gpt2", "modern"])
    assert len(runs) >= 20
    for run in runs:
        words = [w for k, v in scaling.settings(*run).items() for w in (f"--{k}", str(v))]
        config = parse(
            PlanArgs, words, prog="test", default=PlanArgs(config=load_preset(scaling.preset(run[0])).config)
        ).config
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, batch_tokens=scaling.BATCH_TOKENS)
        )
        plan = make_plan(config, LAPTOP, vocab_size=scaling.VOCAB)
        assert plan.total_tokens == run[3]
        assert count_parameters(config.model, scaling.VOCAB).multiplied == scaling.size(*run[:3])


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> ModuleType:
    return script("data")


def test_documents_are_cut_at_blank_lines(data: ModuleType, tmp_path: Path) -> None:
    """Nothing is lost but what does not fill the last one, and it stops where asked."""
    text = "\n\n".join(f"paragraph {i} " + "x" * 500 for i in range(40))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    found = list(data.documents([tmp_path / "a.jsonl"], 1 << 30))
    assert text.startswith("".join(found)) and all(3000 <= len(d) < 3600 for d in found)
    assert len(list(data.documents([tmp_path / "a.jsonl"], 4000))) == 2


def test_ratios_are_of_a_rounds_own_pair(data: ModuleType) -> None:
    def rounds(*rates: float) -> list[dict[str, float]]:
        return [{"bytes_per_second": r, "memory_bytes": 2**20} for r in rates]

    bare = f"tiktoken x{data.cores()}"
    found = {
        "regpt": rounds(8e6, 9e6, 40e6),
        "nanogpt": rounds(2e6, 3e6, 20e6),
        bare: rounds(8e6, 10e6, 50e6),
    }
    found["tokenizers"] = [{"failed": "no such module"}]
    lines = data.table(found, 10**6).splitlines()
    assert "| regpt | 9.0 | 3.00 | 0.90 | 1 MiB |" in lines
    assert "| tokenizers | failed: no such module | | | |" in lines


def test_every_way_to_draw_a_batch_gives_rows_of_the_file(data: ModuleType, tmp_path: Path) -> None:
    """Targets one position on, every row a stretch of it."""
    import numpy as np

    ids = np.arange(5000, dtype=np.uint16)
    ids.tofile(tmp_path / "train.bin")
    for peer in ("nanogpt", "regpt", "gather", "view"):
        x, y = data.drawer(peer, str(tmp_path / "train.bin"))()
        assert x.shape == y.shape == (64, 1024) and x.dtype == y.dtype
        steps = (y - x).unique().tolist()  # around the end it goes on from the beginning
        assert steps in ([1], [-4999, 1])


def test_tokenizers_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a little text, as far as no peer is needed that regpt does not need."""
    bench = script("tokenizer")
    (tmp_path / "text.txt").write_text("the king and the queen and the größer king. " * 200, encoding="utf-8")
    words = ["--text", str(tmp_path / "text.txt"), "--bytes", "5000", "--vocab-size", "270", "--rounds", "2"]
    figures = tmp_path / "figures.json"
    bench.main(
        [*words, "--only", "regpt with tokenizers,learning: tokenizers,minbpe", "--json", str(figures)]
    )
    out = capsys.readouterr().out
    assert "minbpe left out: --minbpe names no clone" in out
    found = json.loads(figures.read_text())
    assert 4997 <= found["bytes"] <= 5000
    assert [len(found["rows"][name]) for name in found["rows"]] == [2, 2]
    assert all(
        f["result"] == 270 and f["memory_bytes"] > 1e7 for rows in found["rows"].values() for f in rows
    )
    assert "| learning: regpt with tokenizers |" in out


def test_a_tokenizer_that_fails_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = script("tokenizer")
    (tmp_path / "text.txt").write_text("some text " * 50)
    words = [
        "--text",
        str(tmp_path / "text.txt"),
        "--rounds",
        "2",
        "--only",
        "minbpe",
        "--minbpe",
        str(tmp_path),
    ]
    bench.main(words)
    assert capsys.readouterr().out.count("minbpe left out: ModuleNotFoundError") == 1


# --- evaluation beside peers ------------------------------------------------------------------------------------------


def test_rates_are_told_beside_build_nanogpts() -> None:
    values = {"seconds": 2.0, "rate": 3.0, "mib": 100.0}
    shown = script("evaluate").table(
        {
            "regpt": {**values, "rate": 9.0},
            "nanogpt": values,
            "passes": values,
            "loss": {**values, "seconds": 2.1},
        }
    )
    assert "| regpt | 9.00 | 3.00 | 100 |" in shown and "| nanogpt | 3.00 | 1.00 | 100 |" in shown
    assert "| loss | 2.10 | 1.050 | 100 |" in shown
