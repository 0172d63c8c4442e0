from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from perpetune.core.errors import ConfigError, RuleError
from perpetune.rules import StepMask, TaskContext, attach


class Bag(nn.Module):
    """Weights of some shapes, all of one value."""

    def __init__(self, *shapes: tuple[int, ...], value: float = 0.0, dtype=torch.float32) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.full(shape, value, dtype=dtype) for shape in shapes)


def walk(rule: StepMask | None, optimizer: type, steps: int, *, entries: int = 1000, **settings) -> tuple:
    """Steps on g ~ N(0.5, 1), the same gradients whatever the rule: displacement, and the last step's share moved."""
    model = Bag((entries,))
    (w,) = model.parameters()
    stepper = optimizer([w], **settings)
    if rule is not None:
        attach(model, stepper, [rule])
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        before = w.detach().clone()
        w.grad = torch.randn(entries, generator=generator) + 0.5
        stepper.step()
    return -w.detach().mean().item(), (w != before).float().mean().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_is_that_of_the_equation(dtype):
    """g <- M g / keep, M of zeros and ones, of the stated mean, another one at every step."""
    model, keep = Bag((60, 50), (700,), dtype=dtype), 0.3
    rule = StepMask(keep)
    rule.begin_task(TaskContext(model, 0))
    masks = []
    for _ in range(2):
        gradients = [torch.randn_like(p) for p in model.parameters()]
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g.clone()
        rule.on_gradient()
        M = torch.cat([(p.grad != 0).flatten() for p in model.parameters()])
        g = torch.cat([g.flatten() for g in gradients])
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.testing.assert_close(found, M * g / keep, rtol=0, atol=0)
        assert abs(M.double().mean() - keep) < 4 * math.sqrt(keep * (1 - keep) / len(M))
        masks.append(M)
    agree = (masks[0] == masks[1]).double().mean()
    assert abs(agree - (keep**2 + (1 - keep) ** 2)) < 0.04


def test_update_is_that_of_the_equation_to_the_bit():
    """w <- M w + (1 - M) w_before: outside the mask neither moments nor decay move anything, -0 and all."""
    model = Bag((40, 50), value=1.0, dtype=torch.float64)
    (w,) = model.parameters()
    w.data[0] = -0.0
    optimizer = torch.optim.AdamW([w], lr=1e-2, weight_decay=0.1)
    attach(model, optimizer, [StepMask(0.3, "update")])
    reference = nn.Parameter(w.detach().clone())
    plain = torch.optim.AdamW([reference], lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        before = w.detach().clone()
        with torch.no_grad():
            reference.copy_(before)
        w.grad = torch.randn_like(w)
        reference.grad = w.grad.clone()
        plain.step()
        optimizer.step()
        same = w.detach().view(torch.int64) == before.view(torch.int64)
        stepped = w.detach().view(torch.int64) == reference.detach().view(torch.int64)
        assert (same | stepped).all()
        assert abs(stepped.double().mean() - 0.3) < 0.05


@pytest.mark.parametrize(("keep", "ratio"), [(0.2, 0.444), (0.3, 0.545), (0.5, 0.705)])
def test_under_adam_it_is_a_smaller_learning_rate(keep, ratio):
    """Check 1: displacement relative to plain Adam is sqrt(keep), and what was measured."""
    plain, _ = walk(None, torch.optim.Adam, 1500, lr=1e-3)
    masked, _ = walk(StepMask(keep), torch.optim.Adam, 1500, lr=1e-3)
    assert masked / plain == pytest.approx(math.sqrt(keep), rel=0.02)
    assert masked / plain == pytest.approx(ratio, rel=0.02)


def test_under_sgd_the_mean_step_is_that_of_all_gradients():
    plain, _ = walk(None, torch.optim.SGD, 300, lr=1e-3)
    masked, _ = walk(StepMask(0.2), torch.optim.SGD, 300, lr=1e-3)
    assert masked / plain == pytest.approx(1, rel=0.02)


def test_who_moves_in_one_step_under_adam():
    """Check 2: masking the gradient moves nearly all entries, masking the update those of the mask alone."""
    _, by_gradient = walk(StepMask(0.2), torch.optim.Adam, 30, entries=10_000, lr=1e-3)
    assert by_gradient > 0.99
    _, by_update = walk(StepMask(0.2, "update"), torch.optim.Adam, 30, entries=10_000, lr=1e-3)
    assert by_update == pytest.approx(0.2, abs=0.02)


def masks(seed: int, index: int) -> torch.Tensor:
    model, rule = Bag((50, 20)), StepMask(0.5, seed=seed)
    rule.begin_task(TaskContext(model, index))
    (w,) = model.parameters()
    w.grad = torch.ones_like(w)
    rule.on_gradient()
    return w.grad


def test_draws_follow_seed_and_task_and_leave_the_global_ones_alone():
    before = torch.get_rng_state()
    assert torch.equal(masks(0, 3), masks(0, 3))
    assert len({tuple(masks(seed, index).flatten().tolist()) for seed, index in [(0, 3), (3, 0), (0, 4), (1, 3)]}) == 4
    torch.rand(3)
    torch.set_rng_state(before)
    masks(0, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("on", ["gradient", "update"])
def test_keeping_all_is_plain_training(on):
    plain, _ = walk(None, torch.optim.AdamW, 5, lr=1e-2)
    assert walk(StepMask(1.0, on), torch.optim.AdamW, 5, lr=1e-2)[0] == plain


def test_parameters_without_a_gradient_stay_without():
    model = Bag((4,), (4,))
    rule = StepMask(0.5)
    rule.begin_task(TaskContext(model, 0))
    model.weights[0].grad = torch.ones(4)
    rule.on_gradient()
    assert model.weights[1].grad is None


@pytest.mark.parametrize("settings", [{"keep": 0.0}, {"keep": 1.1}, {"on": "moments"}, {"seed": -1}])
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigError):
        StepMask(**settings)


def test_nothing_that_trains():
    with pytest.raises(RuleError, match="trains none"):
        StepMask().begin_task(TaskContext(Bag((2,)).requires_grad_(False), 0))
