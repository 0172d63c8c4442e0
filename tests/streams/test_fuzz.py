"""Spoiled streams are read right or refused in one line: a hundred here, PERPETUNE_FUZZ=2000 of them in full."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from benchmarks.fuzz_streams import fuzz


def test_spoiled_streams_are_read_right_or_refused(tmp_path: Path) -> None:
    count = int(os.environ.get("PERPETUNE_FUZZ", "100"))
    became: Counter[str] = Counter()
    for seed in range(count):
        kind, change, what, wrong = fuzz(seed, tmp_path / str(seed))
        assert not wrong, f"seed {seed}, {kind}, {change}: {wrong}"
        became[what] += 1
    assert min(became["read"], became["refused"]) > count / 5
