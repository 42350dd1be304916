"""Parts into documents, documents into pieces: nothing lost, nothing doubled, no token changed, whatever the sizes."""

from __future__ import annotations

import gzip
import json
import lzma
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regpt.data import documents as module
from regpt.data import sources
from regpt.data.documents import Part, cut_safely, documents
from regpt.data.sources import SourceFile, open_source
from regpt.errors import DataError, DeviceError
from regpt.tokenizers import load_tokenizer, open_tokenizer

LAX = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# The split patterns as tiktoken has them (tiktoken_ext/openai_public.py).
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"""
    r"""\s*[\r\n]|\s+(?!\S)|\s""",
    "o200k": "|".join(
        [
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    ),
}
# Everything that the patterns tell apart, and what is easily taken for it.
TRICKY = "aZéßж漢あ한019½²٣Ⅷ  \n\r\t\u00a0\u0085\u2028\u3000\x1c'’.,;:!?()[]{}<>=+/\"，。、_-|#@~^\u0301\u200d😀‍sdmtlvreSDMT"
texts = st.text(st.sampled_from(TRICKY) | st.characters(exclude_categories=["Cs"]), max_size=60)


def in_blocks(text: str, sizes: list[int]) -> list[str]:
    """`text` in blocks of these sizes, over and over."""
    blocks, at = [], 0
    while at < len(text):
        size = sizes[len(blocks) % len(sizes)]
        blocks.append(text[at : at + size])
        at += size
    return blocks


@pytest.mark.parametrize("name", PATTERNS)
@settings(LAX, max_examples=600)
@given(text=texts, sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_no_pre_token_is_cut(name, text, sizes) -> None:
    """The stretches that a split pattern finds in the pieces are those that it finds in the whole."""
    pieces = list(cut_safely(in_blocks(text, sizes)))
    assert "".join(pieces) == text
    assert [t for p in pieces for t in regex.findall(PATTERNS[name], p)] == regex.findall(
        PATTERNS[name], text
    )


def test_pieces_are_as_short_as_the_text_allows() -> None:
    """Prose, code and Chinese are cut near every block; a text that cannot be cut stays whole."""
    for text in (
        "To be, or not to be " * 400,
        "for i in range(10):\n    x[i] = f(i)\n" * 200,
        "天地玄黄，宇宙洪荒。" * 700,
    ):
        assert max(map(len, cut_safely(in_blocks(text, [500])))) < 600
    assert list(cut_safely(in_blocks("é" * 5000, [500]))) == ["é" * 5000]


def test_pieces_have_the_ids_of_the_whole(test_data, monkeypatch) -> None:
    """Real texts of every kind, through GPT-2's tokenizer."""
    tokenizer = open_tokenizer("gpt2", files=str(test_data / "tokenizer"))
    texts = [p.read_text(encoding="utf-8") for p in sorted((test_data / "small").rglob("*.txt"))]
    with lzma.open(test_data / "webdocs/val.jsonl.xz") as lines:
        texts.append("".join(json.loads(line)["text"] for line in lines))
    for text in texts:
        text = text[:400_000]
        pieces = list(cut_safely(in_blocks(text, [1000, 77, 3001])))
        assert len(pieces) > len(text) // 4000
        assert [i for p in pieces for i in tokenizer.encode(p)] == tokenizer.encode(text)


# --- reading ----------------------------------------------------------------------------------------------------------


def read(spec: Path | str, work: Path, **options: str) -> tuple[list[str], Counter[str]]:
    """All documents of a source, and what was skipped."""
    skipped: Counter[str] = Counter()
    found = []
    for part in open_source(str(spec), **options).parts(work):
        for document in documents(part, skipped):
            try:
                found.append("".join(document()))
            except UnicodeError:
                skipped["invalid UTF-8"] += 1
    return found, +skipped


STORIES = ["Once.\n\nThere was", "b<|end", "üß 漢\r\nx", " ", "last|endoftext|>"]


@pytest.mark.parametrize("part_bytes", [1, 7, 13, 30, 1000])
@pytest.mark.parametrize("between", ["<|endoftext|>", "\n<|endoftext|>\n", "\r\n<|endoftext|>\r\n"])
@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".zst"])
def test_text_between_separators(tmp_path, monkeypatch, part_bytes, between, packing) -> None:
    """Each document once, without the line ends around the separator, wherever parts begin, packed or not."""
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    monkeypatch.setattr(sources, "PIECE_BYTES", 11)
    path = tmp_path / f"stories.txt{packing}"
    path.write_bytes(packed(between.join(STORIES).encode(), packing))
    assert read(path, tmp_path) == (STORIES, Counter())
    path.write_bytes(
        packed((between.join(STORIES + [""])).encode(), packing)
    )  # one more at the end is no document
    assert read(path, tmp_path) == (STORIES, Counter())
    path.write_bytes(packed((between.join([STORIES[0], "", STORIES[1]])).encode(), packing))
    assert read(path, tmp_path) == (STORIES[:2], Counter(empty=1))


def packed(data: bytes, packing: str) -> bytes:
    if packing == ".gz":
        return gzip.compress(data)
    if packing == ".xz":
        return lzma.compress(data)
    if packing == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(data) // 2  # several frames, as pzstd writes them
        return zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    return data


LINES = [
    {"text": "plain"},
    {"text": "line\u0085separators\u2028inside\u2029one\x0bstring", "id": 1},
    {"meta": {"text": "not this", "list": [1, {"a": "}]"}]}, "text": 'quoted "word" \\ / \n\t é 😀'},
    {"a": None, "b": -1.5e3, "text": "x" * 50, "c": True},
]


@pytest.mark.parametrize("part_bytes", [1, 20, 75, 1000])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".zst"])
def test_json_lines(tmp_path, monkeypatch, part_bytes, ascii_only, packing) -> None:
    """Each line once, wherever parts begin; lines end at \\n alone; blank lines are nothing."""
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    lines = [json.dumps(line, ensure_ascii=ascii_only) for line in LINES]
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(packed(("\n".join(lines) + "\r\n\n  \n").encode(), packing))
    assert read(path, tmp_path) == ([line["text"] for line in LINES], Counter())


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@LAX
@given(
    text=st.text(st.sampled_from('ab "\\/\n\té漢😀\x7f\u2028,.:{}[]'), max_size=80),
    before=st.dictionaries(st.text(max_size=3), values, max_size=3),
    after=st.dictionaries(st.text(max_size=3), values, max_size=3),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, (", ", ": "), ("  ,\t", " : ")]),
)
def test_long_json_lines_are_read_without_parsing_them_whole(
    tmp_path, monkeypatch, text, before, after, ascii_only, indent
) -> None:
    """The scanner finds the text that json.loads finds, block by block."""
    monkeypatch.setattr(module, "LONG_LINE_BYTES", 0)
    monkeypatch.setattr(
        module, "_UNITS", module.re.compile(module._UNITS.pattern.replace(b"2048", b"3"), module.re.DOTALL)
    )
    monkeypatch.setattr(module.json, "loads", loads := CountingLoads(json.loads))
    value = {k: v for k, v in before.items() if k != "text"} | {"text": text}
    value |= {k: v for k, v in after.items() if k not in value}
    path = tmp_path / "long.jsonl"
    path.write_text(
        json.dumps(value, ensure_ascii=ascii_only, separators=indent), encoding="utf-8", newline=""
    )
    assert read(path, tmp_path)[0] == [text]
    assert not any(isinstance(v, dict) for v in loads.results)  # the line itself was not parsed


class CountingLoads:
    """json.loads, with a record of what it gave."""

    def __init__(self, loads) -> None:
        self.loads, self.results = loads, []

    def __call__(self, data):
        self.results.append(self.loads(data))
        return self.results[-1]


@pytest.mark.parametrize("long", [False, True])
def test_what_is_wrong_with_a_line_is_said_with_its_number(tmp_path, monkeypatch, long) -> None:
    """File, line and fields, also in the middle of a packed file."""
    monkeypatch.setattr(sources, "PART_BYTES", 40)
    if long:
        monkeypatch.setattr(module, "LONG_LINE_BYTES", 0)
    good = json.dumps({"text": "a" * 30}) + "\n"
    cases = {
        '{"content": "x", "id": 2}': "has no field 'text'.\n  got: the fields content, id\n  try: name the field",
        '{"text": ["x"]}': "the field 'text' is not text.\n  got: list",
        "[1]": "each line must be a JSON object.\n  got: list",
        '{"text": "cut': "is not valid JSON",
        '{"text": "a\tb"}': "is not valid JSON",
    }
    for bad, message in cases.items():
        for packing in ("", ".gz"):
            path = tmp_path / f"bad.jsonl{packing}"
            path.write_bytes(packed((good * 6 + bad + "\n" + good).encode(), packing))
            with pytest.raises(DataError) as error:
                read(path, tmp_path)
            assert str(error.value).startswith(f"{path}:7") and message in str(error.value)


@pytest.mark.parametrize("long", [False, True])
def test_documents_that_are_not_text_are_skipped_and_counted(tmp_path, monkeypatch, long) -> None:
    """Invalid UTF-8, lone surrogates and null cost their own document only."""
    if long:
        monkeypatch.setattr(module, "LONG_LINE_BYTES", 0)
    lines = [
        b'{"text": "a"}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": null}',
        b'{"text": "\\ud83d\\ude00"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found, skipped = read(tmp_path / "a.jsonl", tmp_path)
    assert [t for t in found if t != "\ud800"] == ["a", "😀"]  # the surrogate is found when it is encoded
    assert skipped == Counter({"invalid UTF-8": 1, "empty": 1})
    (tmp_path / "b.txt").write_bytes(b"good<|endoftext|>b\xe4d<|endoftext|>good too")
    assert read(tmp_path / "b.txt", tmp_path) == (["good", "good too"], Counter({"invalid UTF-8": 1}))


def test_parquet(tmp_path) -> None:
    """Row group by row group, strings and bytes; nulls counted; a missing field named."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"row {i} é😀" for i in range(100)] + [None, "", "end"]
    for kind in (arrow.string(), arrow.large_string(), arrow.binary()):
        column = arrow.array(
            [None if t is None else t.encode() if kind == arrow.binary() else t for t in texts], kind
        )
        parquet.write_table(
            arrow.table({"text": column, "n": range(len(texts))}), tmp_path / "a.parquet", row_group_size=30
        )
        found, skipped = read(tmp_path / "a.parquet", tmp_path)
        assert found == [t for t in texts if t] and skipped == Counter(empty=2)
    with pytest.raises(DataError, match=r"a.parquet has no field 'body'.\n  got: the fields n, text"):
        read(tmp_path / "a.parquet", tmp_path, text_field="body")
    with pytest.raises(DataError, match=r"a.parquet: the field 'n' is not text.\n  got: int64"):
        read(tmp_path / "a.parquet", tmp_path, text_field="n")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"bad.parquet is damaged or not parquet"):
        read(tmp_path / "bad.parquet", tmp_path)


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_damaged_packing_is_said(tmp_path, packing) -> None:
    """Cut off, or not packed at all: the file is named."""
    path = tmp_path / f"a.txt{packing}"
    whole = packed(bytes(range(65, 91)) * 1000, packing)
    for data in (whole[:-9], b"no such packing"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a.txt\.\w+ is damaged or not what its name says"):
            read(path, tmp_path)


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_what_was_packed_well_takes_no_memory(tmp_path, packing) -> None:
    """A few kilobytes that become 128 MB come in blocks; to the last byte, over several frames."""
    path, line = tmp_path / f"a.jsonl{packing}", b'{"text": "again and again"}\n'
    whole = line * ((128 << 20) // len(line))
    path.write_bytes(lzma.compress(whole, preset=0) if packing == ".xz" else packed(whole, packing))
    read = 0
    tracemalloc.start()
    try:
        with sources.unpacked(SourceFile.of(path, path.name)) as (stream, _):
            while block := sources.read_block(stream, path):
                assert block == whole[read : read + len(block)]
                read += len(block)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert read == len(whole)


def test_missing_optional_packages_are_named(tmp_path, monkeypatch) -> None:
    """With the command that installs them."""
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    (tmp_path / "a.parquet").write_bytes(b"x")
    for name, library in (("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")):
        monkeypatch.setitem(__import__("sys").modules, library, None)
        with pytest.raises(
            DeviceError, match=rf"needs the package {library}.*\n  try: pip install {library}"
        ):
            read(tmp_path / name, tmp_path)


def test_a_part_travels_as_json() -> None:
    """What tells a process its work survives the way, also a file name that is not UTF-8."""
    import dataclasses

    part = Part("a\udcff b/é", "é", "text", 1, 2, 3, fragment="last", temporary=True)
    assert Part(**json.loads(json.dumps(dataclasses.asdict(part)))) == part


def test_saved_tokenizers_load(tmp_path) -> None:
    """The processes load the tokenizer from the folder that ships with the shards."""
    open_tokenizer("bytes").save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == open_tokenizer("bytes").fingerprint
