"""One LoRA into which the LoRA of every task is merged, factor by factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.measurement import Measurement
from ..models.backbone import Backbone
from ..tuners import Tuner, check_base_kept
from .base import Consolidation, Files, Session, StoredFiles, positive, stored_adapter
from .slots import Slots
from .stack import stackable

ADAPTER, START = "adapter_model.safetensors", "next_start.safetensors"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclass
class FactorMerge(Consolidation):
    """The model holds one LoRA. With A'_t, B'_t the factors that task t trained,

        A_t = A'_t,    B_t = B_{t-1} + t^-power (B'_t - B_{t-1}),    A_1 = A'_1,  B_1 = B'_1.

    Task t + 1 starts from what task t trained, and not from the merged factors: B from B'_t, A from the orthonormal
    rows of A'_t, that is Q^T of A'_t^T = Q R with a positive diagonal of R.

    A commit holds the merged adapter, which is the model, and the factors that the next task starts from: its size and
    that of the memory do not depend on the number of tasks. Each task leaves its trace in both, so none can be taken
    out. It promises nothing about old outputs: what is kept of B'_i is a share of it, and every A but the last is gone.

    Source: Qiao and Mahdavi, Merge before Forget (SLAO), 2512.23017, Algorithm 1, lambda(t) = 1 / sqrt(t). No code was
    released; the sign of the rows, which a QR decomposition leaves open, is ours: B'_t goes on with rows that point the
    way of those that it was trained with.

    Args:
        power: 1/2 as published; 1 makes B_t the mean of B'_1, ..., B'_t.

    Raises:
        ConfigError: power is not above 0; (from `open`) the tuner is no plain LoRA of linear layers.
    """

    adapters = "newest"
    power: float = 0.5
    _tasks: int = field(default=0, init=False, repr=False, compare=False)
    _merged: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _start: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _files: Files = field(default_factory=dict, init=False, repr=False, compare=False)
    _slots: Slots | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        positive("FactorMerge: power", self.power)

    def open(self, backbone: Backbone, tuner: Tuner, labels: Sequence[str] = ()) -> None:
        check_base_kept(tuner, "FactorMerge")
        if not stackable(tuner):
            raise ConfigError("FactorMerge merges the factors A and B of a plain LoRA: use a LoraConfig, or use Merge")
        super().open(backbone, tuner, labels)
        self._tasks, self._merged, self._start, self._slots = 0, {}, {}, None

    def begin_task(self, session: Session | None) -> None:
        if self._slots is None:
            self.backbone.model = self.tuner.attach(self.backbone.model)
            self._slots = Slots(self.tuner, self.backbone.model)
            check_linear(self._slots.places, "FactorMerge")
        if self._start:
            self._slots.put(self._start)

    def end_task(self, session: Session) -> None:
        assert self._slots is not None
        self._tasks += 1
        trained = {name: t.detach().clone() for name, t in self.tuner.tensors(self.backbone.model).items()}
        self._merged = merged_factors(self._merged, trained, self._tasks**-self.power)
        self._start = next_start(trained)
        self._slots.put(self._merged)
        self._files = {**self.tuner.files(self.backbone.model), ADAPTER: self._merged, START: self._start}
        self.backbone.version += 1

    def files(self) -> Files:
        return self._files

    def restore(self, commits: Sequence[StoredFiles]) -> None:
        if commits:
            self.begin_task(None)
            assert self._slots is not None
            self._merged, self._start = stored_adapter(commits[-1]), commits[-1].tensors(START)
            self._slots.put(self._merged)
            self._tasks = self.backbone.version = len(commits)

    def start_of_next(self, newest: StoredFiles) -> dict[str, Tensor]:
        return newest.tensors(START)

    def guarantee(self) -> list[Measurement]:
        if not self._start:
            return []
        off = max(_from_orthonormal(A) for name, A in self._start.items() if name.endswith(DOWN))
        note = "Of the rows of A that the next task starts from: the largest entry of |A A^T - I|."
        share = "The share of the way that B went from the merged to the newly trained one."
        return [
            Measurement("rows of A from orthonormal", off, 1e-5, "", "FactorMerge", note),
            Measurement("weight of the newest B", self._tasks**-self.power, None, "share", "FactorMerge", share),
        ]


def check_linear(places: Mapping[str, Tensor], user: str) -> None:
    """
    Raises:
        ConfigError: the adapter holds something else than the two matrices of linear layers.
    """
    odd = [name for name, tensor in places.items() if not name.endswith((DOWN, UP)) or tensor.ndim != 2]
    if odd:
        raise ConfigError(f"{user} merges LoRA of linear layers, and `{odd[0]}` is none: leave its layer out")


def merged_factors(merged: Mapping[str, Tensor], trained: Mapping[str, Tensor], step: float) -> dict[str, Tensor]:
    """A of what was trained; B a step from the merged one, (d_out x r), to what was trained. The first task's as it is.

    Args:
        merged, trained: factors by name, `...lora_A.weight` and `...lora_B.weight`.
        step: lambda(t) in [0, 1].
    """
    if not merged:
        return dict(trained)
    return {name: t if name.endswith(DOWN) else _step(merged[name].to(t), t, step) for name, t in trained.items()}


def _step(old: Tensor, new: Tensor, step: float) -> Tensor:
    return old + step * (new - old)


def next_start(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the next task starts from: B as it is, the rows of A (r x d_in) made orthonormal, in fp64."""
    return {name: orthonormal_rows(t) if name.endswith(DOWN) else t for name, t in trained.items()}


def orthonormal_rows(A: Tensor) -> Tensor:
    """Q^T (r x d_in) of A^T = Q R, with the signs that make the diagonal of R positive (0 counts as positive).

    Where r > d_in, only d_in rows can be orthonormal, and A stays as it is.
    """
    if A.shape[0] > A.shape[1]:
        return A
    Q, R = torch.linalg.qr(A.double().T.cpu())
    return (Q * R.diagonal().sign().add(0.5).sign()).T.contiguous().to(A)


def _from_orthonormal(A: Tensor) -> float:
    if A.shape[0] > A.shape[1]:
        return 0.0
    gram = A.double() @ A.double().T
    return float((gram - torch.eye(len(A), dtype=torch.float64, device=A.device)).abs().max())
