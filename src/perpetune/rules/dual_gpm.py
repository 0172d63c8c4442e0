"""DualGPM: the space of a layer's old inputs as a basis, or as one of what is left of it, whichever is smaller."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .bases import RANK


@dataclass(frozen=True)
class DualBasis:
    """span(M), the protected inputs of one layer, M in R^{d x k}.

    Attributes:
        basis: M, or where k > d / 2 an orthonormal basis of its complement: at most d / 2 columns, fp64.
        complement: which of the two it is ("retain" and "remove" in the released code).
    """

    basis: Tensor
    complement: bool = False

    @classmethod
    def empty(cls, d: int) -> DualBasis:
        return cls(torch.zeros(d, 0, dtype=torch.float64))

    @property
    def k(self) -> int:
        """How many directions are protected."""
        d, columns = self.basis.shape
        return d - columns if self.complement else columns

    def inside(self, X: Tensor) -> Tensor:
        """M M^T X for X (d x n)."""
        part = self.basis @ (self.basis.mT @ X)
        return X - part if self.complement else part

    def outside(self, X: Tensor) -> Tensor:
        """(I - M M^T) X for X (d x n)."""
        part = self.basis @ (self.basis.mT @ X)
        return part if self.complement else X - part

    def spectrum(self, C: Tensor) -> tuple[Tensor, Tensor]:
        """What C = X X^T has outside: eigenvalues above rounding, falling, and their eigenvectors (d x n).

        They are the squared singular values, and the left singular vectors, of (I - M M^T) X.
        """
        values, U = torch.linalg.eigh(self.outside(self.outside(C).mT))
        found = int((values > RANK[values.dtype] * C.diagonal().sum()).sum())
        U = self.outside(U.flip(1)[:, :found])
        return values.flip(0)[:found], torch.linalg.qr(U).Q if found else U

    def grown(self, C: Tensor, epsilon: float) -> DualBasis:
        """With the fewest further directions that make the share of tr C inside at least `epsilon`; all at 1."""
        values, U = self.spectrum(C)
        total = C.diagonal().sum()
        inside = torch.cat([(total - values.sum())[None], total - values.sum() + values.cumsum(0)])
        new = U[:, : len(values) if epsilon == 1 else min(int((inside < epsilon * total).sum()), len(values))]
        if not self.complement:
            return DualBasis(torch.cat([self.basis, new], 1)).smaller()
        left = torch.linalg.svd(self.basis - new @ (new.mT @ self.basis))[0]
        return DualBasis(left[:, : self.basis.shape[1] - new.shape[1]].contiguous(), complement=True)

    def smaller(self) -> DualBasis:
        """The complement instead, where that has fewer columns."""
        d, k = self.basis.shape
        if self.complement or 2 * k <= d:
            return self
        return DualBasis(torch.linalg.svd(self.basis)[0][:, k:].contiguous(), complement=True)
