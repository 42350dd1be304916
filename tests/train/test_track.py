"""Trackers: the numbers arrive where they were sent, and nothing that goes wrong there reaches training."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from regpt.config import TrackConfig
from regpt.errors import DeviceError
from regpt.train.track import Tracker, curves, make_trackers


def silent(text: str) -> None:
    raise AssertionError(text)


def tell(trackers: list[Tracker], first: int, last: int) -> None:
    for step in range(first, last):
        for tracker in trackers:
            tracker.event("step", step, {"loss": 4.0 / (step + 1), "lr": 0.25, "tokens": 64 * step})
            tracker.event("eval", step, {"val_loss": 2.0, "best": True})
            tracker.event("sample", step, {"prompt": "<a>\n", "text": "b & c"})
            tracker.event("save", step, {"path": "step-000001", "save_s": 0.1})


def test_nothing_is_tracked_unless_asked(tmp_path: Path) -> None:
    assert make_trackers(TrackConfig(), tmp_path, {}, say=silent) == []
    assert list(tmp_path.iterdir()) == []


def test_curves_have_names_by_what_they_measure() -> None:
    assert curves("step", {"loss": 3, "name": "x", "ok": True}) == {"train/loss": 3.0}
    assert curves("eval", {"val_loss": 2.5, "val_tokens": 7}) == {"val/loss": 2.5, "val/tokens": 7.0}
    assert curves("save", {"save_s": 1.0}) == {}
    # Where training was is a curve of the steps already, and `val_tokens` has another meaning.
    assert curves("eval", {"val_tokens": 7, "tokens": 99, "time_s": 1.0, "elapsed_s": 2.0}) == {
        "val/tokens": 7.0
    }
    tasks = {"tokens": 99, "hellaswag": {"acc_norm": 0.25, "rows": 8}, "tasks_s": 0.5}
    assert curves("tasks", tasks) == {
        "val/hellaswag/acc_norm": 0.25,
        "val/tasks_s": 0.5,
    }


# --- TensorBoard -------------------------------------------------------------------------------------------------


def read_back(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = TrackConfig(tensorboard=True)
    trackers = make_trackers(config, tmp_path, {}, say=silent)
    tell(trackers, 0, 4)
    trackers[0].close()
    events = read_back(tmp_path / "tensorboard")
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "train/lr", "train/tokens", "val/loss"]
    losses = events.Scalars("train/loss")
    assert [e.step for e in losses] == [0, 1, 2, 3]
    assert [e.value for e in losses] == pytest.approx([4.0, 2.0, 4 / 3, 1.0])
    text = events.Tensors("sample/text_summary")[1].tensor_proto.string_val[0].decode()
    assert text == "    <a>\n    b & c"

    # The run was killed after step 3 and goes on from step 1: steps 2 and 3 are not shown twice.
    again = make_trackers(config, tmp_path, {}, say=silent, resumed_step=1)
    tell(again, 2, 5)
    again[0].close()
    assert [e.step for e in read_back(tmp_path / "tensorboard").Scalars("train/loss")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("config", "module", "says"),
    [
        (
            TrackConfig(tensorboard=True),
            "torch.utils.tensorboard",
            "--track.tensorboard needs the package tensorboard",
        ),
        (TrackConfig(wandb="mine"), "wandb", "--track.wandb needs the package wandb"),
    ],
)
def test_a_missing_package_is_an_error_with_its_remedy(
    config: TrackConfig, module: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DeviceError, match=says) as caught:
        make_trackers(config, tmp_path, {}, say=silent)
    assert "pip install -e '.[track]'" in str(caught.value)


# --- Weights & Biases --------------------------------------------------------------------------------------------


class FakeWandB(types.ModuleType):
    """Stands where `import wandb` finds it and writes down what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self.fails_at = ""

    def fail(self, place: str) -> None:
        if self.fails_at == place:
            raise ConnectionError("no route to host")

    def init(self, **how: Any) -> FakeWandB:
        self.fail("init")
        self.inits.append(how)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.fail("log")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.fail("finish")
        self.finished += 1

    def Html(self, text: str) -> str:
        return text


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_hears_numbers_and_samples(tmp_path: Path, wandb: FakeWandB) -> None:
    trackers = make_trackers(TrackConfig(wandb="mine"), tmp_path, {"seed": 1}, say=silent)
    tell(trackers, 3, 4)
    trackers[0].close()
    how = wandb.inits[0]
    assert (how["project"], how["name"], how["config"]) == ("mine", tmp_path.name, {"seed": 1})
    assert "mode" not in how  # so that WANDB_MODE=offline holds
    assert wandb.logged == [
        (3, {"train/loss": 1.0, "train/lr": 0.25, "train/tokens": 192.0}),
        (3, {"val/loss": 2.0}),
        (3, {"sample": "<pre>&lt;a&gt;\nb &amp; c</pre>"}),
    ]
    assert wandb.finished == 1


def test_wandb_continues_the_same_run(tmp_path: Path, wandb: FakeWandB) -> None:
    for _ in range(2):
        make_trackers(TrackConfig(wandb="mine"), tmp_path, {}, say=silent)
    first, second = wandb.inits
    assert first["id"] == second["id"] and first["resume"] == "allow"


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_failing_network_is_said_once_and_training_goes_on(
    place: str, tmp_path: Path, wandb: FakeWandB
) -> None:
    wandb.fails_at = place
    said: list[str] = []
    trackers = make_trackers(TrackConfig(wandb="mine"), tmp_path, {}, say=said.append)
    tell(trackers, 0, 3)
    trackers[0].close()
    assert said == [
        "Weights & Biases failed and is left out from here on; log.jsonl has every number. "
        "ConnectionError: no route to host"
    ]


def test_the_tracker_module_is_light() -> None:
    assert "torch" not in vars(sys.modules["regpt.train.track"])
