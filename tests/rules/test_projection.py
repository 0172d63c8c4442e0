from __future__ import annotations

import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from perpetune.core.errors import ConfigError, RuleError
from perpetune.rules.base import TaskContext, attach
from perpetune.rules.certificate import certificates
from perpetune.rules.linear_sites import linear_sites, see_inputs, shared_inputs
from perpetune.rules.projection import SubspaceProjection
from tests.rules.course import WIDTH, Course, network, trained

EXACT = {torch.float64: 1e-13, torch.float32: 1e-6}


@pytest.mark.parametrize("tuner", ["lora", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_old_outputs_stay_under_adamw(tuner, dtype):
    """Checks 1, 2, 4: steps of AdamW with decay and (adapter) carried momentum; the new task is learned."""
    course = Course(tuner, dtype, SubspaceProjection(energy=1)).first()
    sites = linear_sites(course.model)[0]
    before = {site.name: site.weight.detach().clone() for site in sites}
    assert course.drift(120, carry=tuner == "adapter") <= EXACT[dtype]
    for site in sites:
        W, M = site.weight.detach().double(), course.rule._memory.of(site).M
        assert ((W - before[site.name].double()) @ M).norm() / W.norm() <= 10 * torch.finfo(dtype).eps
    assert course.loss < 0.4  # the head alone stays above 0.5, see below
    for measured in course.rule.guarantee():
        assert measured.holds is not False, measured


def test_head_alone_does_not_learn_the_new_task():
    course = Course("none")
    features = course.model(course.new[0])
    course.model.forward = lambda x: features  # they never change
    course.learn(1, 300)
    assert course.loss > 0.5


@pytest.mark.parametrize("tuner", ["lora", "adapter"])
def test_projecting_the_gradient_alone_drifts_under_adam(tuner):
    """The control of check 1: without it, the test above would prove nothing."""
    course = Course(tuner, torch.float32, SubspaceProjection(energy=1, on="gradient")).first()
    assert course.drift(200, make=torch.optim.Adam, weight_decay=0) > 0.2
    assert all(m.bound is None for m in course.rule.guarantee() if "|" in m.name)
    assert course.rule.guarantee()[0].value > 0.1


def test_projecting_the_gradient_is_enough_for_plain_sgd():
    course = Course("lora", rule=SubspaceProjection(energy=1, on="gradient")).first()
    assert course.drift(40, make=torch.optim.SGD, lr=0.05, weight_decay=0) < 1e-13
    decayed = Course("lora", rule=SubspaceProjection(energy=1, on="gradient")).first()
    assert decayed.drift(40, make=torch.optim.SGD, lr=0.05, weight_decay=5e-4) > 1e-4


def test_both_holds_too_and_leaves_adam_nothing_to_undo():
    course = Course("lora", rule=SubspaceProjection(energy=1, on="both")).first()
    assert course.drift(40) < 1e-13


def test_bf16_compute_with_fp32_weights():
    """Check 3: the weights' change stays out of the space however coarse the gradients are."""
    course = Course("lora", torch.float32, SubspaceProjection(energy=1)).first()
    assert course.drift(40, autocast=True, carry=True) <= 1e-6


def test_bf16_weights_leak_by_one_rounding():
    course = Course("lora", torch.bfloat16, SubspaceProjection(energy=1)).first(20)
    course.learn(1, 30)
    leak = course.rule.guarantee()[0]
    assert 1e-5 < leak.value <= leak.bound == 4e-3
    assert {p.dtype for p in trained(course.model)} == {torch.bfloat16}


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_certificate_bounds_the_drift_of_each_layer(energy, unit):
    """Section 4 E: sum_old |dW x|^2 <= ||dW||_2^2 (1 - kept) sum_old |x|^2 for the tokens themselves."""
    course = Course("adapter", rule=SubspaceProjection(energy, unit_tokens=unit)).first()
    sites, X = linear_sites(course.model)[0], {}
    see_inputs(course.model, sites, [{"x": course.old[0]}], lambda site, x, _: X.update({site.name: x.clone()}))
    single = {name: x / x.norm(dim=1, keepdim=True) for name, x in X.items()}
    X = single if unit else X
    before = {site.name: site.weight.detach().clone() for site in sites}
    course.learn(1, 30)
    found = {c.name: c for c in certificates(course.rule._memory, course.rule._split_references())}
    assert found.keys() == X.keys()
    for site in sites:
        drift = (X[site.name] @ (site.weight.detach() - before[site.name]).mT).norm() / X[site.name].norm()
        assert math.isclose(found[site.name].drift, drift, rel_tol=1e-6)  # sums are kept in fp32
        assert 0 < drift <= found[site.name].drift_bound
        change = site.weight.detach() - before[site.name]
        assert (single[site.name] @ change.mT).norm(dim=1).max() <= found[site.name].token <= 1.001 * change.norm()
        D, M = site.weight.detach() - before[site.name], course.rule._memory.of(site).M
        kept = (X[site.name] @ M).norm() / X[site.name].norm()
        tight = torch.linalg.matrix_norm(D, 2) * (1 - kept.square()).clamp_min(0).sqrt()
        rounding = torch.finfo(torch.float32).eps * D.shape[1] * D.square().sum()  # of sums made in fp32
        assert found[site.name].drift_bound <= (tight.square() + rounding).sqrt() * 1.001 + 1e-6  # and no looser
    measured = {m.name: m for m in course.rule.guarantee()}
    assert all(m.holds is not False for m in measured.values())
    assert 0 < measured["old inputs left unprotected"].value <= 1 - energy + 1e-9


def test_certificate_turns_red_where_the_promise_is_broken():
    course = Course("lora", rule=SubspaceProjection(energy=1)).first(5)
    course.learn(1, 3)
    with torch.no_grad():
        trained(course.model)[3].add_(1e-3)  # behind the rule's back
    assert [m.holds for m in course.rule.guarantee()] == [False, False, True, None, None]
    assert linear_sites(course.model)[0][3].name in course.rule.guarantee()[0].note


def test_sketch_of_wide_layers_keeps_the_bound():
    course = Course("adapter", rule=SubspaceProjection(energy=1, wide=80, sketch_rows=16)).first()
    course.learn(1, 60)
    names = {site.name: type(course.rule._memory.of(site).memory).__name__ for site in linear_sites(course.model)[0]}
    assert set(names.values()) == {"FrequentDirections", "SecondMoment"}  # d = 96 and 64
    assert all(m.holds is not False for m in course.rule.guarantee())
    assert course.rule.guarantee()[2].bound is None


def test_strength_and_cap_leave_room():
    free = Course("lora", rule=SubspaceProjection(energy=1, strength=0)).first(10)
    soft = Course("lora", rule=SubspaceProjection(energy=1, strength=0.5)).first(10)
    capped = Course("lora", rule=SubspaceProjection(energy=1, cap=0.25)).first(10)
    drifts = [course.drift(25) for course in (soft, free)]
    assert 1e-3 < drifts[0] < 0.8 * drifts[1]
    assert 1e-3 < capped.drift(25)
    assert soft.rule.guarantee()[0].bound is None
    assert all(len(kept.M) // 4 == kept.M.shape[1] for kept in capped.rule._memory.inputs)
    assert capped.rule.guarantee()[2].bound is None and capped.rule.guarantee()[1].holds


# ---- the step, as algebra ----


class Layers(nn.Module):
    def __init__(self, shapes, dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, out, bias=False) for out, d in shapes)
        self.to(dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        inputs = {layer.in_features: x[:, : layer.in_features] for layer in self.layers}
        return [layer(inputs[layer.in_features]) for layer in self.layers]


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(2, 9)), min_size=1, max_size=5),
    rows=st.integers(1, 6), energy=st.sampled_from([0.6, 0.95, 1.0]), strength=st.sampled_from([0.25, 1.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_step_is_the_equation_for_any_mixture_of_shapes(shapes, rows, energy, strength, seed):
    """W <- W_ref + D - strength (D M) M^T and g <- g - strength (g M) M^T, whatever is multiplied together."""
    torch.manual_seed(seed)
    model, x = Layers(shapes, torch.float64), torch.randn(rows, 9, dtype=torch.float64)
    rule = SubspaceProjection(energy, "both", strength=strength)
    rule.observe(model, lambda: [{"x": x}])
    rule.begin_task(TaskContext(model, 1))
    ref = [layer.weight.detach().clone() for layer in model.layers]
    for layer in model.layers:
        layer.weight.grad = torch.randn_like(layer.weight)
        layer.weight.data += torch.randn_like(layer.weight)
    model.layers[0].weight.grad = None
    expected_W, expected_g = [], []
    for layer, W_ref in zip(model.layers, ref, strict=True):
        X, D, g = x[:, : layer.in_features], layer.weight.detach() - W_ref, layer.weight.grad
        M = rule._memory.inputs[rule._memory.reads[f"layers.{len(expected_W)}"]].M
        assert (X @ M).square().sum() >= (energy - 1e-9) * X.square().sum()
        expected_W.append(W_ref + D - strength * (D @ M) @ M.mT)
        expected_g.append(g if g is None else g - strength * (g @ M) @ M.mT)
    rule.on_gradient()
    by_weight = {id(layer.weight): W for layer, W in zip(model.layers, ref, strict=True)}
    rule.on_update([by_weight[id(p)] for p in rule.watches()])
    for layer, W, g in zip(model.layers, expected_W, expected_g, strict=True):
        torch.testing.assert_close(layer.weight.detach(), W, rtol=1e-12, atol=1e-12)
        assert layer.weight.grad is g is None or torch.allclose(layer.weight.grad, g, rtol=1e-12, atol=1e-12)


def test_a_step_waits_for_nothing_and_batches_what_is_alike(counter):
    """Operations do not grow with the number of layers of one shape, nor with the number of tasks."""
    counts = {}
    for layers, tasks in ((2, 1), (8, 1), (2, 7)):
        torch.manual_seed(0)
        model = Layers([(6, 9)] * layers, torch.float32)
        rule = SubspaceProjection(energy=0.9)
        for _ in range(tasks):
            rule.observe(model, lambda: [{"x": torch.randn(3, 9)}])
        rule.begin_task(TaskContext(model, 1))
        with counter() as counted:
            rule.on_update([])
        counts[layers, tasks] = counted.ops - layers * 3  # views of the weights
    assert counts[2, 1] == counts[2, 7]
    assert counts[8, 1] <= counts[2, 1] + 12


def test_state_does_not_grow_with_the_tasks():
    model, rule, sizes = Layers([(4, 8), (3, 6)], torch.float32), SubspaceProjection(energy=0.9, cap=0.5), {}
    for task in range(1, 31):
        rule.observe(model, lambda: [{"x": torch.randn(4, 9)}])
        sizes[task] = sum(t.numel() for t in rule.state().values())
    assert sizes[30] == sizes[10] <= 2 * (8 * 8 + 6 * 6)


# ---- what is protected ----


def bert(width: int, inner: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=50, hidden_size=width, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=8,
        )
    )  # fmt: skip


def test_inputs_that_are_shared_are_kept_once():
    model = bert(width=16, inner=24)
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_("layer" in name and name.endswith("weight") and p.ndim == 2)
    batch = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6)}
    names = [
        [s.name.rsplit(".", 1)[-1] for s in g] for g in shared_inputs(model, linear_sites(model)[0], lambda: [batch])
    ]
    assert names == [["query", "key", "value"], ["dense"], ["dense"], ["dense"]] * 2


def test_masks_are_those_of_the_tokens_and_of_nothing_else():
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor, **_: Tensor) -> Tensor:
            return self.layer(x)

    model, seen = Read(), []
    mask, x = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.randn(2, 3, 4)
    batches = [
        {"x": x, "attention_mask": mask},
        {"x": x.view(6, 4), "attention_mask": mask},
        {"x": x.transpose(0, 1), "attention_mask": mask},  # tokens first: not the mask's shape
        {"x": x[:, 0], "attention_mask": mask},  # pooled
        {"x": x, "attention_mask": mask, "decoder_input_ids": torch.zeros(2, 3)},  # whose tokens are these?
        {"x": x},
    ]
    see_inputs(model, linear_sites(model)[0], batches, lambda site, X, m: seen.append(None if m is None else m.sum()))
    assert seen == [3, 3, None, None, None, None]


def test_an_input_changed_in_place_is_another_one():
    class InPlace(Layers):
        def forward(self, x: Tensor) -> Tensor:
            a = self.layers[0](x)
            return a + self.layers[1](x.add_(1))

    model, rule = InPlace([(3, 4), (3, 4)], torch.float64), SubspaceProjection(energy=1)
    rule.observe(model, lambda: [{"x": torch.eye(4, dtype=torch.float64)[:1]}])
    assert len(rule._memory.inputs) == 2
    assert rule._memory.inputs[0].memory.C[1, 1] == 0 < rule._memory.inputs[1].memory.C[1, 1]


def test_a_transformer_keeps_its_old_outputs():
    """Tokens that are padding are not protected, and nothing reads them; all others stay to rounding."""
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "dense"], lora_dropout=0.1)
    model = peft.get_peft_model(bert(width=48, inner=64), lora, autocast_adapter_dtype=False).double()
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    old = {"input_ids": torch.randint(50, (2, 6)), "attention_mask": mask}
    noise = {**old, "input_ids": torch.where(mask.bool(), old["input_ids"], 7)}  # other padding
    rule = SubspaceProjection(energy=1)

    def learn(index: int, batch: dict[str, Tensor], steps: int) -> None:
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.01)
        attached = attach(model.train(), optimizer, [rule], index=index, batches=lambda: [batch])
        for _ in range(steps):
            optimizer.zero_grad()
            (model(**batch).last_hidden_state - 1).square().mean().backward()
            optimizer.step()
        attached.remove()

    def outputs() -> Tensor:
        model.eval()
        with torch.no_grad():
            return model(**noise).last_hidden_state[mask.bool()]

    learn(0, old, 10)
    rule.end_task(TaskContext(model, 0, lambda: [old]))
    assert model.training and all(m.training for m in model.modules())  # as they were
    assert max(kept.M.shape[1] / len(kept.M) for kept in rule._memory.inputs if len(kept.M) > 4) < 0.5  # 9 tokens
    before = outputs()
    learn(1, {"input_ids": torch.randint(50, (8, 6)), "attention_mask": torch.ones(8, 6)}, 30)
    assert (outputs() - before).norm() / before.norm() <= 1e-12
    assert all(m.holds is not False for m in rule.guarantee())


def test_conv1d_keeps_its_weight_transposed():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = Conv1D(5, 12).double()
    layer.bias.requires_grad_(False)
    X = torch.randn(4, 12, dtype=torch.float64)
    rule = SubspaceProjection(energy=1)
    rule.observe(layer, lambda: [{"x": X}])
    before = layer(X).detach()
    optimizer = torch.optim.AdamW([layer.weight], lr=0.1)
    attach(layer, optimizer, [rule], index=1)
    for _ in range(3):
        layer(torch.randn(6, 12, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer(X).detach(), before, rtol=1e-12, atol=1e-12)
    assert rule.guarantee()[0].holds


def test_frozen_after_the_first_task_all_weights_keep_old_outputs():
    """GPM's way: biases and norms train in the first task, and are frozen from then on."""
    course = Course("all", rule=SubspaceProjection(energy=1, unprotected="freeze"))
    bias = course.model.blocks[0].up.bias
    start = bias.detach().clone()
    course.first(20)
    after = bias.detach().clone()
    assert not torch.equal(start, after)
    assert course.drift(30) < 1e-12
    assert torch.equal(bias, after) and not bias.requires_grad


def test_allowed_but_said_so():
    course = Course("all", rule=SubspaceProjection(energy=1, unprotected="allow")).first(5)
    assert course.drift(5) > 1e-6
    assert "12 trained parameters are not protected" in course.rule.guarantee()[1].note


# ---- the memory ----


def test_evaluation_never_changes_the_memory():
    course = Course("lora", rule=SubspaceProjection()).first(3)
    before = course.rule.state()
    course.model(course.new[0])
    course.learn(1, 2)
    after = course.rule.state()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_resumes_between_tasks_and_within_one_to_the_bit():
    """Check 9: M, C and W_ref come back bit by bit; within a task, W_ref is not taken from the weights."""
    straight = Course("lora", torch.float32, SubspaceProjection(energy=0.9)).first(5)
    resumed = SubspaceProjection(energy=0.9)
    resumed.load_state(load(save(straight.rule.state())))
    assert same(straight.rule.state(), resumed.state())

    straight.learn(1, 3)
    midway = load(save(straight.rule.state()))
    assert any(key.startswith("reference.") for key in midway)
    resumed.load_state(midway)
    resumed.begin_task(TaskContext(straight.model, 1))
    assert same(midway, resumed.state())
    weights, projected = trained(straight.model), []
    moved = [p.detach() + 0.1 for p in weights]
    for rule in (straight.rule, resumed):
        for p, value in zip(weights, moved, strict=True):
            p.data.copy_(value)
        rule.on_update([])
        projected.append({str(i): p.detach().clone() for i, p in enumerate(weights)})
    assert same(*projected) and not torch.equal(projected[0]["0"], moved[0])
    straight.end(1)
    assert not any(key.startswith("reference.") for key in straight.rule.state())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- refusals ----


def test_settings_out_of_range_are_refused():
    for bad in (
        {"energy": 0}, {"energy": 1.5}, {"cap": 0}, {"cap": 2}, {"strength": -1}, {"strength": math.nan},
        {"on": "weights"}, {"unprotected": "ignore"}, {"sketch_rows": 0},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(bad))):
            SubspaceProjection(**bad)


def test_what_cannot_be_protected_is_named():
    with pytest.raises(RuleError, match=r"`blocks.0.norm.weight` \(12 such"):
        SubspaceProjection().begin_task(TaskContext(network("all"), 0))
    with pytest.raises(RuleError, match="trains none"):
        SubspaceProjection().begin_task(TaskContext(network("none"), 0))
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tied[1].weight = tied[0].weight
    assert linear_sites(tied) == ([], {"0.weight": tied[0].weight})


def test_a_memory_that_does_not_fit_is_refused():
    with pytest.raises(RuleError, match="no past at task index 1"):
        SubspaceProjection().begin_task(TaskContext(network("lora"), 1))
    rule = Course("lora", rule=SubspaceProjection()).first(1).rule
    with pytest.raises(RuleError, match="other layers"):
        rule.begin_task(TaskContext(network("adapter"), 1))
    state = rule.state()
    for wrong, match in (
        ({**state, "other": torch.zeros(1)}, "no part"),
        ({k: v for k, v in state.items() if not k.startswith("reads.")}, "incomplete"),
        ({k: v for k, v in state.items() if k != "input.0.C"}, "incomplete"),
        ({**state, "input.0.M": torch.zeros(1)}, "stored"),
    ):
        with pytest.raises(RuleError, match=match):
            SubspaceProjection().load_state(wrong)


def test_inputs_that_are_not_seen_are_refused():
    model = network("lora")
    rule = SubspaceProjection()
    with pytest.raises(RuleError, match="begin_task"):
        rule.end_task(TaskContext(model, 0))
    rule.begin_task(TaskContext(model, 0))
    with pytest.raises(RuleError, match="batches"):
        rule.end_task(TaskContext(model, 0))
    with pytest.raises(RuleError, match="batches"):
        rule.observe(model, lambda: [])
    with pytest.raises(RuleError, match="not finite"):
        rule.observe(model, lambda: [{"x": torch.full((2, WIDTH), math.nan, dtype=torch.float64)}])
    assert not rule.state()
    spare = Layers([(2, 9), (2, 9)], torch.float64)
    spare.forward = lambda x: spare.layers[0](x)
    with pytest.raises(RuleError, match="`layers.1` trains but was not called"):
        rule.observe(spare, lambda: [{"x": torch.randn(2, 9, dtype=torch.float64)}])
    attention = nn.MultiheadAttention(4, 2, bias=False)
    attention.in_proj_weight.requires_grad_(False)
    x = torch.randn(3, 4)
    with pytest.raises(RuleError, match="no protected layer was called"):
        rule.observe(attention, lambda: [{"query": x, "key": x, "value": x}])


def test_padding_alone_is_refused():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    model.forward = lambda x, attention_mask: model[0](x)
    with pytest.raises(RuleError, match="padding alone"):
        SubspaceProjection().observe(model, lambda: [{"x": torch.randn(2, 3, 4), "attention_mask": torch.zeros(2, 3)}])


# ---- long tokens ----


class Sink(nn.Module):
    """A layer whose first token is a hundred times as long as the others, as in decoders."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def sink(seed: int, rows: int = 6) -> Tensor:
    x = torch.randn(rows, 8, 32, generator=torch.Generator().manual_seed(seed)).double()
    x[..., :24] *= 0.05  # few directions matter
    x[:, 0] = 100 * torch.eye(32, dtype=torch.float64)[31]
    return x


@pytest.mark.parametrize("unit", [None, True, False])
def test_a_long_first_token_does_not_take_the_energy_of_the_others(unit):
    torch.manual_seed(0)
    model, rule = Sink().double(), SubspaceProjection(0.99, unit_tokens=unit)
    rule.observe(model, lambda: [{"x": sink(0)}])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model(sink(0)[:, 1:]).detach()
    attach(model, optimizer, [rule], index=1, batches=lambda: [{"x": sink(1)}])
    for _ in range(100):
        optimizer.zero_grad()
        (model(sink(1)) - 1)[:, 1:].square().mean().backward()
        optimizer.step()
    moved = float((model(sink(0)[:, 1:]).detach() - before).norm() / before.norm())
    measured = {m.name: m for m in rule.guarantee()}
    assert all(m.holds is not False for m in measured.values())
    limit = measured["what the drift |dW x| / |x| of any one old token cannot pass"].value
    x = sink(0).flatten(0, 1)
    W_ref = rule._split_references()[0][1]
    change = (x @ (model.layer.weight.detach() - W_ref).mT).norm(dim=1) / x.norm(dim=1)
    assert change.max() <= limit
    if unit is False:
        assert moved > 1 and measured["drift of a layer on old inputs |dW X| / |X|"].value < 0.1 < limit
    else:
        assert moved < 0.6
    assert ("counts alike" in measured["old inputs left unprotected"].note) == (unit is not False)


def test_a_memory_goes_on_with_the_setting_that_it_was_made_with():
    """Memories of versions that knew no unit tokens are by length, whatever the default is now."""
    old = SubspaceProjection(0.9, unit_tokens=False)
    old.observe(Sink().double(), lambda: [{"x": sink(0)}])
    state = load(save(old.state()))
    assert "unit" not in state
    rule, new = SubspaceProjection(0.9), SubspaceProjection(0.9)
    rule.load_state(state)
    for going_on in (old, rule):
        going_on.observe(Sink().double(), lambda: [{"x": sink(1)}])
    assert all(torch.equal(value, rule.state()[key]) for key, value in old.state().items())
    new.observe(Sink().double(), lambda: [{"x": sink(0)}])
    assert "unit" in new.state()
    with pytest.raises(RuleError, match="unit_tokens=False"):
        SubspaceProjection(0.9, unit_tokens=True).load_state(state)
    again = SubspaceProjection(0.9)
    again.load_state(new.state())
    assert again._memory.unit and again.state().keys() == new.state().keys()
