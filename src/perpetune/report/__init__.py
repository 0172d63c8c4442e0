"""Pictures and pages: what a run or a comparison found, for people."""

from __future__ import annotations

from .charts import Bar, Point, bar_svg, lines_svg, scatter_svg
from .data import ReportData
from .heat_maps import matrix_svg
from .page import bars_svg, render, write_picture, write_report

__all__ = [
    "Bar",
    "Point",
    "ReportData",
    "bar_svg",
    "bars_svg",
    "lines_svg",
    "matrix_svg",
    "render",
    "scatter_svg",
    "write_picture",
    "write_report",
]
