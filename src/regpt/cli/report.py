"""One HTML page of a run: curves, samples, settings, hardware, cost; of several runs, a comparison. --watch: live."""

from __future__ import annotations

import math
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from regpt.cli.parse import CommonArgs, Output, parse
from regpt.errors import UsageError
from regpt.paths import user_path
from regpt.report.history import read_histories
from regpt.report.numbers import report_values
from regpt.report.write import report_place, write_report


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt report RUN…`."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run directories; several are compared."""
    out: str | None = None
    """The page. None: report.html in the run; of several runs, comparison.html here."""
    open: Literal["yes", "no"] = "no"
    """Whether to show it in the browser."""
    price: float | None = None
    """Money an hour of all its machines costs, to say what the run's steps, evaluations and saves cost."""
    watch: bool = False
    """Serve the page on this machine and keep it up to date, until Ctrl-C; nothing is written."""
    port: int = 8350
    """Of --watch, on 127.0.0.1. 0: any that is free."""


def main(argv: list[str]) -> int:
    """`regpt report`."""
    args = parse(Args, argv, prog="regpt report", description=__doc__ or "")
    if not args.runs:
        raise UsageError("no run is named.", hint="regpt report runs/demo")
    if args.price is not None and not (math.isfinite(args.price) and args.price >= 0):
        raise UsageError(
            "--price is not an amount of money.", got=f"{args.price:g}", expected="0 or more an hour"
        )
    runs = [user_path(run) for run in args.runs]
    if args.watch:
        return _watch(args, runs)
    place = report_place(runs, user_path(args.out) if args.out else None)
    histories = read_histories(runs)
    write_report(histories, place, price=args.price)
    values = report_values(histories, args.price) | {"report": str(place)}
    lines = [_line(run) for run in values["runs"]] + values["cautions"]
    Output(args).result(values, "\n".join([*lines, f"the report lies in {place}"]))
    if args.open == "yes":
        webbrowser.open(place.absolute().as_uri())
    return 0


def _line(run: dict[str, object]) -> str:
    """One run in a line for a person."""
    loss, bits = run["val_loss"], run["val_bits_per_byte"]
    text = f"{run['label']}: step {run['step']}"
    if loss is not None:
        text += f", validation loss {loss:.4f}"
    return text + (f", {bits:.4f} bits per byte" if bits is not None else "")


def _watch(args: Args, runs: list[Path]) -> int:
    """Serve until Ctrl-C, which is how it ends well."""
    from regpt.report.serve import Server

    read_histories(runs, may_be_empty=True)  # what is not a run is said now
    with Server(runs, args.port, price=args.price) as server:
        out = Output(args)
        try:
            out.result(
                {"url": server.url},
                f"the report is at {server.url} and follows the run; Ctrl-C ends it",
            )
            if args.open == "yes":
                webbrowser.open(server.url)
            server.serve_forever()
        except KeyboardInterrupt:
            out.info("no longer served")
    return 0
