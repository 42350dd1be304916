"""What is asked for beside the prompt, checked. No torch here: the command line is parsed with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from regpt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How completions are drawn and where they end. None means off.

    Raises:
        ConfigError: a value out of range.
    """

    max_new_tokens: int = 200
    """Tokens after which a completion ends."""
    temperature: float = 0.8
    """Below 1 sharper, above 1 flatter; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw among the k likeliest tokens."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Draw among tokens at least this share as likely as the likeliest."""
    stop: tuple[str, ...] = ()
    """End before this text; may be given several times."""
    seed: int | None = None
    """Makes a completion repeatable: number i depends on the seed and i. None: another text each time."""
    n: int = 1
    """Completions, decoded side by side."""

    def __post_init__(self) -> None:
        rules = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (the likeliest token) or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or none to keep all tokens"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
            ("stop", all(self.stop), "text that is not empty"),
            ("n", self.n >= 1, "at least 1"),
        ]
        for name, holds, expected in rules:
            if not holds:
                value = "" if name == "stop" else getattr(self, name)
                raise ConfigError(f"{name} is out of range.", got=repr(value), expected=expected)
