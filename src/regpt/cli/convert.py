"""Turn token files of one program into another's: nanoGPT, llm.c, Megatron, datatrove, build-nanogpt, and our own shards."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from regpt.cli.parse import CommonArgs, Output, parse
from regpt.config import TokenizerConfig
from regpt.errors import ConfigError
from regpt.paths import user_path

if TYPE_CHECKING:
    from regpt.data.formats.base import Eot
    from regpt.data.split import TokenSet
    from regpt.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt convert SOURCE --to FORMAT --out DIR`."""

    source: tyro.conf.Positional[str]
    """A file, folder or glob of token files, or a folder that `regpt prepare` wrote."""
    to: Literal["nanogpt", "llmc", "megatron", "datatrove", "regpt"]
    """The format to write; regpt: our own shards, with checksums and an index of documents."""
    out: str
    """A new folder."""
    eot: Literal["auto", "append", "prepend", "none"] = "auto"
    """Where <|endoftext|> goes. auto: as the program of --to has it (llm.c before every document, the others behind)."""
    source_eot: Literal["auto", "append", "prepend", "none"] = "auto"
    """Where it stands in SOURCE. auto: as an index shows, or as the source's program has it."""
    tokenizer: Annotated[str | None, tyro.conf.arg(aliases=["--tokenizer.name"])] = None
    """Which wrote the ids: gpt2, bytes, chars, or a folder with a saved one. None: the one beside them, else gpt2."""
    tokenizer_files: Annotated[str | None, tyro.conf.arg(aliases=["--tokenizer.files"])] = (
        TokenizerConfig.files
    )
    """Folder with GPT-2's encoder.json and vocab.bpe, for use offline."""
    eot_id: int | None = None
    """With --vocab-size, for ids of a tokenizer that regpt does not have: the id of its end of text."""
    vocab_size: int | None = None
    """With --eot-id: how many ids that tokenizer has."""


def main(argv: list[str]) -> int:
    """`regpt convert`."""
    args = parse(Args, argv, prog="regpt convert", description=__doc__ or "")
    from regpt.data.convert import check_request, convert
    from regpt.data.foreign import ForeignSet

    out = Output(args)
    tokens, tokenizer = _opened(args)
    if isinstance(tokens, ForeignSet) and tokens.left_out:
        out.warn(f"left out, as their names say test: {', '.join(tokens.left_out)}")
    check_request(args.to, user_path(args.out), tokenizer, _known(args.eot))
    with out.progress("checking", tokens.stored_bytes, "bytes") as bar:
        done = 0
        for read in tokens.verified():
            bar.update(done := done + read)
    total = sum(tokens.split(name).n_tokens for name in tokens.splits)
    with out.progress("converting", total, "tokens") as bar:
        made = convert(
            tokens,
            args.to,
            user_path(args.out),
            tokenizer=tokenizer,
            eot=_known(args.eot),
            source_eot=_known(args.source_eot),
            progress=lambda done, _: bar.update(done),
        )
    if args.to in ("nanogpt", "llmc") and made.eot == "none":
        out.warn(f"without <|endoftext|> nothing in {args.to} files says where documents end.")
    lines = [
        f"{name:<10} {n:,} tokens in {made.documents[name]:,} documents" for name, n in made.tokens.items()
    ]
    lines.append(f"eot        {made.source_eot} in {args.source}, {made.eot} in {args.out}")
    lines.append(f"next:      regpt inspect {args.out}")
    out.result({"out": args.out, "format": args.to} | dataclasses.asdict(made), "\n".join(lines))
    return 0


def _known(eot: Literal["auto", "append", "prepend", "none"]) -> Eot | None:
    return None if eot == "auto" else eot


def _opened(args: Args) -> tuple[TokenSet, Tokenizer | None]:
    """The tokens of SOURCE and their tokenizer; None for one that regpt does not have.

    Raises:
        DataError: there are no tokens at SOURCE.
    """
    import numpy as np

    from regpt.data.foreign import open_foreign
    from regpt.data.formats import recognise
    from regpt.data.in_place import open_tokens
    from regpt.data.shards import TokenizerFacts

    if args.eot_id is None and args.vocab_size is None:
        return open_tokens(args.source, args.tokenizer, args.tokenizer_files, eot=_known(args.source_eot))
    eot_id, size, found = args.eot_id, args.vocab_size, recognise(args.source)
    if eot_id is None or size is None or not 0 <= eot_id < size <= 1 << 31 or found is None:
        raise ConfigError(
            "--eot-id and --vocab-size go together, with token files of another program.",
            got=f"{eot_id}, {size}",
            expected="0 <= eot id < vocabulary size",
        )
    facts = TokenizerFacts("unknown", f"{eot_id} of {size}", size, eot_id)
    return open_foreign(found, facts, lambda: np.zeros(size, np.int64), eot=_known(args.source_eot)), None
