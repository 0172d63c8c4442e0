"""One adapter for every task, and the features under all of them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..heads import Head
from ..models.backbone import Backbone
from ..tuners import Tuner
from .adapters import AdapterPerTask
from .states import Reading


@dataclass
class Concatenate(AdapterPerTask):
    """f(x) = [f_1(x), ..., f_T(x)] in R^{T L}, f_t the features under adapter t. Every input takes T passes.

    For heads that read one block for every task (`SubspaceHead`).
    """

    blocks = True

    def open(self, backbone: Backbone, tuner: Tuner, labels: Sequence[str] = ()) -> None:
        """
        Raises:
            ConfigError: the model gives no features that could stand side by side.
        """
        if "features" not in backbone.offers:
            raise ConfigError("Concatenate puts features side by side, and a language model has answers: use PerTask")
        super().open(backbone, tuner, labels)

    def weights(self, reading: Reading, task: int | None = None) -> Tensor:
        """Every state reads every input: log 1, (N x T)."""
        return torch.zeros(reading.count, len(self._adapters))

    def scores(self, head: Head, classes: int, reading: Reading, weights: Tensor) -> Tensor:
        return head.scores(self.observed(reading))

    def observed(self, reading: Reading) -> Tensor:
        """(N x T L)."""
        return torch.cat([reading.all(t) for t in range(len(self._adapters))], 1)
