"""What the old inputs of a linear layer span: second moments, bases by energy, sketches, and the bounds they certify.

A layer W (out x d) has read old tokens x, the rows of X. Its change dW leaves them alone where dW x = 0. What is kept
of them is C = X^T X (d x d) or a sketch of it, never the tokens, and never more for more tasks. It is uncentred, for
dW acts on x and not on x minus its mean; the energy of a direction is its eigenvalue, sigma^2 of X.

Tasks are weighted to count alike: C = sum_t C_t / tr C_t. Every sum over old tokens below is in these weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..core.errors import RuleError
from ..core.processes import sum_
from .bases import basis, check_energy, leading, squared_norm

CHUNK = 8192  # rows that are converted to fp64 at a time


def tokens(X: Tensor, mask: Tensor | None = None) -> Tensor:
    """(... x d) to the rows (n x d) that count: those where `mask` (any shape with as many entries) is not 0."""
    rows = X.detach().reshape(-1, X.shape[-1])
    return rows if mask is None else rows[mask.reshape(-1).to(rows.device) != 0]


class InputMemory(ABC):
    """What is kept of the old inputs of one layer: C exactly, or a sketch with B^T B <= C <= B^T B + Delta I.

    Attributes:
        width: d.
        total: sum_old |x|^2, exactly, as a tensor ().
        Delta: what may be missing in any one direction, as a tensor (); 0 where C is exact.
    """

    width: int
    total: Tensor
    Delta: Tensor

    @abstractmethod
    def add(self, X: Tensor, mask: Tensor | None = None) -> int:
        """Take up the tokens of X (... x d) where `mask` (...) is not 0; returns how many."""

    @abstractmethod
    def merge(self, other: InputMemory) -> None:
        """Take up what another one of the same kind holds."""

    @abstractmethod
    def gather(self) -> None:
        """Take up what this memory holds on every process: each saw its part of the data. A collective call."""

    @abstractmethod
    def scaled(self, weight: Tensor) -> InputMemory:
        """A copy in which every |x|^2 counts `weight` times."""

    @abstractmethod
    def basis(self, energy: float = 0.99, cap: int | None = None) -> Tensor:
        """M (d x k), see `basis`; the shares are those of `total`."""

    @abstractmethod
    def stored(self, D: Tensor) -> Tensor:
        """sum |D x|^2 for D (n x d) over what is stored: tr(D C D^T) or tr(D B^T B D^T)."""

    @abstractmethod
    def stored_total(self) -> Tensor:
        """tr C or tr B^T B."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Tensors on the CPU from which `restore` makes it again, bit by bit."""

    def unit(self) -> InputMemory:
        """A copy with total 1: what a task puts into the memory, so that long tasks do not drown short ones.

        Raises:
            RuleError: an input was not finite.
        """
        if not torch.isfinite(self.total):
            raise RuleError("inputs of a protected layer are not finite: look at the data, or lower the learning rate")
        return self.scaled(1 / self.total.clamp_min(torch.finfo(self.total.dtype).tiny))

    def residual(self, M: Tensor) -> Tensor:
        """Share of sum_old |x|^2 outside of span(M), () in [0, 1]; for a sketch, an upper bound of it."""
        if not self.total > 0:
            return torch.zeros_like(self.total)
        return (1 - self.stored(M.mT) / self.total).clamp(0, 1)

    def drift(self, D: Tensor) -> Tensor:
        """sum_old |D x|^2, (); for a sketch, an upper bound of it: |B D^T|_F^2 + Delta ||D||_F^2."""
        return self.stored(D).clamp_min(0) + self.Delta * D.square().sum()

    def bound(self, D: Tensor, M: Tensor) -> Tensor:
        """What `drift(D)` cannot pass where D M = 0: ||D||_2^2 (1 - kept) sum_old |x|^2 + Delta ||D||_F^2, ().

        For the inputs as they were when they were taken up: changes of earlier layers are not covered.
        """
        outside = (self.stored_total() - self.stored(M.mT)).clamp_min(0)
        return squared_norm(D) * outside + self.Delta * D.square().sum()

    def _rows(self, X: Tensor, mask: Tensor | None) -> Tensor:
        if X.shape[-1] != self.width:
            raise RuleError(f"inputs of width {X.shape[-1]} for a memory of width {self.width}: it is another layer's")
        return tokens(X, mask)


class SecondMoment(InputMemory):
    """C = sum x x^T (d x d) of the tokens, streaming, uncentred, exact to rounding; d^2 floats for ever.

    Args:
        width: d.
        dtype: of the sums; fp32 halves the memory, and cannot tell directions below 1e-6 of the largest eigenvalue.
        products: of x x^T, at most 8192 tokens of which are added up in it; fp32 is twice as fast on a CPU, and cannot
            tell such directions either.
        rounded: sums are rounded to fp32 as they are taken up, and stored so: half the bytes, and the same bits again.
    """

    def __init__(
        self,
        width: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        products: torch.dtype | None = None,
        rounded: bool = False,
    ) -> None:
        self.width, self.products, self.rounded = width, products or dtype, rounded
        self.C = torch.zeros(width, width, dtype=dtype, device=device)
        self.Delta = torch.zeros((), dtype=dtype, device=device)

    @property
    def total(self) -> Tensor:  # type: ignore[override]
        return self.C.trace()

    def add(self, X: Tensor, mask: Tensor | None = None) -> int:
        rows = self._rows(X, mask)
        for chunk in rows.split(CHUNK):
            x = chunk.to(self.C.device, torch.promote_types(self.products, chunk.dtype))
            self.C += x.mT @ x
        return len(rows)

    def merge(self, other: InputMemory) -> None:
        assert isinstance(other, SecondMoment)
        self.C += other.C.to(self.C.device, self.C.dtype)
        if self.rounded:
            self.C = self.C.float().to(self.C)
        self.C = self.C.tril() + self.C.tril(-1).mT  # symmetric to the bit: the state holds one half

    def gather(self) -> None:
        sum_([self.C])

    def scaled(self, weight: Tensor) -> SecondMoment:
        new = SecondMoment(self.width, self.C.dtype, self.C.device, self.products)
        new.C = self.C * weight
        return new

    def basis(self, energy: float = 0.99, cap: int | None = None) -> Tensor:
        return basis(self.C, energy, cap)

    def stored(self, D: Tensor) -> Tensor:
        return ((D @ self.C) * D).sum()

    def stored_total(self) -> Tensor:
        return self.total

    def state(self) -> dict[str, Tensor]:
        half = self.C.cpu()[torch.tril_indices(self.width, self.width).unbind()]
        return {"C": half.float() if self.rounded else half}


class DiagonalMoment(InputMemory):
    """c = sum x * x (d,) of the tokens: C of the matrices diag(x), for weights that act element by element (IA3).

    y = w * x is w diag(x): C = sum diag(x)^2, its eigenvectors are the axes.

    Args:
        width: d.
    """

    def __init__(
        self, width: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> None:
        self.width = width
        self.c = torch.zeros(width, dtype=dtype, device=device)
        self.Delta = torch.zeros((), dtype=dtype, device=device)

    @property
    def total(self) -> Tensor:  # type: ignore[override]
        return self.c.sum()

    def add(self, X: Tensor, mask: Tensor | None = None) -> int:
        rows = self._rows(X, mask)
        for chunk in rows.split(CHUNK):
            self.c += chunk.to(self.c.device, self.c.dtype).square().sum(0)
        return len(rows)

    def merge(self, other: InputMemory) -> None:
        assert isinstance(other, DiagonalMoment)
        self.c += other.c.to(self.c.device, self.c.dtype)

    def gather(self) -> None:
        sum_([self.c])

    def scaled(self, weight: Tensor) -> DiagonalMoment:
        new = DiagonalMoment(self.width, self.c.dtype, self.c.device)
        new.c = self.c * weight
        return new

    def basis(self, energy: float = 0.99, cap: int | None = None) -> Tensor:
        check_energy(energy, cap)
        values, order = self.c.sort(descending=True, stable=True)
        axes = torch.eye(self.width, dtype=self.c.dtype, device=self.c.device)[:, order]
        return leading(values, axes, self.total, energy, cap)

    def stored(self, D: Tensor) -> Tensor:
        return (D.square() * self.c).sum()

    def stored_total(self) -> Tensor:
        return self.total

    def state(self) -> dict[str, Tensor]:
        return {"c": self.c.cpu().clone()}
