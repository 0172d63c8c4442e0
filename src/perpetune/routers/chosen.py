"""The discriminant analysis of frozen features that hold-out moments expect to predict classes best."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .experts import Experts
from .lda import LDARouter

GAMMA = 0.3  # of the kernel, of features of length 1: as of `ClosedFormHead`


@dataclass
class ChosenRouter(Experts):
    """One of two `LDARouter`s, whichever has the less expected log-loss on the hold-out (`LDARouter.expected_loss`):

        layers   all layers that are read side by side, at length 1
        kernel   random Fourier features of the last of them alone, at length 1

    On texts of several kinds the middle layers tell most; classes that lie close to each other take more features
    (docs/results/default.md). p(t, c | x), its sum over classes and its sum over tasks are those of the chosen one, and
    the choice is made anew after every task. What is stored of a task, and the choice, depend on samples alone and not
    on the order of tasks. Of equals, layers.

    Stored for a task: 8 M^2 bytes for either (34 MB at M = 2,048, and 11 MB for three layers of 384).

    Args:
        features: M of the kernel.
        many_tasks: see `ClassRouter`.

    Raises:
        ConfigError: an argument out of range.
    """

    features: int = 2048
    many_tasks: bool = field(default=False, metadata={"unwritten": False})

    def __post_init__(self) -> None:
        kernel = LDARouter(self.features, many_tasks=self.many_tasks, map="kernel_normalised", gamma=GAMMA)
        self._experts = {"layers": LDARouter(many_tasks=self.many_tasks), "kernel": kernel}

    def columns(self, name: str, width: int) -> slice:
        return slice(None) if name == "layers" else slice(width - width // self.layers, None)

    @property
    def chosen(self) -> str:
        """The name of the expert that predicts."""
        return min(self._experts, key=lambda name: self._of(name).expected_loss())

    def _of(self, name: str) -> LDARouter:
        expert = self._experts[name]
        assert isinstance(expert, LDARouter)
        return expert

    def _ask(self, features: Tensor) -> tuple[LDARouter, Tensor]:
        """The chosen expert, and what it reads of checked features."""
        self.check_observed()
        name = self.chosen
        return self._of(name), self.read(name, self.checked_queries(features))

    def route(self, features: Tensor) -> Tensor:
        expert, read = self._ask(features)
        return expert.route(read).to(features.device)

    def log_posterior(self, features: Tensor) -> Tensor:
        expert, read = self._ask(features)
        return expert.log_posterior(read).to(features.device)

    def log_within(self, features: Tensor, task: int) -> Tensor | None:
        expert, read = self._ask(features)
        return expert.log_within(read, task)

    def log_classes(self, features: Tensor) -> Tensor | None:
        expert, read = self._ask(features)
        return expert.log_classes(read)

    def alone(self, features: Tensor, task: int) -> Tensor:
        """See `LDARouter.alone`: of the expert that is expected to do better on this task."""
        features = self.checked_queries(features)
        found = [self._of(name).alone(self.read(name, features), task) for name in self._experts]
        return min(found, key=lambda pair: pair[1])[0]
