"""Tasks while a model trains: refused before, the same figures on any ranks, and training goes on as if they were not."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_child import said, train

from regpt.config import Config, EvalConfig, SampleConfig, SaveConfig
from regpt.data.download import Unreachable
from regpt.errors import ConfigError, DataError
from regpt.evals.choices import MultipleChoice
from regpt.evals.tasks import open_task
from regpt.train import session, tasks
from regpt.train.budget import pause_periods
from regpt.train.dist import Ranks
from regpt.train.load import load_model
from regpt.train.machine import probe, using
from regpt.train.plan import make_plan
from regpt.train.tasks import evaluations, open_tasks, passing_tokens, tasks_time_s
from tiny import tiny_hellaswag

ROWS = 12
forks = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")


@pytest.fixture
def config(tiny_run: Config, one_thread: None) -> Config:
    """Twelve rows in micro-batches of two, which two and three ranks may share; tasks after 5 steps and at the end, 8."""
    Path("hellaswag_val.jsonl").write_text(tiny_hellaswag(ROWS), encoding="utf-8")
    return dataclasses.replace(
        tiny_run,
        train=dataclasses.replace(tiny_run.train, steps=8, batch_tokens=12 * 32, micro_rows=2, threads=1),
        eval=EvalConfig(every=4, tasks="hellaswag", tasks_every=5, tasks_data="hellaswag_val.jsonl"),
        save=SaveConfig(keep=3),
        sample=SampleConfig(tokens=2),
    )


def with_eval(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **changes))


def log(out: str | Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def losses(out: str | Path) -> list[tuple[int, str]]:
    """Every training and validation loss, to the bit."""
    steps = [(e["step"], e["loss_hex"]) for e in log(out, "step")]
    return steps + [(e["step"], e["val_loss_hex"]) for e in log(out, "eval")]


def figures(out: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """What the tasks came to, and when; without the time it took."""
    found = []
    for event in log(out, "tasks"):
        of_tasks = {k: dict(v) for k, v in event.items() if isinstance(v, dict)}
        for values in of_tasks.values():
            values.pop("seconds")
        found.append((event["step"], of_tasks))
    return found


def tensors(out: str | Path) -> tuple[bytes, ...]:
    folder = max((Path(out) / "checkpoints").glob("step-*"))
    return tuple((folder / f"{n}.safetensors").read_bytes() for n in ("model", "optimizer"))


# --- beside training -------------------------------------------------------------------------------------------------


def test_training_is_the_same_to_the_bit_with_and_without(config: Config) -> None:
    """Losses, samples, weights and moments; dropout on."""
    session.train(config, "with")
    session.train(with_eval(config, tasks=None), "without")
    assert losses("with") == losses("without")
    assert tensors("with") == tensors("without")
    assert Path("with/samples.jsonl").read_text() == Path("without/samples.jsonl").read_text()
    assert log("without", "tasks") == []


def test_the_log_has_every_figure_where_it_was_due(config: Config) -> None:
    """Those of the last step are what the saved weights give."""
    session.train(config, "run")
    events = log("run", "tasks")
    assert [e["step"] for e in events] == [5, 8]
    steps = {e["step"]: e for e in log("run", "step")}
    for event in events:
        assert all(event[name] == steps[event["step"]][name] for name in ("tokens", "time_s"))
        assert event["elapsed_s"] >= steps[event["step"]]["elapsed_s"] and event["tasks_s"] > 0
        assert event["hellaswag"]["rows"] == ROWS
    loaded = load_model(Path("run"), which="last")
    with using(probe("cpu")):
        task = open_task("hellaswag", Path("hellaswag_val.jsonl"), None)
        again = task.evaluate(loaded.model, loaded.tokenizer).as_dict()
    again.pop("seconds")
    assert figures("run")[-1] == (8, {"hellaswag": again})


def test_evaluations_say_how_far_training_was(config: Config) -> None:
    """Curves over tokens and time need no guess: the numbers are those of the step."""
    session.train(with_eval(config, tasks=None), "run")
    steps = {e["step"]: e for e in log("run", "step")}
    assert [e["step"] for e in log("run", "eval")] == [4, 8]
    for event in log("run", "eval"):
        assert all(event[name] == steps[event["step"]][name] for name in ("tokens", "time_s"))


def test_the_first_rows_and_the_end_only(config: Config) -> None:
    session.train(with_eval(config, tasks_rows=3, tasks_every=None), "run")
    [(step, found)] = figures("run")
    assert step == 8 and found["hellaswag"]["rows"] == 3


def test_a_finished_run_may_be_asked_later(config: Config) -> None:
    """The same figures as if it had been asked then, once: not again in a third call."""
    session.train(config, "whole")
    session.train(with_eval(config, tasks=None), "run")
    session.train(with_eval(config, tasks_every=None), "run")
    assert figures("run") == figures("whole")[-1:]
    session.train(with_eval(config, tasks_every=None), "run")
    assert len(log("run", "tasks")) == 1
    assert losses("run") == losses("whole")


def test_a_longer_run_is_not_asked_twice_at_a_step(config: Config) -> None:
    session.train(config, "run")
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=11))
    session.train(longer, "run")
    assert [step for step, _ in figures("run")] == [5, 8, 10, 11]


# --- refused before --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": "hellaswga"}, "eval.tasks names 'hellaswga', which is no task. Did you mean hellaswag?"),
        ({"tasks": "hellaswag,"}, "eval.tasks names '', which is no task."),
        (
            {"tasks": "loss"},
            "eval.tasks names loss, which is evaluated anyway.\n  try: --eval.every sets how often",
        ),
        (
            {"tasks_every": 0},
            "eval.tasks_every must be at least 1.\n  got: 0\n  try: --eval.tasks-every none",
        ),
        ({"tasks_rows": 0}, "eval.tasks_rows must be at least 1.\n  got: 0\n  try: --eval.tasks-rows none"),
    ],
)
def test_wrong_settings(config: Config, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        session.train(with_eval(config, **changes), "run")
    assert says in str(error.value)
    assert not Path("run").exists() and not Path("data").exists()  # before any text was read


def test_a_file_that_is_not_there(config: Config) -> None:
    """Though it need not be downloaded: who names a file means it."""
    with pytest.raises(DataError, match=r"none\.jsonl"):
        session.train(with_eval(config, tasks_data="none.jsonl", tasks_required=False), "run")
    assert not Path("run").exists() and not Path("data").exists()


def test_characters_that_the_tokenizer_lacks(config: Config) -> None:
    chars = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, name="chars"))
    with pytest.raises(DataError, match="hellaswag, row 1: the model's tokenizer cannot write this text"):
        session.train(chars, "run")
    assert not Path("run").exists()


def test_an_ending_longer_than_the_context(config: Config) -> None:
    short = dataclasses.replace(config, model=dataclasses.replace(config.model, block_size=16))
    with pytest.raises(DataError) as error:
        session.train(short, "run")
    assert str(error.value).startswith("hellaswag, row 1: continuation 1 is longer than the model")
    assert "got: 17 tokens" in str(error.value) and "expected: at most 16" in str(error.value)
    assert not Path("run").exists()


@pytest.fixture
def no_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, data: Path | None, rows: int | None) -> Any:
        if data is None:
            raise Unreachable(f"{name} could not be downloaded.")
        return open_task(name, data, rows)

    monkeypatch.setattr(tasks, "open_task", refused)


def test_without_internet_a_task_that_is_not_required_is_left_out_aloud(
    config: Config, no_internet: None
) -> None:
    heard: list[str] = []

    def listen(event: str, step: int, values: dict[str, Any]) -> None:
        if event == "note":
            heard.append(values["text"])

    session.train(with_eval(config, tasks_data=None, tasks_required=False), "run", listen=listen)
    assert heard == ["hellaswag is left out (eval.tasks_required=false): hellaswag could not be downloaded."]
    assert log("run", "tasks") == []
    session.train(with_eval(config, tasks=None), "without")
    assert losses("run") == losses("without")


def test_without_internet_a_task_that_is_asked_for_ends_the_run_before_it_begins(
    config: Config, no_internet: None
) -> None:
    with pytest.raises(DataError, match=r"^hellaswag could not be downloaded"):
        session.train(with_eval(config, tasks_data=None), "run")
    assert not Path("run").exists() and not Path("data").exists()


def test_where_another_host_has_no_internet_all_leave_the_task_out(config: Config) -> None:
    """Whoever has the file would wait for ever for those who have not."""

    class Two(Ranks):
        def largest(self, value: int) -> int:
            return max(value, 2)  # rank 1 has none

        def together(self, work: Callable[[], Any]) -> Any:
            return work()

    heard: list[str] = []
    assert open_tasks(config.eval, Two(world=2), heard.append) == []
    assert heard == ["hellaswag is left out (eval.tasks_required=false): rank 1 could not have its file."]


def test_what_the_first_of_a_host_could_not_have_the_others_do_not_ask_for(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would wait for as long again."""
    asked: list[str] = []

    class Second(Ranks):
        def largest(self, value: int) -> int:
            return max(value, 1)  # local rank 0 has none

        def together(self, work: Callable[[], Any]) -> Any:
            return work()

    monkeypatch.setattr("regpt.train.tasks.open_task", lambda name, *_: asked.append(name))
    assert open_tasks(config.eval, Second(rank=1, world=2, local_rank=1), lambda _: None) == []
    assert asked == []


def test_a_damaged_file_is_no_reason_to_go_on_without(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object) -> None:
        raise DataError("the file is not the one that is known.")

    monkeypatch.setattr("regpt.train.tasks.open_task", damaged)
    with pytest.raises(DataError, match="not the one that is known"):
        open_tasks(with_eval(config, tasks_data=None, tasks_required=False).eval, Ranks(), print)


# --- on several ranks ------------------------------------------------------------------------------------------------


@forks
def test_loss_and_tasks_are_the_same_to_the_bit_on_1_2_and_3_ranks(config: Config) -> None:
    """Weights of step 5, evaluated by runs that end there: shared among ranks, by DDP's and by FSDP's."""
    assert train(1, with_eval(config, every=None, tasks=None), "run", (0, 5, "SIGTERM")) == [143]
    ends_here = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=5))
    found = {}
    for world, strategy in ((1, "ddp"), (2, "ddp"), (3, "ddp"), (2, "fsdp")):
        shutil.copytree("run", out := f"{strategy}-{world}")
        asked = dataclasses.replace(ends_here, train=dataclasses.replace(ends_here.train, strategy=strategy))
        assert train(world, asked, out) == [0] * world, said(out, 0)
        [loss] = log(out, "eval")
        found[out] = (loss["step"], loss["val_loss_hex"], loss["val_bits_per_byte"], figures(out))
        assert [step for step, _ in figures(out)] == [5]
    assert all(values == found["ddp-1"] for values in found.values()), found


@forks
@pytest.mark.parametrize(
    ("world", "strategy"), [(1, "ddp"), (2, "ddp"), pytest.param(2, "fsdp", marks=pytest.mark.slow)]
)
def test_a_stop_among_the_tasks_begins_the_next_sitting_with_them(
    config: Config, world: int, strategy: str
) -> None:
    """As in an evaluation: nothing is logged twice or left out, and the end is to the bit as without the stop."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, strategy=strategy))
    assert train(world, config, "whole") == [0] * world
    assert train(world, config, "run", (0, 4, "SIGTERM in tasks")) == [143] * world, said("run", 0)
    assert "stopped by SIGTERM after step 5; everything is saved." in said("run", 0)
    assert log("run", "tasks") == []
    assert train(world, config, "run") == [0] * world, said("run", 0)
    assert (losses("run"), figures("run"), tensors("run")) == (
        losses("whole"),
        figures("whole"),
        tensors("whole"),
    )


@forks
def test_a_run_killed_after_its_tasks_says_them_once(config: Config) -> None:
    """The checkpoint is of before; the log had them already."""
    config = dataclasses.replace(config, save=SaveConfig(every=1, keep=3, in_background=False))
    assert train(1, config, "whole") == [0]
    assert train(1, config, "run", (0, 5, "SIGKILL in save")) == [-9]
    assert [step for step, _ in figures("run")] == [5]
    assert train(1, config, "run") == [0], said("run", 0)
    assert (losses("run"), figures("run")) == (losses("whole"), figures("whole"))


# --- how long --------------------------------------------------------------------------------------------------------


def test_what_tasks_take_is_allowed_for(config: Config) -> None:
    assert pause_periods(config)["tasks"] == 5
    assert "tasks" not in pause_periods(with_eval(config, tasks=None))
    assert [evaluations(config.eval, steps) for steps in (1, 5, 6, 10, 11)] == [1, 1, 2, 2, 3]
    assert evaluations(with_eval(config, tasks_every=None).eval, 1000) == 1


def test_the_plan_has_the_time_of_tasks(config: Config) -> None:
    """A pass forward is a third of a training step's arithmetic, for as many tokens."""
    config = with_eval(config, tasks="lambada,hellaswag", tasks_rows=100)
    gpt2 = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, name="gpt2"))
    names = ["lambada", "hellaswag"]
    assert passing_tokens(gpt2, names) == 100 * sum(tasks.SIZES[name][1] for name in names)
    assert passing_tokens(with_eval(gpt2, tasks_rows=10**9), names) == sum(
        rows * tokens for rows, tokens in (tasks.SIZES[name] for name in names)
    )
    plan = dataclasses.replace(make_plan(gpt2, probe("cpu"), vocab_size=50_257), time_s=300.0)
    token_s = 300.0 / (8 * 12 * 32)
    assert tasks_time_s(gpt2, plan) == pytest.approx(token_s / 3 * passing_tokens(gpt2, names) * 2)
    assert tasks_time_s(with_eval(gpt2, tasks=None), plan) is None
    assert tasks_time_s(gpt2, dataclasses.replace(plan, time_s=None)) is None


def test_the_sizes_are_those_of_the_files(test_data: Path) -> None:
    """Within a tenth: what is counted on the shared files. HellaSwag's rows are of two kinds, one after the other."""
    from regpt.tokenizers.gpt2 import open_gpt2

    tokenizer = open_gpt2(str(test_data / "tokenizer"))
    for name in ("hellaswag", "lambada", "wikitext"):
        task = open_task(name, test_data / "eval", 200 if name == "lambada" else None)
        if isinstance(task, MultipleChoice):
            task = dataclasses.replace(task, questions=task.questions[::40])
        parts = task.requests(tokenizer, 1024)
        passing = 0
        for rows in parts.values():
            for row in rows:
                shared = len(row[0].context) if len({r.context for r in row}) == 1 and len(row) > 1 else 0
                passing += shared + sum(len(r.context) + len(r.continuation) - shared for r in row)
        assert passing / task.rows == pytest.approx(tasks.SIZES[name][1], rel=0.1), name
