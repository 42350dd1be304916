"""The presets: a list with a line each, or one preset's page of settings."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass

import tyro

from regpt.cli.parse import CommonArgs, Output, parse
from regpt.config import Config, Preset, differences, load_preset, preset_names


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt presets [NAME]`."""

    name: tyro.conf.Positional[str | None] = None
    """One preset to show in full."""


def main(argv: list[str]) -> int:
    """`regpt presets`."""
    args = parse(Args, argv, prog="regpt presets", description=__doc__ or "")
    out = Output(args)
    if args.name is not None:
        preset = load_preset(args.name)
        out.result(_as_dict(preset), _page(preset))
        return 0
    presets = [load_preset(name) for name in preset_names()]
    width = max(len(p.name) for p in presets)
    lines = [f"{p.name:<{width}}  {p.about.summary}" for p in presets]
    lines += [
        "",
        "regpt presets NAME shows one; regpt plan NAME says what it needs; regpt train NAME runs it.",
    ]
    out.result({"presets": [_as_dict(p) for p in presets]}, "\n".join(lines))
    return 0


def _as_dict(preset: Preset) -> dict[str, object]:
    return {
        "name": preset.name,
        **dataclasses.asdict(preset.about),
        "settings": dataclasses.asdict(preset.config),
    }


def _page(preset: Preset) -> str:
    about = preset.about
    lines = [
        f"{preset.name}: {about.summary}",
        f"  hardware  {about.hardware}",
        f"  time      {about.time}",
        f"  expected  {about.expected}",
        "",
        "settings that differ from the defaults:",
    ]
    lines += [
        f"  --{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name, (_, value) in differences(Config(), preset.config).items()
    ]
    return "\n".join(lines)
