"""Token files of other programs as a run's text, where they lie: with which tokenizer, and what of them is validation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from regpt.config import VAL_FRACTION, Config, TokenizerConfig
from regpt.data.foreign import ForeignSet, byte_lengths_of, check_ids, open_foreign
from regpt.data.formats import Found, recognise
from regpt.data.formats.base import Eot
from regpt.data.shards import MANIFEST, TOKENIZER, Shards, TokenizerFacts
from regpt.data.split import Ids, TokenSet, mapped
from regpt.errors import ConfigError, DataError
from regpt.paths import user_path
from regpt.tokenizers import KINDS, SIZES, TRAINED, Tokenizer, load_tokenizer, open_tokenizer
from regpt.train.track import Listener

CHECKED_CHARACTERS = 1 << 16  # of a text beside nanoGPT's files


def in_place(
    found: Found, config: Config, kept: Path | None, listen: Listener
) -> tuple[Tokenizer, ForeignSet]:
    """Token files where they lie, with the tokenizer that the run names: most formats do not say which one it was.

    Args:
        kept: a run's own tokenizer folder, used if it exists.
        listen: hears what is trained on.
    """
    tokenizer = tokenizer_of_files(found, config.tokenizer, kept)
    for name in ("train", "val"):
        files = found.of_split(name)
        if files and not any(found.format.open_file(f, tokenizer.vocab_size).ids.tokens for f in files):
            raise DataError(  # a split that would be left out, or cut off the other one, in silence
                f"{files[0]} holds no tokens.",
                hint="write it again, or move it out of the folder to go without",
            )
    made = _opened(found, config, TokenizerFacts.of(tokenizer), partial(byte_lengths_of, tokenizer))
    if "val" in made.splits and made.split("val").n_tokens < 2:
        raise DataError(f"{made.held_out}: one token is too little to validate on.")
    tokens = ", ".join(f"{made.split(name).n_tokens:,} {name}" for name in made.splits)
    text = f"training on {made.format} files in {found.folder} as they are: {tokens} tokens; validation: {made.held_out}"
    listen("info", 0, {"text": text})
    if made.left_out:
        listen("note", 0, {"text": f"left out, as their names say test: {', '.join(made.left_out)}"})
    return tokenizer, made


def known_in_place(found: Found, config: Config) -> ForeignSet:
    """The same without a download: of GPT-2's tokenizer the size is enough."""
    return _opened(found, config, *_facts_at_once(found, config))


def _facts_at_once(found: Found, config: Config) -> tuple[TokenizerFacts, Callable[[], Ids]]:
    """What is known of the tokenizer of token files without a download: of GPT-2's the same wherever its files lie."""
    name = config.tokenizer.name
    if name == "gpt2":
        size = SIZES[name]
        return TokenizerFacts(name, "", size, size - 1), lambda: np.zeros(size, np.int64)
    tokenizer = tokenizer_of_files(found, config.tokenizer)
    return TokenizerFacts.of(tokenizer), partial(byte_lengths_of, tokenizer)


def _opened(
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
        return shards, shards.load_tokenizer()
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
    return open_foreign(found, TokenizerFacts.of(opened), sizes, asked=tokenizer, eot=eot), opened


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
    check_ids(first, 0, TokenizerFacts.of(tokenizer))
    n = min(first.tokens, len(content), CHECKED_CHARACTERS)
    if tokenizer.encode(content[:n]) != mapped(first)[:n].tolist():
        raise DataError(
            f"{text} is not the text that {first.path} was made from: their beginnings differ.",
            hint="--tokenizer.name with a folder that holds the right tokenizer",
        )
    return tokenizer
