"""What every rule must keep to. A new rule joins with one line in CASES."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load, save
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from perpetune.core.errors import RuleError
from perpetune.rules import (
    RULES,
    FixedMask,
    InfLoRA,
    OrthogonalToPast,
    RotationBall,
    Rule,
    SoftOrthogonal,
    StepMask,
    SubspaceProjection,
    TaskContext,
    WeightProjection,
    attach,
    lora_pairs,
)
from perpetune.rules.product_l1 import FactorL1, ProductL1, ReleasedProductL1
from perpetune.tuners import GivensConfig


@dataclass(frozen=True)
class Case:
    """`make`: a new rule, strong enough to matter. `grows`: its cost per step grows with the number of tasks.
    `any_weights`: it acts on whatever trains, LoRA or not. `config`: of its tuner, if that is not LoRA. `hooks`: it
    acts during steps, and not by what it does before them alone."""

    make: Callable[[], Rule]
    grows: bool = False
    any_weights: bool = False
    config: Callable[[], peft.PeftConfig] | None = None
    hooks: bool = True


def exact_oft() -> peft.PeftConfig:
    return peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=r"layers\.\d+")


def quasi() -> peft.PeftConfig:
    return GivensConfig(target_modules=r"layers\.\d+", form="quasi")


CASES = {
    "ProductL1": Case(lambda: ProductL1(1e-3)),
    "ReleasedProductL1": Case(lambda: ReleasedProductL1(1e-2)),
    "FactorL1": Case(lambda: FactorL1(1e-3)),
    "OrthogonalToPast squared": Case(lambda: OrthogonalToPast(0.5)),
    "OrthogonalToPast absolute": Case(lambda: OrthogonalToPast(0.5, "absolute"), grows=True),
    "OrthogonalToPast with norms": Case(lambda: OrthogonalToPast(0.5, norm_strength=0.1)),
    "SubspaceProjection": Case(lambda: SubspaceProjection(0.9)),
    "SubspaceProjection both": Case(lambda: SubspaceProjection(0.9, "both")),
    "SubspaceProjection sketched": Case(lambda: SubspaceProjection(0.9, "gradient", wide=4, sketch_rows=3)),
    "StepMask gradient": Case(lambda: StepMask(0.3), any_weights=True),
    "StepMask update": Case(lambda: StepMask(0.3, "update"), any_weights=True),
    "FixedMask Fisher": Case(lambda: FixedMask(0.3), any_weights=True),
    "FixedMask gradient": Case(lambda: FixedMask(0.1, "gradient", "per_tensor", batch=2), any_weights=True),
    "FixedMask each task": Case(lambda: FixedMask(0.3, "absolute", each_task=True), any_weights=True),
    "RotationBall": Case(lambda: RotationBall(1e-2), config=exact_oft),
    "InfLoRA": Case(lambda: InfLoRA(0.5, 0.9), hooks=False),
    "WeightProjection": Case(lambda: WeightProjection(2, branch="fresh")),
    "SoftOrthogonal": Case(lambda: SoftOrthogonal(0.1), config=quasi),
}
SHAPES = [(8, 8), (16, 16), (8, 8)]  # square, for the released form


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return request.param


@pytest.fixture
def toy(case, toy) -> Callable[..., peft.PeftModel]:
    """The shared one, or one with the tuner of the case, whose parameters are not those of the start."""

    def make(shapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> peft.PeftModel:
        model = toy(shapes, seed=seed, dtype=dtype)
        if case.config is None:
            return model
        model = peft.get_peft_model(model.unload(), case.config(), autocast_adapter_dtype=False)
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data += 0.3 * torch.randn_like(p)
        return model.to(dtype)

    return make


def batch(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def losses(model, seed: int = 0) -> Callable[[int], Iterator[torch.Tensor]]:
    dtype = next(model.parameters()).dtype
    return lambda n: (model(x) for x in batch(seed, dtype).split(n))


def train(model, rule: Rule, index: int, steps: int = 2, end: bool = True) -> list[torch.Tensor]:
    """One task, from begin to end; the trained parameters."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    inputs = {"x": batch(index, params[0].dtype)}
    attached = attach(
        model, optimizer, [rule], index=index, batches=lambda: iter([inputs]), losses=losses(model, index)
    )
    for number in range(steps):
        optimizer.zero_grad()
        model(batch(100 * index + number, params[0].dtype)).backward()
        optimizer.step()
    attached.remove()
    for measurement in rule.guarantee():
        assert math.isfinite(measurement.value) and measurement.holds is not False
    if end:
        rule.end_task(TaskContext(model, index))
    return [p.detach().clone() for p in params]


def remember(rule: Rule, toy, tasks: int):
    """The rule after so many tasks, each with an A of its own, and the model of the next one, begun."""
    model = toy(SHAPES)
    for index in range(tasks + 1):
        context = TaskContext(model, index, lambda: iter([{"x": batch(0)}]), losses(model))
        for pair in lora_pairs(model):
            nn.init.normal_(pair.A)
        rule.begin_task(context)
        if index < tasks:
            rule.end_task(context)
    model(batch(0)).backward()
    return model


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_rule_is_here():
    assert {type(case.make()) for case in CASES.values()} == set(RULES.values())


def test_state_survives_a_file(case, toy):
    rule, other = case.make(), case.make()
    train(toy(SHAPES), rule, 0)
    state = rule.state()
    other.load_state(load(save(state)))
    assert state.keys() == other.state().keys()
    assert all(torch.equal(state[key], value) for key, value in other.state().items())


def test_state_does_not_change_when_training_goes_on(case, toy):
    rule = case.make()
    train(toy(SHAPES), rule, 0)
    state = rule.state()
    kept = {key: value.clone() for key, value in state.items()}
    train(toy(SHAPES, seed=1), rule, 1)
    assert all(torch.equal(state[key], value) for key, value in kept.items())


@pytest.mark.parametrize("stopped_after", [1, 3])
def test_resumes_to_the_bit(case, toy, stopped_after):
    straight = case.make()
    for index in range(stopped_after):
        train(toy(SHAPES, seed=index), straight, index)
    resumed = case.make()
    resumed.load_state(load(save(straight.state())))
    results = [
        [train(toy(SHAPES, seed=index), rule, index) for index in (stopped_after, stopped_after + 1)]
        for rule in (straight, resumed)
    ]
    assert all(same(a, b) for a, b in zip(*results, strict=True))


def test_acts_on_the_second_task(case, toy):
    plain, ruled = Rule(), case.make()
    for rule in (plain, ruled):
        train(toy(SHAPES), rule, 0)
    assert not same(train(toy(SHAPES, seed=1), plain, 1), train(toy(SHAPES, seed=1), ruled, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_keeps_dtypes(case, toy, dtype):
    rule = case.make()
    for index in range(2):
        params = train(toy(SHAPES, seed=index, dtype=dtype), rule, index)
        assert all(p.dtype == dtype and p.isfinite().all() for p in params)


def test_one_step_is_the_same_under_accumulation(case, toy):
    """Section 6, check 6 of the LoRA sheet: the same samples in 1 or in 4 micro-batches."""
    results = []
    for parts in (1, 4):
        rule = case.make()
        train(toy(SHAPES, dtype=torch.float64), rule, 0)
        model = toy(SHAPES, seed=1, dtype=torch.float64)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        inputs = lambda: [{"x": batch(7, torch.float64)}]  # noqa: E731
        attach(model, optimizer, [rule], index=1, batches=inputs, losses=losses(model))
        for x in batch(7, torch.float64).chunk(parts):
            (model(x) / parts).backward()
        optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_cost_does_not_grow_with_the_tasks(case, toy, counter):
    cost = {}
    for tasks in (1, 30, 49):
        rule = case.make()
        remember(rule, toy, tasks)
        rule.on_gradient()  # gradients that are made of nothing, buffers
        with FlopCounterMode(display=False) as flops:
            rule.on_gradient()
        with counter() as counted:
            rule.on_gradient()
        cost[tasks] = (counted.ops, flops.get_total_flops())
    if case.grows:
        assert cost[49][1] > 1.5 * cost[30][1]
    else:
        assert cost[30] == cost[49]
        assert cost[49][0] <= cost[1][0]


def test_works_inside_a_wrapped_model_and_optimizer(case, toy):
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    results = []
    for wrap in (False, True):
        rule = case.make()
        for index in range(2):
            model = toy(SHAPES, seed=index)
            outer = Wrapped(model) if wrap else model
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            if wrap:
                optimizer = Accelerator(cpu=True).prepare(optimizer)
            attached = attach(
                outer, optimizer, [rule], index=index, batches=lambda: [{"x": batch(0)}], losses=losses(outer)
            )
            model(batch(index)).backward()
            optimizer.step()
            attached.remove()
            rule.end_task(TaskContext(outer, index))
        results.append([p.detach() for p in model.parameters()])
    assert same(*results)


def test_remove_takes_it_off(case, toy):
    stepped = []
    for remove in (None, True, False):
        torch.manual_seed(0)
        rule = case.make()
        model = remember(rule, toy, 1)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(params, lr=0.1)
        if remove is not None:
            attached = attach(model, optimizer, [rule], begin=False)
            if remove:
                attached.remove()
        optimizer.step()
        stepped.append([p.detach() for p in params])
    plain, removed, left = stepped
    assert same(plain, removed) and same(plain, left) != case.hooks


def test_nothing_to_act_on_is_an_error_that_says_what_is(case):
    model = nn.Linear(2, 2).requires_grad_(not case.any_weights)
    acts_on = "LoRA" if case.config is None else type(case.config()).__name__
    with pytest.raises(RuleError, match=acts_on):
        attach(model, torch.optim.SGD(model.parameters()), [case.make()])


def test_settings_are_fields_and_state_is_not_compared(case, toy):
    rule = case.make()
    train(toy(SHAPES), rule, 0, end=False)
    assert rule == case.make()
    assert "_pairs" not in repr(rule)
