"""Train a byte-level BPE tokenizer on text of one's own, or show what a tokenizer is made of; without a name, list both."""

from __future__ import annotations

import argparse
import shlex
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from regpt.cli.parse import CommonArgs, Output, parse
from regpt.config import DataConfig, TokenizerConfig
from regpt.durations import duration
from regpt.errors import DataError, UsageError, did_you_mean
from regpt.paths import user_path
from regpt.tokenizers import MAX_BYTES

if TYPE_CHECKING:
    from regpt.tokenizers import Tokenizer

ACTIONS = {
    "train": "learn byte-level BPE from files or sources, into a folder that other programs read, too",
    "show": "what a tokenizer is made of, and how it divides a text; of two, side by side",
}
SHOWN = 8  # merges, tokens
SAMPLE_CHARS = 160  # of the text, shown token by token
MOST_TEXT = 1 << 20  # bytes of a text that is encoded to be shown
EDGE = "│"  # between two tokens
VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt tokenizer`."""


@dataclass(frozen=True, kw_only=True)
class TrainArgs(CommonArgs):
    """Arguments of `regpt tokenizer train SOURCES --vocab-size N --out DIR`."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Text, JSONL or parquet (.gz, .xz, .zst too), folders, globs, named sets, or hf:owner/name[:config][@revision]."""
    out: str
    """The folder for the tokenizer; must not be there yet."""
    vocab_size: int
    """Entries in all, special tokens and <|endoftext|> included."""
    pattern: Literal["gpt2", "gpt4"] = TokenizerConfig.pattern
    """Whose split into words pairs stay inside of. gpt4 keeps numbers to three digits, and takes punctuation along."""
    special_tokens: tuple[str, ...] = ()
    """Control tokens besides <|endoftext|>, such as '<|im_start|>' '<|im_end|>'."""
    min_frequency: int = TokenizerConfig.min_frequency
    """How often a pair must occur to become an entry."""
    max_bytes: int = MAX_BYTES
    """Text to learn from: what lies behind is not read. Memory grows with the number of distinct words."""
    text_field: Annotated[str, tyro.conf.arg(aliases=["--data.text-field"])] = DataConfig.text_field
    """The field that holds the text in JSONL and parquet."""


@dataclass(frozen=True, kw_only=True)
class ShowArgs(CommonArgs):
    """Arguments of `regpt tokenizer show TOKENIZER [OTHER]`."""

    tokenizer: tyro.conf.Positional[str]
    """gpt2, bytes, a folder with a saved tokenizer, or a run."""
    other: tyro.conf.Positional[str | None] = None
    """A second one, to compare."""
    text: str | None = None
    """A file to divide into tokens. None: some of the Python library's own source."""
    tokenizer_files: Annotated[str | None, tyro.conf.arg(aliases=["--tokenizer.files"])] = (
        TokenizerConfig.files
    )
    """Folder with GPT-2's encoder.json and vocab.bpe, for use offline."""


def main(argv: list[str]) -> int:
    """`regpt tokenizer`, and `regpt tokenizer train` and `show`."""
    if argv and not argv[0].startswith("-"):
        name, rest = argv[0], argv[1:]
        if name not in ACTIONS:
            raise UsageError(
                f"there is no tokenizer command {name!r}.{did_you_mean(name, ACTIONS)}",
                hint="regpt tokenizer",
            )
        return {"train": train, "show": show}[name](rest)
    width = max(map(len, ACTIONS))
    listed = "\n".join(f"  regpt tokenizer {name:<{width}}  {what}" for name, what in ACTIONS.items())
    args = parse(Args, argv, prog="regpt tokenizer", description=f"{__doc__}\n\n{listed}")
    Output(args).result({"actions": ACTIONS}, f"{listed}\n\nregpt tokenizer train --help has its options.")
    return 0


# --- train -----------------------------------------------------------------------------------------------------------


def train(argv: list[str]) -> int:
    """`regpt tokenizer train`."""
    args = parse(TrainArgs, argv, prog="regpt tokenizer train", description=f"Train: {ACTIONS['train']}.")
    from regpt.data.corpus import TrainingText
    from regpt.data.sources import open_source
    from regpt.data.unfinished import megabytes
    from regpt.tokenizers.bpe import check_training, train_bpe
    from regpt.tokenizers.learn import learner

    out, folder, begun = Output(args), user_path(args.out), time.monotonic()
    if not args.sources:
        raise UsageError(
            "there is no text to learn from: name files or sources.", hint="regpt tokenizer train --help"
        )
    check_training(args.vocab_size, args.pattern, args.special_tokens, args.min_frequency, args.max_bytes)
    _check_folder(folder)
    text = TrainingText([open_source(s, text_field=args.text_field) for s in args.sources])
    size = sum(s.source_bytes for s in text.sources)
    total = min(size, args.max_bytes)
    out.info(
        f"learning {args.vocab_size:,} entries from {megabytes(total)} of {megabytes(size)}, with {learner()}"
    )
    with out.progress("reading", total, "characters") as bar:
        tokenizer = train_bpe(
            text,
            args.vocab_size,
            pattern=args.pattern,
            special_tokens=args.special_tokens,
            min_frequency=args.min_frequency,
            max_bytes=args.max_bytes,
            progress=bar.update,
        )
    tokenizer.save(folder)
    seconds = time.monotonic() - begun
    values = {
        "out": str(folder),
        **_facts(tokenizer),
        "min_frequency": args.min_frequency,
        "learner": learner(),
        "seconds": round(seconds, 3),
    }
    source, made = shlex.quote(args.sources[0]), shlex.quote(args.out)
    lines = [
        *_described(values),
        f"time         {duration(seconds)}",
        f"next:        regpt tokenizer show {made}",
        f"             regpt prepare {source} --tokenizer {made} --out …",
    ]
    out.result(values, "\n".join(lines))
    return 0


def _check_folder(folder: Path) -> None:
    """Refuse, before any work, a folder that holds something or cannot be made."""
    from regpt.data.unfinished import require_writable

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is there already, and is not overwritten.", hint="another --out")
    require_writable(folder)


# --- show ------------------------------------------------------------------------------------------------------------


def show(argv: list[str]) -> int:
    """`regpt tokenizer show`."""
    args = parse(ShowArgs, argv, prog="regpt tokenizer show", description=f"Show {ACTIONS['show']}.")
    from regpt.tokenizers import open_tokenizer

    out = Output(args)
    named = [(n, open_tokenizer(n, files=args.tokenizer_files)) for n in (args.tokenizer, args.other) if n]
    where, text = _text(args.text)
    shown = [_facts(t) | {"name": name} | _made_of(t) | _on_text(t, text) for name, t in named]
    values: dict[str, Any] = {"text": where, "text_bytes": len(text.encode()), "tokenizers": shown}
    lines: list[str] = []
    for one in shown:
        lines += [f"tokenizer    {one['name']}", *_described(one), *_entries(one), ""]
    if len(shown) == 2:
        values["common"] = common = _in_common(*(t for _, t in named))
        lines += [
            f"in common    {common['entries']:,} entries: {common['of_first']:.1%} of the first, "
            f"{common['of_second']:.1%} of the second",
            "",
        ]
    lines.append(f"on           {where}, {values['text_bytes']:,} bytes")
    for one in shown:
        per = one["bytes_per_token"]
        said = f"{per:.3f} bytes a token, {one['tokens']:,} tokens" if per else one["refused"]
        lines.append(f"{one['name'][-24:]:<24} {said}")
    for one in shown:
        if one["sample"]:
            lines += ["", f"{one['name']}:", EDGE.join(one["sample"]).translate(VISIBLE)]
    out.result(values, "\n".join(lines))
    return 0


def _text(file: str | None) -> tuple[str, str]:
    """The text to divide, and where it comes from.

    Raises:
        DataError: it cannot be read, is empty, or is not UTF-8.
    """
    paths = [user_path(file)] if file is not None else [Path(str(m.__file__)) for m in (argparse, textwrap)]
    try:
        raw = b"".join(path.read_bytes()[:MOST_TEXT] for path in paths)
    except OSError as e:
        raise DataError(f"cannot read {e.filename}: {e.strerror}.", hint="--text FILE") from None
    text = raw.decode(errors="ignore") if len(raw) >= MOST_TEXT else _decoded(raw, paths[0])
    if not text:
        raise DataError(f"{paths[0]} is empty.", hint="--text FILE")
    where = file or "the Python library's argparse and textwrap"
    return where + (f" (its first {MOST_TEXT:,} bytes)" if len(raw) >= MOST_TEXT else ""), text


def _decoded(raw: bytes, path: Path) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not valid UTF-8 at byte {e.start}.", hint="another --text") from None


def _facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a tokenizer says of itself."""
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "pattern": getattr(tokenizer, "pattern", None),
        "special_tokens": dict(tokenizer.special_tokens),
        "fingerprint": tokenizer.fingerprint,
    }


def _made_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Its first and last merges, its longest tokens, and how many entries are of which sort."""
    from regpt.tokenizers.exchange import token_bytes

    ordinary = tokenizer.vocab_size - len(tokenizer.special_tokens)
    tokens = [tokenizer.decode_bytes([i]) for i in range(ordinary)]
    longest = sorted(tokens, key=lambda t: (-len(t), t))[:SHOWN]
    merges = getattr(tokenizer, "merges", ())
    ends = merges if len(merges) <= 2 * SHOWN else [*merges[:SHOWN], *merges[-SHOWN:]]
    pairs = [[_readable(token_bytes(token)) for token in merge] for merge in ends]
    return {
        "merges": len(merges),
        "first_merges": pairs[:SHOWN],
        "last_merges": pairs[SHOWN:],
        "longest": [_readable(t) for t in longest if len(t) > 1],
        "entries": dict(Counter(map(_sort_of, tokens)).most_common()),
    }


def _readable(token: bytes) -> str:
    """Its text; bytes that are none as \\xff."""
    return token.decode(errors="backslashreplace")


def _sort_of(token: bytes) -> str:
    """What an entry is, its leading blank aside."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "parts of characters"
    word = text.removeprefix(" ")
    if not word or word.isspace():
        return "white space"
    if word.isalpha():
        return "words" if text[0] == " " else "parts of words"
    return "numbers" if word.isdigit() else "punctuation and mixed"


def _on_text(tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """How it divides the text; where the text has what it lacks, only why."""
    try:
        ids = tokenizer.encode(text)
        sample = tokenizer.encode(text[:SAMPLE_CHARS])
    except DataError as e:
        return {"tokens": None, "bytes_per_token": None, "sample": [], "refused": e.what}
    return {
        "tokens": len(ids),
        "bytes_per_token": len(text.encode()) / len(ids),
        "sample": [_readable(tokenizer.decode_bytes([i])) for i in sample],
    }


def _in_common(first: Tokenizer, second: Tokenizer) -> dict[str, Any]:
    """How many entries both have, special tokens aside."""
    sets = [
        {t.decode_bytes([i]) for i in range(t.vocab_size - len(t.special_tokens))} for t in (first, second)
    ]
    both = len(sets[0] & sets[1])
    return {"entries": both, "of_first": both / len(sets[0]), "of_second": both / len(sets[1])}


def _described(values: dict[str, Any]) -> list[str]:
    """A tokenizer's facts for a person."""
    split = f", {values['pattern']}'s split" if values["pattern"] else ""
    special = ", ".join(f"{token} {i}" for token, i in values["special_tokens"].items())
    return [
        f"kind         {values['kind']}{split}",
        f"entries      {values['vocab_size']:,}",
        f"special      {special}",
        f"fingerprint  {values['fingerprint'][:12]}",
    ]


def _entries(one: dict[str, Any]) -> list[str]:
    """What a tokenizer is made of, for a person."""

    def listed(texts: Sequence[str]) -> str:
        return "  ".join(t.translate(VISIBLE) for t in texts)

    total = sum(one["entries"].values())
    lines = ["of these     " + ", ".join(f"{n / total:.1%} {sort}" for sort, n in one["entries"].items())]
    if one["merges"]:
        lines += [
            f"merges       {one['merges']:,}; the first: {listed(['+'.join(m) for m in one['first_merges']])}",
            f"             the last:  {listed(['+'.join(m) for m in one['last_merges']])}",
        ]
    return lines + ([f"longest      {listed(one['longest'])}"] if one["longest"] else [])
