"""Class statistics of a model that is tuned on: those of earlier tasks are carried along by a linear map (SLDC)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, HeadError
from ..core.measurement import Measurement
from ..core.validation import as_written, call_checked
from .base import Head
from .lda import KLDAHead, LDAHead
from .moments import MomentsHead
from .prototype import PrototypeHead
from .readout import Readout
from .ridge import RidgeHead
from .statistics import ObservingHead, StatisticsHead

ORDER_FREE = ("bits of the largest sum",)  # measurements of exact sums, which a carried one is not


class Carried(ObservingHead):
    """A head of class statistics whose earlier classes follow the features. **Its statistics are estimates.**

    With f, f' the new task's training features before and after the model was tuned on it, in rows F, F' (n x d),

        M = (F^T F + strength * (mean |f|^2) I)^-1 F^T F',    M <- (1 - w) M + w I,    w = exp(-n / (temperature d)),

    and every sum that was gathered before is carried: sums of features S <- S M, of products G <- M^T G M, so that
    class means become mu M and covariances M^T Sigma M. Then the new task's samples are added.

    What it promises: where f' = f M for one matrix M, and the new task spans the space of f, earlier classes are
    recovered exactly (as strength and temperature go to 0). What it does not promise: anything where the drift of old
    classes is not that of the new ones, which is the rule and not the exception, as nothing of old classes is seen. It
    depends on the order of tasks, no task can be taken out, and errors of one map are carried by the next.

    Source: Rao et al., Compensating Distribution Drifts in Class-incremental Learning of Pre-trained Vision
    Transformers (SLDC), 2511.09926, its linear form (alpha_1), with strength 1e-4 and temperature 1 as in its authors'
    code. There each class has a Gaussian of its own, from which a linear classifier is trained on samples; here the
    head reads the moments itself.

    Args:
        of: the head whose sums are carried: lda, klda, ncm or ridge; its name, or `{type: NAME, setting: value}`.
            Where it maps features at random, M is that of the mapped ones.
        strength: of the ridge, of the mean squared length of the features.
        temperature: how many samples, in multiples of d, the identity outweighs; 0: none.
        normalise: M from features of length 1, as published; it then says nothing about how their length changed.

    Raises:
        ConfigError: another head, one that is refreshed, or a setting out of range.
    """

    carries = True

    def __init__(
        self, of: Any = "lda", strength: float = 1e-4, temperature: float = 1.0, normalise: bool = True
    ) -> None:
        super().__init__()
        self.inner = _inner(of)
        self.name = f"{self.inner.name}_carried"
        self.strength, self.temperature, self.normalise = strength, temperature, normalise
        if not strength > 0 or not 0 <= temperature < math.inf:
            raise ConfigError(f"head `{self.name}`: strength={strength} above 0, temperature={temperature} 0 or more")
        self._carried, self._left, self._identity = 0, 0.0, 0.0

    def config(self) -> dict[str, Any]:
        own = {"strength": self.strength, "temperature": self.temperature, "normalise": self.normalise}
        return {"of": {"type": self.inner.name, **self.inner.config()}, **own}

    def open(self, width: int, labels: Sequence[str], *, seed: int, label_embeddings: Tensor | None = None) -> None:
        super().open(width, labels, seed=seed)
        self.inner.open(width, labels, seed=seed)
        self._carried, self._left, self._identity = 0, 0.0, 0.0

    def trainer(self) -> Head:
        return self.inner.trainer()

    # ---- learning ----

    def carry(self, before: Tensor, after: Tensor) -> None:
        """Carry all sums along, from the features of the same samples before and after the model changed.

        Args:
            before, after: (n x width).

        Raises:
            HeadError: they do not match, or are not finite.
        """
        before, after = (self.inner.checked_queries(f) for f in (before, after))
        if before.shape != after.shape or not len(before):
            raise HeadError(f"head `{self.name}`: {len(before)} features before and {len(after)} after: one pair each")
        if not self.inner.class_counts().any():
            return
        statistics = self.inner.statistics
        for prefix, pair in self._mapped(before, after):
            M, self._identity = transition(*pair, self.strength, self.temperature, self.normalise)
            moved = float((pair[1] - pair[0]).norm())
            self._left = float((pair[1] - pair[0] @ M).norm()) / moved if moved > 0 else 0.0
            for name in statistics.keys() & {f"{prefix}{kind}" for kind in ("sums", "cross", "shards")}:
                statistics[name] = statistics[name] @ M
            if (gram := statistics.get(f"{prefix}gram")) is not None:
                carried = M.T @ gram @ M
                statistics[f"{prefix}gram"] = (carried + carried.mT) / 2
        self._carried += 1
        self.inner.changed()

    def _mapped(self, before: Tensor, after: Tensor) -> list[tuple[str, tuple[Tensor, Tensor]]]:
        """The features that the head sums, (n x M) before and after, by the prefix of its sums."""
        if not isinstance(self.inner, MomentsHead):
            return [("", (before, after))]
        maps = self.inner.maps
        return [(prefix, (m.steps(before)[0] * m.unit, m.steps(after)[0] * m.unit)) for prefix, m in maps.items()]

    def observe(self, features: Tensor, labels: Tensor, ids: Sequence[str]) -> None:
        self.inner.observe(features, labels, ids)

    def clear(self) -> None:
        self.inner.clear()
        self._carried = 0

    def forget(self, task: int, classes: Sequence[int], before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        """
        Raises:
            HeadError: always, once sums were carried.
        """
        if self._carried:
            raise HeadError(
                f"head `{self.name}`: its statistics are estimates, from which no task can be taken out: learn the "
                f"other tasks in another run directory (--out), or read `{self.inner.name}`"
            )
        self.inner.forget(task, classes, before, after)

    # ---- predicting ----

    def scores(self, features: Tensor, task: int | None = None) -> Tensor:
        return self.inner.scores(features, task)

    def readout(self, classes: Sequence[int], task: int | None = None) -> Readout | None:
        return self.inner.readout(classes, task)

    def knows(self, classes: Sequence[int]) -> bool:
        return self.inner.knows(classes)

    # ---- saving ----

    def state(self) -> dict[str, Tensor]:
        """The whole of the sums, as each of them changes with every task; and how often, how well they were carried."""
        facts = torch.tensor([self._carried, self._left, self._identity], dtype=torch.float64)
        return {**self.inner.state(), "carried": facts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        carried, self._left, self._identity = self.take(state, "carried", (3,)).tolist()
        self._carried = int(carried)
        self.inner.load_state({name: t for name, t in state.items() if name != "carried"})

    def guarantee(self) -> list[Measurement]:
        own = [m for m in self.inner.guarantee() if not (self._carried and m.name in ORDER_FREE)]
        if not self._carried:
            return own
        source = type(self).__name__
        times = "How often the sums of earlier classes were carried along by an estimate: they depend on the order."
        left = "Of the change of the newest task's own features, what the linear map leaves; old classes are not seen."
        weight = "The weight of the identity in the newest map: little is known from few samples."
        return [
            *own,
            Measurement("statistics that are estimates: maps", float(self._carried), None, "", source, times),
            Measurement("change that the map leaves", self._left, None, "relative", source, left),
            Measurement("weight of no change", self._identity, None, "share", source, weight),
        ]


def transition(
    before: Tensor, after: Tensor, strength: float, temperature: float, normalise: bool
) -> tuple[Tensor, float]:
    """M (d x d) with f' ~ f M of rows, see `Carried`, and w.

    Args:
        before, after: F and F', (n x d), fp64.
    """
    if normalise:
        before, after = (nn.functional.normalize(f, dim=1) for f in (before, after))
    n, d = before.shape
    gram = before.T @ before
    gram.diagonal().add_(max(strength * float(before.square().sum(1).mean()), torch.finfo(gram.dtype).tiny))
    M = torch.linalg.solve(gram, before.T @ after)
    w = math.exp(-n / (temperature * d)) if temperature else 0.0
    return (1 - w) * M + w * torch.eye(d, dtype=M.dtype), w


def _inner(of: Any) -> StatisticsHead:
    """The head itself, or the one of this name, or of `{type: NAME, setting: value}`."""
    head, name = of, str(getattr(of, "name", of))
    if isinstance(of, (str, Mapping)):
        name, settings = as_written("head", of)
        kind = {**CARRIED, **{kind.__name__: kind for kind in CARRIED.values()}}.get(name)
        head = None if kind is None else call_checked(f"head `{name}`", kind, settings)
    if type(head) not in CARRIED.values():
        raise ConfigError(f"Carried carries the sums of {', '.join(CARRIED)} along, not those of `{name}`")
    if head.refresh:
        raise ConfigError(f"head `{head.name}` gathers its sums anew, so that none grow stale: do not carry them")
    return head


CARRIED: dict[str, type[StatisticsHead]] = {
    "lda": LDAHead, "klda": KLDAHead, "ncm": PrototypeHead, "ridge": RidgeHead
}  # fmt: skip


def lda_carried(of: Any = "lda", strength: float = 1e-4, temperature: float = 1.0, normalise: bool = True) -> Carried:
    """Discriminant analysis with the moments of earlier classes carried along."""
    return Carried(of, strength, temperature, normalise)


def ncm_carried(of: Any = "ncm", strength: float = 1e-4, temperature: float = 1.0, normalise: bool = True) -> Carried:
    """Nearest class mean with the means of earlier classes carried along."""
    return Carried(of, strength, temperature, normalise)


def ridge_carried(of: Any = None, strength: float = 1e-4, temperature: float = 1.0, normalise: bool = True) -> Carried:
    """Ridge on the features as they are, with the moments of earlier classes carried along."""
    return Carried({"type": "ridge", "features": 0} if of is None else of, strength, temperature, normalise)
