"""Asking malloc to keep freed memory: where it can be asked, it does; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from regpt.train import allocator

# Allocate 64 MB, touch it, free it, 20 times; the kernel is asked for its pages once, or every time.
FAULTS = """
import resource, sys
from regpt.train.allocator import keep_memory
assert 'torch' not in sys.modules
kept = sys.argv[1] == "keep" and keep_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    bytearray(64 << 20)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> tuple[bool, int]:
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], check=True, capture_output=True, text=True)
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these are settings of glibc")
def test_freed_memory_is_used_again() -> None:
    """Page faults fall to a few per cent of what they were."""
    kept, few = faults("keep")
    if not kept:
        pytest.skip("this glibc takes no thresholds of this size, or another malloc stands before it")
    _, many = faults("leave")
    assert few < many / 4


@pytest.mark.parametrize("answer", ["", None])
def test_another_libc_is_left_alone(monkeypatch: pytest.MonkeyPatch, answer: str | None) -> None:
    monkeypatch.setattr(os, "confstr", lambda _name: answer, raising=False)
    assert allocator.keep_memory() is False


def test_no_confstr_as_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "confstr", raising=False)
    assert allocator.keep_memory() is False


def test_unknown_name_as_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_name: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", unknown, raising=False)
    assert allocator.keep_memory() is False


def test_no_mallopt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "confstr", lambda _name: "glibc 2.36", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    assert allocator.keep_memory() is False


def test_refused_settings_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old glibc returns 0 for thresholds of this size."""
    asked: list[tuple[int, int]] = []

    class Library:
        @staticmethod
        def mallopt(name: int, value: int) -> int:
            asked.append((name, value))
            return int(name == allocator.M_TRIM_THRESHOLD)

    monkeypatch.setattr(os, "confstr", lambda _name: "glibc 2.17", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Library)
    assert allocator.keep_memory() is False
    assert asked == [(-3, 2**31 - 1), (-1, 2**31 - 1)]
