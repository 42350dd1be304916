"""The text that a run asks for, as a tokenizer and its tokens: prepared on first use, found again afterwards.

Token files of other programs (`regpt.data.formats`) are trained on where they lie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from regpt.config import VAL_FRACTION, Config, TokenizerConfig
from regpt.data.foreign import ForeignSet, byte_lengths_of, check_ids, facts_of, open_foreign
from regpt.data.formats import Found, recognise
from regpt.data.formats.base import Eot
from regpt.data.prepare import passing, prepare, training_texts, unusual_split
from regpt.data.request import Selection
from regpt.data.shards import FIRST_SHARD, MANIFEST, TOKENIZER, Shards, TokenizerFacts
from regpt.data.sources import Source, open_sources
from regpt.data.split import Ids, TokenSet, mapped
from regpt.errors import ConfigError, DataError
from regpt.paths import user_path
from regpt.tokenizers import KINDS, SIZES, Tokenizer, check_entries, load_tokenizer, open_tokenizer

Listener = Callable[[str, int, dict[str, Any]], None]
"""Hears (event, step, values) of a run: info, note, progress, plan, resume, step, eval, sample, save."""
Text = tuple[Source, Source | None, float | None]
"""What `open_sources` gives: training text, validation text of its own, or the share to hold out."""
TRAINED = ("chars", "bpe")
"""Tokenizers that are made from the text itself."""
CHECKED_CHARACTERS = 1 << 16  # of a text beside nanoGPT's files
GUESSED_CHARACTERS = 96  # printable ASCII and the line end: what a plan assumes before the text was seen


def corpus(
    config: Config,
    listen: Listener = lambda *_: None,
    *,
    kept_tokenizer: Path | None = None,
    verify: bool = True,
) -> tuple[Tokenizer, TokenSet]:
    """The tokenizer and tokens of `config`, prepared now if they are not there yet.

    Args:
        listen: hears ("info", 0, {"text"}) and ("progress", 0, {"description", "done", "total", "unit"}).
        kept_tokenizer: a run's own tokenizer folder; used, if it exists, instead of training one again.
        verify: compare shards that are there already with their checksums, if `data.verify` wants it.

    Raises:
        DataError: the source, the tokenizer or the shards are missing, damaged, or do not belong together.
    """
    if not config.data.source:
        raise ConfigError(
            "data.source is not set.", hint="--data.source FILE, a folder, a glob, or a named set"
        )
    folder = user_path(config.data.source)
    verified = _verified if verify and config.data.verify else lambda pair, _: pair
    if (folder / MANIFEST).exists():
        return verified(_prepared(folder, config), listen)
    if (folder / FIRST_SHARD).exists():
        raise DataError(
            f"{folder / MANIFEST} is missing.", hint="prepare the shards again, or copy the whole folder"
        )
    if found := recognise(config.data.source):
        return verified(_in_place(found, config, kept_tokenizer, listen), listen)
    text = open_sources(config.data, note=lambda said: listen("info", 0, {"text": said}))
    folder = data_folder(config, text)
    if (folder / MANIFEST).exists():
        return verified(_prepared(folder, config, text), listen)
    source, val_source, val_fraction = text
    if not config.data.keep_downloads:
        source, val_source = passing(folder, source, val_source)
    tokenizer = tokenizer_for(
        config.tokenizer,
        source,
        val_source,
        val_fraction or 0,
        listen,
        min_chars=config.data.min_chars,
        kept=kept_tokenizer,
    )
    listen("info", 0, {"text": f"preparing {source.name} into {folder}"})

    def progress(done: int, total: int) -> None:
        values = {"description": "tokenising", "done": done, "total": total, "unit": "bytes"}
        listen("progress", 0, values)

    manifest = prepare(
        source,
        tokenizer,
        folder,
        val_fraction=val_fraction or 0,
        val_source=val_source,
        selection=selection(config),
        workers=config.data.workers,
        progress=progress,
    )
    if unusual := unusual_split(manifest, val_fraction or 0):
        listen("note", 0, {"text": unusual})
    return _prepared(folder, config)


def _verified(found: tuple[Tokenizer, TokenSet], listen: Listener) -> tuple[Tokenizer, TokenSet]:
    """The same, every byte compared with its checksum, or every id with the vocabulary: what is wrong would be learned."""
    done, total = 0, found[1].stored_bytes
    for read in found[1].verified():
        done += read
        listen("progress", 0, {"description": "verifying", "done": done, "total": total, "unit": "bytes"})
    return found


# --- token files of other programs ------------------------------------------------------------------------------------


def _in_place(
    found: Found, config: Config, kept: Path | None, listen: Listener
) -> tuple[Tokenizer, ForeignSet]:
    """Token files where they lie, with the tokenizer that the run names: most formats do not say which one it was."""
    tokenizer = tokenizer_of_files(found, config.tokenizer, kept)
    made = _foreign(found, config, facts_of(tokenizer), partial(byte_lengths_of, tokenizer))
    if "val" in made.splits and made.split("val").n_tokens < 2:
        raise DataError(f"{made.held_out}: one token is too little to validate on.")
    tokens = ", ".join(f"{made.split(name).n_tokens:,} {name}" for name in made.splits)
    text = f"training on {made.format} files in {found.folder} as they are: {tokens} tokens; validation: {made.held_out}"
    listen("info", 0, {"text": text})
    if made.left_out:
        listen("note", 0, {"text": f"left out, as their names say test: {', '.join(made.left_out)}"})
    return tokenizer, made


def _foreign(
    found: Found, config: Config, tokenizer: TokenizerFacts, byte_lengths: Callable[[], Ids]
) -> ForeignSet:
    d, val = config.data, None
    if d.val_source is not None:
        val = recognise(d.val_source)
        if val is None:
            raise ConfigError(
                f"data.source holds tokens, data.val_source={d.val_source} does not.",
                hint="a file or folder of tokens for both, or text for both",
            )
    fraction = VAL_FRACTION if d.val_fraction is None else d.val_fraction
    return open_foreign(
        found, tokenizer, byte_lengths, val=val, val_fraction=fraction, asked=config.tokenizer.name
    )


def open_tokens(
    source: str, tokenizer: str | None = None, files: str | None = None, *, eot: Eot | None = None
) -> tuple[TokenSet, Tokenizer]:
    """The tokens at `source`, our own shards or another program's files, with nothing split off; and their tokenizer.

    Args:
        tokenizer: its name; None: the one that lies beside the tokens, else gpt2.
        files: GPT-2's own, for use offline.
        eot: where `<|endoftext|>` stands, if not where the source's program has it.

    Raises:
        DataError: there are no tokens at `source`.
    """
    folder = user_path(source)
    if (folder / MANIFEST).exists():
        shards = Shards.open(folder)
        return shards, _tokenizer_of_shards(shards)
    found = recognise(source)
    if found is None:
        raise DataError(
            f"{source} holds no token files.",
            expected=".bin of nanoGPT or llm.c, .bin with .idx, .ds, .npy, or shards of regpt's",
            hint=f"regpt prepare {source} --out DIR, if it is text",
        )
    beside = found.folder / TOKENIZER
    if tokenizer is None and beside.is_dir():
        opened = load_tokenizer(beside)
    else:
        tokenizer = tokenizer or TokenizerConfig.name
        opened = tokenizer_of_files(found, TokenizerConfig(name=tokenizer, files=files))
    sizes = partial(byte_lengths_of, opened)
    return open_foreign(found, facts_of(opened), sizes, asked=tokenizer, eot=eot), opened


def tokenizer_of_files(found: Found, asked: TokenizerConfig, kept: Path | None = None) -> Tokenizer:
    """The tokenizer that `asked` names for token files: the one beside them, where `convert` left one; chars also from
    nanoGPT's input.txt.

    Raises:
        ConfigError: there is nothing that a chars or bpe tokenizer could be made from.
        DataError: the input.txt beside the files is not the text that they were made from.
    """
    beside = next((f for f in (found.folder / TOKENIZER, kept) if f is not None and f.is_dir()), None)
    if beside is not None:
        tokenizer = load_tokenizer(beside)
        wanted = asked.name if asked.name in KINDS else open_tokenizer(asked.name).fingerprint
        if wanted != (tokenizer.kind if asked.name in KINDS else tokenizer.fingerprint):
            raise DataError(
                f"{beside} is the {tokenizer.kind} tokenizer of these tokens, this run asks for {asked.name}.",
                hint=f"--tokenizer.name {beside}",
            )
        return tokenizer
    if asked.name not in TRAINED:
        return open_tokenizer(asked.name, files=asked.files)
    text = found.folder / "input.txt"
    if asked.name == "chars" and text.is_file():
        return _chars_of(text, found)
    has_pickle = " (nanoGPT's meta.pkl is never read: a pickle can run any program)"
    raise ConfigError(
        f"{found.path} holds tokens, and nothing there says which {asked.name} tokenizer wrote them"
        f"{has_pickle if (found.folder / 'meta.pkl').exists() else ''}.",
        hint="put the text that they were made from beside them as input.txt, with --tokenizer.name chars"
        if asked.name == "chars"
        else "--tokenizer.name gpt2, or a folder with the tokenizer",
    )


def _chars_of(text: Path, found: Found) -> Tokenizer:
    """nanoGPT's characters: the sorted distinct ones of input.txt; its beginning must give the tokens' beginning."""
    from regpt.tokenizers.chars import train_chars

    content = text.read_text(encoding="utf-8")  # line ends as Python reads them, like nanoGPT
    tokenizer = train_chars([content])
    first = found.format.open_file(found.of_split("train")[0], tokenizer.vocab_size).ids
    check_ids(first, 0, facts_of(tokenizer))
    n = min(first.tokens, len(content), CHECKED_CHARACTERS)
    if tokenizer.encode(content[:n]) != mapped(first)[:n].tolist():
        raise DataError(
            f"{text} is not the text that {first.path} was made from: their beginnings differ.",
            hint="--tokenizer.name with a folder that holds the right tokenizer",
        )
    return tokenizer


# --- text -------------------------------------------------------------------------------------------------------------


def text_identity(config: Config) -> dict[str, Any]:
    """What decides the text of a run and its split, without reading all of it: equal identity, equal text."""
    folder = user_path(config.data.source)
    if (folder / MANIFEST).exists():
        return {"shards": Shards.open(folder).manifest.fingerprint}
    if recognise(config.data.source) is not None:
        found = _found(config)
        assert found is not None
        return {"tokens": found.fingerprint}
    return _asked(config, open_sources(config.data))


def selection(config: Config) -> Selection:
    """Which documents a run takes."""
    d = config.data
    return Selection(dedup=d.dedup, min_chars=d.min_chars, shuffle_seed=d.shuffle_seed)


def _asked(config: Config, text: Text) -> dict[str, Any]:
    """The text and its split, as manifests keep them."""
    source, val_source, val_fraction = text
    return {
        "source": source.fingerprint,
        "val_source": val_source.fingerprint if val_source else None,
        "val_fraction": val_fraction,
    } | selection(config).asked()


def data_folder(config: Config, text: Text) -> Path:
    """data/<source>-<tokenizer>-<fingerprint>, or what data.dir says. Other text or settings: another folder."""
    if config.data.dir is not None:
        return user_path(config.data.dir)
    name = config.tokenizer.name
    asked = _asked(config, text) | {
        "tokenizer": name if name in KINDS else open_tokenizer(name).fingerprint,
        "vocab_size": config.tokenizer.vocab_size if name == "bpe" else None,
    }
    if name == "bpe":  # said only where it is not as it always was, so that old folders keep their names
        usual = TokenizerConfig()
        for setting in ("pattern", "min_frequency"):
            value = getattr(config.tokenizer, setting)
            asked |= {setting: value} if value != getattr(usual, setting) else {}
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    return Path("data") / f"{text[0].name}-{Path(name).name}-{key}"


@dataclass(frozen=True)
class TrainingText:
    """The text that a tokenizer learns from, each time that it is iterated over."""

    sources: Sequence[Source]
    val_fraction: float = 0
    min_chars: int = 0

    def __iter__(self) -> Iterator[str]:
        for source in self.sources:
            yield from training_texts(source, self.val_fraction, self.min_chars)


def tokenizer_for(
    asked: TokenizerConfig,
    source: Source,
    val_source: Source | None,
    val_fraction: float,
    listen: Listener,
    *,
    min_chars: int = 0,
    kept: Path | None = None,
) -> Tokenizer:
    """The tokenizer that `asked` names. bpe is trained on the training part of the text; chars holds every character
    of all of it, as in nanoGPT, since it could not write one that only validation has."""
    if asked.name not in TRAINED:
        return open_tokenizer(asked.name, files=asked.files)
    if kept is not None and kept.exists():
        return load_tokenizer(kept)
    from regpt.tokenizers.bpe import train_bpe
    from regpt.tokenizers.chars import train_chars

    if asked.name == "chars":
        return train_chars(
            itertools.chain.from_iterable(training_texts(s, 0, min_chars) for s in (source, val_source) if s)
        )
    texts = TrainingText([source], 0 if val_source else val_fraction, min_chars)
    listen("info", 0, {"text": f"training a tokenizer of {asked.vocab_size:,} entries on {source.name}"})

    def progress(chars: int) -> None:
        values = {"description": "reading", "done": chars, "total": source.source_bytes, "unit": "characters"}
        listen("progress", 0, values)

    return train_bpe(
        texts,
        asked.vocab_size,
        pattern=asked.pattern,
        min_frequency=asked.min_frequency,
        progress=progress,
    )


def known_corpus(config: Config) -> tuple[int, bool, TokenSet | None]:
    """The vocabulary size, whether it is sure, and the tokens where they are there already.

    Touches and downloads nothing. What the text has to say (how many characters) is guessed until it is prepared.
    """
    sizes = SIZES | {"bpe": config.tokenizer.vocab_size, "chars": GUESSED_CHARACTERS + 1}
    name = config.tokenizer.name
    if name == "bpe":
        check_entries(config.tokenizer.vocab_size)
    shards = _found(config)
    if shards is not None:
        return shards.tokenizer.vocab_size, True, shards
    if name in sizes:
        return sizes[name], name != "chars", None
    return open_tokenizer(name, files=config.tokenizer.files).vocab_size, True, None


def _found(config: Config) -> TokenSet | None:
    """The tokens of `config` if they lie here."""
    folder = user_path(config.data.source)
    if not config.data.source:
        return None
    if (folder / MANIFEST).exists():
        return _prepared(folder, config)[1]
    if files := recognise(config.data.source):
        return _foreign(files, config, *_facts_at_once(files, config))
    try:
        folder = data_folder(config, open_sources(config.data, network=False))
    except DataError:
        return None  # the text is not on this machine, or not known here; a plan does not need it
    return _prepared(folder, config)[1] if (folder / MANIFEST).exists() else None


def _facts_at_once(found: Found, config: Config) -> tuple[TokenizerFacts, Callable[[], Ids]]:
    """What is known of the tokenizer of token files without a download."""
    name = config.tokenizer.name
    if name == "gpt2" and config.tokenizer.files is None:
        size = SIZES[name]
        return TokenizerFacts(name, "", size, size - 1), lambda: np.zeros(size, np.int64)
    tokenizer = tokenizer_of_files(found, config.tokenizer)
    return facts_of(tokenizer), partial(byte_lengths_of, tokenizer)


def _prepared(folder: Path, config: Config, text: Text | None = None) -> tuple[Tokenizer, Shards]:
    """Shards and tokenizer from a shard directory; refused where the run asks for another tokenizer or text."""
    shards = Shards.open(folder)
    manifest = shards.manifest
    if text is not None:
        asked = {f.name: None for f in dataclasses.fields(Selection)} | _asked(config, text)
        other = [name for name, value in asked.items() if manifest.request.get(name) != value]
        if other:
            raise DataError(
                f"{folder} was made from {manifest.source.spec} by another request; different: {', '.join(other)}.",
                expected=f"shards of {text[0].spec} as it is now",
                hint="another --data.dir, or none",
            )
    tokenizer = _tokenizer_of_shards(shards)
    has, asks = manifest.tokenizer, config.tokenizer.name
    wanted = asks if asks in KINDS else open_tokenizer(asks).fingerprint
    if wanted != (has.kind if asks in KINDS else has.fingerprint):
        raise DataError(
            f"{folder} was written with tokenizer {has.kind} ({has.fingerprint[:8]}), this run asks for {asks}.",
            hint=f"--tokenizer.name {has.kind}, or other shards: regpt prepare … --tokenizer {asks}",
        )
    return tokenizer, shards


def _tokenizer_of_shards(shards: Shards) -> Tokenizer:
    """The tokenizer that lies in a shard directory, once it is sure that it wrote the shards."""
    tokenizer, has = load_tokenizer(shards.path / TOKENIZER), shards.tokenizer
    if tokenizer.fingerprint != has.fingerprint:
        raise DataError(
            f"{shards.path / TOKENIZER} is not the tokenizer that these shards were written with.",
            got=tokenizer.fingerprint,
            expected=has.fingerprint,
            hint="prepare the shards again, or copy the whole folder",
        )
    return tokenizer
