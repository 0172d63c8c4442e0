"""What a rotation of a layer's inputs leaves alone: the angles between its neurons, and their lengths.

W is out x in, a neuron a row w_i. W R^T keeps both exactly where R is orthogonal; a positive factor for every row keeps
the energy alone. In high dimensions the energy hardly depends on the weights (a term is about 0.7071), so that its
relative change is the figure to look at, and a small one does not show that R was orthogonal: rotations from five terms
of a Neumann series move it by 1e-9 to 1e-4 where lengths of rows move by 1e-5 to 0.2. Look at both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import ConfigError
from .geometry import CHUNK

ENERGY_FORMULAS: dict[str, str] = {
    "hyperspherical_energy": "HE(W) = sum over i != j of 1 / max(|u_i - u_j|, 2e-3), u_i = w_i / |w_i|, no rows of 0",
    "relative_energy_change": "(HE(W) - HE(W_0)) / HE(W_0)",
    "row_norm_change": "max over i of ||w_i| - |w_0i|| / |w_0i|",
}
NEAREST = 2e-3  # distance that two rows have at least: rounding in fp32 makes up to 9e-4 out of 0
LARGE = 2048  # rows from which on products are made in fp32


@torch.no_grad()
def hyperspherical_energy(W: Tensor, *, gram: torch.dtype | None = None, chunk: int = CHUNK) -> float:
    """HE(W) = sum over i != j of 1 / |u_i - u_j|, with u_i = w_i / |w_i| and w_i the rows of W (out x in).

    |u_i - u_j| = sqrt(2 - 2 u_i u_j), for i < j, in chunks of rows: out^2 in multiplications, `chunk` entries of U U^T
    at a time. Rows of 0 have no direction and are left out. Two rows nearer to one another than 2e-3 count as 2e-3
    apart, so that rows that coincide add 500 each way, whatever the rounding.

    OFT (2306.07280), its equation; the released code adds all -u_i, takes a mean over pairs and smooths the distances.

    Args:
        gram: type of the products U U^T; None: fp64 below 2,048 rows, fp32 from there on. Sums are fp64. What fp32
            rounds is of the order of 1e-10 of the sum, but up to a few per cent of a pair that is 1e-2 apart or less.
        chunk: entries of U U^T that exist at a time, at least one row.

    Raises:
        ConfigError: W is not a matrix.
    """
    if W.ndim != 2:
        raise ConfigError(f"hyperspherical energy is that of the rows of a matrix, got shape {tuple(W.shape)}")
    W = W.detach().to("cpu", torch.float64) if W.device.type == "mps" else W.detach().double()
    norms = W.norm(dim=1, keepdim=True)
    kept = norms[:, 0] > 0
    n = int(kept.sum())
    U = (W[kept] / norms[kept]).to(gram or (torch.float64 if n < LARGE else torch.float32))  # n x in
    total = torch.zeros((), dtype=torch.float64, device=U.device)
    step = max(1, chunk // max(n, 1))
    for start in range(0, n, step):
        G = (U[start : start + step] @ U[start:].T).double()  # from the diagonal on
        total += G.mul_(-2).add_(2).clamp_(min=NEAREST**2).rsqrt_().triu_(1).sum()
    return 2 * total.item()


def relative_energy_change(W: Tensor, W_0: Tensor, *, gram: torch.dtype | None = None, chunk: int = CHUNK) -> float:
    """(HE(W) - HE(W_0)) / HE(W_0) in fp64, for W and W_0 (out x in); 0.0 where fewer than two rows have a direction.

    Arguments as in `hyperspherical_energy`.

    Raises:
        ConfigError: W and W_0 are not matrices of one shape.
    """
    _check(W, W_0)
    now, before = (hyperspherical_energy(weight, gram=gram, chunk=chunk) for weight in (W, W_0))
    return 0.0 if now == before else (now - before) / before if before else float("inf")


@torch.no_grad()
def row_norm_change(W: Tensor, W_0: Tensor) -> float:
    """The largest ||w_i| - |w_0i|| / |w_0i| of all rows, in fp64; infinite where a row of 0 became another.

    Raises:
        ConfigError: W and W_0 are not matrices of one shape.
    """
    _check(W, W_0)
    now, before = (_norms(weight) for weight in (W, W_0))
    gap = (now - before).abs()
    return torch.where(gap == 0, gap, gap / before).max().item() if len(gap) else 0.0


def _norms(W: Tensor) -> Tensor:
    return (W.detach().cpu() if W.device.type == "mps" else W.detach()).double().norm(dim=1)


def _check(W: Tensor, W_0: Tensor) -> None:
    if W.ndim != 2 or W.shape != W_0.shape:
        raise ConfigError(f"the weight before and after has one shape, out x in; got {[*W_0.shape]} and {[*W.shape]}")
