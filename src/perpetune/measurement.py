"""A promise and what was measured of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """One measured figure of one promise.

    Attributes:
        name: what was measured, a few words ("drift of merged outputs").
        value: the measured figure.
        bound: what was promised, `value <= bound`; None for a figure that is only observed.
        unit: "" for pure numbers, else for instance "relative", "share", "bytes".
        source: the piece that promises it (class name of the rule, head, consolidation or tuner).
        note: one sentence for somebody who does not know the method.
    """

    name: str
    value: float
    bound: float | None = None
    unit: str = ""
    source: str = ""
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the promise was kept; None where nothing was promised. NaN never keeps a promise."""
        if self.bound is None:
            return None
        return not math.isnan(self.value) and self.value <= self.bound

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}
