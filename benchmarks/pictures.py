"""The pictures in the README: the upper part of a run's report, or of a comparison, as a browser shows it.

python benchmarks/pictures.py docs/images/report-demo.png runs/demo
python benchmarks/pictures.py docs/images/report-comparison.png runs/shakespeare-char-cpu runs/modern-char
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from regpt.report.history import read_histories
from regpt.report.page import page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def picture(html: str, place: Path, *, width: int, height: int | None, dark: bool, axis: str) -> None:
    """`html` as a PNG of so many CSS pixels; the whole page where height is None."""
    executable = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if executable is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is installed")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "report.html"
        file.write_text(html, encoding="utf-8")
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox"] if root else []
        )
        shown = browser.new_page(
            viewport={"width": width, "height": height or 900}, color_scheme="dark" if dark else "light"
        )
        shown.goto(file.as_uri())
        if axis != "step":
            shown.click(f"[data-axis={axis}]")
        shown.screenshot(path=place, full_page=height is None)
        browser.close()


def main() -> None:
    """Read the command line and take the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("place", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--height", type=int, default=900, help="0: the whole page")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--axis", choices=("step", "tokens", "time_s", "flops"), default="step")
    args = parser.parse_args()
    html = page(read_histories(args.runs))
    picture(html, args.place, width=args.width, height=args.height or None, dark=args.dark, axis=args.axis)
    print(f"{args.place}: {args.place.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
