"""Files damaged at random (bits, ends, middles, swaps, stale manifests): every one noticed before it is used, and named.

Two reads are put to the test, as training does them before its first step: `read_checkpoint`, and `corpus`, which opens
prepared shards and their tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from runs import debris, outcome, steps

from regpt.cli import main
from regpt.config import Config, EvalConfig, SaveConfig, TokenizerConfig
from regpt.data.corpus import corpus
from regpt.data.prepare import prepare
from regpt.data.sources import open_source
from regpt.errors import CheckpointError, ConfigError, DataError
from regpt.tokenizers.bpe import train_bpe
from regpt.train import session
from regpt.train.checkpoint import DamagedCheckpoint, newest_valid, read_checkpoint
from regpt.train.plan import Plan
from tiny import tiny_config

TEXT = "<|endoftext|>".join(
    f"{i} little ducks went out one day, over the hills and far away. " * (1 + i % 3) for i in range(150)
)
RUN_FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


# --- damage -------------------------------------------------------------------------------------------------


def flip(whole: bytes, chance: random.Random) -> bytes:
    """One bit is another."""
    at = chance.randrange(len(whole))
    return whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :]


def truncate(whole: bytes, chance: random.Random) -> bytes:
    """The end is missing: at times a byte of it, at times nearly all."""
    return whole[: chance.choice((-1, -chance.randint(1, min(16, len(whole))), chance.randrange(len(whole))))]


def append(whole: bytes, chance: random.Random) -> bytes:
    """Something stands behind the end: anything, zeros, or the file's own beginning."""
    n = chance.choice((1, 8, 512, 4096))
    return whole + chance.choice((chance.randbytes(n), bytes(n), whole[:n]))


def cut(whole: bytes, chance: random.Random) -> bytes:
    """A chunk in the middle is gone, and what stood behind it moved up."""
    at = chance.randrange(len(whole))
    return whole[:at] + whole[at + chance.randint(1, max(1, len(whole) // 4)) :]


def zero(whole: bytes, chance: random.Random) -> bytes:
    """A chunk in the middle holds zeros, as after a power loss. One that held them already is cut out."""
    at = chance.randrange(len(whole))
    end = at + chance.choice((1, 64, 512))
    made = whole[:at] + bytes(len(whole[at:end])) + whole[end:]
    return made if made != whole else whole[:at] + whole[end:]


def empty(whole: bytes, chance: random.Random) -> bytes:
    """Nothing is left."""
    return b""


INSIDE: tuple[Callable[[bytes, random.Random], bytes], ...] = (flip, truncate, append, cut, zero, empty)


class Folder:
    """A folder of whole files and a second one like it, damaged and put right again."""

    def __init__(self, path: Path, other: Path, twins: Callable[[str, str], bool]) -> None:
        """`twins`: which two files of the folder may be mistaken for each other."""
        self.path, self.others = path, _contents(other)
        self.whole = _contents(path)
        self.pairs = [(a, b) for a in self.whole for b in self.whole if a < b and twins(a, b)]

    @property
    def kinds(self) -> list[str]:
        """What `damage` can do."""
        inside = [f.__name__ for f in INSIDE]
        return [*inside, *inside, "flip", "flip", "missing", "swapped", "exchanged", "stale manifest"]

    def damage(self, kind: str, chance: random.Random) -> tuple[dict[str, bytes | None], str]:
        """Do it. Returns what now stands where (None: nothing), and a description."""
        names = [n for n in self.whole if self.whole[n] != self.others.get(n) and n in self.others]
        name = chance.choice([n for n in self.whole if self.whole[n]])
        changed: dict[str, bytes | None]
        if kind == "missing":
            changed = {name: None}
        elif kind == "swapped":  # with the file of the same name in the other folder
            name = chance.choice(names)
            changed = {name: self.others[name]}
        elif kind == "exchanged":  # two files of this folder
            a, b = chance.choice([p for p in self.pairs if self.whole[p[0]] != self.whole[p[1]]])
            changed = {a: self.whole[b], b: self.whole[a]}
        elif kind == "stale manifest":
            changed = {"manifest.json": self.others["manifest.json"]}
        else:
            made = next(f for f in INSIDE if f.__name__ == kind)(self.whole[name], chance)
            changed = {name: made}
        for n, content in changed.items():
            if content is None:
                (self.path / n).unlink()
            else:
                (self.path / n).write_bytes(content)
        return changed, f"{kind}: {', '.join(changed)}"

    def mend(self, changed: Mapping[str, bytes | None]) -> None:
        """As it was."""
        for name in changed:
            (self.path / name).write_bytes(self.whole[name])

    def means_the_same(self, changed: Mapping[str, bytes | None]) -> bool:
        """Whether only blanks around a JSON document changed: without its last line end it says what it said."""
        return all(n.endswith(".json") and _json(c) == _json(self.whole[n]) for n, c in changed.items())


def _contents(folder: Path) -> dict[str, bytes]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def _parent(name: str) -> Path:
    return Path(name).parent


def _json(content: bytes | None) -> object:
    """What a JSON file says; the bytes themselves where it says nothing."""
    try:
        return json.loads(content or b"")
    except ValueError:
        return content


def told(kind: str, counts: Counter[str]) -> None:
    """One line for a person."""
    parts = ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))
    print(f"{kind}: {counts.total()} cases: {parts}")


# --- what is damaged ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which everything of this file lies."""
    folder = tmp_path_factory.mktemp("damage")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs name their files from there; nobody waits for an estimate of their time."""
    monkeypatch.chdir(place)

    def timeless(plan: Plan, *_: object) -> Plan:
        return plan

    monkeypatch.setattr(session, "with_time", timeless)


@pytest.fixture(scope="module")
def config() -> Config:
    """A run of a second, of three checkpoints."""
    tiny = tiny_config()
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, n_embd=16, block_size=16),
        train=dataclasses.replace(tiny.train, steps=6, batch_tokens=64, threads=1),
        eval=EvalConfig(every=2),
        save=SaveConfig(keep=3),
    )


@pytest.fixture(scope="module")
def run(place: Path, config: Config) -> Path:
    """What nobody damaged; copied by who means to write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        session.train(config, "whole")
    assert steps(place / "whole") == [2, 4, 6]
    return place / "whole"


def copied(run: Path, name: str) -> Path:
    """The run again, to be damaged."""
    shutil.rmtree(run.parent / name, ignore_errors=True)
    return Path(shutil.copytree(run, run.parent / name))


@pytest.fixture(scope="module")
def shards(place: Path) -> tuple[Path, Path]:
    """Shards of several files, and those of an earlier state of the text: as long to the byte, other words."""
    folders = place / "shards", place / "earlier"
    file = place / "text.txt"
    for folder, text in zip(reversed(folders), (TEXT.replace("day", "two"), TEXT), strict=True):
        file.write_text(text, encoding="utf-8")
        tokenizer = train_bpe([text], 290)
        source = open_source(str(file))
        prepare(source, tokenizer, folder, val_fraction=0.1, workers=1, shard_tokens=1500)
    return folders


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [200, pytest.param(6200, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_noticed(run: Path, n: int) -> None:
    chance, counts = random.Random(n), Counter[str]()
    path = copied(run, "copy") / "checkpoints"
    folder = Folder(path / "step-000006", path / "step-000004", lambda a, b: True)
    assert set(folder.whole) == set(RUN_FILES)
    for number in range(n):
        changed, what = folder.damage(folder.kinds[number % len(folder.kinds)], chance)
        if folder.means_the_same(changed):  # read as what it says, which is what was written
            counts["a blank, harmless"] += 1
            folder.mend(changed)
            continue
        with pytest.raises(DamagedCheckpoint) as caught:
            read_checkpoint(folder.path)
            pytest.fail(f"case {number} was not noticed: {what}")
        # A manifest that is not the folder's own shows in what it says of the files.
        names = RUN_FILES if what.startswith("stale") else tuple(changed)
        assert any(name in caught.value.what for name in names), f"case {number}, {what}: {caught.value}"
        folder.mend(changed)
        counts[what.partition(":")[0]] += 1
    assert read_checkpoint(folder.path).step == 6
    told("checkpoint", counts)


def test_the_checkpoint_before_is_used(run: Path) -> None:
    chance, counts = random.Random(0), Counter[str]()
    for number in range(36):
        path = copied(run, "copy") / "checkpoints"
        folder = Folder(path / "step-000006", path / "step-000004", lambda a, b: True)
        changed, what = folder.damage(folder.kinds[number % len(folder.kinds)], chance)
        if folder.means_the_same(changed):
            continue
        said: list[str] = []
        found = newest_valid(path, say=said.append)
        assert found is not None and found.step == 4, what
        assert len(said) == 1 and "corrupt-step-000006-1" in said[0], what
        assert any(name in said[0] for name in (*changed, *RUN_FILES)), what
        assert sorted(p.name for p in path.iterdir()) == [
            "corrupt-step-000006-1",
            "step-000002",
            "step-000004",
        ], what
        # Kept for a person, as it was found.
        kept = _contents(path / "corrupt-step-000006-1")
        assert all(kept.get(name) == content for name, content in changed.items()), what
        counts[what.partition(":")[0]] += 1
    told("newest_valid", counts)


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        ("flip", 1),
        ("stale manifest", 2),
        pytest.param("truncate", 3, marks=pytest.mark.slow),
        pytest.param("swapped", 4, marks=pytest.mark.slow),
        pytest.param("missing", 5, marks=pytest.mark.slow),
        pytest.param("zero", 6, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_past_the_damage_to_the_bit(run: Path, config: Config, kind: str, seed: int) -> None:
    out = copied(run, "copy")
    path = out / "checkpoints"
    folder = Folder(path / "step-000006", path / "step-000004", lambda a, b: True)
    folder.damage(kind, random.Random(seed))
    heard: list[str] = []
    session.train(config, out, listen=lambda event, _, values: heard.append(f"{event} {values.get('text')}"))
    assert any(h.startswith("note ") and "corrupt-step-000006-1" in h for h in heard)
    assert debris(out) == ["corrupt-step-000006-1"]
    assert outcome(out) == outcome(run)


# --- shards -------------------------------------------------------------------------------------------------


def asked(config: Config, folder: Path, by_source: bool) -> Config:
    """A run on that very folder: named as its source, or found as the place where the text's shards lie."""
    data = dataclasses.replace(config.data, source=str(folder))
    if not by_source:
        data = dataclasses.replace(config.data, dir=str(folder))
    return dataclasses.replace(config, data=data, tokenizer=TokenizerConfig(name="bpe", vocab_size=290))


def of_one_kind(a: str, b: str) -> bool:
    """Files with equal endings."""
    return Path(a).suffix == Path(b).suffix


@pytest.mark.parametrize("n", [100, pytest.param(4060, marks=pytest.mark.slow)])
def test_damaged_shards_are_noticed(shards: tuple[Path, Path], config: Config, n: int) -> None:
    chance, counts = random.Random(n), Counter[str]()
    folder = Folder(*shards, of_one_kind)
    assert len([name for name in folder.whole if name.endswith(".bin")]) >= 4
    whole = {
        corpus(asked(config, folder.path, by_source))[0].fingerprint for by_source in (True, False)
    }.pop()
    before = sorted(p.name for p in folder.path.parent.iterdir())
    for number in range(n):
        changed, what = folder.damage(folder.kinds[number % len(folder.kinds)], chance)
        if folder.means_the_same(changed):
            counts["a blank, harmless"] += 1
            folder.mend(changed)
            continue
        try:
            tokenizer, _ = corpus(asked(config, folder.path, by_source=chance.random() < 0.5))
        except DataError as e:
            said = str(e)
        else:  # what its files say beside the merges: a tokenizer's fingerprint is of what it does
            of_tokenizer = all(name.startswith("tokenizer/") for name in changed)
            assert of_tokenizer and tokenizer.fingerprint == whole, f"case {number} was not noticed: {what}"
            counts["a remark in a tokenizer's file, harmless"] += 1
            folder.mend(changed)
            continue
        # A whole file that is of another folder shows in what does not go with it; without its manifest a folder is
        # no longer one of shards, and it is enough that it is named.
        names = [*changed]
        if what.startswith(("stale", "swapped")):
            names = [
                n
                for n in folder.whole
                if "manifest.json" in changed or Path(n).parent in map(_parent, changed)
            ]
        if changed == {"manifest.json": None}:
            names = [folder.path.name]
        assert any(Path(name).name in said for name in names), f"case {number}, {what}: {said}"
        folder.mend(changed)
        counts[what.partition(":")[0]] += 1
    corpus(asked(config, folder.path, by_source=False))
    assert sorted(p.name for p in folder.path.parent.iterdir()) == before  # nothing was made beside it
    told("shards", counts)


# --- record and log -----------------------------------------------------------------------------------------


def damaged_records(run: Path, n: int) -> Iterator[str]:
    """The copy of the run with one damaged run.json, log.jsonl or samples.jsonl after the other."""
    chance = random.Random(n)
    for number in range(n):
        out = copied(run, "copy")
        name = ("run.json", "log.jsonl", "samples.jsonl")[number % 3]
        kind = chance.choice((flip, flip, flip, truncate, append, cut, zero, empty))
        made = kind((out / name).read_bytes(), chance)
        (out / name).write_bytes(made)
        yield f"case {number}, {kind.__name__} of {name}"


@pytest.mark.parametrize("n", [24, pytest.param(600, marks=pytest.mark.slow)])
def test_a_damaged_record_never_gives_a_traceback(
    run: Path, config: Config, capsys: pytest.CaptureFixture[str], n: int
) -> None:
    """run.json that changed is refused; lines of a log that cannot be read are passed over; no weight changes."""
    counts, written = Counter[str](), json.loads((run / "run.json").read_text())
    for what in damaged_records(run, n):
        status = main(["inspect", "copy", "--json"])
        said = capsys.readouterr()
        assert status in (0, 2), f"{what}: {said.err}"
        assert isinstance(json.loads(said.out), dict) and "Traceback" not in said.err, what
        kind = re.sub("^case [0-9]+, ", "", what).rpartition(" of ")[2]
        try:
            unchanged = _json(Path("copy/run.json").read_bytes()) == written
            session.train(config, "copy")
            assert kind != "run.json" or unchanged, f"{what}: it was not noticed"
            counts[f"{kind} gone on"] += 1
        except (CheckpointError, ConfigError) as e:
            assert kind == "run.json" and "copy" in str(e), what  # the run is named
            counts[f"{kind} refused"] += 1
        weights = Path("copy/checkpoints/step-000006/model.safetensors").read_bytes()
        assert weights == (run / "checkpoints/step-000006/model.safetensors").read_bytes(), what
    told("record", counts)
