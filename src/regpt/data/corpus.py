"""The text that a run asks for, as a tokenizer and its tokens: prepared on first use, found again afterwards.

Token files of other programs (`regpt.data.formats`) are trained on where they lie.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regpt.config import VAL_FRACTION, Config, TokenizerConfig
from regpt.data.formats import recognise
from regpt.data.in_place import in_place, known_in_place
from regpt.data.prepare import passing, prepare, training_texts, unusual_split
from regpt.data.request import Selection
from regpt.data.shards import FIRST_SHARD, MANIFEST, Shards
from regpt.data.sources import Source, open_sources
from regpt.data.split import TokenSet
from regpt.errors import ConfigError, DataError
from regpt.paths import user_path
from regpt.tokenizers import KINDS, SIZES, TRAINED, Tokenizer, check_entries, load_tokenizer, open_tokenizer
from regpt.train.track import Listener

Text = tuple[Source, Source | None, float | None]
"""What `open_sources` gives: training text, validation text of its own, or the share to hold out."""
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
        return verified(in_place(found, config, kept_tokenizer, listen), listen)
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


# --- text -------------------------------------------------------------------------------------------------------------


def text_identity(config: Config) -> dict[str, Any]:
    """What decides the text of a run and its split, without reading all of it: equal identity, equal text."""
    folder = user_path(config.data.source)
    if (folder / MANIFEST).exists():
        return {"shards": Shards.open(folder).manifest.fingerprint}
    if files := recognise(config.data.source):
        return {"tokens": known_in_place(files, config).fingerprint}
    return _known_by(config, open_sources(config.data))


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


def _known_by(config: Config, text: Text) -> dict[str, Any]:
    """The same as runs and the names of folders have it: with the share, though `data.val_source` leaves it without use."""
    d, asked = config.data, _asked(config, text)
    if d.val_source is not None:  # so it always was: runs that are begun go on, and find their folders
        asked["val_fraction"] = VAL_FRACTION if d.val_fraction is None else d.val_fraction
    return asked


def data_folder(config: Config, text: Text) -> Path:
    """data/<source>-<tokenizer>-<fingerprint>, or what data.dir says. Other text or settings: another folder."""
    if config.data.dir is not None:
        return user_path(config.data.dir)
    name = config.tokenizer.name
    asked = _known_by(config, text) | {
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
        return known_in_place(files, config)
    try:
        folder = data_folder(config, open_sources(config.data, network=False))
    except DataError:
        return None  # the text is not on this machine, or not known here; a plan does not need it
    return _prepared(folder, config)[1] if (folder / MANIFEST).exists() else None


def _prepared(folder: Path, config: Config, text: Text | None = None) -> tuple[Tokenizer, Shards]:
    """Shards and tokenizer from a shard directory; refused where the run asks for another tokenizer or text."""
    shards = Shards.open(folder)
    manifest = shards.manifest
    if part := manifest.request.get("slice"):
        raise DataError(
            f"{folder} is only slice {part} of {manifest.source.spec}.",
            hint="regpt merge SLICES… --out DIR, then that folder",
        )
    if text is not None:
        asked = {f.name: None for f in dataclasses.fields(Selection)} | _asked(config, text)
        other = [name for name, value in asked.items() if manifest.request.get(name) != value]
        if other:
            raise DataError(
                f"{folder} was made from {manifest.source.spec} by another request; different: {', '.join(other)}.",
                expected=f"shards of {text[0].spec} as it is now",
                hint="another --data.dir, or none",
            )
    tokenizer = shards.load_tokenizer()
    has, asks = manifest.tokenizer, config.tokenizer.name
    wanted = asks if asks in KINDS else open_tokenizer(asks).fingerprint
    if wanted != (has.kind if asks in KINDS else has.fingerprint):
        raise DataError(
            f"{folder} was written with tokenizer {has.kind} ({has.fingerprint[:8]}), this run asks for {asks}.",
            hint=f"--tokenizer.name {has.kind}, or other shards: regpt prepare … --tokenizer {asks}",
        )
    return tokenizer, shards
