"""Where rows are from: the split, its files and their lines, for messages that name what is to be mended."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..core.errors import StreamError


@dataclass(frozen=True)
class Origin:
    """What messages say of the rows of one split.

    Attributes:
        place: "the train split of task `x`".
        files: each file and the lines (from 1) on which its rows begin, or the number of its rows where they have none.
        untyped: whether the files have no types, so that every cell is text (CSV).
        strays: columns of several types -> the first row whose value is not text; numbers among texts stand as text.
    """

    place: str
    files: tuple[tuple[Path, np.ndarray | int], ...] = ()
    untyped: bool = False
    strays: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.place

    @classmethod
    def of(cls, place: str | Origin) -> Origin:
        return place if isinstance(place, Origin) else cls(place)

    def called(self, place: str) -> Origin:
        """The same rows under another name."""
        return replace(self, place=place)

    @property
    def whole(self) -> str:
        """ "the train split of task `x` (week-1/train.csv)": the first file stands for all."""
        return f"{self.place} ({self.files[0][0]})" if self.files else self.place

    def at(self, row: int) -> str:
        """ "row 3 (week-1/train.csv, line 5)"; rows are counted from 0, lines from 1."""
        return f"row {row}{self._file(row)}"

    def row(self, row: int) -> str:
        """ "row 3 of the train split of task `x` (week-1/train.csv, line 5)"."""
        return f"row {row} of {self.place}{self._file(row)}"

    def refusal(self, row: int, says: str) -> StreamError:
        """ "row 3 of the train split of task `x`: says (week-1/train.csv, line 5)"."""
        return StreamError(f"row {row} of {self.place}{says}{self._file(row)}")

    def _file(self, row: int) -> str:
        for path, lines in self.files:
            count = lines if isinstance(lines, int) else len(lines)
            if row < count:
                if isinstance(lines, int):
                    return f" ({path})" if count == 1 else f" ({path}, row {row})"
                return f" ({path}, line {lines[row]})"
            row -= count
        return ""


def warn(text: str) -> None:
    """Warn on behalf of what called the library."""
    package, level = __name__.partition(".")[0], 1
    frame = sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
