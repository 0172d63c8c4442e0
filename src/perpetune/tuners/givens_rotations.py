"""Givens rotations along a tree: d - 1 planes that turn d coordinates, in work that grows with d and not with d^2.

A rotation of the coordinates i < j is a 2 x 2 block g, and G(i, j; g) is the identity but for G_ii = g_00, G_ij = g_01,
G_ji = g_10, G_jj = g_11. Strict: g = (cos t, -sin t; sin t, cos t). Quasi: any g.

Stage s = 0, 1, ... pairs the survivors 0, 2^s, 2 * 2^s, ... < d in order; the first of a pair survives, and an odd last
one is carried on. P_s is the product of the rotations of a stage, R = P_last ... P_1 P_0. A weight W (out x d) becomes
W R^T, so that a token x (a row) becomes x R and meets the last stage first. R is one of a family of d - 1 parameters;
it cannot be any rotation (of d(d-1)/2 parameters), nor even turn any one vector into any other.

Blocks come stage by stage, (d-1) x 2 x 2, and are the same to all functions here.

Source: Ma et al., Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation (2404.04316). The paper does not
say what to do where d is no power of two, nor the order of the stages: both are those of the first released version.
(The second, of 2025, pairs neighbours at all stages and is not orthogonal.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MIN_RADIX = 8  # below it the matrix of the upper stages, (d/b) x (d/b), costs more than the tree


def pairs(d: int) -> list[list[tuple[int, int]]]:
    """The planes (i, j) of each stage for d coordinates: d - 1 in all, in ceil(log2 d) stages."""
    steps = [2**s for s in range((d - 1).bit_length())]
    return [[(i, i + step) for i in range(0, d - step, 2 * step)] for step in steps]


def strict_blocks(theta: Tensor) -> Tensor:
    """(cos t, -sin t; sin t, cos t) for each angle (d-1,): (d-1) x 2 x 2.

    As in the paper the angles are the parameters themselves, 0 at the start. (The first released version takes
    t = pi tanh(parameter), so that its parameters and learning rates mean something else.)
    """
    cos, sin = theta.cos(), theta.sin()
    return torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))


def from_identity(change: Tensor) -> Tensor:
    """The blocks g = I + change, ... x (d-1) x 2 x 2: quasi rotations start where the change is 0."""
    return change + torch.eye(2, dtype=change.dtype, device=change.device)


def dense(blocks: Tensor) -> Tensor:
    """R itself.

    R_ij is a product of entries of blocks on the way down the tree to j. It begins where i is second in its pair, at
    stage s if 2^s is the lowest bit of i, and the 2^(s+1) coordinates below that pair are the columns where row i is
    not 0; 0 is first in all its pairs. So R has about d (log2 d + 1) entries that are not 0.

    Args:
        blocks: ... x (d-1) x 2 x 2; several trees at once where there are dimensions before.

    Returns:
        ... x d x d, of the same type.
    """
    d = blocks.shape[-3] + 1
    full = 1 << (d - 1).bit_length()  # where d is no power of two, coordinates are added that nothing turns
    row = blocks.new_ones(full, 1)  # first rows of all trees below this stage: ... x trees x size
    begun = []
    for s, g in enumerate(_stages(blocks)):  # ... x k x 2 x 2
        if missing := full // 2 ** (s + 1) - g.shape[-3]:
            eye = torch.eye(2, dtype=g.dtype, device=g.device)
            g = torch.cat((g, eye.expand(*g.shape[:-3], missing, 2, 2)), -3)
        both = (g.unsqueeze(-1) * row.unflatten(-2, (-1, 1, 2))).flatten(-2)  # ... x k x 2 x 2^(s+1)
        row, second = both.unbind(-2)
        begun.append(second.flatten(-2))  # ... x full
    begun.append(row.expand(*blocks.shape[:-3], 1, full).flatten(-2))
    i = torch.arange(full, device=blocks.device)
    lowest = i & -i  # 2^s
    lowest[0] = full
    stage = lowest.double().log2().round().long()
    reached = (i.unsqueeze(-1) ^ i) < 2 * lowest.unsqueeze(-1)  # columns that agree with i above bit s
    return (torch.stack(begun, -2)[..., stage, :] * reached)[..., :d, :d]


def rotate(x: Tensor, blocks: Tensor, radix: int = 32, scale: Tensor | None = None) -> Tensor:
    """x R, or x R diag(scale).

    With b = `radix`, or the largest power of two that divides d if that is less, the first log2 b stages are m = d/b
    dense matrices M_low (b x b), and the others, which see the coordinates 0, b, 2b, ... only, one matrix M_top
    (m x m); they are built from the blocks in each call, in work that does not depend on the number of tokens. Where b
    would be below 8 the stages act on x one after the other: less arithmetic, but many small operations.

    Args:
        x: ... x d, of the type of `blocks`.
        blocks: (d-1) x 2 x 2.
        radix: b, a power of two; 1 for the stages one after the other.
        scale: (d,).
    """
    b = _radix(x.shape[-1], radix)
    if b < MIN_RADIX:
        y = _tree(x, blocks)
        return y if scale is None else y * scale
    return _Radix.apply(x, *_low_top(blocks, b, scale))


def rotate_back(x: Tensor, blocks: Tensor, radix: int = 32, scale: Tensor | None = None) -> Tensor:
    """x R^T, or x diag(scale) R^T: what `rotate` does to tokens, done to a weight x (out x d). Arguments as there."""
    b = _radix(x.shape[-1], radix)
    if b < MIN_RADIX:
        return _tree_back(x if scale is None else x * scale, blocks)
    return _radix_back(x, *_low_top(blocks, b, scale))


def _stages(blocks: Tensor) -> tuple[Tensor, ...]:
    """The blocks of each stage, ... x k x 2 x 2."""
    left, counts = blocks.shape[-3] + 1, []
    while left > 1:
        counts.append(left // 2)
        left -= left // 2
    return blocks.split(counts, -3)


def _radix(d: int, radix: int) -> int:
    return min(radix, d & -d)


def _tree(x: Tensor, blocks: Tensor) -> Tensor:
    """x R, from the root to the leaves."""
    v = x[..., :1]  # the survivors of a stage
    for s, g in reversed(list(enumerate(_stages(blocks)))):
        k, step = len(g), 2**s
        first, second = v[..., :k], x[..., step :: 2 * step]
        turned = (g[:, 0, 0] * first + g[:, 1, 0] * second, g[:, 0, 1] * first + g[:, 1, 1] * second)
        v = torch.cat((torch.stack(turned, -1).flatten(-2), v[..., k:]), -1)
    return v


def _tree_back(x: Tensor, blocks: Tensor) -> Tensor:
    """x R^T, from the leaves to the root."""
    v, y = x, torch.empty_like(x)
    for s, g in enumerate(_stages(blocks)):
        k, step = len(g), 2**s
        first, second = v[..., 0 : 2 * k : 2], v[..., 1 : 2 * k : 2]
        y[..., step :: 2 * step] = g[:, 1, 0] * first + g[:, 1, 1] * second
        v = torch.cat((g[:, 0, 0] * first + g[:, 0, 1] * second, v[..., 2 * k :]), -1)
    y[..., :1] = v
    return y


def _low_top(blocks: Tensor, b: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """M_low (m x b x b), its columns times `scale`, and M_top (m x m)."""
    m = (len(blocks) + 1) // b
    stages = _stages(blocks)[: b.bit_length() - 1]
    low = dense(torch.cat([g.unflatten(0, (m, -1)) for g in stages], 1))
    if scale is not None:
        low = low * scale.view(m, 1, b)
    return low, dense(blocks[m * (b - 1) :])


def _blockwise(x3: Tensor, M: Tensor) -> Tensor:
    """x_m M_m of x (n x m x b) and M (m x b x b): n x m x b, contiguous."""
    if torch.compiler.is_compiling():  # torch 2.13 cannot write into a transposed view there
        return torch.bmm(x3.transpose(0, 1), M).transpose(0, 1).contiguous()
    y = torch.empty(x3.shape, dtype=x3.dtype, device=x3.device)
    y.transpose(0, 1).baddbmm_(x3.transpose(0, 1), M, beta=0)  # a product in its place saves a copy as large as x
    return y


def _radix_back(x: Tensor, low: Tensor, top: Tensor) -> Tensor:
    y = _blockwise(x.reshape(-1, *low.shape[:2]), low.mT)
    y[:, :, 0] = y[:, :, 0].clone() @ top.T
    return y.view(x.shape)


class _Radix(torch.autograd.Function):
    """With x as n x m x b: x_m0 <- sum_k x_k0 M_top,km, then x_m <- x_m M_low,m.

    Written out with its gradient because autograd would copy x, its gradient and the products several times, and these
    copies cost more than the products. Kept for the gradient is x, which other layers often keep as well.
    """

    @staticmethod
    def forward(x: Tensor, low: Tensor, top: Tensor) -> Tensor:
        m, b, _ = low.shape
        x3 = x.reshape(-1, m, b)
        y = _blockwise(x3, low)
        # M_top moves x_m0 by x_0 (M_top - I), which reaches the output through the first rows of M_low.
        moved = x3[:, :, 0] @ (top - torch.eye(m, dtype=top.dtype, device=top.device))
        return y.addcmul_(moved.unsqueeze(-1), low[:, 0]).view(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, low, top = ctx.saved_tensors
        m, b, _ = low.shape
        x3 = x.reshape(-1, m, b)
        dy3 = dy.reshape(-1, m, b).transpose(0, 1)  # m x n x b
        firsts = x3[:, :, 0].contiguous()  # n x m
        d_low = torch.bmm(x3.permute(1, 2, 0), dy3)
        d_low[:, :1] = torch.bmm((firsts @ top).T.unsqueeze(1), dy3)
        dx = _blockwise(dy.reshape(-1, m, b), low.mT)
        d_firsts = dx[:, :, 0].clone()  # of firsts M_top
        dx[:, :, 0] = d_firsts @ top.T
        return dx.view(x.shape), d_low, firsts.T @ d_firsts
