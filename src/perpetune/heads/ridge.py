"""Ridge regression on random features: RanPAC's head, from sums that do not depend on the order of tasks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import ConfigError, HeadError
from ..core.measurement import Measurement
from .base import matmul_dtype
from .exact_sums import EXACT_BITS, FEATURES, GAUSSIAN, FixedPoint, check_room, exact_matmul, gaussian_steps
from .readout import Readout
from .statistics import Shape, StatisticsHead

GRID = tuple(10.0 ** (k / 4) for k in range(-32, 33))  # 1e-8 ... 1e8, four points per decade
FEWEST = 10  # samples a fold needs before a hold-out error says anything
ROWS = 4096  # samples expanded at a time: bounds memory at ROWS x M


class RidgeHead(StatisticsHead):
    """Ridge regression on random features (RanPAC, 2307.02251), with order-free statistics.

    h = relu(f W) in R^M, W ~ N(0, 1)^{L x M} from the seed; G = sum h h^T, Q = sum h y^T (y one-hot);
    Theta = (G + lambda I)^-1 Q, scores h Theta. G and Q are kept for two folds, train and hold-out, to which a sample
    belongs by a hash of its id. lambda minimises the hold-out error, from moments alone (`holdout_errors`); the final
    fit is on both folds. Everything that is summed is rounded to fixed point first: the statistics, lambda, Theta and
    the scores have identical bits under any order of tasks, classes, samples, and any batch size.

    Differs from the paper and its code: lambda is chosen from a hold-out over all tasks (theirs: from the last task
    alone, which makes the head depend on the order) on a grid of four points per decade (one); M is 1,024 (10,000:
    statistics cost M^2 and a fit M^3); h is scaled by the power of two nearest to 1/sqrt(L), which centres the grid
    and is otherwise immaterial as lambda is tuned. W is an Irwin-Hall sum, see `gaussian_steps`.

    Args:
        features: M; 0 for ridge on the features as they are (no projection, no relu).
        regularisation: lambda, in units of the scaled h; None to choose it. With fewer than 10 samples in either
            fold, or where every lambda of the grid does equally well, it is a tenth of the mean |h|^2, on the grid.
        holdout: share of the samples that choose lambda.
        bits: of the grid on which h is rounded, over a fixed range (0..512 before scaling; +-32 where `features` is
            0). 2 * bits + log2(n) must stay below 53: 17 bits allow 524,287 samples, 16 bits four times as many.
        refresh: see `StatisticsHead`.

    Raises:
        ConfigError: an argument out of range.
    """

    name = "ridge"
    class_axis: ClassVar[Mapping[str, int]] = {"cross": 1, "counts": 1}
    symmetric: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __init__(
        self,
        features: int = 1024,
        regularisation: float | None = None,
        holdout: float = 0.2,
        bits: int = 17,
        refresh: bool = False,
    ) -> None:
        super().__init__(refresh)
        if features < 0:
            raise ConfigError(f"ridge head: features={features}; give their number, or 0 for none")
        if regularisation is not None and not (math.isfinite(regularisation) and regularisation > 0):
            raise ConfigError(f"ridge head: regularisation={regularisation}; give a positive number, or none to choose")
        if not 0 < holdout < 1:
            raise ConfigError(f"ridge head: holdout={holdout}; give a share between 0 and 1")
        if not 8 <= bits <= 24:
            raise ConfigError(f"ridge head: bits={bits}; give 8 to 24")
        self.features, self.regularisation, self.holdout, self.bits = features, regularisation, holdout, bits

    @property
    def folds(self) -> int:
        """A lambda that is given needs no hold-out."""
        return 2 if self.regularisation is None else 1

    def shapes(self, classes: int) -> dict[str, Shape]:
        m = self.features or self.width
        return {
            "gram": (torch.float64, (self.folds, m, m)),  # G, in steps^2; [0] train, [1] hold-out
            "cross": (torch.float64, (self.folds, classes, m)),  # Q^T, in steps
            "counts": (torch.int64, (self.folds, classes)),
            "clipped": (torch.int64, (2,)),  # clipped entries, all entries
        }

    def open(self, width: int, labels: Sequence[str], *, seed: int, label_embeddings: Tensor | None = None) -> None:
        super().open(width, labels, seed=seed)
        self.W = gaussian_steps(seed, width, self.features) if self.features else None
        # |f W| is about |f|: 512 is 5 deviations at norm 100, and at norm 1 one deviation has 256 steps.
        self.grid = FixedPoint(self.bits, (512.0 if self.features else 32.0) * 2.0**-self.bits)
        scale = 2.0 ** -round(math.log2(width) / 2) if self.features else 1.0
        self.unit = self.grid.step * scale  # h = unit * steps, exactly

    def changed(self) -> None:
        self._fitted: tuple[list[int], Tensor, float] | None = None

    def check_samples(self, samples: int) -> None:
        check_room(self.grid, samples, 2, self.name, "give the head fewer samples, or fewer `bits`")

    def expand(self, features: Tensor) -> tuple[Tensor, int]:
        """h in steps, (N x M), integers in fp64, and the number of clipped entries."""
        f, clipped = FEATURES.steps(features)
        if self.W is None:
            h, more = self.grid.steps(f * FEATURES.step)
        else:
            h, more = self.grid.steps((f @ self.W).clamp_(min=0) * (FEATURES.step * GAUSSIAN.step))
        return h, clipped + more

    def observe(self, features: Tensor, labels: Tensor, ids: Sequence[str]) -> None:
        features, labels = self.checked_samples(features, labels, ids)
        self.check_samples(int(self.class_counts().sum()) + len(labels))
        fold = torch.tensor([self.folds == 2 and in_holdout(i, self.holdout) for i in ids], dtype=torch.long)
        s = self.statistics
        for rows in torch.arange(len(labels)).split(ROWS):
            h, clipped = self.expand(features[rows])
            s["clipped"] += torch.tensor([clipped, h.numel() + len(rows) * self.width])
            for k in range(self.folds):
                mine = fold[rows] == k
                h_k, y_k = h[mine], labels[rows][mine]
                s["gram"][k].addmm_(h_k.T, h_k)
                s["cross"][k].index_add_(0, y_k, h_k)
                s["counts"][k] += torch.bincount(y_k, minlength=len(self.labels))
        self.changed()

    def fit(self) -> tuple[list[int], Tensor, float]:
        """Classes seen (k of them, by label text), Theta (M x k), lambda. Computed once after each change.

        Classes are sorted by label text and unseen ones left out, so that Theta's bits depend on the samples alone.
        """
        if self._fitted is None:
            n_c = self.class_counts()
            seen = sorted((c for c in range(len(self.labels)) if n_c[c] > 0), key=lambda c: self.labels[c])
            G = self.statistics["gram"] * self.unit**2  # (folds, M, M)
            Q = self.statistics["cross"][:, seen].mT.contiguous() * self.unit  # (folds, M, k)
            n = self.statistics["counts"].sum(1).tolist()
            penalty = self.regularisation if self.regularisation is not None else choose_penalty(G, Q, n)
            self._fitted = seen, solve(G.sum(0), Q.sum(0), penalty), penalty
        return self._fitted

    def scores(self, features: Tensor, task: int | None = None) -> Tensor:
        h, _ = self.expand(self.checked_queries(features))
        scores = torch.full((len(h), len(self.labels)), -torch.inf, dtype=torch.float64)
        if self.class_counts().any():
            seen, Theta, _ = self.fit()
            scores[:, seen] = exact_matmul(h, self.bits, Theta) * self.unit
        return scores.to(matmul_dtype(features.device)).to(features.device)

    def readout(self, classes: Sequence[int], task: int | None = None) -> Readout | None:
        """See `Head.readout`: random features are not linear."""
        if self.features:
            return None
        seen, Theta, _ = self.fit()
        weight = Theta.T[[seen.index(c) for c in self.checked_classes(classes)]].float()
        return Readout(weight, torch.zeros(len(weight)), normalised=False)

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "seed": torch.tensor(self.seed), "bits": torch.tensor(self.bits)}

    def _read(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, ours in (("bits", self.bits), ("seed", self.seed)):
            found = int(self.take(state, name, ()))
            if found != ours and (name == "bits" or self.features):
                raise HeadError(
                    f"head `{self.name}` no longer fits its checkpoint: expected random features of {name} {ours}, "
                    f"found {name} {found}; use the settings that the checkpoint was made with"
                )
        return super()._read(state)

    def guarantee(self) -> list[Measurement]:
        n, source = int(self.class_counts().sum()), type(self).__name__
        energy = float(self.statistics["gram"].diagonal(dim1=-2, dim2=-1).sum())  # sum of h^2, in steps^2
        noise = math.sqrt(n * self.statistics["gram"].shape[-1] / 12 / max(energy, 1e-300)) if n else 0.0
        measured = [
            Measurement(
                "bits of the largest sum", self.grid.used_bits(n, 2), EXACT_BITS, "bits", source,
                "Below 53 the head has the same bits in any order of tasks and for any batch size.",
            ),
            Measurement(
                "clipped entries", self.clipped_share(), 1e-3, "share", source,
                "Entries beyond the range of the fixed grid are cut off; many of them would change predictions.",
            ),
            Measurement(
                "rounding of random features", noise, 1e-2, "relative", source,
                "Random features are rounded to a fixed grid so that sums are exact; tiny ones would lose precision.",
            ),
        ]  # fmt: skip
        if n:
            note = "The ridge strength, given or chosen from a hold-out over all tasks so far."
            measured.append(Measurement("regularisation", self.fit()[2], None, "", source, note))
        return measured


def in_holdout(sample_id: str, share: float) -> bool:
    """Whether a sample belongs to the hold-out: by its id alone, not by its position."""
    return int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "big") < share * 2**64


def spectrum(G: Tensor) -> tuple[Tensor, Tensor]:
    """G = U diag(d) U^T; directions that no sample has (d below rounding) get d = inf, so that 1 / (d + lambda) = 0.

    Q lies in the range of G: nothing is lost by leaving them out, and rounding noise is not divided by a small lambda.
    """
    d, U = torch.linalg.eigh(G)
    return torch.where(d > rounding(G), d, torch.inf), U


def rounding(G: Tensor) -> float:
    """Eigenvalues of G (M x M) below this are rounding: M * 2^-52 * tr(G)."""
    return len(G) * torch.finfo(G.dtype).eps * float(G.trace())


def holdout_errors(G: Tensor, Q: Tensor, n_v: int, penalties: Sequence[float]) -> Tensor:
    """Hold-out mean squared error of Theta = (G_tr + lambda I)^-1 Q_tr for every lambda, from moments alone.

    [tr(Theta^T G_v Theta) - 2 tr(Theta^T Q_v) + n_v] / (n_v C), with G = (G_tr, G_v) of shape (2 x M x M) and
    Q = (Q_tr, Q_v) of shape (2 x M x C).
    In the eigenbasis of G_tr, with r = 1 / (d + lambda), the traces are r^T ((U^T G_v U) o (Z Z^T)) r and
    r . rowsum(Z o U^T Q_v), Z = U^T Q_tr: one decomposition, then M^2 operations per lambda.
    """
    d, U = spectrum(G[0])
    Z = U.T @ Q[0]  # (M, C)
    K = (U.T @ G[1] @ U) * (Z @ Z.T)  # (M, M)
    z = (Z * (U.T @ Q[1])).sum(1)  # (M,)
    R = 1 / (d[None] + torch.tensor(penalties, dtype=d.dtype)[:, None])  # (penalties, M)
    return (((R @ K) * R).sum(1) - 2 * R @ z + n_v) / (n_v * Q.shape[-1])


def choose_penalty(G: Tensor, Q: Tensor, n: Sequence[int]) -> float:
    """The lambda of the grid with the least hold-out error; of equals (to 1e-9 of the error of Theta = 0), the largest.

    Too few samples (n = (n_tr, n_v)), or no difference between any two: a tenth of the mean |h|^2, on the grid.
    """
    if min(n) >= FEWEST:
        errors = holdout_errors(G, Q, n[1], GRID)
        equal = 1e-9 / Q.shape[-1]
        if errors.max() - errors.min() > equal:
            return max(p for p, e in zip(GRID, errors.tolist(), strict=True) if e <= float(errors.min()) + equal)
    scale = 0.1 * float(G.diagonal(dim1=-2, dim2=-1).sum()) / max(sum(n), 1)
    return min(GRID, key=lambda p: abs(math.log10(p) - math.log10(max(scale, GRID[0]))))


def solve(G: Tensor, Q: Tensor, penalty: float) -> Tensor:
    """Theta = (G + lambda I)^-1 Q, (M x C). Cholesky, or by the spectrum where lambda drowns in rounding."""
    if penalty > rounding(G):
        return torch.cholesky_solve(Q, torch.linalg.cholesky(G + penalty * torch.eye(len(G), dtype=G.dtype)))
    d, U = spectrum(G)
    return U @ ((U.T @ Q) / (d + penalty)[:, None])
