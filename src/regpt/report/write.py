"""A report into its file: written whole or not at all, and never over a file that is not a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regpt.errors import UsageError
from regpt.report.history import History
from regpt.report.page import MARK, page
from regpt.train.durable import replace_file

NAME, OF_SEVERAL = "report.html", "comparison.html"


def report_place(runs: Sequence[Path], out: Path | None) -> Path:
    """Where the report goes: in the run; of several, here, under a name that no run's own report has.

    Raises:
        UsageError: something else than a report is there, or no folder to write in.
    """
    name = NAME if len(runs) == 1 else OF_SEVERAL
    place = out or (runs[0] / name if len(runs) == 1 else Path(name))
    if out is not None and out.is_dir():
        place = out / name
    if not place.parent.is_dir():
        raise UsageError(
            f"there is no folder {place.parent} to write {place.name} in.", hint="--out FILE elsewhere"
        )
    begins = MARK.encode()
    try:
        if place.exists():
            with place.open("rb") as file:
                begins = file.read(200)
    except OSError as e:
        raise UsageError(
            f"{place} cannot be replaced: {e.strerror or e}.", hint="--out FILE elsewhere"
        ) from None
    if MARK.encode() not in begins:
        raise UsageError(
            f"{place} is there and is not a report, so it is left alone.", hint="--out FILE elsewhere"
        )
    return place


def write_report(histories: Sequence[History], place: Path, *, price: float | None = None) -> None:
    """The page at `place`. Raises UsageError where it cannot be written."""
    try:
        replace_file(place, page(histories, price=price).encode())
    except OSError as e:
        raise UsageError(
            f"{place} cannot be written: {e.strerror or e}.", hint="--out FILE elsewhere"
        ) from None
