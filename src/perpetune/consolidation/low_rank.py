"""Matrices of low rank as what they are, U S V^T, in fp64: sums and projections without the dense matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOTHING = 1e-13  # singular values below this share of the largest are rounding


@dataclass(frozen=True)
class LowRank:
    """U C V^T, fp64.

    Attributes:
        U: (m x k), V: (n x l); columns are orthonormal where it is `thin`.
        C: (k x l); the singular values on its diagonal, falling and above 0, where it is `thin`.
    """

    U: Tensor
    C: Tensor
    V: Tensor

    @classmethod
    def product(cls, B: Tensor, A: Tensor) -> LowRank:
        """B A of B (m x r), A (r x n), thin."""
        return cls(B, torch.eye(B.shape[1], dtype=B.dtype), A.T).thin()

    def thin(self) -> LowRank:
        """The same matrix with its singular value decomposition as its factors."""
        left, R = torch.linalg.qr(self.U)
        right, L = torch.linalg.qr(self.V)
        u, s, vh = torch.linalg.svd(R @ self.C @ L.T, full_matrices=False)
        some = s > NOTHING * s.max() if len(s) else s > 0
        return LowRank(left @ u[:, some], s[some].diag(), right @ vh[some].T)

    def __add__(self, other: LowRank) -> LowRank:
        """The sum, of summed rank, with its factors side by side."""
        C = torch.block_diag(self.C, other.C)
        return LowRank(torch.cat([self.U, other.U], 1), C, torch.cat([self.V, other.V], 1))

    def scaled(self, factor: float) -> LowRank:
        return LowRank(self.U, factor * self.C, self.V)

    def transposed(self) -> LowRank:
        return LowRank(self.V, self.C.T, self.U)

    def leading(self, count: int) -> LowRank:
        """The part of the first singular values, of a thin one."""
        return LowRank(self.U[:, :count], self.C[:count, :count], self.V[:, :count])

    def within(self, other: LowRank) -> Tensor:
        """U^T X V of another matrix X, (k x l)."""
        return (self.U.T @ other.U) @ other.C @ (other.V.T @ self.V)

    def overlap(self, other: LowRank) -> float:
        """The Frobenius norm of U^T X V."""
        return float(self.within(other).norm()) if self.U.shape[1] else 0.0

    def square_norm(self) -> float:
        """The squared Frobenius norm of a thin one."""
        return float(self.C.square().sum())

    def dense(self) -> Tensor:
        """(m x n), fp32."""
        return (self.U @ self.C @ self.V.T).float()


def filtered(D: LowRank, merged: LowRank, kept: float) -> tuple[LowRank, int]:
    """P(D) = D - U Z V^T with the merged update's U, S, V; Z is U^T D V in the leading p x p block and on the diagonal.

    Args:
        merged: thin; kept: p is how many of the leading singular values hold at most this share of their sum.

    Returns:
        P(D), not thin, and p.
    """
    s = merged.C.diagonal()
    p = int((s.cumsum(0) <= kept * s.sum()).sum())
    within = merged.within(D)
    Z = within.diagonal().diag()
    Z[:p, :p] = within[:p, :p]
    return D + LowRank(merged.U, -Z, merged.V), p
