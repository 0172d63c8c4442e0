"""Every task's LoRA, tuned from the base, is merged into one update outside of its leading singular directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.measurement import Measurement
from ..models.backbone import Backbone
from ..tuners import Tuner, base_names, check_base_kept
from .base import Consolidation, Files, Session, StoredFiles, stored_adapter
from .factor_merge import check_linear
from .low_rank import LowRank, filtered
from .slots import Slots
from .stack import stackable


@dataclass
class ProjectedMerge(Consolidation):
    """W_t = W_0 + M_t. Each task is tuned from W_0 alone, D_t = s B_t A_t; with M_{t-1} = U S V^T (thin, positive S)

        M_t = (lambda_{t-1} M_{t-1} + P(D_t)) / lambda_t,    P(D) = D - U Z V^T,    M_1 = D_1,  lambda_1 = 1;

    Z is U^T D V in its leading p x p block and on its diagonal, and 0 elsewhere; p is how many of the leading singular
    values hold at most the share `kept` of their sum; lambda_t > 0 makes the norm of M_t, over all weights, the mean of
    the norms of D_1, ..., D_t.

    A commit holds the adapter of its task; M_t is made anew from them in the order of learning, so that a task can be
    taken out as if it had never been. Memory: the base of the touched weights, and U, S, V in fp64, whose rank is at
    most the sum of the tasks' ranks and never more than a weight has.

    It promises of M_t what is measured: no part of a new task lies in the block that was protected, and its norm does
    not grow with the tasks. It does not promise outputs on old inputs.

    Source: Tang et al., Merging Models on the Fly Without Retraining (OPCM), 2501.09522, as its released code computes
    it, for weights of linear layers. There the diagonal is also cleared where M_{t-1} has no singular values, in an
    arbitrary basis of what is left; here only where it has, so that the result does not depend on such a basis.

    Args:
        kept: alpha in [0, 1), 0.5 as published; 0 clears the diagonal alone.

    Raises:
        ConfigError: kept out of range; (from `open`) the tuner is no plain LoRA of linear layers.
    """

    branch = "fresh"
    kept: float = 0.5
    _base: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _update: dict[str, LowRank] = field(default_factory=dict, init=False, repr=False, compare=False)
    _norms: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    _scale: float = field(default=1.0, init=False, repr=False, compare=False)  # lambda_t
    _files: Files = field(default_factory=dict, init=False, repr=False, compare=False)
    _measured: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.kept < 1:
            raise ConfigError(f"ProjectedMerge: kept={self.kept}: a share of the singular values, at least 0, below 1")

    def open(self, backbone: Backbone, tuner: Tuner, labels: Sequence[str] = ()) -> None:
        check_base_kept(tuner, "ProjectedMerge")
        if not stackable(tuner):
            raise ConfigError("ProjectedMerge merges plain LoRA adapters: use a LoraConfig, or use DeltaMerge")
        super().open(backbone, tuner, labels)
        self._base, self._update, self._norms, self._scale = {}, {}, [], 1.0

    # ---- learning ----

    def begin_task(self, session: Session) -> None:
        self._write({})
        self._attach()

    def _attach(self) -> Slots:
        self.backbone.model = self.tuner.attach(self.backbone.model)
        slots = Slots(self.tuner, self.backbone.model)
        check_linear(slots.places, "ProjectedMerge")
        return slots

    def end_task(self, session: Session) -> None:
        self._files = self.tuner.files(self.backbone.model)
        self._add(changes(self.backbone.model))
        self.backbone.model = self.tuner.detach(self.backbone.model)
        self._write(self._update)
        self.backbone.version += 1

    def _add(self, task: Mapping[str, LowRank]) -> None:
        """M_t of M_{t-1} and D_t, all weights at once."""
        self._norms.append(_norm(task.values()))
        before, raw, inside, passed = self._update, {}, 0.0, []
        for name, D in task.items():
            if name not in before:
                raw[name] = D
                continue
            part, p = filtered(D, before[name], self.kept)
            inside = max(inside, before[name].leading(p).overlap(part))
            raw[name] = (before[name].scaled(self._scale) + part).thin()
            passed.append(part)
        mean, norm = sum(self._norms) / len(self._norms), _norm(raw.values())
        self._scale = norm / mean if norm > 0 and mean > 0 else 1.0
        self._update = {name: M.scaled(1 / self._scale) for name, M in raw.items()}
        size = max(self._norms[-1], 1e-300)
        self._measured = {"inside": inside / size, "norm": abs(_norm(self._update.values()) - mean) / max(mean, 1e-300)}
        if before:
            self._measured["passed"] = _norm(part.thin() for part in passed) / size

    @torch.no_grad()
    def _write(self, update: Mapping[str, LowRank]) -> None:
        """The base, and on it what is merged; on a model without its tuner."""
        parameters = dict(self.backbone.model.named_parameters())
        for name in update.keys() | self._base.keys():
            if name not in self._base:
                self._base[name] = parameters[name].detach().clone()
            base = self._base[name]
            dense = update[name].dense().to(base.device) if name in update else 0.0
            parameters[name].copy_(base + dense)

    # ---- commits ----

    def files(self) -> Files:
        return self._files

    def restore(self, commits: Sequence[StoredFiles]) -> None:
        slots = None
        for commit in commits:
            slots = slots or self._attach()
            slots.put(stored_adapter(commit))
            self._add(changes(self.backbone.model))
            self.backbone.version += 1
        if slots is not None:
            self.backbone.model = self.tuner.detach(self.backbone.model)
            self._write(self._update)

    def compose(self, commits: Mapping[str, StoredFiles], scales: Mapping[str, float]) -> None:
        """See `Consolidation.compose`: the chosen tasks merged in the order of learning, as if there were no others.

        Raises:
            ConfigError: a scale, which the norm of the merge would undo.
        """
        if set(scales.values()) != {1.0}:
            raise ConfigError("ProjectedMerge sets the norm of what it merges, so tasks have no scales: leave them out")
        self.restore([commit for task, commit in commits.items() if task in scales])

    def separable(self, tuner: Tuner) -> bool:
        return True

    def keeps_base(self, tuner: Tuner) -> bool:
        return False

    @property
    def independent(self) -> bool:
        return True

    def guarantee(self) -> list[Measurement]:
        if not self._measured:
            return []
        source, found = "ProjectedMerge", self._measured
        inside = (
            "The largest norm, over weights, of what a new task puts into the block that is protected, of its norm."
        )
        norm = "Of the merged update from the mean of the tasks' norms, relative: it does not grow with the tasks."
        measured = [
            Measurement("new update in the protected block", found["inside"], 1e-8, "relative", source, inside),
            Measurement("norm of the merged update", found["norm"], 1e-8, "relative", source, norm),
        ]
        if "passed" in found:
            note = "What is left of the task's update outside of the block and the diagonal."
            measured.append(Measurement("norm that passes", found["passed"], None, "share", source, note))
        return measured


@torch.no_grad()
def changes(model: nn.Module) -> dict[str, LowRank]:
    """s B A of every LoRA layer of an attached model, by the name of the weight, in the weight's own layout."""
    from peft.tuners.lora import LoraLayer

    names = base_names(model)
    found = {}
    for module in model.modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            layer: Any = module
            B, A = (f["default"].weight.detach().cpu().double() for f in (layer.lora_B, layer.lora_A))
            change = LowRank.product(layer.scaling["default"] * B, A)
            transposed = getattr(layer, "fan_in_fan_out", False)  # `Conv1D` keeps its weight so
            found[names[id(layer.get_base_layer().weight)]] = change.transposed() if transposed else change
    return found


def _norm(parts: Iterable[LowRank]) -> float:
    """The Frobenius norm over all weights."""
    return sum(part.square_norm() for part in parts) ** 0.5
