"""The nearest k-means centre decides: CoLoR's router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import ConfigError, nearest
from ..core.measurement import Measurement
from .base import Router, RouterError, State

STARTS = 10  # k-means++ starts, of which the best is kept (scikit-learn's `n_init`)


@dataclass
class KMeansRouter(Router):
    """CoLoR (2311.17601): D(x) = argmin_D min_j dist(h(x), mu_{D,j}), mu_{D,1..k} the k-means centres of task D.

    h(x) is the frozen feature, of length 1; centres are not brought to length 1 again, as in the authors' library
    (Renate). Released S-Prompts code takes the L1 distance of features as they are; its clustering is Euclidean, too.

    Each task is clustered alone, from the same seed, its samples sorted by id: neither the order of tasks nor that of
    samples changes a bit. A task with fewer distinct samples than `centres` keeps these samples; a task that is
    observed again keeps the centres of every time.

    Args:
        centres: k; distance: "l2" or "l1", of the routing; normalise: bring features to length 1 first.

    Raises:
        ConfigError: fewer than one centre, or an unknown distance.
    """

    centres: int = 5
    distance: Literal["l2", "l1"] = "l2"
    normalise: bool = True

    def __post_init__(self) -> None:
        if self.centres < 1:
            raise ConfigError(f"KMeansRouter: centres={self.centres}; give at least 1")
        if self.distance not in ("l2", "l1"):
            raise ConfigError(f"KMeansRouter: distance={self.distance!r}; {nearest(self.distance, ('l2', 'l1'))}")

    def summarise(self, features: Tensor, labels: Tensor, ids: Sequence[str]) -> State:
        from sklearn.cluster import KMeans

        h = self._h(features[sorted(range(len(ids)), key=lambda i: ids[i])])  # (n x L)
        k = min(self.centres, len(torch.unique(h, dim=0)))
        assigned = KMeans(k, n_init=STARTS, random_state=self.seed % 2**32).fit_predict(h.numpy())
        # Means taken here: scikit-learn adds up in an order that depends on its threads.
        of = torch.from_numpy(assigned)
        return {"centres": _sorted(torch.stack([h[of == j].mean(0) for j in of.unique()]))}

    def combine(self, one: State, other: State) -> State:
        return {"centres": _sorted(torch.cat([one["centres"], other["centres"]]))}

    def check_state(self, state: State) -> None:
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        mu = state.get("centres")
        if mu is None or len(found) > 1 or mu.ndim != 2 or not len(mu) or mu.shape[1] != self.width:
            raise RouterError(
                f"KMeansRouter no longer fits its checkpoint: expected `centres` of shape (k, {self.width}), found "
                f"{found}; use the model that the checkpoint was made with"
            )

    def route(self, features: Tensor) -> Tensor:
        self.check_observed()
        h = self._h(self.checked_queries(features))
        tasks = self.tasks
        distances = [self._distances(h, self.known[task]["centres"]).amin(1) for task in tasks]
        return torch.tensor(tasks)[torch.stack(distances, 1).argmin(1)].to(features.device)  # argmin: the first

    def plain(self) -> tuple[dict[str, Any], State]:
        """See `Router.plain`: the centres (K x L) of all tasks."""
        self.check_observed()
        centres = [self.known[task]["centres"] for task in self.tasks]
        task_of = torch.tensor(self.tasks).repeat_interleave(torch.tensor([len(mu) for mu in centres]))
        settings = {"type": self._name, "normalise": self.normalise, "distance": self.distance}
        return settings, {"centres": torch.cat(centres), "task_of": task_of}

    def _h(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1) if self.normalise else features

    def _distances(self, x: Tensor, mu: Tensor) -> Tensor:
        """(N x L), (k x L) -> (N x k), pair by pair: the bits of a row do not depend on how many rows there are."""
        p = 2.0 if self.distance == "l2" else 1.0
        return torch.cdist(x, mu.to(x), p=p, compute_mode="donot_use_mm_for_euclid_dist")

    def guarantee(self) -> list[Measurement]:
        """Storage, and how near the centres of different tasks come to each other."""
        measured = super().guarantee()
        centres = [self.known[task]["centres"] for task in self.tasks]
        if len(centres) > 1:
            mu = torch.cat(centres)
            of = torch.repeat_interleave(torch.tensor([len(each) for each in centres]))
            gap = float(self._distances(mu, mu)[of[:, None] != of].min())
            note = "The smaller, the more two tasks look alike to the router; at 0 the first of them always wins."
            measured.append(Measurement("nearest centres of two tasks", gap, None, "distance", self._name, note))
        return measured


def _sorted(centres: Tensor) -> Tensor:
    """Distinct rows in lexicographic order: the same bits whatever the numbers of the clusters."""
    return torch.unique(centres, dim=0)
