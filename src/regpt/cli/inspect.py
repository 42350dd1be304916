"""What a shard directory, token files, a run or a checkpoint hold, and whether every byte is as it was written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from regpt.cli.parse import CommonArgs, Output, parse
from regpt.errors import CheckpointError, DataError
from regpt.paths import user_path
from regpt.train.batches import Batches

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from regpt.config import Config
    from regpt.data.shards import Shards
    from regpt.data.split import TokenSplit
    from regpt.tokenizers import Tokenizer

SAMPLE_CHARS = 400


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt inspect PATH`."""

    path: tyro.conf.Positional[str]
    """A shard directory, token files of another program, a run directory, or one of its checkpoints."""
    documents: int = 2
    """Of shards: how many documents to show, from the first on."""
    split: Literal["train", "val"] = "train"
    """Of shards: which documents to show."""
    verify: bool = True
    """Whether to read every file whole and compare it with its checksum, or to look at sizes only."""
    tokenizer: str | None = None
    """Of token files: which tokenizer wrote them. None: the one that lies beside them, else gpt2."""
    tokenizer_files: str | None = None
    """Folder with GPT-2's encoder.json and vocab.bpe, for use offline."""


def main(argv: list[str]) -> int:
    """`regpt inspect`."""
    args = parse(Args, argv, prog="regpt inspect", description=__doc__ or "")
    from regpt.data.formats import recognise

    path = user_path(args.path)
    if not path.exists() and recognise(args.path) is None:
        raise DataError(f"there is nothing at {path}.")
    if (path / "run.json").exists():
        return 0 if inspect_run(path, args) else 2
    elif (path / "state.json").exists() or path.name.startswith("step-"):
        inspect_checkpoint(path, args)
    elif not (path / "manifest.json").exists() and recognise(args.path):
        inspect_tokens(args)
    elif (path / "manifest.json").exists() or not path.is_dir():
        inspect_shards(path, args)
    else:
        raise DataError(
            f"{path} is neither a shard directory, a run nor a checkpoint.",
            expected="a folder with manifest.json, run.json or state.json, or with token files",
        )
    return 0


LOSSES = ("val_loss", "val_bits_per_byte")


def _described(path: Path, record: dict[str, Any], config: Config) -> list[str]:
    """What was trained on what, from a run's record."""
    m = config.model
    about = f"{config.train.minutes:g} minutes, about " if config.train.minutes is not None else ""
    try:
        plan = record["plan"]
        ramp = Batches(config.train.batch_tokens // config.model.block_size, config.train.batch_ramp_steps)
        return [
            f"run        {path}: begun {record['sittings'][0]}, {len(record['sittings'])} sitting(s)",
            f"model      {m.arch} {m.n_layer} layers x {m.n_embd}, {m.n_head} heads, context {m.block_size}: "
            f"{plan['parameters']:,} parameters",
            f"data       {config.data.source}, tokenizer {config.tokenizer.name} of {plan['vocab_size']:,}",
            f"training   {about}{plan['steps']:,} steps of {config.train.batch_tokens:,} tokens{ramp}, {plan['dtype']} on "
            f"{record['machine']['name']}",
        ]
    except (KeyError, IndexError, TypeError) as e:
        raise CheckpointError(f"{path / 'run.json'} is not a whole record of a run: {e}.") from None


def inspect_run(path: Path, args: Args) -> bool:
    """A run: what it trained, how far it came, and its checkpoints, verified. False where one is damaged or gone.

    Raises:
        CheckpointError: run.json cannot be read.
    """
    from regpt.config import Config, build
    from regpt.train.checkpoint import checkpoint_name, list_checkpoints, read_checkpoint
    from regpt.train.load import evaluated_loss
    from regpt.train.run import RunDirectory

    out, run = Output(args), RunDirectory(path)
    record, config = run.read(), build(Config, run.config, where=str(run.record))
    checkpoints = []
    for folder in list_checkpoints(run.checkpoints):
        try:
            found = read_checkpoint(folder, verify=args.verify)
            checkpoints.append({"path": folder.name, "valid": True, "val_loss": evaluated_loss(found)})
        except CheckpointError as e:
            checkpoints.append({"path": folder.name, "valid": False, "fault": e.what})
    evals = [e for e in run.lines.entries() if e.get("event") == "eval" and {*LOSSES} <= e.keys()]
    lines = _described(path, record, config)
    for last in evals[-5:]:
        loss = "not finite"
        if last["val_loss"] is not None and last["val_bits_per_byte"] is not None:
            loss = f"{last['val_loss']:.4f} ({last['val_bits_per_byte']:.4f} bits per byte)"
        lines.append(f"validation step {last['step']:>6}: {loss}")
    for c in checkpoints:
        state = ("whole" if args.verify else "not checked") if c["valid"] else f"DAMAGED: {c['fault']}"
        lines.append(f"checkpoint {c['path']}: {state}")
    saved = run.last_saved_step()
    gone = saved is not None and all(c["path"] != checkpoint_name(saved) for c in checkpoints)
    if gone:
        lines.append(f"checkpoint of step {saved}, the last one saved, is GONE")
    values: dict[str, object] = {
        "kind": "run",
        "path": str(path),
        "run": record,
        "evals": evals,
        "checkpoints": checkpoints,
    }
    values["missing_step"] = saved if gone else None
    out.result(values, "\n".join(lines))
    return not gone and all(c["valid"] for c in checkpoints)


def inspect_checkpoint(path: Path, args: Args) -> None:
    """One checkpoint: its files verified, its state, its tensors.

    Raises:
        CheckpointError: naming the file that is missing or has changed.
    """
    from regpt.train.checkpoint import read_checkpoint

    found = read_checkpoint(path, verify=args.verify)
    tensors = {
        name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in found.model_tensors().items()
    }
    plain = {k: v for k, v in found.state.items() if not isinstance(v, dict)}
    lines = [
        f"checkpoint {path}: step {found.step}, {'every byte as written' if args.verify else 'not checked'}"
    ]
    lines += [f"  {name:<24} {value}" for name, value in plain.items()]
    lines += [f"tensors    {len(tensors)}"]
    lines += [
        f"  {name:<32} {kind} {' x '.join(map(str, shape))}" for name, (kind, *shape) in tensors.items()
    ]
    values = {
        "kind": "checkpoint",
        "path": str(path),
        "step": found.step,
        "state": found.state,
        "tensors": tensors,
    }
    Output(args).result(values, "\n".join(lines))


def inspect_shards(path: Path, args: Args) -> None:
    """Everything about a shard folder.

    Raises:
        DataError: naming the file that is missing or has changed.
    """
    from regpt.data.shards import Shards

    out, shards = Output(args), Shards.open(path)
    facts, split = shards.manifest, shards.split(args.split)
    if args.verify:
        total = sum(f.bytes for f in facts.files)
        with out.progress("verifying", total, "bytes") as bar:
            done = 0
            for file in shards.verify():
                bar.update(done := done + file.bytes)
    tokenizer = shards.load_tokenizer()
    samples = first_documents(split, tokenizer, args.documents)
    lengths = count_lengths(split.document_ends)
    lines = describe_shards(shards)
    lines += [f"lengths    {args.split}: " + ", ".join(f"{n:,} under {k:,}" for k, n in lengths.items() if n)]
    lines += [f"checked    {'every byte is as it was written' if args.verify else 'sizes only'}"]
    lines += shown(samples, args.split)
    values: dict[str, Any] = {
        "kind": "shards",
        "path": str(path),
        "verified": args.verify,
        "manifest": dataclasses.asdict(facts),
        "lengths": lengths,
        "samples": samples,
    }
    out.result(values, "\n".join(lines))


def inspect_tokens(args: Args) -> None:
    """Everything about token files of another program.

    Raises:
        DataError: naming the file and the byte where something is wrong.
    """
    from regpt.data.foreign import ForeignSet
    from regpt.data.in_place import open_tokens

    out = Output(args)
    tokens, tokenizer = open_tokens(args.path, args.tokenizer, args.tokenizer_files)
    assert isinstance(tokens, ForeignSet)
    if args.verify:
        with out.progress("verifying", tokens.stored_bytes, "bytes") as bar:
            done = 0
            for read in tokens.verified():
                bar.update(done := done + read)
    lines = [
        f"tokens     {tokens.path}: {tokens.format} files",
        f"tokenizer  {tokenizer.kind}, {tokenizer.vocab_size:,} ids; <|endoftext|> has id {tokenizer.eot_id:,}",
    ]
    splits, shown_split = {}, tokens.split(args.split)
    for name, files in tokens.files.items():
        split = shown_split if name == args.split else tokens.split(name)
        splits[name] = {"tokens": split.n_tokens, "documents": split.n_documents, "files": len(files)}
        lines.append(
            f"{name:<10} {split.n_tokens:,} tokens in {split.n_documents:,} documents, {len(files)} files of "
            f"{files[0].ids.dtype.name}"
        )
    where = "by their index" if tokens.has_index else f"where <|endoftext|> says so ({tokens.eot})"
    checked = "every id lies in the vocabulary" if args.verify else "headers, indices and some ids"
    samples = first_documents(shown_split, tokenizer, args.documents)
    lengths = count_lengths(shown_split.document_ends)
    lines += [f"left out   {', '.join(tokens.left_out)}: test"] if tokens.left_out else []
    lines += [f"documents  end {where}"]
    lines += [f"lengths    {args.split}: " + ", ".join(f"{n:,} under {k:,}" for k, n in lengths.items() if n)]
    lines += [f"checked    {checked}", *shown(samples, args.split)]
    values = {
        "kind": "tokens",
        "path": str(tokens.path),
        "format": tokens.format,
        "verified": args.verify,
        "splits": splits,
        "left_out": tokens.left_out,
        "lengths": lengths,
        "samples": samples,
    }
    out.result(values, "\n".join(lines))


def first_documents(split: TokenSplit, tokenizer: Tokenizer, n: int) -> list[dict[str, Any]]:
    """The beginnings of the first `n` documents, without `<|endoftext|>` at their ends."""
    samples = []
    ends = split.document_ends[: max(n, 0)].tolist()
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        ids = split.read(start, min(end - start, SAMPLE_CHARS)).tolist()
        while ids and ids[-1] == tokenizer.eot_id:
            ids.pop()
        text = tokenizer.decode(ids[ids[:1] == [tokenizer.eot_id] :])[:SAMPLE_CHARS]
        samples.append({"document": number, "tokens": end - start, "text": text})
    return samples


def shown(samples: list[dict[str, Any]], split: str) -> list[str]:
    """Those documents for a person."""
    lines = []
    for s in samples:
        lines += [f"--- {split} document {s['document']}, {s['tokens']:,} tokens", str(s["text"])]
    return lines


def describe_shards(shards: Shards) -> list[str]:
    """The manifest in a few lines for a person."""
    m = shards.manifest
    lines = [
        f"shards     {shards.path}: {m.source.name}, from {m.source.spec}",
        f"tokenizer  {m.tokenizer.kind}, {m.tokenizer.vocab_size:,} ids, fingerprint {m.tokenizer.fingerprint[:12]}; "
        f"ids as {m.dtype}, up to {m.max_id:,}; <|endoftext|> {m.eot} to every document",
    ]
    if part := m.request.get("slice"):
        lines.append(f"slice      {part} of its source: regpt merge joins all of them")
    for name, s in m.splits.items():
        lines.append(
            f"{name:<10} {s.tokens:,} tokens in {s.documents:,} documents, {s.source_bytes:,} bytes of text "
            f"({s.source_bytes / max(s.tokens, 1):.2f} a token), the longest {s.longest:,} tokens"
        )
    if m.duplicates:
        kept = "left out" if m.request.get("dedup") else "kept"
        lines.append(f"duplicates {m.duplicates:,} documents whose text is that of an earlier one, {kept}")
    if m.skipped:
        lines.append("skipped    " + ", ".join(f"{n:,} {reason}" for reason, n in m.skipped.items()))
    lines.append(f"files      {len(m.files)}, {sum(f.bytes for f in m.files):,} bytes")
    return lines


def count_lengths(document_ends: NDArray[np.int64]) -> dict[int, int]:
    """Number of documents by length: {10: how many have under 10 tokens, 100: how many of the others under 100, …}."""
    import numpy as np

    bounds = 10 ** np.arange(1, 19)
    counts = np.bincount(np.searchsorted(bounds, np.diff(document_ends, prepend=0), side="right"))
    return {10 ** (i + 1): n for i, n in enumerate(counts.tolist()) if n}
