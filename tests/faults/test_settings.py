"""Random settings through the command line: a documented exit status and a clear word each time, never a traceback.

Every option is found by `regpt.cli.parse.options`, so that a new setting is tried here by itself. Nothing trains: the
loop, the estimate of time and the making of processes are replaced by what notes with which numbers they were asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import json
import os
import shutil
import signal
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from regpt.cli import main
from regpt.cli.parse import options
from regpt.config import ModelConfig, preset_names
from regpt.data import prepare
from regpt.models import build_model
from regpt.models.count import count_parameters
from regpt.tokenizers.bytes import ByteTokenizer
from regpt.train import estimate, loop, machine, session

COMMANDS = ("plan", "train", "prepare", "inspect", "sample")
STATUSES = {0, 2, 3, 4, 129, 130, 138, 143}  # docs/cli.md, without 1, which is a fault of ours
MOST_PROCESSES = 1024  # that a machine gives; the same bound holds for threads
LARGEST_MODEL = 1_000_000  # weights that are really made here
TEXT = "".join(f"{i} little ducks went out one day, over the hills and far away. " for i in range(60))
# A run as small as can be, so that a case which is right gets to the end: later options win over these.
SMALL = {
    "--data.source": "text.txt",
    "--data.val-fraction": "0.1",
    "--data.workers": "1",
    "--tokenizer.name": "bytes",
    "--model.n-layer": "1",
    "--model.n-head": "2",
    "--model.n-embd": "8",
    "--model.block-size": "8",
    "--train.batch-tokens": "64",
    "--train.steps": "4",
    "--train.device": "cpu",
    "--optim.warmup-steps": "1",
}


# --- arguments ----------------------------------------------------------------------------------------------

WHOLE = st.one_of(
    st.integers(0, 16),
    st.sampled_from([2**n for n in range(5, 14)]),
    st.sampled_from(
        [-1, -(2**31), 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1]
    ),
    st.sampled_from([10**6, 10**9, 10**12, 10**15, 10**18, 10**30, 10**310, -(10**310), 10**5000]),
    st.sampled_from([257, 256, 258, 1023, 1024, 1025, 50257]),
    st.integers(),
).map(lambda n: format(n, "x") if abs(n) > 10**4000 else str(n))
NUMBER = st.one_of(
    st.sampled_from(["0", "-0.0", "1", "0.5", "0.1", "-1", "1e-8", "5e-324", "1e308", "1e400", "-1e400"]),
    st.sampled_from(["nan", "inf", "-inf", "NaN", "+Infinity", "1_000", ".5", "1.", "0x10", "1e", "½"]),
    st.floats(0, 1).map(repr),
    st.floats().map(repr),
)
LETTERS = st.characters(exclude_characters="\0", exclude_categories=("Cs",))  # no argument can hold these;
# "\udcff" is how Python has a byte that is not UTF-8.
TEXTS = st.one_of(
    st.text(LETTERS, max_size=12),
    st.sampled_from(
        ["", " ", "none", "None", "null", "-", "--", "~", "~nobody/x", "é", "日本", "🦆", "\udcff"]
    ),
    st.sampled_from(
        ["a" * 300, "%s{0}", "\\", "'", '"', "a\nb", "\x1b[31m", "*", "[", "**", "[a", "-h-", "=", "a=b"]
    ),
)
PLACES = st.one_of(
    st.sampled_from(
        ["text.txt", "texts", "none.txt", "shards", "text.txt/x", "/dev/null", "/dev/null/x", ".", ".."]
    ),
    st.sampled_from(["new", "new/er", "empty", "*.txt", "data", "runs/demo", "shakespeare", "python-stdlib"]),
    TEXTS,
).filter(lambda s: not s.startswith(("/", "..", "~")) or s in ("/dev/null", "/dev/null/x", "..", "~nobody/x"))
WORDS = {
    "--train.device": st.sampled_from(
        [
            "cpu",
            "auto",
            "cuda",
            "cuda:0",
            "cuda:99",
            "cuda:²",
            "cuda:" + "9" * 5000,
            "cuda:-1",
            "mps",
            "cpu:1",
            "tpu",
        ]
    ),
    "--tokenizer.name": st.one_of(
        st.sampled_from(["bytes", "chars", "bpe", "gpt2", "shards/tokenizer"]), PLACES
    ),
}
PATHS = ("--data.source", "--data.dir", "--data.val-source", "--tokenizer.files", "--out", "--file")


def values(name: str, kind: Any) -> st.SearchStrategy[str]:
    """What is typed behind an option: mostly of its type, at times of any other."""
    parts = (kind, *typing.get_args(kind))
    fitting: list[st.SearchStrategy[str]] = []
    if name in WORDS:
        fitting.append(WORDS[name])
    elif name.startswith(PATHS) or name in ("--tokenizer", "--tokenizer-files", "--val-source"):
        fitting.append(PLACES)
    elif typing.get_origin(kind) is Literal:
        fitting.append(st.sampled_from([str(a) for a in typing.get_args(kind)]))
    elif bool in parts:
        fitting.append(st.sampled_from(["true", "false", "True", "False", "yes", "1", "0", ""]))
    elif float in parts:
        fitting.append(NUMBER)
    elif int in parts:
        fitting.append(WHOLE)
    else:
        fitting.append(TEXTS)
    anything = st.one_of(
        WHOLE, NUMBER, TEXTS, st.sampled_from(["none", "None", "true", "1.5", "", "--", "--seed"])
    )
    return st.integers(0, 9).flatmap(lambda n: anything if n == 0 else fitting[0])


def misspelt(name: str) -> st.SearchStrategy[str]:
    """An option with a letter too few, too many, or another case."""
    places = st.integers(2, len(name) - 1)
    return st.one_of(
        places.map(lambda i: name[:i] + name[i + 1 :]),
        places.map(lambda i: name[:i] + name[i] + name[i:]),
        places.map(lambda i: name[:i] + name[i:].upper()),
        st.just(name.replace("-", "_")),
        st.just("--no-" + name[2:]),
        st.just(name[1:]),
    )


@st.composite
def option(draw: st.DrawFn, known: dict[str, Any]) -> list[str]:
    """One option with its value, as one word or as two."""
    name = draw(st.sampled_from(sorted(known)))
    kind, spelling = known[name], draw(st.integers(0, 24))
    value = draw(values(name, kind))
    if name == "--nproc" and value == "1":
        return []
    if spelling == 0:
        name = draw(misspelt(name))
    if "." not in name and kind is bool and spelling < 20:  # a flag
        return [name]
    if spelling == 1:
        return [name]  # its value is forgotten
    return [f"{name}={value}"] if spelling % 3 == 0 else [name, value]


SHAPES = {  # settings that must fit one another
    "--model.n-embd": [6, 8, 16, 48, 10**6],
    "--model.n-head": [1, 2, 3, 8, 0],
    "--model.n-layer": [1, 2, 10**9],
    "--model.block-size": [1, 8, 16, 100, 10**5],
    "--train.batch-tokens": [8, 64, 96, 1024, 10**13],
    "--train.micro-rows": ["none", 1, 2, 3, 8],
    "--train.strategy": ["ddp", "fsdp"],
    "--train.reduction": ["fast", "exact"],
    "--train.shard-group": ["none", 1, 2],
    "--train.dtype": ["auto", "float32", "bfloat16", "float16"],
    "--train.steps": [1, 2, 10],
    "--train.checkpoint-activations": ["true", "false"],
    "--train.spike-sigma": ["none", 0, 3],
    "--optim.warmup-steps": [0, 1, 2, 10],
    "--optim.schedule": ["cosine", "linear", "constant"],
    "--optim.decay-steps": ["none", 1, 2, 10],
    "--optim.min-lr": [0, 1e-4, 1],
    "--tokenizer.name": ["bytes", "chars", "bpe"],
    "--tokenizer.vocab-size": [256, 257, 300, 2**31, 2**63],
    "--data.val-fraction": [0, 0.1, 0.999, 1],
    "--data.order": ["permuted", "replacement"],
    "--sample.prompt": ["", "little", "日本"],
}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A whole command line."""
    command = draw(st.sampled_from(("plan", "train", "train", *COMMANDS)))
    known = options(importlib.import_module(f"regpt.cli.{command}").Args)
    words: list[str] = []
    if command in ("plan", "train"):
        preset = draw(
            st.sampled_from(
                [None, None, "demo", *preset_names(), "p.toml", "damaged.toml", "dmo", "", "no.toml"]
            )
        )
        words += [preset] if preset is not None else []
        if draw(st.integers(0, 9)):  # without it the preset's own text and shape stand
            words += [w for name, value in SMALL.items() for w in (name, value)]
        for name in draw(st.lists(st.sampled_from(sorted(SHAPES)), max_size=4, unique=True)):
            words += [name, str(draw(st.sampled_from(SHAPES[name])))]
    elif command == "prepare":
        words += [
            draw(st.one_of(st.just("text.txt"), PLACES)),
            *draw(st.sampled_from([["--out", "new"], []])),
        ]
        words += draw(st.sampled_from([["--tokenizer", "bytes"], ["--tokenizer", "chars"], []]))
    else:
        words += draw(st.lists(st.one_of(PLACES, st.just("shards")), max_size=2))
    drawn = draw(st.lists(option(known), max_size=4))
    words += [w for one in drawn for w in one]
    words += drawn[0] if drawn and draw(st.integers(0, 9)) == 0 else []  # the same one again
    words += draw(st.sampled_from([[], [], ["--json"], ["--quiet"], ["--json", "--quiet"]]))
    # `--debug` shows tracebacks by design; `--help` has tests of its own.
    return [command, *(w for w in words if w not in ("--debug", "-h", "--help"))]


# --- the place, and what must not really happen ------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A folder with a little of all that an option can name, and regpt without what takes long."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    for folder in ("texts", "python-stdlib", "empty"):
        Path(folder).mkdir()
    for file in ("texts/a.txt", "python-stdlib/a.py", "shakespeare"):
        Path(file).write_text(TEXT, encoding="utf-8")
    Path("p.toml").write_text('[model]\nn_layer = 1\n[data]\nsource = "text.txt"\n', encoding="utf-8")
    Path("damaged.toml").write_text('[model]\nn_layer = "1"\n[', encoding="utf-8")
    source = prepare.Source("text.txt", "text", prepare_files())
    prepare.prepare(source, ByteTokenizer(), Path("shards"), val_fraction=0.1, workers=1)
    for name in ("HOME", "XDG_CACHE_HOME", "REGPT_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "empty"))
    monkeypatch.setenv("REGPT_GPT2_FILES", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # tasks of presets would be asked for again and again
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which a launch would set
    asked = SimpleNamespace(launched=False, short_of_memory=False)

    def timeless(plan: Any, *_: object) -> Any:
        return dataclasses.replace(plan, time_s=plan.time_s or 1.0)

    def model(config: ModelConfig, vocab_size: int) -> object:
        """A small one; a large one is as if the system had no memory, which is all that it may come to."""
        assert vocab_size >= 1 and config.n_layer <= 10_000, f"{config}, {vocab_size}: would never be ready"
        if count_parameters(config, vocab_size).stored > LARGEST_MODEL or config.n_layer > 50:
            asked.short_of_memory = True
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return build_model(config, vocab_size)

    @contextlib.contextmanager
    def using(found: machine.Machine) -> Iterator[None]:
        assert 1 <= found.threads <= MOST_PROCESSES, f"{found.threads} threads"
        yield

    def tokenizing(workers: int, *more: Any) -> Any:
        assert 1 <= workers <= MOST_PROCESSES, f"{workers} processes"
        return tokenize(1, *more)

    def elastic_launch(config: Any, _: str) -> Any:
        assert 1 <= config.nproc_per_node <= MOST_PROCESSES, f"{config.nproc_per_node} processes"
        asked.launched = True
        return lambda *words: None

    tokenize = prepare.tokenizing
    monkeypatch.setattr(prepare, "tokenizing", tokenizing)
    monkeypatch.setattr(estimate, "with_time", timeless)
    monkeypatch.setattr(session, "with_time", timeless)
    monkeypatch.setattr(session, "build_model", model)
    monkeypatch.setattr(session, "using", using)
    monkeypatch.setattr(machine, "using", using)
    monkeypatch.setattr(loop.Trainer, "run", lambda self: None)
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic_launch)
    # tyro reads the source of our settings for every command line, for their help: here once.
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
    state = torch.get_rng_state()
    yield asked
    torch.set_rng_state(state)


def prepare_files() -> Any:
    """The text as a source has it."""
    from regpt.data.sources import SourceFile

    return (SourceFile.of(Path("text.txt"), "text.txt"),)


def standing() -> set[str]:
    """Every file here."""
    return {os.path.join(here, name) for here, folders, files in os.walk(".") for name in (*folders, *files)}


def holds(words: list[str], place: SimpleNamespace, counts: Counter[str]) -> None:
    """The contract, for one command line."""
    before = standing()
    place.launched = place.short_of_memory = False
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    signals = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    printed, said = (_text(stream) for stream in (out, err))
    made = {Path(p) for p in standing() - before}
    kept = {p for p in made if _is_of_shards(p)}  # prepared text, to be found again
    for path in sorted(made, reverse=True):
        if path.exists() and not path.is_symlink():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert {s: signal.getsignal(s) for s in signals} == signals
    assert status in STATUSES, f"exit status {status}: {said}"
    assert "Traceback" not in printed + said
    if "--json" in words and not place.launched:  # else it is printed by the processes
        assert printed.count("\n") == 1 and isinstance(json.loads(printed, parse_constant=_refuse), dict), (
            printed
        )
    if status:
        assert said.strip(), "an error without a word"
        assert "--json" in words or not printed.strip(), printed
        # A run stays only where it was the machine that gave up.
        if not place.short_of_memory:
            assert not made - kept, f"left behind: {sorted(map(str, made - kept))[:5]}: {said}"
    assert not [p for p in made if ".partial" in str(p) or p.name.endswith(".tmp")]
    counts[f"{words[0]} {status}"] += 1


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    raw = typing.cast(io.BytesIO, stream.buffer).getvalue()
    return raw.decode("utf-8", "surrogateescape")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _is_of_shards(path: Path) -> bool:
    """A finished shard folder, what lies in it, or a folder made to hold it."""
    inside = any((folder / "manifest.json").exists() for folder in (path, *path.parents))
    return inside or (path.is_dir() and any(path.rglob("manifest.json")))


# --- the tests ----------------------------------------------------------------------------------------------


# What torch says of itself when something is to be compiled.
COMPILING_WARNS = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")


def trial(place: SimpleNamespace, examples: int, *, number: int | None) -> None:
    """So many command lines; with a number other ones, without always the same."""
    counts = Counter[str]()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=number is None,
        database=None,
        print_blob=True,
        phases=[
            Phase.generate
        ],  # these lines are short as they are, and what hangs would be tried again and again
        suppress_health_check=list(HealthCheck),
    )
    @given(command_lines())
    def holds_for(words: list[str]) -> None:
        holds(words, place, counts)

    (holds_for if number is None else seed(number)(holds_for))()
    told = ", ".join(f"{name}: {n}" for name, n in sorted(counts.items()))
    print(f"{counts.total()} command lines by command and exit status: {told}")
    assert counts.total() >= examples
    assert {name.split()[0] for name in counts} == set(COMMANDS)


@COMPILING_WARNS
def test_a_few_hundred(place: SimpleNamespace) -> None:
    trial(place, 200, number=None)


@COMPILING_WARNS
@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_twenty_thousand(place: SimpleNamespace, number: int) -> None:
    trial(place, 10_000, number=number)
