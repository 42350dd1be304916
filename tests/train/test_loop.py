"""The training loop: equal to a loop written by hand, exact when resumed, safe when numbers or signals go wrong."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from regpt.config import (
    Config,
    SampleConfig,
    SaveConfig,
    TokenizerConfig,
)
from regpt.data.corpus import corpus
from regpt.data.loader import Loader
from regpt.errors import CheckpointError, ConfigError, DeviceError, Interrupted, TrainingDiverged
from regpt.models.gpt2 import GPT2
from regpt.optim.schedule import learning_rate
from regpt.train import checkpoint, loop, plan, session
from regpt.train.load import load_model
from regpt.train.loop import Trainer
from regpt.train.machine import probe, using
from regpt.train.parallel import Gradients
from regpt.train.run import RunDirectory


@pytest.fixture
def config(tiny_run: Config) -> Config:
    """A model that trains in a second."""
    return tiny_run


def weights(out: str | Path) -> str:
    """One hash over all weights of a run's last checkpoint."""
    model = load_model(Path(out), which="last").model
    digest = hashlib.sha256()
    for name, p in model.state_dict().items():
        digest.update(name.encode() + p.numpy().tobytes())
    return digest.hexdigest()


def log(out: str | Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def losses(out: str | Path) -> list[str]:
    return [line["loss_hex"] for line in log(out, "step")]


def test_it_equals_a_loop_written_by_hand(config: Config) -> None:
    """The same batches through a plain PyTorch loop give bitwise the same weights and losses."""
    with using(probe("cpu")):
        _equals_a_loop_written_by_hand(config)


def _equals_a_loop_written_by_hand(config: Config) -> None:
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    result = session.train(config, "run")
    tokenizer, shards = corpus(config)
    torch.manual_seed(config.seed)
    model = GPT2(config.model, tokenizer.vocab_size)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    loader = Loader(
        shards.split("train"), block_size=32, batch_rows=8, seed=config.seed, order=config.data.order
    )
    seen = []
    for step in range(config.train.steps):
        x, y = loader.batch(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.optim, config.train.steps)
        logits = model(x)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert [float.fromhex(x) for x in losses("run")] == seen
    trained = load_model(Path("run"), which="last").model
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), trained.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        ids = torch.from_numpy(shards.split("val").read(0, shards.split("val").n_tokens))
        model.eval()
        nats = [F.cross_entropy(model(w[None, :-1])[0], w[1:], reduction="sum") for w in _windows(ids, 32)]
    assert result.val_loss == pytest.approx(sum(map(float, nats)) / (len(ids) - 1), abs=1e-6)
    n_bytes = shards.split("val").source_bytes
    assert result.val_bits_per_byte == pytest.approx(sum(map(float, nats)) / math.log(2) / n_bytes, rel=1e-6)


def _windows(ids: torch.Tensor, T: int) -> list[torch.Tensor]:
    return [ids[i : i + T + 1] for i in range(0, len(ids) - 1, T)]


def test_it_learns(config: Config) -> None:
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=60))
    result = session.train(longer, "run")
    assert log("run", "step")[0]["loss"] == pytest.approx(math.log(257), abs=0.1)
    assert result.val_loss is not None and result.val_loss < math.log(257) / 2


def test_accumulation_changes_nothing_but_rounding(config: Config) -> None:
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    session.train(config, "whole")
    parts = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_rows=2))
    session.train(parts, "parts")
    a = [float.fromhex(x) for x in losses("whole")]
    b = [float.fromhex(x) for x in losses("parts")]
    assert a == pytest.approx(b, abs=2e-5)


@pytest.mark.parametrize("after", [0, 1, 5, 8, 11, 12])
def test_a_stopped_run_ends_as_an_unstopped_one(
    config: Config, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise the same weights and losses, dropout on, wherever the signal came."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_rows=4))
    session.train(config, "whole")
    polls = 0
    original = Trainer.poll

    def poll(self: Trainer) -> None:
        nonlocal polls
        if self.state.step == after and (polls := polls + 1) == 2:  # in the middle of a step or an evaluation
            signal.raise_signal(signal.SIGTERM)
        original(self)

    with monkeypatch.context() as m:
        m.setattr(Trainer, "poll", poll)
        with pytest.raises(Interrupted) as stopped:
            session.train(config, "parts")
    assert stopped.value.exit_status == 143
    assert str(stopped.value) == (
        f"stopped by SIGTERM after step {after}; everything is saved.\n"
        "  try: the same command continues (without --fresh)"
    )
    heard: list[str] = []
    session.train(config, "parts", listen=lambda event, step, values: heard.append(f"{event} {step}"))
    assert f"resume {after}" in heard
    assert weights("parts") == weights("whole")
    assert losses("parts") == losses("whole")
    assert load_model(Path("parts")).step == load_model(Path("whole")).step
    session.train(config, "parts")  # a third call finds nothing left to do
    assert [e["step"] for e in log("parts", "eval")] == [4, 8, 12]
    assert [e["val_loss_hex"] for e in log("parts", "eval")] == [
        e["val_loss_hex"] for e in log("whole", "eval")
    ]


def test_a_finished_run_is_left_as_it_is(config: Config) -> None:
    first = session.train(config, "run")
    before = weights("run")
    again = session.train(config, "run")
    assert (again.step, again.val_loss, weights("run")) == (first.step, first.val_loss, before)
    assert len(log("run", "eval")) == 3


def test_more_steps_go_on_from_the_end(config: Config) -> None:
    session.train(config, "run")
    more = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=16))
    heard: list[str] = []
    result = session.train(more, "run", listen=lambda e, s, v: heard.append(v.get("text", "")))
    assert result.step == 16
    assert "train.steps was 12 in this run, from now on it is 16" in heard


def test_fresh_moves_the_old_run_aside(config: Config) -> None:
    session.train(config, "run")
    before = weights("run")
    other = dataclasses.replace(config, seed=7)
    with pytest.raises(CheckpointError, match="holds a run with other settings: seed was 1337, now 7"):
        session.train(other, "run")
    session.train(other, "run", fresh=True)
    assert weights("run") != before
    assert weights("run.previous-1") == before


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_never_reaches_the_weights(
    config: Config, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training stops before the update, with exit status 3, and the last checkpoint is of finite weights."""
    original = GPT2.forward

    def forward(self: GPT2, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = original(self, *args, **kwargs)
        if self.training and loop_step[0] == 6:
            if where == "loss":
                return out * math.nan
            self.ln_f.weight.register_hook(lambda g: g * math.inf)
        return out

    loop_step = [0]
    step = Trainer.train_step

    def train_step(self: Trainer) -> None:
        loop_step[0] = self.state.step
        step(self)

    monkeypatch.setattr(GPT2, "forward", forward)
    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(TrainingDiverged) as e:
        session.train(config, "run")
    assert e.value.exit_status == 3
    assert "at step 6 is" in e.value.what and "the last checkpoint is of step 4" in (e.value.hint or "")
    assert all(p.isfinite().all() for p in load_model(Path("run"), which="last").model.state_dict().values())


def test_a_surprising_first_loss_is_said_aloud(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    original = GPT2.init_weights

    def large(self: GPT2) -> None:
        original(self)
        with torch.no_grad():
            self.wte.weight.mul_(30)

    monkeypatch.setattr(GPT2, "init_weights", large)
    notes: list[str] = []
    session.train(config, "run", listen=lambda e, s, v: notes.append(v["text"]) if e == "note" else None)
    assert len(notes) == 1 and "ln(257) = 5.549" in notes[0]


def test_compile_auto_falls_back_aloud(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: torch.nn.Module, **kwargs: Any) -> Any:
        def call(*args: Any) -> Any:
            raise torch._dynamo.exc.TorchDynamoException("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(loop.Trainer, "__init__", _with_compile(loop.Trainer.__init__))
    notes: list[str] = []
    result = session.train(
        config, "run", listen=lambda e, s, v: notes.append(v["text"]) if e == "note" else None
    )
    assert result.step == 12
    assert notes == ["torch.compile failed, going on without it: no compiler here"]


def _with_compile(original: Any) -> Any:
    def init(self: Trainer, config: Config, plan: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, dataclasses.replace(plan, compile=True), *args, **kwargs)

    return init


def test_best_and_newest_checkpoints_stay(config: Config) -> None:
    session.train(dataclasses.replace(config, save=SaveConfig(every=2, keep=2)), "run")
    kept = sorted(p.name for p in Path("run/checkpoints").glob("step-*"))
    best = min(log("run", "eval"), key=lambda e: e["val_loss"])["step"]
    assert kept == sorted({f"step-{n:06d}" for n in (10, 12, best)})
    assert load_model(Path("run"), which="best").step == best


def test_a_half_deleted_run_is_refused(config: Config) -> None:
    import shutil

    session.train(config, "run")
    shutil.rmtree("run/checkpoints")
    with pytest.raises(
        CheckpointError, match="saved step 12, but it has no checkpoint: a part of it was deleted"
    ):
        session.train(config, "run")


def test_checkpoints_without_their_record_are_refused(config: Config) -> None:
    """Else another run's settings could go on from them."""
    session.train(config, "run")
    (Path("run") / "log.jsonl").unlink()
    notes = []
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=14))
    session.train(
        longer,
        "run",
        listen=lambda event, _, values: notes.append(values.get("text")) if event == "note" else None,
    )
    assert any("log.jsonl is missing: the log begins anew at step 12" in str(text) for text in notes)
    (Path("run") / "run.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"run has checkpoints but no run\.json: a part of it was deleted"
    ):
        session.train(config, "run")


def test_changed_text_is_refused_before_it_is_prepared(config: Config) -> None:
    """And --fresh then learns the tokenizer of the new text, not the old run's."""
    config = dataclasses.replace(config, tokenizer=TokenizerConfig(name="chars"))
    session.train(config, "run")
    Path("text.txt").write_text(Path("text.txt").read_text().replace("ducks", "GEESE"), encoding="utf-8")
    before = list(Path("data").iterdir())
    with pytest.raises(CheckpointError, match="the text changed since the run in run was begun: source"):
        session.train(config, "run")
    assert list(Path("data").iterdir()) == before
    session.train(config, "run", fresh=True)
    assert load_model(Path("run")).tokenizer.encode("GEESE")


def test_samples_keep_their_own_rhythm(config: Config) -> None:
    session.train(dataclasses.replace(config, sample=SampleConfig(tokens=4, every=5)), "run")
    lines = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]


def test_no_clipping_equals_a_limit_never_reached(config: Config) -> None:
    session.train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip_norm=None)), "a")
    session.train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip_norm=1e9)), "b")
    assert weights("a") == weights("b")


def test_float16_goes_on_after_a_step_that_was_left_out(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scaler has seen gradients that no update followed."""
    train = dataclasses.replace(config.train, on_bad_step="skip", steps=6)
    monkeypatch.setattr(plan, "choose_dtype", lambda *_: "float16")  # a CPU can, slowly
    real = Trainer.check_finite

    def spoiled(self: Trainer, loss: float, norm: float) -> bool:
        return real(self, math.nan if self.state.step == 2 else loss, norm)

    monkeypatch.setattr(Trainer, "check_finite", spoiled)
    result = session.train(dataclasses.replace(config, train=train), "run")
    assert result.step == 6 and result.val_loss is not None and math.isfinite(result.val_loss)


def test_out_of_memory_names_the_knob(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "train_step", full)
    with pytest.raises(DeviceError, match="ran out of memory") as e:
        session.train(config, "run")
    assert e.value.hint == "--train.micro-rows 4 (the batch stays as it is)"


def test_what_is_far_from_fitting_is_refused_before_it_is_built(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system short of memory ends processes without a word."""
    machine = dataclasses.replace(probe("cpu"), memory_bytes=100 << 20)
    monkeypatch.setattr(session, "probe", lambda *_: machine)
    with pytest.raises(DeviceError, match=r"this model needs 0\.4 GiB to train") as e:
        session.train(config, "run")
    assert "0.1 GiB for each process" in str(e.value) and "--train." in str(e.value)
    assert not (Path("run") / "checkpoints").exists() and not (Path("run") / "run.json").exists()


def test_a_full_disk_costs_one_save_and_not_the_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A periodic save that fails is said; training goes on and the next one succeeds."""
    original, failed = checkpoint.save_checkpoint, []

    def save(folder: Path, *, step: int, **kwargs: Any) -> Path:
        if step == 4:
            failed.append(step)
            raise checkpoint.SaveFailed("no space for it.", folder, no_space=True)
        return original(folder, step=step, **kwargs)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    notes: list[str] = []
    result = session.train(
        config, "run", listen=lambda e, s, v: notes.append(v["text"]) if e == "note" else None
    )
    assert (failed, result.step) == ([4], 12)
    assert notes == [
        "no space for it.\n"
        "  try: free some space on the disk of run/checkpoints; older checkpoints are untouched\n"
        "  training goes on; the next save will try again."
    ]


def test_old_checkpoints_that_cannot_be_deleted_make_no_save_fail(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prune(folder: Path, **_: object) -> list[Path]:
        raise checkpoint.SaveFailed("old checkpoints could not be deleted: EIO.", folder, no_space=False)

    monkeypatch.setattr(checkpoint, "prune", prune)
    heard: list[tuple[str, int]] = []
    assert session.train(config, "run", listen=lambda e, s, _: heard.append((e, s))).step == 12
    assert [s for e, s in heard if e == "save"] == [4, 8, 12] == [s for e, s in heard if e == "note"]


def test_no_checkpoint_without_the_log_below_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after it, a run would never write the missing lines again."""
    real, failed = RunDirectory.sync, []

    def sync(self: RunDirectory) -> None:
        if not failed:
            failed.append(1)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self)

    monkeypatch.setattr(RunDirectory, "sync", sync)
    heard: list[tuple[str, int, str]] = []
    session.train(config, "run", listen=lambda e, s, v: heard.append((e, s, v.get("text", ""))))
    assert [s for e, s, _ in heard if e == "save"] == [8, 12]
    (note,) = [text for e, _, text in heard if e == "note"]
    assert note.startswith(
        "the checkpoint of step 4 could not be written, nor the log before it: No space left"
    )


def test_training_goes_on_while_a_checkpoint_is_written(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is held until two more steps are made; what it then writes is the step that it was asked for."""
    session.train(config, "plain")
    written, later, real = threading.Event(), threading.Event(), checkpoint.save_checkpoint
    seen: list[int] = []

    def held(folder: Path, *, step: int, **kwargs: Any) -> Path:
        if step == 4:
            assert later.wait(60)
        path = real(folder, step=step, **kwargs)
        written.set()
        return path

    step_made = Trainer.train_step

    def made(self: Trainer) -> None:
        step_made(self)
        seen.append(self.state.step)
        if self.state.step == 6:
            assert not written.is_set()
            later.set()

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save_checkpoint", held)
        m.setattr(Trainer, "train_step", made)
        session.train(config, "run")
    assert (losses("run"), weights("run")) == (losses("plain"), weights("plain"))
    a, b = (Path(run) / "checkpoints/step-000004/model.safetensors" for run in ("run", "plain"))
    assert not a.exists() and not b.exists()  # keep=2: pruned, best or not
    assert [e["path"] for e in log("run", "save")] == [f"step-{n:06d}" for n in (4, 8, 12)]
    in_turn = dataclasses.replace(config, save=SaveConfig(keep=9, in_background=False))
    session.train(in_turn, "in turn")
    behind = dataclasses.replace(config, save=SaveConfig(keep=9))
    session.train(behind, "behind")
    for step in (4, 8, 12):
        for file in ("model.safetensors", "optimizer.safetensors"):
            pair = [Path(run) / f"checkpoints/step-{step:06d}" / file for run in ("in turn", "behind")]
            assert pair[0].read_bytes() == pair[1].read_bytes()


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_spike_is_a_bad_step_where_that_is_asked_for(
    config: Config, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its window survives a stop: the spike comes right after one."""
    monkeypatch.setattr(loop, "SPIKE_WINDOW", 6)
    train = dataclasses.replace(config.train, spike_sigma=20.0, on_bad_step=policy)
    config = dataclasses.replace(config, train=train)
    original = Trainer.train_step

    def stopped(self: Trainer) -> None:
        original(self)
        if self.state.step == 8:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as m, pytest.raises(Interrupted):
        m.setattr(Trainer, "train_step", stopped)
        session.train(config, "run")
    finish, calls = Gradients.finish, []

    def spiking(self: Gradients) -> float:
        calls.append(1)
        return finish(self) + (50.0 if len(calls) == 1 else 0.0)

    monkeypatch.setattr(Gradients, "finish", spiking)
    if policy == "stop":
        with pytest.raises(
            TrainingDiverged, match=r"the loss at step 8 is 5\d\.\d+, a spike; the update was not made"
        ):
            session.train(config, "run")
    else:
        session.train(config, "run")
        assert [e["step"] for e in log("run", "step")] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12]
        assert "a spike" in log("run", "note")[-1]["text"]


def test_what_breaks_exactness_is_said_on_resume(config: Config) -> None:
    session.train(config, "run")
    train = dataclasses.replace(config.train, steps=14, micro_rows=2)
    notes: list[str] = []
    session.train(
        dataclasses.replace(config, train=train),
        "run",
        listen=lambda e, s, v: notes.append(v["text"]) if e == "note" else None,
    )
    assert notes == ["micro_rows changed since this run was begun: it goes on, but not to the same bits."]


@pytest.mark.parametrize("scale", [2.0**16, 0.5])
def test_float16_overflow_is_said_and_lasting_overflow_ends_the_run(
    config: Config, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scaler that always finds an overflow: each is said; below a scale of 1 it is divergence."""

    class Overflowing:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.now = scale * 2

        def get_scale(self) -> float:
            return self.now

        def update(self) -> None:
            self.now /= 2

        def scale(self, loss: torch.Tensor) -> torch.Tensor:
            return loss

        def is_enabled(self) -> bool:
            return True

        def state_dict(self) -> dict[str, Any]:
            return {}

        def unscale_(self, optimizer: Any) -> None: ...

        def step(self, optimizer: Any) -> None: ...

    monkeypatch.setattr(torch.amp, "GradScaler", Overflowing)
    notes: list[str] = []

    def run() -> None:
        session.train(config, "run", listen=lambda e, s, v: notes.append(v["text"]) if e == "note" else None)

    if scale < 1:
        with pytest.raises(TrainingDiverged, match=r"at every scale down to 0\.5, at step 0"):
            run()
    else:
        run()
        assert notes[0] == "float16 overflowed at step 0; the update was left out." and len(notes) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"batch_tokens": 500},
            "train.batch_tokens=500 is not a multiple of 32 tokens.\n  try: --train.batch-tokens 480 or 512",
        ),
        (
            {"batch_tokens": 256, "micro_rows": 3},
            "train.batch_tokens=256 is not a multiple of 3 rows x 32 tokens = 96.\n"
            "  try: --train.batch-tokens 192 or 288",
        ),
        (
            {"steps": 0},
            "train.steps must be at least 1.\n  got: 0",
        ),
        ({"device": "cuda:99"}, "train.device=cuda:99: this machine has"),
        ({"device": "gpu"}, "train.device is not a device."),
        ({"dtype": "float16"}, "train.dtype=float16 needs a GPU."),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    config: Config, change: dict[str, Any], message: str
) -> None:
    from regpt.errors import RegptError

    before = sorted(p.name for p in Path().iterdir())
    with pytest.raises(RegptError) as e:
        session.train(dataclasses.replace(config, train=dataclasses.replace(config.train, **change)), "run")
    assert str(e.value).startswith(message)
    assert sorted(p.name for p in Path().iterdir()) == before


def test_a_context_longer_than_the_text_is_refused(config: Config) -> None:
    model = dataclasses.replace(config.model, n_layer=1, n_head=1, block_size=2**15)
    train = dataclasses.replace(config.train, batch_tokens=2**15)
    with pytest.raises(ConfigError, match="block_size"):
        session.train(dataclasses.replace(config, model=model, train=train), "run")


def test_bfloat16_on_cpu_follows_float32(config: Config) -> None:
    session.train(config, "full")
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="bfloat16"))
    session.train(half, "half")
    a, b = ([float.fromhex(x) for x in losses(r)] for r in ("full", "half"))
    assert a == pytest.approx(b, abs=0.05) and a != b
