"""Where a run's numbers go beside its own log.jsonl, when asked for: TensorBoard, Weights & Biases."""

from __future__ import annotations

import html
import importlib.util
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from regpt.config import TrackConfig
from regpt.errors import RegptError, missing_package
from regpt.evals.names import NOT_FIGURES

Listener = Callable[[str, int, dict[str, Any]], None]
"""Hears (event, step, values) of a run: info, note, progress, plan, resume, step, eval, tasks, sample, save."""
GROUPS = {"step": "train", "eval": "val", "tasks": "val"}
"""Events whose numbers are curves, and the heading that they stand under."""
PLACES = {"tokens", "time_s", "elapsed_s"}
"""Where in training an evaluation was made: curves of the training steps already."""


class Tracker(Protocol):
    """Hears the events of a run."""

    def event(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """One event: `step`, `eval` and `tasks` hold numbers, `sample` a prompt and a text."""

    def close(self) -> None:
        """No more events come."""


def check_trackers(config: TrackConfig) -> None:
    """Refuse, before anything slow, a tracker whose package is missing.

    Raises:
        DeviceError: naming the package and how to install it.
    """
    for wanted, package, setting in (
        (config.tensorboard, "tensorboard", "--track.tensorboard"),
        (config.wandb is not None, "wandb", "--track.wandb"),
    ):
        if wanted and package not in sys.modules and importlib.util.find_spec(package) is None:
            raise missing_package(package, "track", setting)


def make_trackers(
    config: TrackConfig,
    folder: Path,
    settings: Mapping[str, Any],
    *,
    say: Callable[[str], None],
    resumed_step: int | None = None,
) -> list[Tracker]:
    """The trackers that `config` asks for. One that fails later is said once and left out: training goes on.

    Args:
        folder: the run directory; event files and the id of the W&B run are kept in it.
        settings: the whole config as plain values, to be shown beside the curves.
        say: told of a tracker that failed.
        resumed_step: the step that training continues from; later points of an earlier sitting are hidden.

    Raises:
        DeviceError: the package of a tracker is not installed.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(
            _Guarded("TensorBoard", lambda: TensorBoard(folder / "tensorboard", resumed_step), say)
        )
    if config.wandb is not None:
        project = config.wandb
        trackers.append(_Guarded("Weights & Biases", lambda: WandB(project, folder, settings), say))
    return trackers


def curves(event: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event by the name of their curve: {"train/loss": 3.2}. Yes or no is not a number."""
    if event not in GROUPS:
        return {}
    # A task's figures stand one deeper: {"hellaswag": {"acc": 0.25}} is the curve val/hellaswag/acc.
    deeper = {
        f"{task}/{k}": v
        for task, part in values.items()
        if isinstance(part, Mapping)
        for k, v in part.items()
        if k not in NOT_FIGURES
    }
    numbers = {
        k: v
        for k, v in {**values, **deeper}.items()
        if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    left_out = PLACES if event != "step" else set()
    return {
        f"{GROUPS[event]}/{name.removeprefix('val_')}": float(v)
        for name, v in numbers.items()
        if name not in left_out
    }


class TensorBoard:
    """Event files in `folder`, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise missing_package("tensorboard", "track", "--track.tensorboard") from None
        purge = None if resumed_step is None else resumed_step + 1
        self.writer = SummaryWriter(str(folder), purge_step=purge)

    def event(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Scalars, and samples as text."""
        for name, value in curves(event, values).items():
            self.writer.add_scalar(name, value, step)
        if event == "sample":
            self.writer.add_text("sample", _indented(values), step)

    def close(self) -> None:
        """Write what is buffered."""
        self.writer.close()


class WandB:
    """A run in a W&B project, under the same id in every sitting. W&B's own WANDB_MODE=offline holds."""

    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise missing_package("wandb", "track", "--track.wandb") from None
        kept = folder / "wandb-id.txt"
        if not kept.exists():
            kept.write_text(secrets.token_hex(4))
        self.make_html = wandb.Html
        self.run = wandb.init(
            project=project,
            name=folder.resolve().name,
            dir=str(folder),
            id=kept.read_text(),
            resume="allow",
            config=dict(settings),
        )

    def event(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Numbers, and samples as text."""
        if found := curves(event, values):
            self.run.log(found, step=step)
        if event == "sample":
            text = html.escape(f"{values['prompt']}{values['text']}")
            self.run.log({"sample": self.make_html(f"<pre>{text}</pre>")}, step=step)

    def close(self) -> None:
        """Upload what is left."""
        self.run.finish()


class _Guarded:
    """A tracker whose failures do not reach training."""

    def __init__(self, name: str, make: Callable[[], Tracker], say: Callable[[str], None]) -> None:
        self.name, self.say = name, say
        self.inner: Tracker | None = None
        self._attempt(lambda: setattr(self, "inner", make()))

    def event(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Passed on, unless the tracker has failed."""
        if (inner := self.inner) is not None:
            self._attempt(lambda: inner.event(event, step, values))

    def close(self) -> None:
        """Passed on, unless the tracker has failed."""
        if (inner := self.inner) is not None:
            self._attempt(inner.close)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except RegptError:
            raise
        except Exception as e:  # whatever a network or a full disk does in there
            self.inner = None
            reason = f"{type(e).__name__}: {e}"
            self.say(f"{self.name} failed and is left out from here on; log.jsonl has every number. {reason}")


def _indented(values: Mapping[str, Any]) -> str:
    """A sample as a Markdown code block, which keeps its line ends."""
    return "\n".join("    " + line for line in f"{values['prompt']}{values['text']}".split("\n"))
