"""Join the slices that `regpt prepare --slice i/n` made into the shards that one machine would have made."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from regpt.cli.parse import CommonArgs, Output, parse


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt merge SLICES... --out DIR`."""

    slices: tyro.conf.Positional[tuple[str, ...]]
    """The folders of all slices, in any order."""
    out: str
    """The folder for the shards."""


def main(argv: list[str]) -> int:
    """`regpt merge`."""
    args = parse(Args, argv, prog="regpt merge", description=__doc__ or "")
    from regpt.cli.prepare import report
    from regpt.data.merge import merge
    from regpt.errors import UsageError
    from regpt.paths import user_path

    if not args.slices:
        raise UsageError("regpt merge: no slices are given.", hint="regpt merge parts/* --out data/whole")
    out, begun = Output(args), time.monotonic()
    folders = [user_path(folder) for folder in args.slices]
    total = sum(p.stat().st_size for folder in folders for p in folder.glob("*.bin"))
    with out.progress("merging", total, "bytes") as bar:
        manifest = merge(folders, Path(args.out), progress=lambda done, _: bar.update(done))
    report(out, args.out, manifest, time.monotonic() - begun)
    return 0
