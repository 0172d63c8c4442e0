"""Bases by energy: the directions in which the old inputs of a layer lie, and how a change is shrunk along them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import ConfigError

# Eigenvalues of C below this share of the largest are rounding of the sums, not directions that inputs have.
RANK = {torch.float64: 1e-12, torch.float32: 1e-6}
LARGEST_SPECTRUM = 2048  # beyond it, the spectral norm is replaced by Frobenius', which is never smaller


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
    return leading(values.flip(0), V.flip(1), values.sum(), energy, cap)


def check_energy(energy: float, cap: float | None) -> None:
    if not 0 < energy <= 1:
        raise ConfigError(f"energy={energy} is a share of sum sigma^2: it must be above 0 and at most 1")
    if cap is not None and not cap > 0:
        raise ConfigError(f"cap={cap} must be above 0, or None for no cap")


def leading(values: Tensor, V: Tensor, total: Tensor, energy: float, cap: int | None) -> Tensor:
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
