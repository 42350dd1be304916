"""Whole corpora to ids by gigatoken, where it is installed; compared with tiktoken on a sample of every run's text.

gigatoken is several times as fast, and young. So each process compares the first texts that it encodes, and then
one in a hundred, with what tiktoken says: one id that differs stops the work. The only importer of gigatoken.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regpt.errors import ConfigError, DataError, missing_package
from regpt.tokenizers.exchange import Merge, gigatoken_json

VARIABLE = "REGPT_TOKENIZER_BACKEND"
"""Environment: gigatoken, tiktoken, or auto (also where it is unset), which is gigatoken where it is installed."""
OFF = f"{VARIABLE}=tiktoken in the environment: slower, and what defines the ids"
CHECKED_FIRST = 1 << 18  # characters of each process, all compared
CHECKED_SHARE = 0.01  # of the texts after those
REMADE_AFTER = 1 << 26  # characters: gigatoken 0.10 keeps every word that it has seen, and lets go of none
EXCERPT = 40  # characters to each side of the first id that differs

log = logging.getLogger(__name__)
Ids = NDArray[np.uint32]


def backend() -> str:
    """What encodes whole corpora here: gigatoken or tiktoken.

    Raises:
        ConfigError: the environment asks for something else.
        DeviceError: it asks for gigatoken, which is not installed.
    """
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in ("auto", "gigatoken", "tiktoken"):
        raise ConfigError(f"{VARIABLE} is unknown.", got=asked, expected="gigatoken, tiktoken or auto")
    here = importlib.util.find_spec("gigatoken") is not None
    if asked == "gigatoken" and not here:
        raise missing_package("gigatoken", "fast", f"{VARIABLE}=gigatoken")
    return "gigatoken" if here and asked != "tiktoken" else "tiktoken"


class FastEncoder:
    """One process's way from valid text to ids.

    Args:
        plainly: tiktoken's ids of a text: the authority.
        decode: bytes of ids, to show where two encodings differ.
    """

    def __init__(
        self,
        merges: Sequence[Merge],
        pattern: str,
        plainly: Callable[[str], Ids],
        decode: Callable[[list[int]], bytes],
    ) -> None:
        self._plainly, self._decode = plainly, decode
        self._json = gigatoken_json(merges, pattern) if backend() == "gigatoken" else None
        self._engine: Any = None
        self._to_check, self._random = CHECKED_FIRST, random.Random(0)
        self._until_remade = 0

    def encode(self, text: str) -> Ids:
        """Ids of one text.

        Raises:
            DataError: gigatoken and tiktoken do not agree.
        """
        if self._json is None:
            return self._plainly(text)
        if self._until_remade <= 0 and not self._make():
            return self._plainly(text)
        self._until_remade -= len(text)
        try:
            ids: Ids = self._engine.encode(text)
        except BaseException as e:
            if type(e).__name__ != "PanicException":  # what a fault in Rust becomes
                raise
            raise DataError(f"gigatoken failed: {e}.", got=_excerpt(text, 0), hint=OFF) from None
        if self._to_check > 0 or self._random.random() < CHECKED_SHARE:
            self._to_check -= len(text)
            self._compare(text, ids)
        return ids

    def _make(self) -> bool:
        """A new engine; tiktoken for good, aloud, where gigatoken cannot be loaded or does not take the vocabulary."""
        assert self._json is not None
        try:
            from gigatoken.gigatoken_rs import load_hf_json

            self._engine, self._until_remade = load_hf_json(self._json), REMADE_AFTER
            return True
        except (ImportError, ValueError, RuntimeError, TypeError) as e:
            log.warning(f"gigatoken is installed and cannot be used ({e}); tiktoken encodes instead")
            self._json = None
            return False

    def _compare(self, text: str, ids: Ids) -> None:
        right = self._plainly(text)
        if np.array_equal(ids, right):
            return
        shorter = min(len(ids), len(right))
        different = np.flatnonzero(ids[:shorter] != right[:shorter])
        first = int(different[0]) if len(different) else shorter
        place = len(self._decode(right[:first].tolist()).decode(errors="ignore"))
        raise DataError(
            f"gigatoken and tiktoken do not agree on the ids of a text, from character {place} on: {_excerpt(text, place)}",
            got=f"{ids[first : first + 5].tolist()} by gigatoken",
            expected=f"{right[first : first + 5].tolist()} by tiktoken",
            hint=OFF,
        )


def _excerpt(text: str, place: int) -> str:
    return repr(text[max(place - EXCERPT, 0) : place + EXCERPT])
