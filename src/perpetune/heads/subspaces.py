"""Prototypes in the concatenated feature spaces of one adapter a task (EASE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.errors import ConfigError, HeadError
from .exact_sums import FEATURES, check_room
from .statistics import ObservingHead


class SubspaceHead(ObservingHead):
    """Cosine to class prototypes, subspace by subspace; missing prototypes are completed from similar classes.

    Features f = [f_1, ..., f_T] in R^{T L}: block t is what adapter t makes of the input. P_{c,t} in R^L is the mean of
    f_t over the samples of class c, known for the adapters t <= t_c that were there when c was learned (t_c: its own).

    Scores      s_c(f) = cos(f_{t_c}, P_{c,t_c}) + alpha sum_{t != t_c} cos(f_t, P_{c,t})
    Completion  for t > t_c: P_{c,t} = sum_n w_n P_{n,t}, w = softmax_n cos(P_{c,t_c}, P_{n,t_c}), over the classes n
                learned with adapter t: a class keeps among new classes, in the new space, the neighbours that it has
                in its own.

    A class that reappears in a later task counts as one of that task, with the samples of all its tasks. The sums are
    exact in fixed point, as those of `PrototypeHead`: the same bits in any order of samples.

    Source: EASE, Expandable Subspace Ensemble (Zhou et al., 2403.12030).

    Args:
        alpha: weight of the other tasks' subspaces; published 0.1.
        released: as the released code does it: alpha / (T - 1), and completion from all classes learned with adapter t
            or later.

    Raises:
        ConfigError: alpha is negative.
    """

    name = "ease"
    blocks = True
    sums: Tensor  # of f_t over the samples of c, (C, T, L), fp64, in steps
    counts: Tensor  # of these samples, (C, T)

    def __init__(self, alpha: float = 0.1, released: bool = False) -> None:
        super().__init__()
        if not alpha >= 0:
            raise ConfigError(f"SubspaceHead: alpha={alpha} is the weight of other subspaces: 0 or more")
        self.alpha, self.released = alpha, released

    def open(self, width: int, labels: Sequence[str], *, seed: int, label_embeddings: Tensor | None = None) -> None:
        super().open(width, labels, seed=seed)
        self.clear()

    def clear(self) -> None:
        self.sums = torch.zeros(len(self.labels), 0, self.width, dtype=torch.float64)
        self.counts = torch.zeros(len(self.labels), 0, dtype=torch.long)
        self._prototypes: Tensor | None = None

    @torch.no_grad()
    def observe(self, features: Tensor, labels: Tensor, ids: Sequence[str]) -> None:
        """See `Head.observe`; features under all adapters so far, (N x T L)."""
        f = self._blocks(features)
        grown = f.shape[1] - self.sums.shape[1]
        if grown < 0:
            raise HeadError(f"head `{self.name}`: features of {f.shape[1]} adapters; {self.sums.shape[1]} were seen")
        self.sums = torch.cat([self.sums, self.sums.new_zeros(len(self.labels), grown, self.width)], 1)
        self.counts = torch.cat([self.counts, self.counts.new_zeros(len(self.labels), grown)], 1)
        check_room(FEATURES, int(self.counts.sum()) + len(labels), 1, self.name, "use fewer samples")
        steps, _ = FEATURES.steps(f)
        self.sums.index_add_(0, labels, steps)
        self.counts += torch.bincount(labels, minlength=len(self.labels))[:, None]
        self._prototypes = None

    def _blocks(self, features: Tensor) -> Tensor:
        """(N x T L) to (N x T x L), fp64, CPU."""
        self._check_open()
        if features.ndim != 2 or not features.shape[1] or features.shape[1] % self.width:
            raise HeadError(
                f"head `{self.name}` reads the features of one adapter a task, (N, T x {self.width}), found "
                f"{tuple(features.shape)}: use the consolidation Concatenate (recipe `ease`)"
            )
        return features.detach().cpu().double().unflatten(1, (-1, self.width))

    def own(self) -> Tensor:
        """t_c, (C,): the newest adapter that was there when a class was learned; -1 for classes not seen."""
        return (self.counts > 0).sum(1) - 1

    def prototypes(self) -> Tensor:
        """P, (C, T, L), completed; 0 where no class was learned with an adapter."""
        if self._prototypes is None:
            P, own = self.sums / self.counts.clamp(min=1)[..., None], self.own()
            known = P.clone()
            for t in range(P.shape[1]):
                donors = ((own >= t) if self.released else (own == t)).nonzero().flatten()
                for c in ((own >= 0) & (own < t)).nonzero().flatten().tolist() if len(donors) else ():
                    similar = normalize(known[donors, own[c]], dim=1) @ normalize(known[c, own[c]], dim=0)
                    P[c, t] = similar.softmax(0) @ known[donors, t]
            self._prototypes = P
        return self._prototypes

    @torch.no_grad()
    def scores(self, features: Tensor, task: int | None = None) -> Tensor:
        f, P, own = normalize(self._blocks(features), dim=2), normalize(self.prototypes(), dim=2), self.own()
        T = P.shape[1]
        if f.shape[1] != T:
            raise HeadError(f"head `{self.name}`: features of {f.shape[1]} adapters; {T} were observed")
        alpha = self.alpha / max(1, T - 1) if self.released else self.alpha
        weight = torch.full((len(P), T), alpha, dtype=P.dtype)
        seen = own >= 0
        weight[seen, own[seen]] = 1
        scores = torch.einsum("ntl,ctl,ct->nc", f, P, weight)
        return scores.masked_fill(~seen, -torch.inf).to(features.device)

    def knows(self, classes: Sequence[int]) -> bool:
        return bool((self.own()[self.checked_classes(classes)] >= 0).all())

    def forget(self, task: int, classes: Sequence[int], before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        """See `Head.forget`: the samples of the task, and the subspace of its adapter."""
        sums, counts = self._read(after)
        past, fewer = self._read(before) if before else (sums[:, :0], counts[:, :0])
        own, less = sums.clone(), counts.clone()
        own[:, : past.shape[1]] -= past
        less[:, : past.shape[1]] -= fewer
        if less.shape[1] > self.counts.shape[1] or (self.counts[:, : less.shape[1]] < less).any():
            raise HeadError(f"head `{self.name}`: cannot subtract samples that it has not seen")
        self.sums[:, : own.shape[1]] -= own
        self.counts[:, : own.shape[1]] -= less
        left = [t for t in range(self.sums.shape[1]) if t != task]
        self.sums, self.counts, self._prototypes = self.sums[:, left], self.counts[:, left], None
        self.sums[list(classes)], self.counts[list(classes)] = 0, 0

    def state(self) -> dict[str, Tensor]:
        seen = (self.own() >= 0).nonzero().flatten()
        return {**self.header(seen), "sums": self.sums[seen], "counts": self.counts[seen]}

    def load_state(self, state: dict[str, Tensor]) -> None:
        (self.sums, self.counts), self._prototypes = self._read(state), None

    def _read(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sums and counts of a saved head, laid out for our classes."""
        columns = self.columns(state)
        tasks = self.take(state, "counts", None).shape[1]
        sums = torch.zeros(len(self.labels), tasks, self.width, dtype=torch.float64)
        counts = torch.zeros(len(self.labels), tasks, dtype=torch.long)
        sums[columns] = self.take(state, "sums", (len(columns), tasks, self.width))
        counts[columns] = self.take(state, "counts", (len(columns), tasks))
        return sums, counts
