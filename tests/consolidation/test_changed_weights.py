"""All weights that train: a commit holds what is not the base's, in the same bits; what does not change stands once."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import perpetune as pt
from perpetune.consolidation.changed_weights import BaseWeights

TRAINING = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 5e-3}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False)
        self.last.weight = self.first.weight
        self.norm = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("seen", torch.tensor(0))


@given(share=st.floats(0, 1), seed=st.integers(0, 9))
def test_base_plus_what_changed_is_the_model_to_the_bit(share, seed):
    draw = torch.Generator().manual_seed(seed)
    model = Tied()
    base = BaseWeights(model)
    with torch.no_grad():
        weight = model.first.weight
        weight[torch.rand(weight.shape, generator=draw) < share] = -0.0
        model.norm[0] = float("nan") if seed % 2 else 1.0
    stored = base.changed(model)
    again = Tied()
    base.load(again, stored)
    for name, tensor in model.state_dict().items():
        ours, theirs = (t.reshape(-1, 1).view(torch.uint8) for t in (tensor, again.state_dict()[name]))
        assert torch.equal(ours, theirs), name
    assert not any("last" in name or "seen" in name for name in stored)
    size = sum(t.numel() * t.element_size() for t in stored.values())
    assert size <= 4 * weight.numel() + 6 and (share > 0 or size <= 6)


def test_a_mask_is_written_once_and_a_task_holds_the_entries_in_it(tiny_bert, word_stream, tmp_path):
    stream, folder = pt.load_stream(word_stream, tasks=["films", "news"]), tiny_bert(width=64)

    def learn(name, some):
        recipe = {"name": "sam", "keep": 0.05}
        return pt.Learner(folder, recipe, tmp_path / name, training=TRAINING, max_length=16).learn(some)

    first, second = learn("run", stream).commits[1:]
    masks = [commit.path / "rules.safetensors" for commit in (first, second)]
    assert masks[0].read_bytes() == masks[1].read_bytes() and masks[0].samefile(masks[1])
    entries = sum(p.numel() for p in pt.Learner.open(tmp_path / "run").backbone.parameters())
    stored = second.tensors("changed.safetensors")
    values = sum(t.numel() for name, t in stored.items() if not name.startswith("places."))
    assert 0 < values <= 0.05 * entries
    assert second.size < 0.5 * 4 * entries
    learn("stopped", stream.select(["films"]))
    again = learn("stopped", stream).commits[-1]
    ours, theirs = (c.tensors("changed.safetensors") for c in (again, second))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_that_holds_whole_weights_goes_on_with_them(tiny_bert, word_stream, tmp_path, monkeypatch):
    """As earlier versions wrote them."""
    from perpetune.consolidation import Continue

    stream = pt.load_stream(word_stream, tasks=["films", "news"])
    monkeypatch.setattr(Continue, "_whole", True)
    pt.Learner(tiny_bert(), "sequential", tmp_path, training=TRAINING).learn(stream.select(["films"]))
    monkeypatch.undo()
    result = pt.Learner(tiny_bert(), "sequential", tmp_path, training=TRAINING).learn(stream)
    assert [commit.has("weights.safetensors") for commit in result.commits] == [False, True, True]
    opened = pt.Learner.open(tmp_path).backbone.model.state_dict()
    stored = result.commits[-1].tensors("weights.safetensors")
    assert all(torch.equal(opened[name], tensor) for name, tensor in stored.items())


def test_memories_of_old_inputs_are_stored_in_fp32_below_energy_1():
    from perpetune.rules.second_moments import SecondMoment
    from perpetune.rules.sketches import restore

    draw = torch.Generator().manual_seed(0)
    kept = SecondMoment(16, products=torch.float32, rounded=True)
    for _ in range(3):
        new = SecondMoment(16)
        new.add(torch.randn(40, 16, generator=draw))
        kept.merge(new.unit())
    state = kept.state()
    assert state["C"].dtype == torch.float32 and restore(state).rounded
    assert torch.equal(restore(state).C, kept.C)
    assert torch.equal(restore({"C": state["C"].double()}).state()["C"], state["C"].double())
