"""Published benchmarks as named streams: `load_stream("cl-order-1", data="PATH/TO/CL_Benchmark")`."""

from .base import Benchmark
from .cl_text import CL_TEXT
from .instructions import INSTRUCTIONS
from .vision import VISION

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (*CL_TEXT, *INSTRUCTIONS, *VISION)}

__all__ = ["BENCHMARKS", "Benchmark"]
