from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from torch import nn

from perpetune.core.errors import ConfigError, RuleError
from perpetune.recipes import make_recipe
from perpetune.rules import RotationBall, TaskContext, attach


def model(*widths: int, dtype=torch.float32, base=None, std=0.0, **settings) -> peft.PeftModel:
    """Linear layers side by side with OFT by the exact Cayley transform; entries of Q of that size."""
    torch.manual_seed(0)
    settings = {"oft_block_size": 4, "use_cayley_neumann": False, "target_modules": r"\d+", **settings}
    layers = base or nn.Sequential(*(nn.Linear(d, 6, bias=False) for d in widths))
    tuned = peft.get_peft_model(layers, peft.OFTConfig(**settings), autocast_adapter_dtype=False).to(dtype)
    for Q in rows(tuned):
        Q.data.normal_(std=std)
    return tuned


def rows(tuned) -> list[nn.Parameter]:
    return [p for p in tuned.parameters() if p.requires_grad]


def skew(row: torch.Tensor) -> torch.Tensor:
    """Q (b x b) of its entries above the diagonal."""
    b = (1 + math.isqrt(1 + 8 * len(row))) // 2
    Q = row.new_zeros(b, b)
    Q[tuple(torch.triu_indices(b, b, 1))] = row
    return Q - Q.T


def cayley(row: torch.Tensor) -> torch.Tensor:
    Q = skew(row)
    eye = torch.eye(len(Q), dtype=row.dtype)
    return (eye - Q) @ torch.linalg.inv(eye + Q)


def by_name(rule) -> dict:
    found = {m.name: m for m in rule.guarantee()}
    return {key: next(m for name, m in found.items() if key in name) for key in ("|Q|", "|R - I|", "not move", "edge")}


@pytest.mark.parametrize("share", [False, True])
def test_projection_is_that_of_the_equation(share):
    """|Q_i|_F <= eps b^2 / sqrt(r): each block outside is scaled to that length, each block inside stays to the bit."""
    tuned = model(8, 24, 8, dtype=torch.float64, block_share=share, std=0.1)
    rule = RotationBall(0.02)
    rule.begin_task(TaskContext(tuned, 0))
    before = [Q.detach().clone() for Q in rows(tuned)]
    assert [len(Q) for Q in before] == ([1, 1, 1] if share else [2, 6, 2])
    rule.on_update(())
    scaled = 0
    for Q, start in zip(rows(tuned), before, strict=True):
        length = 0.02 * 4**2 / math.sqrt(len(Q))
        for row, old in zip(Q, start, strict=True):
            norm = torch.linalg.matrix_norm(skew(old))
            if norm > length:
                scaled += 1
                torch.testing.assert_close(row, old * length / norm, rtol=1e-14, atol=0)
            else:
                assert torch.equal(row, old)
    assert 0 < scaled < sum(map(len, before))


def test_the_radius_is_that_of_the_released_layers():
    """24 blocks of 32 at 768 inputs: 1.25e-2, where peft's own has 1.2e-5."""
    tuned = model(768, oft_block_size=32, std=1.0)
    rule = RotationBall(6e-5)
    rule.begin_task(TaskContext(tuned, 0))
    rule.on_update(())
    lengths = rows(tuned)[0].detach().norm(dim=1) * math.sqrt(2)
    torch.testing.assert_close(lengths, torch.full((24,), 1.2541e-2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [4, 96])
def test_it_never_leaves_the_ball_under_adamw(dtype, block_size):
    tuned = model(96, 192, dtype=dtype, oft_block_size=block_size)
    rule = RotationBall(1e-3 if block_size == 96 else 1e-2)
    optimizer = torch.optim.AdamW(rows(tuned), lr=0.3, weight_decay=0.1)
    attach(tuned, optimizer, [rule])
    for _ in range(4):
        for Q in rows(tuned):
            Q.grad = torch.randn_like(Q)
        optimizer.step()
    found = by_name(rule)
    assert found["|Q|"].holds and found["|R - I|"].holds
    assert found["|Q|"].value == pytest.approx(1, rel=0.02)
    assert found["edge"].value > 0.9 or dtype == torch.bfloat16
    assert [name for name, *_ in found["|Q|"].parts] == ["base_model.model.0", "base_model.model.1"]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("base", [None, nn.Sequential(nn.Embedding(5, 24))])
def test_figures_are_those_of_the_dense_rotation(base, share):
    tuned = model(24, 16, dtype=torch.float64, base=copy.deepcopy(base), block_share=share, std=0.05)
    rule = RotationBall(0.1)
    rule.begin_task(TaskContext(tuned, 0))
    shares = []
    for Q in rows(tuned):
        length = 0.1 * 16 / math.sqrt(len(Q))
        largest = max(torch.linalg.matrix_norm(cayley(row) - torch.eye(4)).item() for row in Q.detach())
        shares.append(largest / (2 * length))
    assert by_name(rule)["|R - I|"].value == pytest.approx(max(shares), rel=1e-12)
    assert [value for _, value, _ in by_name(rule)["|R - I|"].parts] == pytest.approx(shares, rel=1e-12)


def regression(rule: RotationBall | None = None, **settings) -> tuple[float, float, nn.Parameter]:
    """First and last loss of 100 steps towards outputs of the same layer with its inputs rotated; and Q."""
    tuned = model(96, oft_block_size=32, **settings)
    x = torch.randn(256, 96)
    turned = x @ cayley(0.02 * torch.randn(96 * 95 // 2))
    with torch.no_grad(), tuned.disable_adapter():
        y = tuned(turned)
    (Q,) = rows(tuned)
    optimizer = torch.optim.AdamW([Q], lr=1e-3)
    if rule is not None:
        attach(tuned, optimizer, [rule])

    def loss() -> torch.Tensor:
        return (tuned(x) - y).square().mean()

    first = loss().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return first, loss().item(), Q


def test_it_learns_where_the_default_of_peft_does_not():
    """Check 7: peft's radius is without b^2, 1000 times less; with b^2 both are the same ball."""
    first, free, _ = regression()
    assert regression(coft=True)[1] > 0.9999 * first
    rule = RotationBall(6e-5)
    _, ball, Q = regression(rule)
    assert ball == pytest.approx(regression(coft=True, eps=6e-5 * 32**2)[1], rel=1e-3)
    assert free < 0.6 * first < ball < 0.98 * first
    lengths = Q.detach().norm(dim=1) * math.sqrt(2)
    assert lengths.max() <= 6e-5 * 32**2 / math.sqrt(3) * (1 + 1e-6)
    assert all(m.holds is not False for m in rule.guarantee())
    wider = RotationBall(1e-3)
    assert free < regression(wider)[1] < 0.7 * first


@pytest.mark.parametrize(("size", "neumann"), [(0.11, 1e-4), (0.33, 6.6e-3), (1.08, 0.46), (2.2, 170)])
def test_exact_cayley_stays_orthogonal_where_the_neumann_series_does_not(size, neumann):
    """max |R R^T - I| at |Q|_2 of that size: the table of the sheet, and the configuration of the recipes."""

    def gap(config: peft.OFTConfig) -> float:
        torch.manual_seed(0)
        layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"f": nn.Linear(768, 8)}))["f"]
        Q = layer.oft_R["default"].weight.data.normal_()
        Q.mul_(size / max(torch.linalg.matrix_norm(skew(row), 2).item() for row in Q))
        R = layer.get_delta_weight("default").detach().double()
        return (R @ R.T - torch.eye(768)).abs().max().item()

    exact = make_recipe({"name": "oft", "target": ["f"]}).tuner.config
    assert gap(exact) < 2e-6
    assert neumann / 5 < gap(peft.OFTConfig(target_modules=["f"])) < neumann * 5


def test_a_neumann_series_is_only_observed():
    for exact in (True, False):
        rule = RotationBall(1e-2)
        rule.begin_task(TaskContext(model(8, std=0.1, use_cayley_neumann=not exact), 0))
        found = by_name(rule)["|R - I|"]
        assert (found.bound is not None) == exact == ("Neumann" not in found.note and "neumann" not in found.note)


def test_a_run_in_which_nothing_moved_warns():
    tuned = model(8, 8, std=0.01)
    rule = RotationBall(1.0)
    rule.begin_task(TaskContext(tuned, 0))
    assert by_name(rule)["not move"].holds is False and by_name(rule)["not move"].value == 1
    rows(tuned)[1].data[0, 0] += 1e-3
    assert by_name(rule)["not move"].holds is True and by_name(rule)["not move"].value == 0.75
    rule.end_task(TaskContext(tuned, 0))
    assert rule.guarantee() == []


def test_weights_that_are_not_numbers_keep_no_promise():
    tuned = model(8, 8, std=0.01)
    rule = RotationBall(1.0)
    rule.begin_task(TaskContext(tuned, 0))
    rows(tuned)[1].data[0, 0] = math.nan
    rule.on_update(())
    assert by_name(rule)["|Q|"].holds is False and by_name(rule)["|R - I|"].holds is False


def test_work_does_not_grow_with_the_layers(counter):
    """Layers of like shape are laid together; what is done to each in place takes one operation."""
    counts = []
    for layers in (2, 20):
        rule = RotationBall()
        rule.begin_task(TaskContext(model(*[8] * layers), 0))
        with counter() as counted:
            rule.on_update(())
        counts.append(counted.ops)
    assert counts[1] <= counts[0] + 18


def test_adapters_that_do_not_train_or_act_are_left_alone():
    tuned = model(8, std=1.0)
    tuned.add_adapter("second", peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=r"\d+"))
    tuned.set_adapter("second")
    first = tuned.base_model.model[0].oft_R["default"].weight
    rule, kept = RotationBall(), first.detach().clone()
    rule.begin_task(TaskContext(tuned, 0))
    rule.on_update(())
    assert torch.equal(first, kept)
    with tuned.disable_adapter(), pytest.raises(RuleError, match="trains none"):
        rule.begin_task(TaskContext(tuned, 0))


def test_two_projections_are_refused():
    with pytest.raises(RuleError, match="leave `coft` off"):
        RotationBall().begin_task(TaskContext(model(8, coft=True), 0))


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), float("inf")])
def test_radius_out_of_range(radius):
    with pytest.raises(ConfigError, match="radius"):
        RotationBall(radius)
