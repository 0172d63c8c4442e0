"""Givens rotations: the tree, the equation against rotations plane by plane, and all forms of it against each other."""

from __future__ import annotations

import math

import pytest
import torch

from perpetune.tuners.givens_rotations import (
    MIN_RADIX,
    dense,
    from_identity,
    pairs,
    rotate,
    rotate_back,
    strict_blocks,
)

WIDTHS = [*range(2, 41), 96, 768]


def _plane_by_plane(x, parameters):
    """x P_last ... P_0, each plane by itself, straight from the definition of G(i, j; g)."""
    columns = list(x.unbind(-1))
    numbers = iter(range(len(parameters)))
    order = [(i, j, next(numbers)) for stage in pairs(x.shape[-1]) for i, j in stage]
    for i, j, n in reversed(order):
        g = parameters[n]
        if g.ndim == 0:
            (g_ii, g_ij), (g_ji, g_jj) = (g.cos(), -g.sin()), (g.sin(), g.cos())
        else:
            (g_ii, g_ij), (g_ji, g_jj) = g[0], g[1]
        columns[i], columns[j] = columns[i] * g_ii + columns[j] * g_ji, columns[i] * g_ij + columns[j] * g_jj
    return torch.stack(columns, -1)


def _parameters(form, d, dtype=torch.float64, std=0.5):
    generator = torch.Generator().manual_seed(d)
    if form == "strict":
        made = std * torch.randn(d - 1, generator=generator, dtype=dtype)
    else:
        made = torch.eye(2, dtype=dtype) + std * torch.randn(d - 1, 2, 2, generator=generator, dtype=dtype)
    return made.requires_grad_()


def _blocks(parameters):
    return strict_blocks(parameters) if parameters.ndim == 1 else parameters


def _inputs(d, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 3, 5, d, generator=generator, dtype=dtype)
    return x.requires_grad_(), dy


@pytest.mark.parametrize("form", ["strict", "quasi"])
@pytest.mark.parametrize("d", WIDTHS)
def test_equation(form, d):
    """Outputs and gradients are those of an explicit product of d - 1 plane rotations, whatever form computes them."""
    x, dy = _inputs(d)
    parameters = _parameters(form, d)
    expected = _plane_by_plane(x, parameters)
    wanted = torch.autograd.grad(expected, (x, parameters), dy)
    forms = {"dense": lambda: x @ dense(_blocks(parameters))}
    for radix in (1, 8, 32):
        forms[f"radix {radix}"] = lambda radix=radix: rotate(x, _blocks(parameters), radix)
    for name, form_of in forms.items():
        got = form_of()
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, msg=name)
        for one, other in zip(torch.autograd.grad(got, (x, parameters), dy), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("radix", [1, 8, 32])
@pytest.mark.parametrize("d", [2, 7, 8, 12, 32, 40, 96, 768])
def test_a_weight_is_turned_as_tokens_are(d, radix):
    """x (W R^T)^T = (x R) W^T, with a diagonal too, gradients included; in fp32 all forms agree to 1e-6."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        x, W = _inputs(d, dtype)[0], torch.randn(4, d, generator=torch.Generator().manual_seed(2), dtype=dtype)
        theta, scale = _parameters("strict", d, dtype), torch.linspace(0.5, 2, d, dtype=dtype).requires_grad_()
        outputs, gradients = [], []
        for y in (
            rotate(x, strict_blocks(theta), radix, scale) @ W.T,
            x @ rotate_back(W, strict_blocks(theta), radix, scale).T,
            (x @ dense(strict_blocks(theta)) * scale) @ W.T,
        ):
            outputs.append(y)
            gradients.append(torch.autograd.grad(y.square().sum(), (x, theta, scale)))
        for y, gradient in zip(outputs[1:], gradients[1:], strict=True):
            for one, other in zip((y, *gradient), (outputs[0], *gradients[0]), strict=True):
                assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("radix", [1, 8])
def test_gradients_are_those_of_finite_differences(radix):
    x = _inputs(24)[0].detach()[:1, :2].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, g: rotate(x, g, radix), (x, _parameters("quasi", 24)))


def test_an_odd_survivor_is_carried_on():
    assert pairs(7) == [[(0, 1), (2, 3), (4, 5)], [(0, 2), (4, 6)], [(0, 4)]]
    twelve = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)], [(0, 2), (4, 6), (8, 10)], [(0, 4)], [(0, 8)]
    assert pairs(12) == list(twelve)
    assert [len(stage) for stage in pairs(768)] == [384, 192, 96, 48, 24, 12, 6, 3, 1, 1]
    for d in (1, 2, 3, 4097):
        assert sum(map(len, pairs(d))) == d - 1 and len(pairs(d)) == math.ceil(math.log2(d))


@pytest.mark.parametrize("d", [2, 7, 10, 12, 768])
def test_orthogonal_in_single_precision(d):
    R = dense(strict_blocks(_parameters("strict", d, torch.float32))).detach()
    assert (R.double() @ R.double().T - torch.eye(d)).abs().max() <= 1e-6
    assert torch.linalg.det(R.double()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("d", [8, 64, 768])
def test_number_of_entries_that_are_not_zero(d):
    """Of a tree that stops after its first stage R would have 2d."""
    R = dense(strict_blocks(_parameters("strict", d)))
    assert int((R != 0).sum()) == pytest.approx(d * (math.log2(d) + 1), rel=0.01)


@pytest.mark.parametrize("d", [1, 2, 7, 32, 96, 768])
def test_identity_at_the_start(d):
    x = _inputs(d, torch.float32)[0].detach()
    for blocks in (from_identity(torch.zeros(d - 1, 2, 2)), strict_blocks(torch.zeros(d - 1))):
        assert torch.equal(dense(blocks), torch.eye(d))
        for radix in (1, 32):
            assert torch.equal(rotate(x, blocks, radix), x) and torch.equal(rotate_back(x, blocks, radix), x)


def test_orthogonal_after_hundreds_of_steps():
    """Angles cannot leave the rotations, however long they are trained; free blocks do."""
    generator = torch.Generator().manual_seed(0)
    d, x, W = 32, torch.randn(16, 32, generator=generator), torch.randn(8, 32, generator=generator)
    y = torch.randn(16, 8, generator=generator)
    off = {}
    for form in ("strict", "quasi"):
        p = torch.zeros(d - 1) if form == "strict" else from_identity(torch.zeros(d - 1, 2, 2))
        optimizer = torch.optim.Adam([p.requires_grad_()], lr=3e-2)
        for _ in range(400):
            optimizer.zero_grad()
            (rotate(x, _blocks(p)) @ W.T - y).square().mean().backward()
            optimizer.step()
        R = dense(_blocks(p)).detach()
        off[form] = (R @ R.T - torch.eye(d)).abs().max()
    assert off["strict"] < 1e-6 and off["quasi"] > 1e-2


def test_where_the_tree_is_taken(monkeypatch):
    """Dense blocks need a power of two of at least 8 in d; smaller ones would make the matrix above them large."""
    taken = []
    monkeypatch.setattr("perpetune.tuners.givens_rotations._tree", lambda x, blocks: taken.append(x.shape[-1]) or x)
    for d in (12, 24, 31, 40, 64, 768):
        rotate(_inputs(d)[0], from_identity(torch.zeros(d - 1, 2, 2)).double())
    assert taken == [12, 31] and MIN_RADIX == 8


def test_tokens_of_any_layout():
    """As views, and none at all."""
    blocks = strict_blocks(_parameters("strict", 64)).detach()
    x = torch.randn(64, 6, dtype=torch.float64).T.requires_grad_()
    y = rotate(x, blocks)
    torch.testing.assert_close(y, x @ dense(blocks), rtol=0, atol=1e-12)
    y.sum().backward()
    assert rotate(torch.zeros(0, 64, dtype=torch.float64), blocks).shape == (0, 64)
