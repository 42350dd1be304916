"""train.compile=auto on a CPU: when it compiles, what it says, what a resumed run keeps, and where results are kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from regpt.config import Config, load_preset
from regpt.train import compile as compiling
from regpt.train import loop, session
from regpt.train.compile import (
    CACHE_VARIABLE,
    COLD_S_PER_LAYER,
    GAIN,
    MARGIN,
    as_recorded,
    cpp_compiler,
    inductor_folder,
    keep_compiled,
    with_compile,
)
from regpt.train.machine import Machine
from regpt.train.plan import Plan, make_plan
from regpt.train.session import train

CPU = Machine(
    device="cpu", name="a laptop", memory_bytes=16 << 30, threads=2, peak_flops=None, fast_bf16=True
)
GPU = dataclasses.replace(CPU, device="cuda:0")
CXX = "/usr/bin/g++"


def config_of(compile: str = "auto", **model: Any) -> Config:
    config = load_preset("modern-char").config
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **model),
        train=dataclasses.replace(config.train, compile=compile),  # type: ignore[arg-type]
    )


def plan_of(config: Config, time_s: float | None, machine: Machine = CPU, **more: Any) -> Plan:
    return dataclasses.replace(make_plan(config, machine, vocab_size=65), time_s=time_s, **more)


def test_it_compiles_where_the_gain_is_the_cost_with_a_margin() -> None:
    config = config_of()
    pays_s = MARGIN * COLD_S_PER_LAYER["modern"] * 4 / GAIN["modern"]
    short, long = (
        with_compile(plan_of(config, s), config, CPU, compiler=CXX) for s in (0.98 * pays_s, 1.02 * pays_s)
    )
    assert (short.compile, short.compile_why) == (False, "compiling would cost about 80 s and gain 157")
    assert (long.compile, long.compile_why) == (True, "it costs about 80 s and gains 163")
    assert dataclasses.replace(long, compile=False, compile_why="") == plan_of(config, 1.02 * pays_s)


@pytest.mark.parametrize(
    ("model", "more", "compiler", "why"),
    [
        ({}, {"time_s": None}, CXX, "the time of a step is not known"),
        ({}, {}, None, "there is no C++ compiler; it would gain about 150000 s"),
        ({}, {"world": 2}, CXX, "over several ranks compiling is left to train.compile=on"),
        ({}, {"padded_vocab_size": 4096}, CXX, "compiling gains nothing at this shape"),
        ({"n_embd": 384}, {}, CXX, "compiling gains nothing at this shape"),
        ({"dropout": 0.1}, {}, CXX, "compiling gains nothing at this shape"),
    ],
    ids=str,
)
def test_what_keeps_it_eager_for_ever(
    model: dict[str, Any], more: dict[str, Any], compiler: str | None, why: str
) -> None:
    config = config_of(**model)
    plan = plan_of(config, **{"time_s": 1e6, **more})
    decided = with_compile(plan, config, CPU, compiler=compiler)
    assert (decided.compile, decided.compile_why) == (False, why)


@pytest.mark.parametrize(("setting", "machine"), [("on", CPU), ("off", CPU), ("auto", GPU)], ids=str)
def test_where_nothing_is_to_be_decided(setting: str, machine: Machine) -> None:
    config = config_of(setting)
    plan = plan_of(config, 1e6, machine)
    assert with_compile(plan, config, machine, compiler=CXX) is plan
    recorded: dict[str, object] = {"compile": not plan.compile}
    assert as_recorded(plan, recorded, config, machine, compiler=CXX) is plan


def test_a_run_keeps_its_decision() -> None:
    config = config_of()
    eager, compiled = (
        dataclasses.replace(plan_of(config, 1.0), compile=x, compile_why="as it came out")
        for x in (False, True)
    )
    assert as_recorded(eager, None, config, CPU, compiler=CXX) is eager
    assert as_recorded(eager, {"world": 1}, config, CPU, compiler=CXX) is eager
    kept = as_recorded(eager, {"compile": True}, config, CPU, compiler=CXX)
    assert (kept.compile, kept.compile_why) == (True, "as when this run was begun")
    assert not as_recorded(compiled, {"compile": False}, config, CPU, compiler=CXX).compile
    lost = as_recorded(compiled, {"compile": True}, config, CPU, compiler=None)
    assert (lost.compile, lost.compile_why) == (False, "there is no C++ compiler any more")


def test_a_resumed_run_compiles_if_it_did(tiny_run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it would now be decided otherwise; run.json says so, and a compiler that went is said aloud."""
    compiled: list[bool] = []

    def as_it_is(self: loop.Trainer, model: Any) -> Any:
        compiled.append(True)
        return model

    monkeypatch.setattr(loop.Trainer, "_compiled", as_it_is)
    monkeypatch.setattr(session, "cpp_compiler", lambda: CXX)
    config = dataclasses.replace(tiny_run, model=dataclasses.replace(tiny_run.model, dropout=0.0))

    def sitting(steps: int) -> list[str]:
        notes: list[str] = []
        some = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
        train(some, "run", listen=lambda e, _, v: notes.append(v["text"]) if e == "note" else None)
        return notes

    with monkeypatch.context() as patch:
        patch.setitem(compiling.GAIN, "gpt2", 1e9)
        sitting(4)
    assert len(compiled) == 1
    assert not sitting(6) and len(compiled) == 2
    plan = json.loads(Path("run/run.json").read_text())["plan"]
    assert (plan["compile"], plan["compile_why"]) == (True, "as when this run was begun")
    monkeypatch.setattr(session, "cpp_compiler", lambda: None)
    assert sitting(8) == ["compile changed since this run was begun: it goes on, but not to the same bits."]
    assert len(compiled) == 2


def test_the_compiler_is_the_one_that_inductor_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert cpp_compiler() is None
    own = tmp_path / "my-c++"
    own.touch(mode=0o755)
    monkeypatch.setenv("CXX", "my-c++")
    assert cpp_compiler() == str(own)


def test_results_are_kept_where_they_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In regpt's cache folder; Inductor's own variable goes before; a folder that cannot be made is no fault."""
    monkeypatch.setenv(CACHE_VARIABLE, "")
    monkeypatch.setenv("REGPT_CACHE", str(tmp_path / "cache"))
    assert inductor_folder() == tmp_path / "cache/inductor" and not (tmp_path / "cache").exists()
    keep_compiled()
    assert compiling.os.environ[CACHE_VARIABLE] == str(tmp_path / "cache/inductor")
    monkeypatch.setenv("REGPT_CACHE", str(tmp_path / "other"))
    assert inductor_folder() == tmp_path / "cache/inductor"
    monkeypatch.setenv(CACHE_VARIABLE, "")
    (tmp_path / "other").touch()
    keep_compiled()
    assert compiling.os.environ[CACHE_VARIABLE] == ""
