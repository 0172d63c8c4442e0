from __future__ import annotations

import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from perpetune.core.errors import ConfigError, RuleError
from perpetune.rules import SoftOrthogonal, TaskContext, attach
from perpetune.tuners import GivensConfig

WIDTHS = (7, 12, 7, 2)


def model(widths=WIDTHS, dtype=torch.float64, shaken=True, seed=0, **settings) -> peft.PeftModel:
    torch.manual_seed(seed)
    config = GivensConfig(target_modules=r"\d+", **{"form": "quasi", **settings})
    base = nn.Sequential(*(nn.Linear(d, 3) for d in widths))
    tuned = peft.get_peft_model(base, config, autocast_adapter_dtype=False).to(dtype)
    if shaken:
        for p in blocks(tuned):
            p.data += 0.5 * torch.randn_like(p)
    return tuned


def blocks(tuned) -> list[nn.Parameter]:
    return [p for p in tuned.parameters() if p.requires_grad]


def equation(params, strength: float) -> torch.Tensor:
    """strength * sum of <alpha_i, beta_i>^2, block by block; what is trained is g - I."""
    I = torch.eye(2, dtype=params[0].dtype)  # noqa: E741
    return strength * sum(((g + I)[:, 0] @ (g + I)[:, 1]) ** 2 for p in params for g in p)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=4), st.integers(0, 999))
def test_gradient_is_that_of_the_equation(widths, seed):
    tuned = model(widths, seed=seed)
    rule = SoftOrthogonal(0.7)
    rule.begin_task(TaskContext(tuned, 0))
    value = equation(blocks(tuned), 0.7)
    expected = torch.autograd.grad(value, blocks(tuned))
    rule.on_gradient()
    for p, g in zip(blocks(tuned), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-14)
    rule.on_gradient()  # it is added to what is there
    torch.testing.assert_close(blocks(tuned)[0].grad, 2 * expected[0], rtol=1e-12, atol=1e-14)
    assert math.isclose(rule.penalty().item(), value.item(), rel_tol=1e-12)


def test_nothing_to_pull_at_where_columns_are_at_right_angles():
    tuned = model(shaken=False)
    rule = SoftOrthogonal(1.0)
    rule.begin_task(TaskContext(tuned, 0))
    for p in blocks(tuned):
        p.data += torch.diag(torch.tensor([1.0, -0.5]))  # columns of any length
    rule.on_gradient()
    assert rule.penalty() == 0 and all((p.grad == 0).all() for p in blocks(tuned))
    assert rule.guarantee()[0].value == 0


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_it_brings_columns_to_right_angles(strength):
    tuned = model()
    rule = SoftOrthogonal(strength)
    attach(tuned, optimizer := torch.optim.AdamW(blocks(tuned), lr=1e-2, weight_decay=0), [rule])
    before = rule.guarantee()[0].value
    for _ in range(300):
        optimizer.zero_grad()
        optimizer.step()
    cosine, penalty = rule.guarantee()
    assert cosine.holds is None and penalty.holds is None  # a penalty promises nothing
    assert before > 0.5 and (cosine.value < 0.01) == (strength > 0)


def test_largest_cosine_is_that_of_the_worst_block():
    tuned = model(shaken=False)
    rule = SoftOrthogonal()
    rule.begin_task(TaskContext(tuned, 0))
    blocks(tuned)[1].data[3] = torch.tensor([[1.0, 3.0], [0.0, 3.0]]) - torch.eye(2)
    blocks(tuned)[2].data[2] = -torch.eye(2)  # no angle at all
    assert rule.guarantee()[0].value == pytest.approx(math.sqrt(0.5))
    assert rule.guarantee()[1].value == pytest.approx(1e-3 * 9)


def test_half_precision_is_computed_in_fp32():
    tuned = model(dtype=torch.bfloat16)
    rule = SoftOrthogonal(1.0)
    rule.begin_task(TaskContext(tuned, 0))
    rule.on_gradient()
    wide = [p.detach().float().requires_grad_() for p in blocks(tuned)]
    for p, g in zip(blocks(tuned), torch.autograd.grad(equation(wide, 1.0), wide), strict=True):
        torch.testing.assert_close(p.grad, g.bfloat16(), rtol=0, atol=0)


def test_work_does_not_grow_with_the_layers(counter):
    """All blocks in one product; only making gradients of nothing takes one operation a layer."""
    counts = []
    for layers in (2, 20):
        tuned, rule = model([8] * layers), SoftOrthogonal()
        rule.begin_task(TaskContext(tuned, 0))
        rule.on_gradient()
        with counter() as counted:
            rule.on_gradient()
        counts.append(counted.ops - layers)  # each gradient's `detach`
    assert counts[1] <= counts[0] + 20


def test_adapters_that_do_not_train_or_act_are_left_alone():
    tuned = model()
    tuned.add_adapter("second", GivensConfig(target_modules=r"\d+", form="quasi"))
    tuned.set_adapter("second")
    rule = SoftOrthogonal()
    rule.begin_task(TaskContext(tuned, 0))
    rule.on_gradient()
    assert {n.rpartition(".")[2] for n, p in tuned.named_parameters() if p.grad is not None} == {"second"}
    with tuned.disable_adapter(), pytest.raises(RuleError, match="trains none"):
        rule.begin_task(TaskContext(tuned, 0))


@pytest.mark.parametrize("form", ["strict", "norm"])
def test_rotations_without_free_blocks_need_no_penalty(form):
    with pytest.raises(RuleError, match=r"GivensConfig\(form='quasi'\)"):
        SoftOrthogonal().begin_task(TaskContext(model(form=form), 0))


@pytest.mark.parametrize("strength", [-1e-3, float("nan"), float("inf")])
def test_strength_out_of_range(strength):
    with pytest.raises(ConfigError, match="strength"):
        SoftOrthogonal(strength)
