from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_texts import RHYME

from regpt.errors import ConfigError, DataError
from regpt.tokenizers import HEADER, Tokenizer, load_tokenizer, open_tokenizer
from regpt.tokenizers.bpe import BPETokenizer, train_bpe
from regpt.tokenizers.bytes import ByteTokenizer
from regpt.tokenizers.chars import train_chars
from regpt.tokenizers.exchange import CONFIG_FILE, RANKS_FILE
from regpt.tokenizers.gpt2 import GPT2Tokenizer

CHARS = train_chars([RHYME])


@pytest.fixture(params=["bytes", "chars", "bpe", "gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind in turn; gpt2 only where the shared data is given."""
    if request.param in ("bpe", "gpt2"):
        return request.getfixturevalue({"bpe": "small_bpe", "gpt2": "gpt2"}[request.param])
    return ByteTokenizer() if request.param == "bytes" else CHARS


def test_every_kind_keeps_the_protocol(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.eot_id == tokenizer.vocab_size - 1
    assert tokenizer.special_tokens == {"<|endoftext|>": tokenizer.eot_id}
    assert len(tokenizer.fingerprint) == 64
    assert tokenizer.decode(tokenizer.encode(RHYME)) == RHYME
    assert tokenizer.encode_batch([RHYME, "a"]) == [tokenizer.encode(RHYME), tokenizer.encode("a")]


def test_saved_and_loaded_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Also when saved once more from what was loaded, byte for byte; no temporary file stays behind."""
    first, second = tmp_path / "ein Ordner ü" / "1", tmp_path / "2"
    tokenizer.save(first)
    again = load_tokenizer(first)
    assert (again.kind, again.fingerprint, again.vocab_size) == (
        tokenizer.kind,
        tokenizer.fingerprint,
        tokenizer.vocab_size,
    )
    assert again.encode(RHYME) == tokenizer.encode(RHYME)
    again.save(second)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {
        p.name: p.read_bytes() for p in second.iterdir()
    }
    expected = {
        "gpt2": {"encoder.json", "vocab.bpe"},
        "chars": {"chars.json"},
        "bpe": {"tokenizer.json", "tokenizer_config.json", "ranks.tiktoken"},
    }
    assert {p.name for p in first.iterdir()} == {HEADER} | expected.get(tokenizer.kind, set())
    assert json.loads((first / HEADER).read_text()) == {
        "format": 1,
        "kind": tokenizer.kind,
        "fingerprint": tokenizer.fingerprint,
    }


def encode_here(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


def load_and_encode(folder: Path, text: str) -> list[int]:
    return load_tokenizer(folder).encode(text)


def test_it_goes_to_spawned_processes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Pickled, and by its folder: macOS and Windows know no other way."""
    tokenizer.save(tmp_path / "für andere")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(encode_here, (tokenizer, RHYME)) == tokenizer.encode(RHYME)
        assert pool.apply(load_and_encode, (tmp_path / "für andere", RHYME)) == tokenizer.encode(RHYME)
    again = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301
    assert again.fingerprint == tokenizer.fingerprint


def test_fingerprints_tell_mappings_apart(small_bpe: BPETokenizer) -> None:
    """Equal for equal mappings, however they came about; different for any other."""
    merges = list(small_bpe._merges)
    others = [
        small_bpe,
        BPETokenizer(merges[:-1]),
        BPETokenizer([merges[1], merges[0], *merges[2:]]),
        ByteTokenizer(),
        CHARS,
        train_chars([RHYME + "§"]),
        train_chars(["a"]),
    ]
    assert len({t.fingerprint for t in others}) == len(others)
    assert train_chars(reversed(RHYME)).fingerprint == CHARS.fingerprint
    assert BPETokenizer(merges).fingerprint == small_bpe.fingerprint


def test_fingerprint_does_not_see_the_formatting_of_files(small_bpe: BPETokenizer, tmp_path: Path) -> None:
    """Another program may write the same JSON with other spaces, keys and escapes."""
    for tokenizer, name in ((small_bpe, "tokenizer.json"), (CHARS, "chars.json")):
        folder = tmp_path / tokenizer.kind
        tokenizer.save(folder)
        content = json.loads((folder / name).read_bytes())
        written = json.dumps(content, indent=4, sort_keys=True, ensure_ascii=False)
        (folder / name).write_text(written, encoding="utf-8")
        assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint


def test_pinned_fingerprints() -> None:
    """Shards and checkpoints name them, so they may never change."""
    assert ByteTokenizer().fingerprint == "f174428298827646280b6b2a4e2a92fdf66cae45a2cb53cc31635e7ef351b152"
    assert (
        train_chars(["ab"]).fingerprint == "3eb83fc07044d15f79324b84b26ceb5a0f32be236622df8ecc1ea90550e0b5a4"
    )
    assert (
        BPETokenizer([("a", "b")]).fingerprint
        == "14ade22cba983ece4f77c922b98a47160443f7abe64076bee5cbcebc8587ef53"
    )


# --- damage ----------------------------------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "this regpt does not know its format.\n  got: 2\n  expected: 1"),
        ({"format": "1"}, "this regpt does not know its format.\n  got: '1'"),
        ({"kind": "wordpiece"}, "there is no such kind of tokenizer.\n  got: 'wordpiece'"),
        ({"kind": ["chars"]}, "there is no such kind of tokenizer.\n  got: ['chars']"),
        ({"kind": "../chars"}, "there is no such kind of tokenizer."),
        ({"kind": None}, "there is no such kind of tokenizer."),
        ({"fingerprint": "0" * 64}, "its fingerprint is not that of the files beside it.\n  got: '000000"),
        ({"fingerprint": 10**4000}, "its fingerprint is not that of the files beside it.\n  got: 1000000"),
    ],
)
def test_a_damaged_header(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    CHARS.save(tmp_path)
    edit(tmp_path / HEADER, **changes)
    with pytest.raises(DataError) as e:
        load_tokenizer(tmp_path)
    assert str(e.value).startswith(f"{tmp_path / HEADER} is damaged: {said}")
    assert str(e.value).endswith("\n  try: save or train the tokenizer again")
    assert len(str(e.value)) < 500


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is not JSON"),
        (b'{"format": 1, "ki', "it is not JSON"),
        (b"\xff\xfe\x00", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"9" * 10_000, "it is not JSON"),
        (b"[1, 2]", "it must hold a JSON object.\n  got: list"),
        (b"null", "it must hold a JSON object.\n  got: NoneType"),
        (b"{}", "this regpt does not know its format.\n  got: None"),
    ],
    ids=["empty", "truncated", "not UTF-8", "nested", "digits", "list", "null", "no keys"],
)
def test_a_header_that_is_something_else(content: bytes, said: str, tmp_path: Path) -> None:
    CHARS.save(tmp_path)
    (tmp_path / HEADER).write_bytes(content)
    with pytest.raises(DataError) as e:
        load_tokenizer(tmp_path)
    assert str(e.value).startswith(f"{tmp_path / HEADER} is damaged: {said}")


@pytest.mark.parametrize("chars", ["", "aa", "ba", ["a"], None, 3, "a\ud800", 1e400, {"a": 1}])
def test_damaged_characters(chars: object, tmp_path: Path) -> None:
    CHARS.save(tmp_path)
    (tmp_path / "chars.json").write_text(json.dumps({"chars": chars}))
    with pytest.raises(DataError) as e:
        load_tokenizer(tmp_path)
    assert e.value.what == (
        f'{tmp_path / "chars.json"} is damaged: "chars" must be a text of distinct characters in code point order.'
    )


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["model"], None, "it holds no BPE model"),
        (["model", "merges"], "a b", "it holds no BPE model"),
        (["model", "vocab"], [], "the vocabulary is not the one that the merges make"),
        (["model", "vocab", "!"], 7, "the vocabulary is not the one that the merges make"),
        (["model", "vocab", "!"], 10**30, "the vocabulary is not the one that the merges make"),
        (["model", "vocab", "!"], None, "the vocabulary is not the one that the merges make"),
        (["model", "vocab", "new"], 400, "the vocabulary is not the one that the merges make"),
        (
            ["model", "merges", 1],
            ["zz", "y"],
            "merge 1 does not follow from those before.\n  got: ['zz', 'y']",
        ),
        (["model", "merges", 1], [1, 2], "merge 1 does not follow"),
        (["model", "merges", 1], ["a"], "merge 1 does not follow"),
        (["model", "merges", 1], ["\x00", "a"], "merge 1 does not follow"),
        (["model", "merges", 1], 10**30, "merge 1 does not follow"),
        (
            ["normalizer"],
            {"type": "Lowercase"},
            "it holds no BPE model with merges that splits text as GPT-2 or GPT-4 does",
        ),
        (["pre_tokenizer"], {"type": "Whitespace"}, "it holds no BPE model with merges that splits"),
        (["pre_tokenizer", "add_prefix_space"], True, "it holds no BPE model with merges that splits"),
    ],
)
def test_a_damaged_bpe(
    path: list[Any], value: object, said: str, small_bpe: BPETokenizer, tmp_path: Path
) -> None:
    """A merge twice is caught, too: the second one does not follow (below)."""
    small_bpe.save(tmp_path)
    content = inner = json.loads((tmp_path / "tokenizer.json").read_bytes())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError) as e:
        load_tokenizer(tmp_path)
    assert str(e.value).startswith(f"{tmp_path / 'tokenizer.json'} is damaged: {said}")


def test_a_merge_twice_is_damage(small_bpe: BPETokenizer, tmp_path: Path) -> None:
    small_bpe.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_bytes())
    content["model"]["merges"][5] = content["model"]["merges"][4]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="merge 5 does not follow from those before"):
        load_tokenizer(tmp_path)


def test_files_of_another_tokenizer_beside_the_header(small_bpe: BPETokenizer, tmp_path: Path) -> None:
    """As a crash between two saves would leave them."""
    small_bpe.save(tmp_path / "a")
    train_bpe([RHYME], 300).save(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "tokenizer.json", tmp_path / "a")
    with pytest.raises(DataError, match="its fingerprint is not that of the files beside it"):
        load_tokenizer(tmp_path / "a")


def test_a_missing_file_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for_others = {CONFIG_FILE, RANKS_FILE}
    for path in sorted(p for p in tmp_path.iterdir() if p.name not in for_others):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(DataError) as e:
            load_tokenizer(tmp_path)
        assert str(e.value).startswith(f"cannot read {path}: No such file or directory.")
        path.write_bytes(content)


def test_a_damaged_gpt2_file_is_named(gpt2: GPT2Tokenizer, tmp_path: Path) -> None:
    gpt2.save(tmp_path)
    (tmp_path / "vocab.bpe").write_bytes((tmp_path / "vocab.bpe").read_bytes()[:-5])
    with pytest.raises(DataError, match=r"vocab\.bpe is not the published file\.\n  got: sha256 "):
        load_tokenizer(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_fuzzed_files_load_as_before_or_are_a_data_error(
    small_bpe: BPETokenizer, tmp_path: Path, data: st.DataObject
) -> None:
    """Bytes changed or cut anywhere, or any JSON value in place of any other: no other exception, no other mapping."""
    tokenizer: Tokenizer = data.draw(st.sampled_from([small_bpe, CHARS]))
    tokenizer.save(tmp_path)
    name = {"bpe": "tokenizer.json", "chars": "chars.json"}[tokenizer.kind]
    path = tmp_path / data.draw(st.sampled_from([HEADER, name]))
    if data.draw(st.booleans()):
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=4))
        path.write_bytes(content)
    else:
        value = json.loads(path.read_bytes())
        root: Any = {"": value}
        holder, key = root, ""
        while data.draw(st.booleans()) and isinstance(holder[key], dict | list) and holder[key]:
            holder = holder[key]
            key = data.draw(
                st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
            )
        holder[key] = data.draw(JSON)
        path.write_text(json.dumps(root[""]), encoding="utf-8")
    try:
        assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    except DataError as e:
        assert str(tmp_path) in str(e)


# --- opening by name -------------------------------------------------------------------------------------------------


def test_open_a_saved_folder_or_a_run(small_bpe: BPETokenizer, tmp_path: Path) -> None:
    small_bpe.save(tmp_path / "run" / "tokenizer")
    assert open_tokenizer(str(tmp_path / "run")).fingerprint == small_bpe.fingerprint
    assert open_tokenizer(str(tmp_path / "run" / "tokenizer")).fingerprint == small_bpe.fingerprint
    assert open_tokenizer("bytes").kind == "bytes"


@pytest.mark.parametrize("name", ["chars", "bpe"])
def test_trained_kinds_cannot_be_opened_by_name(name: str) -> None:
    with pytest.raises(ConfigError) as e:
        open_tokenizer(name)
    assert str(e.value) == (
        f"a {name} tokenizer is trained on a text, and none is given here.\n"
        "  expected: gpt2, bytes, or a folder with a saved tokenizer"
    )


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        open_tokenizer("gtp2")
    assert str(e.value) == (
        "there is no tokenizer 'gtp2'. Did you mean gpt2?\n"
        "  expected: gpt2, bytes, chars or bpe (made from the text), or a folder with a saved tokenizer"
    )
    with pytest.raises(DataError, match=f"^cannot read .*{HEADER}: No such file"):
        open_tokenizer(str(tmp_path))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^cannot write .*chars\.json: "):
        CHARS.save(tmp_path / "file" / "inside")


def test_the_package_itself_is_light() -> None:
    """`regpt --help` imports it: no library behind the kinds may come along."""
    heavy = ("torch", "numpy", "tiktoken", "tokenizers", "regex")
    code = f"import sys, regpt.tokenizers; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
