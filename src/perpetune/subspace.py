"""What the old inputs of a linear layer span: second moments, bases by energy, sketches, and the bounds they certify.

A layer W (out x d) has read old tokens x, the rows of X. Its change dW leaves them alone where dW x = 0. What is kept
of them is C = X^T X (d x d) or a sketch of it, never the tokens, and never more for more tasks. It is uncentred, for
dW acts on x and not on x minus its mean; the energy of a direction is its eigenvalue, sigma^2 of X.

Tasks are weighted to count alike: C = sum_t C_t / tr C_t. Every sum over old tokens below is in these weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .errors import ConfigError, RuleError

# Eigenvalues of C below this share of the largest are rounding of the sums, not directions that inputs have.
RANK = {torch.float64: 1e-12, torch.float32: 1e-6}
LARGEST_SPECTRUM = 2048  # beyond it, the spectral norm is replaced by Frobenius', which is never smaller
CHUNK = 8192  # rows that are converted to fp64 at a time


def tokens(X: Tensor, mask: Tensor | None = None) -> Tensor:
    """(... x d) to the rows (n x d) that count: those where `mask` (any shape with as many entries) is not 0."""
    rows = X.detach().reshape(-1, X.shape[-1])
    return rows if mask is None else rows[mask.reshape(-1).to(rows.device) != 0]


def basis(C: Tensor, energy: float = 0.99, cap: int | None = None) -> Tensor:
    """Orthonormal M (d x k): the leading eigenvectors of C that hold the share `energy` of its trace.

    k = (leading eigenvalues whose cumulative share of sum sigma^2 is below `energy`) + 1, so that the share kept is at
    least `energy`; with energy = 1, all eigenvalues above 1e-12 of the largest (fp64). `cap` bounds k: the share kept
    may then be less, see `InputMemory.residual`.

    Raises:
        ConfigError: energy outside of (0, 1], or cap below 1.
    """
    check_energy(energy, cap)
    values, V = torch.linalg.eigh(C)
    return _leading(values.flip(0), V.flip(1), values.sum(), energy, cap)


def check_energy(energy: float, cap: float | None) -> None:
    if not 0 < energy <= 1:
        raise ConfigError(f"energy={energy} is a share of sum sigma^2: it must be above 0 and at most 1")
    if cap is not None and not cap > 0:
        raise ConfigError(f"cap={cap} must be above 0, or None for no cap")


def _leading(values: Tensor, V: Tensor, total: Tensor, energy: float, cap: int | None) -> Tensor:
    """The columns of V (d x n) that `basis` keeps; values (n,) fall, total is the trace that shares refer to."""
    rank = int((values > RANK[values.dtype] * values[:1]).sum())
    k = rank if energy == 1 else min(int((values.cumsum(0) < energy * total).sum()) + 1, rank)
    return V[:, : k if cap is None else min(k, cap)].contiguous()


def squared_norm(D: Tensor) -> Tensor:
    """||D||_2^2, or an upper bound of it (||D||_F^2) where the spectrum of D would be expensive."""
    if min(D.shape) > LARGEST_SPECTRUM or D.numel() == 0:
        return D.square().sum()
    return torch.linalg.eigvalsh(D @ D.mT if D.shape[0] <= D.shape[1] else D.mT @ D)[-1]


def soft_projector(C: Tensor, tau: float) -> Tensor:
    """S = (I + C / tau)^-1 (d x d): shrinks each direction the more, the more energy it has; never runs full.

    dW = D S obeys sum_old |dW x|^2 = tr(D S C S D^T) <= `soft_bound(D, tau)` for any number of tasks. S is no
    projector (S S is not S): apply it to a change once.

    Raises:
        ConfigError: tau is not above 0.
    """
    if not tau > 0:
        raise ConfigError(f"tau={tau} must be above 0")
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(eye + C / tau))


def soft_bound(D: Tensor, tau: float) -> Tensor:
    """(tau / 4) ||D||_F^2, for lambda / (1 + lambda / tau)^2 is largest, tau / 4, at lambda = tau."""
    return tau / 4 * D.square().sum()


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
    """

    def __init__(
        self,
        width: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        products: torch.dtype | None = None,
    ) -> None:
        self.width, self.products = width, products or dtype
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
        self.C = self.C.tril() + self.C.tril(-1).mT  # symmetric to the bit: the state holds one half

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
        return {"C": self.C.cpu()[torch.tril_indices(self.width, self.width).unbind()]}


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

    def scaled(self, weight: Tensor) -> DiagonalMoment:
        new = DiagonalMoment(self.width, self.c.dtype, self.c.device)
        new.c = self.c * weight
        return new

    def basis(self, energy: float = 0.99, cap: int | None = None) -> Tensor:
        check_energy(energy, cap)
        values, order = self.c.sort(descending=True, stable=True)
        axes = torch.eye(self.width, dtype=self.c.dtype, device=self.c.device)[:, order]
        return _leading(values, axes, self.total, energy, cap)

    def stored(self, D: Tensor) -> Tensor:
        return (D.square() * self.c).sum()

    def stored_total(self) -> Tensor:
        return self.total

    def state(self) -> dict[str, Tensor]:
        return {"c": self.c.cpu().clone()}


class FrequentDirections(InputMemory):
    """A sketch B (l x d) of the tokens with a certificate: 0 <= C - B^T B <= Delta I, for wide layers.

    A buffer of 2 l rows; when it is full, delta = the (l+1)-th sigma^2, the l leading rows are kept with
    sigma^2 - delta, and Delta += delta. Delta is at most sum_{i > k} sigma_i^2 / (l - k) for every k < l: little where
    few directions hold most of the energy. Where all rows of B are protected, sum_old |dW x|^2 <= Delta ||dW||_F^2.

    Source: Frequent Directions (1501.01711); the certificate follows from it.

    Args:
        width: d.
        rows: l.
    """

    def __init__(
        self, width: int, rows: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> None:
        if rows < 1:
            raise ConfigError(f"a sketch needs at least 1 row, not {rows}")
        self.width, self.rows = width, rows
        self._buffer = torch.zeros(2 * rows, width, dtype=dtype, device=device)
        self._filled = 0
        self.total = torch.zeros((), dtype=dtype, device=device)
        self.Delta = torch.zeros((), dtype=dtype, device=device)

    @property
    def B(self) -> Tensor:
        """The rows as they are now, at most 2 l."""
        return self._buffer[: self._filled]

    def add(self, X: Tensor, mask: Tensor | None = None) -> int:
        rows = self._rows(X, mask)
        for chunk in rows.split(CHUNK):
            x = chunk.to(self._buffer.device, self._buffer.dtype)
            self.total += x.square().sum()
            self._append(x)
        return len(rows)

    def merge(self, other: InputMemory) -> None:
        """Delta becomes the sum of both, plus what is shrunk in merging."""
        assert isinstance(other, FrequentDirections)
        device, dtype = self._buffer.device, self._buffer.dtype
        self.total += other.total.to(device, dtype)
        self.Delta += other.Delta.to(device, dtype)
        self._append(other.B.to(device, dtype))
        self._shrink()  # down to l rows: what is stored between tasks

    def _append(self, x: Tensor) -> None:
        while len(x):
            room = 2 * self.rows - self._filled
            part, x = x[:room], x[room:]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == 2 * self.rows:
                self._shrink()

    def _shrink(self) -> None:
        rows = self.rows
        if self._filled <= rows:
            return
        values, U = torch.linalg.eigh(self.B @ self.B.mT)  # rotating rows by U leaves B^T B as it is
        values, U = values.flip(0).clamp_min(0), U.flip(1)
        delta = values[rows]
        shrunk = (1 - delta / values[:rows].clamp_min(torch.finfo(values.dtype).tiny)).clamp_min(0).sqrt()
        self._buffer[:rows] = shrunk.unsqueeze(1) * (U[:, :rows].mT @ self.B)
        self.Delta += delta
        self._filled = rows

    def scaled(self, weight: Tensor) -> FrequentDirections:
        new = FrequentDirections(self.width, self.rows, self._buffer.dtype, self._buffer.device)
        new._buffer, new._filled = self._buffer * weight.sqrt(), self._filled
        new.total, new.Delta = self.total * weight, self.Delta * weight
        return new

    def basis(self, energy: float = 0.99, cap: int | None = None) -> Tensor:
        """As `basis`, among the rows of B alone: at most all of them, though they may hold less than `energy`."""
        check_energy(energy, cap)
        if not self._filled:
            return self._buffer.new_empty(self.width, 0)
        values, U = torch.linalg.eigh(self.B @ self.B.mT)
        V = self.B.mT @ U.flip(1)  # d x n, orthogonal columns of length sigma
        return torch.linalg.qr(_leading(values.flip(0), V, self.total, energy, cap)).Q.contiguous()

    def stored(self, D: Tensor) -> Tensor:
        return (self.B @ D.mT).square().sum()

    def stored_total(self) -> Tensor:
        return self.B.square().sum()

    def state(self) -> dict[str, Tensor]:
        state = {"B": self.B, "total": self.total, "Delta": self.Delta, "rows": torch.tensor(self.rows)}
        return {name: value.cpu().clone() for name, value in state.items()}


def restore(state: dict[str, Tensor]) -> InputMemory:
    """Inverse of `InputMemory.state`.

    Raises:
        RuleError: the tensors are of neither kind.
    """
    if state.keys() == {"c"}:
        diagonal = DiagonalMoment(len(state["c"]), state["c"].dtype)
        diagonal.c.copy_(state["c"])
        return diagonal
    if state.keys() == {"C"}:
        width = (math.isqrt(8 * len(state["C"]) + 1) - 1) // 2  # one half of a symmetric matrix, row by row
        moment = SecondMoment(width, state["C"].dtype)
        half = torch.zeros_like(moment.C)
        half[torch.tril_indices(width, width).unbind()] = state["C"]
        moment.C = half + half.tril(-1).mT
        return moment
    if state.keys() != {"B", "total", "Delta", "rows"}:
        raise RuleError(f"no memory of inputs is stored as {', '.join(sorted(state)) or 'nothing'}")
    B = state["B"]
    sketch = FrequentDirections(B.shape[1], int(state["rows"]), B.dtype)
    sketch._buffer[: len(B)] = B
    sketch._filled = len(B)
    sketch.total, sketch.Delta = state["total"].clone(), state["Delta"].clone()
    return sketch
