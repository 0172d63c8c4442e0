"""Projection beyond one tuner all the way: fresh branches, element-wise vectors, soft steps, raw probes."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import perpetune as pt
from perpetune.core.errors import ConfigError, RuleError
from perpetune.rules import SubspaceProjection, TaskContext, attach, lora_pairs
from tests.rules.course import Course, data, network, trained

EXACT = {torch.float64: 1e-13, torch.float32: 1e-6}


def fresh(dtype=torch.float64, **settings) -> Course:
    course = Course("lora", dtype, SubspaceProjection(energy=1, branch="fresh", **settings))
    course.first()
    course.merge()
    return course


# ---- branch C of the sheet: y = W x + s B A (I - M M^T) x, merged ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fresh_lora_leaves_old_outputs_alone_whatever_b_does(dtype):
    """Check 5: 120 steps of AdamW with decay; merged and unmerged agree; the new task is learned; B is free."""
    course = fresh(dtype)
    assert course.drift(120) <= EXACT[dtype]
    assert course.loss < 0.2  # the head alone: above 0.5
    for pair in lora_pairs(course.model):
        M = course.rule._memory.inputs[course.rule._memory.reads[f"{pair.name}.A"]].M
        assert (pair.A.detach().double() @ M).norm() <= 10 * torch.finfo(dtype).eps * pair.A.norm()
        assert pair.B.norm() > 0.1
    assert all(m.holds is not False for m in course.rule.guarantee())
    unmerged = course.model(course.new[0])
    old = course.outputs()
    course.end(1)
    course.merge()
    new = (course.model(course.new[0]) - unmerged).norm() / unmerged.norm()
    assert max(new, (course.outputs() - old).norm() / old.norm()) < EXACT[dtype]


@pytest.mark.parametrize("branch", ["kept", "fresh"])
@pytest.mark.parametrize("on", ["update", "gradient", "both"])
def test_nothing_at_all_moves_where_every_direction_is_protected(branch, on):
    """In fp32 rounding would leave something of I - M M^T = 0, which Adam makes steps of, and |dW M| / |W| the quotient
    of two roundings."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    model, rule = peft.get_peft_model(plain, config), SubspaceProjection(energy=1, on=on, branch=branch)
    x, said = torch.randn(400, 16), []
    rule.begin_task(TaskContext(model, 0))
    rule.end_task(TaskContext(model, 0, lambda: [{"input": x}]))
    assert all(kept.M.shape[0] == kept.M.shape[1] for kept in rule._memory.inputs)
    if branch == "fresh":
        model = peft.get_peft_model(model.merge_and_unload(), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
    rule.begin_task(TaskContext(model, 1, say=said.append))
    attached = attach(model, optimizer, [rule], begin=False)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    attached.remove()
    measured = rule.guarantee()
    assert "can learn nothing" in said[0] and len(said) == 1
    assert measured and all(m.holds is not False for m in measured), measured
    for name, p in model.named_parameters():
        if p.requires_grad and branch == "kept":
            assert torch.equal(p, before[name])
        elif "lora_A" in name:
            assert not p.any() or on == "gradient"


def test_a_fresh_branch_learns_more_than_a_kept_one():
    """The kept one's B has been full since task 1."""
    kept = Course("lora", rule=SubspaceProjection(energy=1)).first()
    kept.learn(1, 60)
    course = fresh()
    course.learn(1, 60)
    assert course.loss < 0.8 * kept.loss
    B = {name: value for name, value in kept.model.named_parameters() if "lora_B" in name}
    used = kept.rule._memory
    assert all(used.inputs[used.reads[p.name + ".B"]].M.shape == (8, 8) for p in lora_pairs(kept.model)) and B


def test_a_fresh_branch_starts_in_the_complement():
    course = fresh()
    course.rule.begin_task(TaskContext(course.model, 1))
    for pair in lora_pairs(course.model):
        M = course.rule._memory.inputs[course.rule._memory.reads[f"{pair.name}.A"]].M
        assert (pair.A.detach() @ M).norm() < 1e-13 and pair.A.norm() > 0.1


def test_fresh_needs_lora_and_the_right_consolidation():
    with pytest.raises(RuleError, match="LoRA"):
        SubspaceProjection(branch="fresh").begin_task(TaskContext(network("adapter"), 0))
    config = peft.LoraConfig(target_modules=["query"])
    with pytest.raises(ConfigError, match="set branch to `fresh`"):
        pt.Recipe(config, [SubspaceProjection()], pt.Merge())
    with pytest.raises(ConfigError, match="set branch to `kept`"):
        pt.Recipe(config, [SubspaceProjection(branch="fresh")], pt.Continue())


# ---- strength ----


def test_strength_is_the_share_of_each_step_that_is_taken_back():
    """W <- W + u - strength (u M) M^T for every step u: what is learned in the protected space adds up, and stays."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 2, bias=False).double(), torch.randn(2, 6, dtype=torch.float64)
    rule = SubspaceProjection(energy=1, strength=0.75)
    rule.observe(model, lambda: [{"input": x}])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attach(model, optimizer, [rule], index=1)
    M, start, total = rule._memory.inputs[0].M, model.weight.detach().clone(), torch.zeros(2, 6).double()
    for _ in range(5):
        model.weight.grad = torch.randn(2, 6, dtype=torch.float64)
        total -= model.weight.grad
        optimizer.step()
    D = model.weight.detach() - start
    torch.testing.assert_close(D @ M, 0.25 * total @ M)
    torch.testing.assert_close(D - (D @ M) @ M.mT, total - (total @ M) @ M.mT)


# ---- IA3: element by element ----


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k, self.down = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.k(x)))


def test_ia3_is_protected_element_by_element():
    """dl * y = 0 holds where dl is 0 or y is: what old inputs never used can still be scaled."""
    torch.manual_seed(0)
    base = Scaled().double()
    with torch.no_grad():
        base.k.weight[:2], base.k.bias[:2] = 0, 0  # elements 0 and 1 are unused by all inputs
    config = peft.IA3Config(target_modules=["k", "down"], feedforward_modules=["down"])
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    x = torch.randn(20, 6, dtype=torch.float64)
    rule = SubspaceProjection(energy=1)
    rule.observe(model, lambda: [{"x": x}])
    assert {m.memory.width: m.M.shape[1] for m in rule._memory.inputs} == {6: 4}
    before, optimizer = model(x), torch.optim.AdamW(trained(model), lr=0.1)
    attach(model, optimizer, [rule], index=1)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x).square().sum() + sum(p.sum() for p in trained(model))).backward()
        optimizer.step()
    assert torch.equal(model(x), before)
    for p in trained(model):
        assert ((p - 1).abs().flatten() > 0.1).tolist() == [True, True, False, False, False, False]
    other = SubspaceProjection(energy=1)
    other.load_state(load(save(rule.state())))
    pairs = zip(other._memory.inputs, rule._memory.inputs, strict=True)
    assert all(torch.equal(a.M, b.M) for a, b in pairs)


def test_ia3_with_an_energy_keeps_the_elements_that_are_used_most():
    torch.manual_seed(0)
    model = peft.get_peft_model(Scaled(), peft.IA3Config(target_modules=["k"], feedforward_modules=[]))
    rule = SubspaceProjection(energy=0.5, unit_tokens=False)
    x = torch.randn(50, 6)
    rule.observe(model, lambda: [{"x": x}])
    energies = model.base_model.model.k.base_layer(x).detach().double().square().sum(0)
    M = rule._memory.inputs[0].M
    kept = M.sum(1).bool()
    assert energies[kept].min() > energies[~kept].max()
    assert energies[kept].sum() >= 0.5 * energies.sum() > energies[kept].sum() - energies[kept].min()


# ---- probes ----


def test_probes_measure_the_outputs_themselves():
    course = Course("lora", torch.float32, SubspaceProjection(energy=1, probes=5)).first()
    restored = SubspaceProjection(energy=1, probes=5)
    restored.load_state(load(save(course.rule.state())))
    course.rule = restored
    course.learn(1, 20)
    measured = course.rule.guarantee()[-1]
    assert measured.name == "worst change of outputs on probes" and measured.holds
    assert 0 < measured.value < measured.bound < 1.1e-5
    with torch.no_grad():
        for p in trained(course.model):
            p.add_(0.1)
    assert course.rule.guarantee()[-1].holds is False


def test_no_probe_is_kept_unless_asked_for():
    course = Course("lora", torch.float32, SubspaceProjection(energy=1)).first(2)
    assert not any(key.startswith("probe") for key in course.rule.state())
    inputs = data(48, 1, torch.float32)[0]
    assert not any(value.shape == inputs.shape for value in course.rule.state().values())


def test_probes_promise_nothing_where_the_rule_does_not():
    course = Course("lora", torch.float32, SubspaceProjection(energy=0.9, probes=5)).first(5)
    course.learn(1, 5)
    assert course.rule.guarantee()[-1].bound is None and course.rule.guarantee()[-1].value > 0


# ---- in a recipe, beside other rules ----


def test_composes_with_other_rules_and_any_head(word_stream, tiny_bert):
    rules = [pt.ProductL1(1e-3), pt.OrthogonalToPast(0.5), SubspaceProjection(0.9, branch="fresh", probes=4)]
    heads = [pt.LinearHead(), pt.RidgeHead(features=64), pt.PrototypeHead()]
    config = peft.LoraConfig(r=4, target_modules=["query", "value"])
    training = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    learner = pt.Learner(tiny_bert(), pt.Recipe(config, rules, pt.Merge(), heads, training=training))
    result = learner.learn(pt.load_stream(word_stream, tasks=["films", "news", "mood"]))
    assert all(g["holds"] is not False for g in result.guarantees), result.guarantees
    names = {g["name"] for g in result.guarantees}
    assert {"worst change of outputs on probes", "change of features on earlier tasks' test inputs"} <= names
    layers = [g for g in result.guarantees if g["name"].startswith("drift of a layer")]
    assert len(layers) == 2 and all(len(g["parts"]) == 4 for g in layers)  # A of query and value, two layers
    assert all(value <= bound for g in layers for _, value, bound in g["parts"])
