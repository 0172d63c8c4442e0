from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from perpetune.core.errors import ConfigError, RuleError
from perpetune.rules import OrthogonalToPast, TaskContext, attach, lora_pairs

FORMS = ("squared", "absolute")
SHAPES = [(6, 8), (8, 8), (3, 10)]


def learn(rule, model, tasks, first=0):
    """Begin and end tasks, each with random A; returns the A of all of them, layer by layer."""
    history = {pair.name: [] for pair in lora_pairs(model)}
    for index in range(first, first + tasks):
        rule.begin_task(TaskContext(model, index))
        for pair in lora_pairs(model):
            nn.init.normal_(pair.A)
            history[pair.name].append(pair.A.detach().clone())
        rule.end_task(TaskContext(model, index))
    return history


def equation(form, history, model, strength, norm_strength=0.0):
    """The term as it is printed, layer by layer, past task by past task."""
    total = 0.0
    for pair in lora_pairs(model):
        for past in history[pair.name]:
            overlap = past @ pair.A.T  # r x r
            total = total + strength * (overlap.square().sum() if form == "squared" else overlap.abs().sum())
        if norm_strength:
            total = total + norm_strength * (pair.A.norm() + pair.B.norm())
    return total


def gradients(rule, model, index):
    for p in model.parameters():
        p.grad = None
    rule.begin_task(TaskContext(model, index))
    rule.on_gradient()
    return [p.grad for pair in lora_pairs(model) for p in (pair.A, pair.B)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm_strength", [0.0, 0.2])
@pytest.mark.parametrize(
    "tasks", [1, 2, 20]
)  # 2 x rank 2 rows are d_in / 2 of the first layers, 20 are past the switch
def test_gradient_is_that_of_the_equation(form, norm_strength, tasks, toy, relative):
    model = toy(SHAPES, dtype=torch.float64)
    rule = OrthogonalToPast(0.7, form, norm_strength)
    history = learn(rule, model, tasks)
    for pair in lora_pairs(model):
        nn.init.normal_(pair.A)
    params = [p for pair in lora_pairs(model) for p in (pair.A, pair.B)]
    value = equation(form, history, model, 0.7, norm_strength)
    expected = torch.autograd.grad(value, params, allow_unused=True)
    found = gradients(rule, model, tasks)
    assert all((e is None) == (f is None) for e, f in zip(expected, found, strict=True))
    assert relative([f for f in found if f is not None], [e for e in expected if e is not None]) < 1e-12
    assert math.isclose(rule.penalty().item(), value.item(), rel_tol=1e-12)


@settings(max_examples=20, deadline=None)
@given(
    d_in=st.integers(1, 24), d_out=st.integers(1, 8), rank=st.integers(1, 5), tasks=st.integers(1, 8),
    form=st.sampled_from(FORMS), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_shape_on_both_sides_of_the_switch(toy, relative, d_in, d_out, rank, tasks, form, seed):
    model = toy([(d_out, d_in), (d_in, d_in), (d_out, d_in)], rank=rank, seed=seed, dtype=torch.float64)
    rule = OrthogonalToPast(0.7, form)
    history = learn(rule, model, tasks)
    As = [pair.A for pair in lora_pairs(model)]
    expected = torch.autograd.grad(equation(form, history, model, 0.7), As)
    assert relative(gradients(rule, model, tasks)[::2], expected) < 1e-12
    kinds = {key.rpartition(".")[2] for key in rule.state()}
    assert kinds == ({"gram"} if form == "squared" and rank * tasks > d_in / 2 else {"rows"})


def test_ranks_may_differ_from_task_to_task(toy, relative):
    rule = OrthogonalToPast(0.7)
    history = learn(rule, toy(SHAPES, rank=2, dtype=torch.float64), 2)
    model = toy(SHAPES, rank=3, dtype=torch.float64)
    expected = torch.autograd.grad(equation("squared", history, model, 0.7), [pair.A for pair in lora_pairs(model)])
    assert relative(gradients(rule, model, 2)[::2], expected) < 1e-12


def test_equals_the_scan_of_parameter_names_of_the_released_code(toy):
    model = toy(SHAPES)
    rule = OrthogonalToPast(0.5, "absolute")
    history = learn(rule, model, 3)
    rule.begin_task(TaskContext(model, 3))
    scanned = 0.0
    for name, param in model.named_parameters():
        if "lora_A" in name:
            for other, past in history.items():
                if name.split(".lora_A")[0] == other:
                    scanned += torch.abs(torch.mm(torch.cat(past), param.T)).sum()
    assert rule.penalty().item() == pytest.approx(0.5 * scanned.item(), rel=1e-6)


@pytest.mark.parametrize("layers, d_in, published", [(144, 1024, 76.6), (64, 4096, 17.0)])
def test_expected_size_at_random_initialisation(layers, d_in, published, toy):
    """E[sum |A_past A_t^T|] = (t-1) L r^2 sqrt(2/pi) / (3 sqrt(d_in)); T5-large and LLaMA-7B, q and v."""
    rule = OrthogonalToPast(1.0, "absolute")
    past, model = (toy([(1, d_in)] * layers, rank=8, seed=seed) for seed in (1, 2))
    rule.begin_task(TaskContext(past, 0))
    rule.end_task(TaskContext(past, 0))
    rule.begin_task(TaskContext(model, 1))
    expected = layers * 64 * math.sqrt(2 / math.pi) / (3 * math.sqrt(d_in))
    assert expected == pytest.approx(published, rel=0.01)
    assert rule.penalty().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_first_task_keeps_its_bits(form, toy):
    weights = []
    for rules in ([], [OrthogonalToPast(0.5, form)]):
        model = toy(SHAPES)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        attach(model, optimizer, rules)
        for seed in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 10, generator=torch.Generator().manual_seed(seed))).backward()
            optimizer.step()
        weights.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert rules[0].penalty().item() == 0.0
    assert rules[0].guarantee() == []


def test_norm_term_at_zero_is_flat_as_in_autograd(toy):
    model = toy([(6, 8)])
    (pair,) = lora_pairs(model)
    nn.init.zeros_(pair.B)
    dA, dB = gradients(OrthogonalToPast(0.0, norm_strength=0.3), model, 0)
    assert torch.equal(dB, torch.zeros_like(dB))
    torch.testing.assert_close(dA, 0.3 * pair.A.detach() / pair.A.detach().norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tasks", [1, 9])
def test_half_precision_is_computed_in_fp32(form, tasks, toy, relative):
    model = toy([(6, 32)], dtype=torch.bfloat16)
    rule = OrthogonalToPast(0.7, form)
    history = {name: [A.double() for A in As] for name, As in learn(rule, model, tasks).items()}
    for pair in lora_pairs(model):
        nn.init.normal_(pair.A)
    exact = copy.deepcopy(model).double()
    expected = torch.autograd.grad(equation(form, history, exact, 0.7), [pair.A for pair in lora_pairs(exact)])
    found = gradients(rule, model, tasks)[::2]
    assert found[0].dtype == torch.bfloat16
    assert {t.dtype for t in rule.state().values()} == {torch.float32}
    assert relative(found, expected) < 2**-8  # one rounding


def test_overlap_shrinks_under_adamw(toy):
    figures = {}
    for strength in (1e-12, 1.0):
        rule = OrthogonalToPast(strength)
        model = toy([(6, 64)], rank=4)
        learn(rule, model, 3)
        nn.init.normal_(lora_pairs(model)[0].A)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        attached = attach(model, optimizer, [rule], index=3)
        for seed in range(200):
            optimizer.zero_grad()
            model(torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))).backward()
            optimizer.step()
        attached.remove()
        figures[strength] = [m.value for m in rule.guarantee()]
    assert figures[1.0][0] < 0.3 * figures[1e-12][0]
    assert figures[1.0][1] < 0.05 * figures[1e-12][1]


@pytest.mark.parametrize("tasks", [3, 9])  # rows; Gram matrix of a past that does not span the space
def test_guarantee_is_the_angle_to_the_span_of_the_past(tasks, toy):
    model = toy([(4, 24)], rank=2)
    (pair,) = lora_pairs(model)
    rule = OrthogonalToPast(1.0)
    for index in range(tasks):
        rule.begin_task(TaskContext(model, index))
        with torch.no_grad():
            pair.A.normal_()[:, 5:] = 0  # all past A read the first five inputs
        rule.end_task(TaskContext(model, index))
    with torch.no_grad():
        pair.A.zero_()
        pair.A[0, 2], pair.A[0, 7] = 3.0, 4.0  # cosine 3/5
        pair.A[1, 9] = 1.0
    rule.begin_task(TaskContext(model, tasks))
    largest, overlap = rule.guarantee()
    assert next(iter(rule.state())).endswith("gram" if tasks == 9 else "rows")
    assert largest.value == pytest.approx(0.6, abs=1e-5)
    assert overlap.value == pytest.approx(rule.penalty().item())
    assert largest.bound is None and overlap.bound is None


def test_task_after_the_first_without_a_past_is_an_error(toy):
    with pytest.raises(RuleError, match="knows no past at task index 2"):
        OrthogonalToPast(0.5).begin_task(TaskContext(toy(), 2))


def test_first_task_with_a_past_is_an_error(toy):
    rule = OrthogonalToPast(0.5)
    learn(rule, toy(), 1)
    with pytest.raises(RuleError, match="begins task index 0"):
        rule.begin_task(TaskContext(toy(), 0))


def test_past_of_other_layers_is_an_error(toy):
    rule = OrthogonalToPast(0.5)
    learn(rule, toy([(6, 8), (8, 8)]), 1)
    with pytest.raises(RuleError, match=r"`base_model.model.layers.2` has d_in = 5, in earlier tasks no LoRA \(1 of 3"):
        rule.begin_task(TaskContext(toy([(6, 8), (8, 8), (4, 5)]), 1))
    with pytest.raises(RuleError, match=r"layers.1` has d_in = 9, in earlier tasks d_in = 8"):
        rule.begin_task(TaskContext(toy([(6, 8), (8, 9)]), 1))


def test_a_term_that_cannot_act_is_an_error(toy):
    model = toy()
    rule = OrthogonalToPast(0.5)
    rule.begin_task(TaskContext(model, 0))
    for pair in lora_pairs(model):
        nn.init.zeros_(pair.A)
    rule.end_task(TaskContext(model, 0))
    with pytest.raises(RuleError, match="exactly 0"):
        rule.begin_task(TaskContext(toy(), 1))


def test_frozen_A_is_an_error(toy):
    rule = OrthogonalToPast(0.5)
    learn(rule, toy(), 1)
    model = toy()
    lora_pairs(model)[0].A.requires_grad_(False)
    with pytest.raises(RuleError, match="frozen"):
        rule.begin_task(TaskContext(model, 1))


def test_foreign_state_is_an_error(toy):
    rule = OrthogonalToPast(0.5, "absolute")
    with pytest.raises(RuleError, match="expected `<layer>.rows`"):
        rule.load_state({"layer.Q": torch.zeros(2, 3)})
    with pytest.raises(RuleError, match="expected `<layer>.rows`"):
        rule.load_state({"layer.gram": torch.zeros(2, 3)})
    with pytest.raises(RuleError, match="absolute form needs all past rows"):
        rule.load_state({"layer.gram": torch.zeros(3, 3)})


@pytest.mark.parametrize(
    "settings",
    [dict(strength=-1.0), dict(strength=math.nan), dict(strength=1, norm_strength=-1), dict(strength=1, form="l2")],
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError, match="OrthogonalToPast"):
        OrthogonalToPast(**settings)


def test_strength_zero_does_nothing_and_needs_nothing(counter):
    rule = OrthogonalToPast(0.0)
    context = TaskContext(nn.Linear(2, 2), 3)
    rule.begin_task(context)
    with counter() as counted:
        rule.on_gradient()
    rule.end_task(context)
    assert counted.ops == 0 and rule.state() == {} and rule.guarantee() == []
