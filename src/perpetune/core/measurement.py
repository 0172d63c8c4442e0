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
        parts: (name, value, bound) of everything of which `value` is the worst (layers), where that can be told.
    """

    name: str
    value: float
    bound: float | None = None
    unit: str = ""
    source: str = ""
    note: str = ""
    parts: tuple[tuple[str, float, float | None], ...] = ()

    @property
    def holds(self) -> bool | None:
        """Whether the promise was kept; None where nothing was promised. NaN never keeps a promise."""
        if self.bound is None:
            return None
        return not math.isnan(self.value) and self.value <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; figures that are not finite are None."""
        parts = [[name, finite(value), finite(bound)] for name, value, bound in self.parts]
        return {**asdict(self), "value": finite(self.value), "parts": parts, "holds": self.holds}


def finite(value: float | None) -> float | None:
    """JSON has no NaN: what is not a number is written as nothing."""
    return value if value is not None and math.isfinite(value) else None


def broken_promise(measured: dict[str, Any], newest: str) -> str:
    """A stored measurement (`Measurement.to_dict`) in a line, with its task where that is not the newest."""
    value, bound = ("not a number" if x is None else f"{x:.2g}" for x in (measured["value"], measured["bound"]))
    task = measured.get("task", newest)
    after = "" if task == newest else f", after task `{task}`"
    return f"{measured['source']}, {measured['name']}: {value}, promised {bound}{after}"
