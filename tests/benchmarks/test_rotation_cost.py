from __future__ import annotations

import json
import math

import pytest

from benchmarks import rotations


def test_measures_every_method_and_writes_records(tmp_path, capsys):
    file = tmp_path / "rotations.json"
    records = rotations.main(["--widths", "64", "32", "--tokens", "8", "--steps", "1", "--json", str(file)])
    assert json.loads(file.read_text()) == records and len(records) == 2 * len(rotations.METHODS)
    assert all(math.isfinite(r["ratio"]) and r["ms"] > 0 for r in records)
    trained = {r["name"]: r["trained"] for r in records if r["width"] == 64}
    assert trained["frozen layer"] == 0 and trained["LoRA, r = 8"] == 2 * 8 * 64
    assert trained["OFT, exact"] == 2 * 32 * 31 // 2
    assert [trained[f"Givens, {form}"] for form in ("strict", "norm", "quasi")] == [63, 127, 4 * 63]
    assert {r["ratio"] for r in records if r["name"] == rotations.REFERENCE} == {1}
    assert "Givens, strict" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--steps", "0"], ["--tokens", "0"], ["--widths", "48"]])
def test_sizes_that_cannot_be_measured(options, capsys):
    with pytest.raises(SystemExit):
        rotations.main(options)
    assert options[0] in capsys.readouterr().err
