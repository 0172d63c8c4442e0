"""Fixed maps of the features under a head of sums: as they are, of length 1, random ReLU or GELU, random Fourier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy
import torch
from torch import Tensor

from ..core.errors import ConfigError, nearest
from .exact_sums import FEATURES, GAUSSIAN, FixedPoint, gaussian_steps

Kind = Literal["raw", "normalised", "relu", "relu_normalised", "kernel", "kernel_normalised", "gelu", "gelu_normalised"]
UNIT = FixedPoint(bits=24, step=2.0**-24)  # entries of f / |f|
TURN = 2**16  # steps of a full turn: angles of random Fourier features are multiples of 2 pi / TURN
# Largest entry of h: |f W| is about |f|, 512 is 5 deviations at norm 100; about 1 where |f| = 1, 16 is never reached.
REACH = {"raw": 32.0, "normalised": 1.0, "relu": 512.0, "relu_normalised": 16.0, "gelu": 16.0, "gelu_normalised": 16.0}


@dataclass(frozen=True)
class FeatureMap:
    """h(f) in R^M, rounded to a fixed grid: the same bits for a sample whatever stands beside it, and on any platform.

        raw      h = f                                        normalised: f / |f| in the place of f, for all of these
        relu     h = max(0, f W), W ~ N(0, 1)^{L x M}         (RanPAC, 2307.02251)
        gelu     h = gelu(f W)                                (AnaCP, 2511.13880)
        kernel   h = sqrt(2) cos(f W sqrt(2 gamma) + b), b ~ U(0, 2 pi)^M: h(f) . h(g) / M is close to
                 exp(-gamma |f - g|^2)                        (random Fourier features; KLDA, 2412.15571)

    The columns of W and b do not depend on M: fewer features are the first ones of more.

    Args:
        kind: see above; width: L; features: M, read where the map is random; seed: of W and b; bits: of the grid.
        gamma: of the kernel, in units of the (normalised) features.
    """

    kind: Kind
    width: int
    features: int
    seed: int
    bits: int = 17
    gamma: float = 1.0

    @property
    def random(self) -> bool:
        return self.kind not in ("raw", "normalised")

    @property
    def size(self) -> int:
        """M."""
        return self.features if self.random else self.width

    @property
    def normalises(self) -> bool:
        return self.kind.endswith("normalised")

    @cached_property
    def grid(self) -> FixedPoint:
        return FixedPoint(self.bits, REACH.get(self.kind, 2.0) * 2.0**-self.bits)

    @cached_property
    def unit(self) -> float:
        """h = unit * steps, exactly. ReLU of raw features is scaled by the power of two nearest to 1 / sqrt(L)."""
        return self.grid.step * (2.0 ** -round(math.log2(self.width) / 2) if self.kind == "relu" else 1.0)

    @cached_property
    def W(self) -> Tensor | None:
        """(L x M), in steps of `GAUSSIAN`."""
        return gaussian_steps(self.seed, self.width, self.features) if self.random else None

    @cached_property
    def _phases(self) -> Tensor:
        """b, (M,), in steps of a turn."""
        words = numpy.random.Philox(key=numpy.array([self.seed % 2**64, 0x525046], dtype=numpy.uint64))
        raw = words.random_raw(-(-self.features // 4)).view(numpy.uint16)[: self.features]
        return torch.from_numpy(raw.astype(numpy.int64))

    @cached_property
    def _cosines(self) -> Tensor:
        """sqrt(2) cos of every angle, (TURN,), in steps of the grid."""
        angles = torch.arange(TURN, dtype=torch.float64) * (2 * math.pi / TURN)
        return self.grid.steps(math.sqrt(2) * angles.cos())[0]

    def steps(self, features: Tensor) -> tuple[Tensor, int]:
        """h in steps of `grid`, (N x M), integers in fp64, and how many were clipped; features (N x L), fp64."""
        f, clipped = FEATURES.steps(features)
        step = FEATURES.step
        if self.normalises:
            # integers: the length of a row has the same bits whatever stands in the other rows
            length = f.long().square().sum(1, keepdim=True).to(torch.float64).sqrt()
            f, _ = UNIT.steps(f / length.where(length > 0, torch.ones((), dtype=length.dtype)))
            step = UNIT.step
        if self.W is None:
            h, more = self.grid.steps(f * step)
            return h, clipped + (0 if self.normalises else more)
        projected = f @ self.W  # exact: |f| < 2^25, |W| < 2^13, L <= 2^13
        step *= GAUSSIAN.step
        if self.kind.startswith("kernel"):
            turns = projected * (step * math.sqrt(2 * self.gamma) / (2 * math.pi))
            angle = ((turns - turns.floor()) * TURN).round().long() + self._phases
            return self._cosines[angle % TURN], clipped
        if self.kind.startswith("gelu"):
            h, more = self.grid.steps(torch.nn.functional.gelu(projected * step))
        else:
            h, more = self.grid.steps(projected.clamp_(min=0) * step)
        return h, clipped + more


def check_map(head: str, kind: str, features: int, bits: int, gamma: float = 1.0) -> None:
    """
    Raises:
        ConfigError: an unknown kind of map, or settings out of range.
    """
    if kind not in get_args(Kind):
        raise ConfigError(f"head `{head}`: map={kind!r}; {nearest(str(kind), get_args(Kind))}")
    if kind not in ("raw", "normalised") and features < 1:
        raise ConfigError(f"head `{head}`: features={features}; the map `{kind}` needs their number, at least 1")
    if not 8 <= bits <= 24:
        raise ConfigError(f"head `{head}`: bits={bits}; give 8 to 24")
    if not (math.isfinite(gamma) and gamma > 0):
        raise ConfigError(f"head `{head}`: gamma={gamma}; give a positive number")
