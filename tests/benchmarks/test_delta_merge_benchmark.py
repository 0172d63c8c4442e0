from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import delta_merge


def test_the_shapes_are_those_of_vit_b():
    from transformers import ViTConfig, ViTModel

    whole = delta_merge.shapes(delta_merge.ALL)
    assert sum(map(math.prod, whole.values())) == delta_merge.ALL == sum(math.prod(s) for _, s in delta_merge.vit_b())
    with torch.device("meta"):
        model = ViTModel(ViTConfig(), add_pooling_layer=False)
    assert sorted(whole.values()) == sorted(tuple(p.shape) for p in model.parameters())
    assert list(delta_merge.shapes(600_000).values()) == [(768, 3, 16, 16), (768,), (1, 1, 768), (8640,)]


def test_measures_everything_and_writes_records(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(delta_merge, "TASKS", 3)
    file = tmp_path / "delta.json"
    options = ["--parameters", "20000", "--peft-parameters", "5000", "--repeats", "1", "--json", str(file)]
    records = delta_merge.main(options)
    assert json.loads(file.read_text()) == records
    timed = [r for r in records if "ms" in r]
    assert [r["name"] for r in timed] == [
        *(f"{work}, {scheme}" for scheme in delta_merge.SCHEMES for work in ("mask", "extract", "merge of 3")),
        "peft dare_linear",
        "peft dare_ties",
    ]
    assert all(r["ms"] > 0 and r["copy_ms"] > 0 and math.isclose(r["ratio"], r["ms"] / r["copy_ms"]) for r in timed)
    assert [r["target"] for r in timed] == [1.5, None, 30, None, None, None, None, None]
    assert [r["parameters"] for r in timed] == [20_000] * 6 + [5000] * 2
    assert all(r["mb"] >= 0 for r in records if r not in timed)
    assert "merge of 3, bernoulli" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", [("--parameters", "10"), ("--parameters", "86000001"), ("--peft-parameters", "-1"), ("--repeats", "0")]
)
def test_sizes_that_cannot_be_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        delta_merge.main([*option])
    assert f"{option[0]} must be" in capsys.readouterr().err
