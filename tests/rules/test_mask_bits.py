from __future__ import annotations

import math

import pytest
import torch

from perpetune.rules import FixedMask, StepMask, TaskContext, mask_bits
from perpetune.rules.mask_bits import as_bits, draw, pieces, restore

SPECIAL = [-0.0, 0.0, math.inf, -math.inf, math.nan, 1.0, -2.5]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("mask_type", [torch.int8, torch.int16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_outside_is_the_start_and_inside_the_value_to_the_bit(dtype, mask_type):
    values, start = torch.cartesian_prod(*[torch.tensor(SPECIAL, dtype=dtype)] * 2).unbind(1)
    for inside in (True, False):
        found = values.clone()
        restore(found, start, torch.full_like(found, -int(inside), dtype=mask_type))
        assert torch.equal(as_bits(found), as_bits(values if inside else start))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (7,), (5, 3), (2, 40), (4, 1, 6)])
def test_pieces_are_views_of_every_entry(monkeypatch, shape):
    monkeypatch.setattr(mask_bits, "PIECE", 8)
    for values in (torch.zeros(shape), torch.zeros(shape[::-1]).permute(tuple(reversed(range(len(shape)))))):
        cut = pieces(values)
        assert all(piece.numel() <= max(8, values[:1].numel() if shape else 1) for piece in cut)
        for number, piece in enumerate(cut):
            piece.add_(number + 1)
        assert torch.equal(values, torch.cat(list(cut)) if shape else cut[0]) and (values > 0).all()


def test_draws_are_these_wherever_they_are_made():
    expected = [[1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0, 1, 1, 0, 0, 0]]
    assert draw(torch.empty(2, 11), 0.3, seeded()).tolist() == expected
    assert draw(torch.empty(22, dtype=torch.float64), 0.3, seeded()).view(2, 11).tolist() == expected


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.3, 0.01, 2**-16, 1e-9])
def test_draws_have_the_chance_that_is_asked_for(keep):
    n = 2_000_003
    chance = max(keep, 2**-16)
    M = draw(torch.empty(n), keep, seeded(1))
    assert M.shape == (n,) and set(M.unique().tolist()) <= {0, 1}
    assert abs(int(M.sum()) - chance * n) <= 4 * math.sqrt(n * chance * (1 - chance))
    both = int((M[1:] * M[:-1]).sum())  # neighbours know nothing of one another
    spread = math.sqrt(n * chance**2 * (1 - chance) * (1 + 3 * chance))
    assert abs(both - chance**2 * (n - 1)) <= 4 * spread


class Weights(torch.nn.Module):
    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(tensors)


@pytest.mark.parametrize("rule", [StepMask(0.5), StepMask(0.5, "update"), FixedMask(0.5, "random")])
def test_large_and_transposed_weights_are_masked_piece_by_piece(monkeypatch, rule):
    monkeypatch.setattr(mask_bits, "PIECE", 64)
    model = Weights(torch.zeros(50, 40), torch.zeros(40, 50).T, torch.zeros(()))
    rule.begin_task(TaskContext(model, 0))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    rule.on_gradient()
    before = [p.detach().clone() for p in rule.watches()]
    for p in model.parameters():
        p.data.add_(1)
    rule.on_update(before)
    for p in list(model.parameters())[:2]:
        masked = p.grad if rule == StepMask(0.5) else p.detach()
        inside = (masked != 0).reshape(-1, 50)  # rows of different pieces
        assert 0.4 < inside.double().mean() < 0.6
        assert len({tuple(row.tolist()) for row in inside}) == len(inside)
