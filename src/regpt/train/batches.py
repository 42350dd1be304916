"""Rows of each update's batch, and rows before it, in closed form: a batch may be ramped up over the first steps.

In the first half of `ramp_steps` a batch has a quarter of the rows, in the second half a half, then all. Early gradients
agree among rows, so few rows tell as much, and more updates are made of the same text. Quarters and halves, rather than
something smooth, are fewer micro-batches of the same shape, which a compiler need not learn anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PARTS = 4  # a whole batch has so many of the ramp's smallest


@dataclass(frozen=True)
class Batches:
    """Pure: everything follows from the step, so a run goes on anywhere, on any number of ranks."""

    whole: int
    """Rows of a batch after the ramp."""
    ramp_steps: int = 0
    """0: every batch is whole. Otherwise `whole` is a multiple of PARTS."""

    @property
    def _quarters(self) -> int:
        """Steps of a quarter batch; the half's are never more."""
        return (self.ramp_steps + 1) // 2

    def before(self, step: int) -> int:
        """Rows of all updates before number `step`."""
        # A half batch lacks two quarters, a quarter batch one more.
        lacking = 2 * min(step, self.ramp_steps) + min(step, self._quarters)
        return step * self.whole - lacking * (self.whole // PARTS)

    def rows(self, step: int) -> int:
        """Rows of update number `step`."""
        return self.before(step + 1) - self.before(step)

    def first_row(self, step: int, skipped: int) -> int:
        """The first row of update number `step`, where `skipped` whole batches of the endless list were passed over."""
        return self.before(step) + skipped * self.whole

    def skipped(self, step: int, row: int) -> int:
        """Whole batches to pass over so that update number `step` begins at `row`, or after it where that is inside one."""
        return -(-(row - self.before(step)) // self.whole)

    def micro(self, step: int, n_micro: int, micro_rows: int) -> tuple[int, int]:
        """One rank's micro-batches in update number `step`, and their rows, where a whole batch has `n_micro` of `micro_rows`.

        Fewer of them as far as they divide, else smaller ones.
        """
        share = self.whole // self.rows(step)
        fewer = math.gcd(n_micro, share)
        return n_micro // fewer, micro_rows * fewer // share

    def steps_in(self, whole: float) -> int:
        """Updates that the rows of so many whole batches are enough for."""
        # `before` is convex, so of the three lines the lowest holds.
        quarters = self._quarters
        return int(min(4 * whole, 2 * whole + quarters / 2, whole + self.ramp_steps / 2 + quarters / 4))

    def __str__(self) -> str:
        """What a person is told of the ramp; nothing where there is none."""
        return (
            f", a quarter and then a half of it in the first {self.ramp_steps:,} steps"
            if self.ramp_steps
            else ""
        )
