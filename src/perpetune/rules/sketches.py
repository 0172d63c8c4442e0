"""A sketch of the old inputs of a wide layer, with a certificate of what it may lack."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.errors import ConfigError, RuleError
from ..core.processes import from_all, together
from .bases import check_energy, leading
from .second_moments import CHUNK, DiagonalMoment, InputMemory, SecondMoment


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

    def gather(self) -> None:
        """The sketches of all processes in one, whose bound holds; not the one that a single process would make."""
        if together() == 1:
            return
        first, *others = (restore(state) for state in from_all(self.state()))
        assert isinstance(first, FrequentDirections)
        for other in others:
            first.merge(other)
        device = self._buffer.device
        self._buffer[: len(first.B)], self._filled = first.B.to(device), len(first.B)
        self.total, self.Delta = first.total.to(device), first.Delta.to(device)

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
        return torch.linalg.qr(leading(values.flip(0), V, self.total, energy, cap)).Q.contiguous()

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
        moment = SecondMoment(width, rounded=state["C"].dtype == torch.float32)  # fp64: as earlier versions stored it
        half = torch.zeros_like(moment.C)
        half[torch.tril_indices(width, width).unbind()] = state["C"].to(half)
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
