"""The best head of sums: feature map, width, method and strength chosen on hold-out moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.measurement import Measurement
from .feature_maps import FeatureMap, Kind, check_map
from .holdout import Linear
from .lda import EQUAL, SHARDS, SHRINKAGES, Discriminant
from .moments import MomentsHead
from .ridge import FEWEST, solve

PENALTIES = tuple(10.0 ** (k / 2) for k in range(-8, 1))  # of the mean of diag G: 1e-4 ... 1, two points per decade
WIDTHS = (4, 2, 1)  # a random map is tried with M / 4, M / 2 and M features: the first ones of M
MB = 1e6


class Choice(NamedTuple):
    """A read-out: prefix of the map, how many features, "lda" or "ridge", strength, expected hold-out accuracy."""

    prefix: str
    features: int
    method: str
    strength: float
    accuracy: float = 0.0


class ClosedFormHead(MomentsHead):
    """Ridge or discriminant analysis on one of several feature maps, whichever a hold-out of moments says is best.

    G and Q are kept for every map (`FeatureMap`), in a train and a hold-out fold. For every map, width, method and
    strength the read-out that the train fold gives is judged by the accuracy that is to be expected of it on the
    hold-out (`HoldoutMoments`); the best is fitted on both folds. Of equals (to 1e-4) the first stands: linear maps
    before random ones, narrow before wide, discriminant analysis before ridge. Nothing is ever chosen on test data, and
    nothing depends on the order of tasks: statistics, choice and scores have the same bits in any order, for any batch.

    Why a choice: which one is best depends on the data (docs/results/frozen_heads.md).

    Args:
        kinds: kinds of maps to choose from, see `FeatureMap`.
        features: M of the random maps; None: the largest power of two with which all maps fit into `memory`.
        memory: in MB, of G: 16 M^2 bytes for every map (67 MB at M = 2,048, 1.1 GB at 8,192). Q and the shards take
            144 M bytes for a class and a map.
        methods: "lda", "ridge" or both.
        holdout, bits: see `RidgeHead`; gamma: of a kernel, see `FeatureMap`; refresh: see `StatisticsHead`.
        shards: see `HoldoutMoments`.

    Raises:
        ConfigError: an argument out of range; (from `open`) a memory that is too small.
    """

    name = "closed_form"
    METHODS: ClassVar[tuple[str, ...]] = ("lda", "ridge")

    def __init__(
        self,
        kinds: Sequence[Kind] = ("normalised", "relu_normalised", "kernel_normalised"),
        features: int | None = None,
        memory: float = 256.0,
        methods: Sequence[str] = METHODS,
        holdout: float = 0.2,
        bits: int = 17,
        gamma: float = 0.3,
        refresh: bool = False,
        shards: int = SHARDS,
    ) -> None:
        super().__init__(refresh)
        self.shards = shards
        self.kinds, self.features, self.memory, self.methods = list(kinds), features, memory, list(methods)
        self.holdout, self.bits, self.gamma = holdout, bits, gamma
        for kind in self.kinds:
            check_map(self.name, kind, 1 if features is None else features, bits, gamma)
        if not self.kinds or not self.methods or set(self.methods) - set(self.METHODS):
            raise ConfigError(f"head `{self.name}`: methods={self.methods}; give a map, and lda, ridge or both")
        if not memory > 0:
            raise ConfigError(f"head `{self.name}`: memory={memory}; give the MB that its sums may take")
        self.check_moments()

    def make_maps(self) -> dict[str, FeatureMap]:
        """
        Raises:
            ConfigError: a memory that is too small.
        """
        m = self.features or self._widest()
        made = {f"{k}.": FeatureMap(k, self.width, m, self.seed, self.bits, self.gamma) for k in self.kinds}
        needed = sum(self._megabytes(feature_map.size) for feature_map in made.values())
        if needed > self.memory:
            raise ConfigError(
                f"head `{self.name}`: the sums of {', '.join(self.kinds)} take {needed:.0f} MB at {m} features: set "
                f"memory to that, or features or kinds to less"
            )
        return made

    def _megabytes(self, size: int) -> float:
        return self.folds * 8 * size**2 / MB

    def _widest(self) -> int:
        """The largest power of two, at least 256, with which random maps fit beside the linear ones."""
        random = [k for k in self.kinds if FeatureMap(k, self.width, 1, self.seed).random]
        left = self.memory - (len(self.kinds) - len(random)) * self._megabytes(self.width)
        m = 256
        while len(random) * self._megabytes(2 * m) <= left and random:
            m *= 2
        return m

    def changed(self) -> None:
        super().changed()
        self._choice: Choice | None = None

    # ---- choosing ----

    def choice(self) -> Choice:
        """What reads the sums as they are now; with fewer than 10 samples in either fold, the first is taken."""
        if self._choice is None:
            n = self.statistics["counts"].sum(1)
            candidates = self._candidates() if int(n.min()) >= FEWEST else iter([self._unchosen()])
            best = next(candidates)
            for candidate in candidates:
                if candidate.accuracy > best.accuracy + EQUAL:
                    best = candidate
            self._choice = best
        return self._choice

    def _unchosen(self) -> Choice:
        prefix, feature_map = next(iter(self.maps.items()))
        return Choice(prefix, feature_map.size, self.methods[0], 0.1)

    def _candidates(self) -> Iterator[Choice]:
        seen = self.seen()
        for prefix, feature_map in sorted(self.maps.items(), key=lambda item: item[1].random):
            G, Q, n = self.moments(seen, prefix)
            for m in (
                sorted({max(1, feature_map.size // w) for w in WIDTHS}) if feature_map.random else [feature_map.size]
            ):
                g, q, holdout = G[0, :m, :m], Q[0, :m], self.holdout_moments(seen, prefix, m)
                for method in self.methods:
                    strengths = SHRINKAGES[::-1] if method == "lda" else PENALTIES[::-1]
                    found = holdout.accuracies(readouts(method, g, q, n[0], strengths))
                    for strength, accuracy in zip(strengths, found, strict=True):
                        yield Choice(prefix, m, method, strength, accuracy)

    def fit(self) -> tuple[list[int], Tensor, float]:
        """See `MomentsHead.fit`; the strength is that of the choice."""
        if self._fitted is None:
            seen, choice = self.seen(), self.choice()
            G, Q, n = (sums.sum(0) for sums in self.moments(seen, choice.prefix))
            m = choice.features
            (linear,) = readouts(choice.method, G[:m, :m], Q[:m], n, [choice.strength])
            Theta, self._offset = linear
            self._fitted = seen, Theta, choice.strength
        return self._fitted

    def offset(self) -> Tensor | None:
        return self._offset

    @property
    def chosen(self) -> FeatureMap:
        if self._choice is None:
            return super().chosen
        feature_map = self.maps[self._choice.prefix]
        return replace(feature_map, features=self._choice.features) if feature_map.random else feature_map

    def guarantee(self) -> list[Measurement]:
        measured, source = super().guarantee(), type(self).__name__
        held = sum(self._megabytes(feature_map.size) for feature_map in self.maps.values())
        note = "What the sums of all maps take in memory."
        measured.append(Measurement("sums", held, self.memory, "MB", source, note))
        if self.class_counts().any():
            choice = self.choice()
            what = (
                f"{choice.method} on {choice.features} features, {choice.prefix[:-1]}, strength {choice.strength:.1g}"
            )
            note = f"Chosen on hold-out moments: {what}. The accuracy that was expected there, of Gaussian classes."
            measured.append(Measurement("expected accuracy", choice.accuracy, None, "", source, note))
        return measured


def readouts(method: str, G: Tensor, Q: Tensor, n: Tensor, strengths: Sequence[float]) -> Iterator[Linear]:
    """The read-outs of one fold, (M x M), (M x C), (C,), of rising regularisation or not, as given."""
    if method == "lda":
        discriminant = Discriminant(G, Q, n)
        yield from (discriminant.solve(a) for a in strengths)
    else:
        level = float(G.diagonal().mean())
        yield from ((solve(G, Q, max(p * level, torch.finfo(G.dtype).tiny)), None) for p in strengths)
