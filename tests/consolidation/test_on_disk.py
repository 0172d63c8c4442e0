"""Tensors in files: what is put comes back in its bits, and what is read is a copy."""

from __future__ import annotations

import pytest
import torch

from perpetune.consolidation.merge import Merge
from perpetune.consolidation.on_disk import OnDisk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_what_is_put_comes_back(dtype):
    held, tensor = OnDisk(), torch.randn(3, 4).mul(100).to(dtype).T
    held["layer.0.weight"] = tensor
    found = held["layer.0.weight"]
    assert torch.equal(found, tensor) and found.dtype == dtype
    found.zero_()
    assert torch.equal(held["layer.0.weight"], tensor)  # until it is put back
    held["layer.0.weight"] = found
    assert not held["layer.0.weight"].any() and list(held) == ["layer.0.weight"]


def test_a_file_for_each_name_as_long_as_it_is_held():
    held = OnDisk()
    held.update({f"{i}": torch.full((2,), i) for i in range(3)})
    del held["1"]
    held["3"] = torch.full((2,), 3)
    held["1"] = torch.full((2,), 11)
    assert {name: int(held[name][0]) for name in held} == {"0": 0, "2": 2, "3": 3, "1": 11}
    files = [file for file, _ in held._at.values()]
    assert len(set(files)) == 4 and all(file.is_file() for file in files)
    del held
    assert not any(file.exists() for file in files)


def test_a_merge_holds_no_tensor_of_the_weights(tiny_bert, word_stream, tmp_path):
    import perpetune as pt

    learner = pt.Learner(tiny_bert(), "lora", tmp_path / "run", training={"max_steps": 1})
    learner.learn(pt.load_stream(word_stream, tasks=["films", "news"]))
    merge = learner.state.consolidation
    assert isinstance(merge, Merge) and len(merge._sum) == len(merge._base) > 0
    weights = dict(learner.backbone.model.named_parameters())
    for name, total in merge._sum.items():
        assert torch.equal(weights[name], merge._base[name] + total) and total.any()
    held = [value for value in vars(merge).values() if isinstance(value, dict)]
    assert not any(isinstance(t, torch.Tensor) and t.shape == weights[name].shape for d in held for t in d.values())
