"""Every task leaves a sparse delta; the model is the base plus their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.measurement import Measurement
from ..deltas.combine import merge
from ..deltas.delta import Delta
from ..deltas.extract import extract
from ..deltas.overlap import overlap
from ..deltas.seeded_mask import SeededMask, tensor_id
from ..models.backbone import Backbone
from ..tuners import AllWeights, Tuner
from .base import Consolidation, Files, Session, StoredFiles

VALUES, SETTINGS = "delta.safetensors", "delta.json"


@dataclass
class SparseSum(Consolidation):
    """theta = theta_0 + s sum_t m_t * d_t, with d_t = theta_t - theta_0 and m_t a random mask that keeps a share of it.

    Each task is tuned from the base, so that d_t does not depend on the tasks before it; only the sum does. A commit
    holds m_t * d_t and the seed of m_t. The sum is made in fp32 from all commits, in the order of the tasks' keys, and
    added to the untouched base once.

    With masks that keep 1/T, the expected weights are those of the average of the T tuned models (`soup`): compare.

    Args:
        keep: share of the entries that a task keeps; 1 keeps all.
        scheme: "bernoulli"; "stratified", one entry of every 1/keep; "disjoint", the same, and up to 1/keep tasks never
            meet: each takes the first slot that no other has, a task that is taken out frees its own.
        scale: s: a number, "1/keep" (the expectation of the masked delta is then d_t), or "1/T" (the average).
        sequential: tune from the model as it is after the tasks before, d_t is then the change since.
        vectors: "masked" like all else, or "dense": biases and norms (0.1 % of a ViT) are kept whole.
        storage: of the values: "fp32", "bf16", or "int8" with a scale for 256.
        seed: of the masks; a task's own key is made of its name.

    Raises:
        ConfigError: a setting out of range; more disjoint tasks than 1/keep.
    """

    keep: float = 0.1
    scheme: Literal["bernoulli", "stratified", "disjoint"] = "bernoulli"
    scale: float | Literal["1/keep", "1/T"] = 1.0
    sequential: bool = False
    vectors: Literal["masked", "dense"] = "masked"
    storage: Literal["fp32", "bf16", "int8"] = "fp32"
    seed: int = 0
    _base: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _start: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _deltas: list[Delta] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._mask("any", 0)
        for name, known in (("vectors", ("masked", "dense")), ("storage", ("fp32", "bf16", "int8"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"SparseSum: {name}=`{getattr(self, name)}` must be {', '.join(known)}")
        if isinstance(self.scale, str) and self.scale not in ("1/keep", "1/T"):
            raise ConfigError(f"SparseSum: scale=`{self.scale}` must be a number, 1/keep or 1/T")

    @property
    def branch(self) -> Literal["kept", "fresh"]:
        return "kept" if self.sequential else "fresh"

    def _mask(self, task: str, slot: int) -> SeededMask:
        disjoint = slot if self.scheme == "disjoint" else None
        return SeededMask.of(self.scheme, self.keep, seed=self.seed, task_key=tensor_id(task), slot=disjoint)

    def open(self, backbone: Backbone, tuner: Tuner, labels: Sequence[str] = ()) -> None:
        """
        Raises:
            ConfigError: the tuner's change is not a sum on the weights.
        """
        if not (isinstance(tuner, AllWeights) or tuner.additive):
            kind = type(getattr(tuner, "config", tuner)).__name__
            raise ConfigError(f"SparseSum adds up changes of weights, and that of this {kind} is none: use Continue")
        super().open(backbone, tuner, labels)
        self._base = _copy(self._state())
        self._deltas = []

    def begin_task(self, session: Session) -> None:
        if not self.sequential:
            self._load({})
        self._start = _copy(self._state()) if self.sequential else self._base
        self.backbone.model = self.tuner.attach(self.backbone.model)

    def end_task(self, session: Session) -> None:
        task = session.tasks[0].name
        tuned = self._tuned()
        dense = [n for n, t in tuned.items() if t.ndim <= 1] if self.vectors == "dense" else []
        taken = {delta.mask.slot for delta in self._deltas}
        mask = self._mask(task, next(slot for slot in count() if slot not in taken))
        fingerprint = self.backbone.fingerprint
        self._deltas.append(
            extract(self._start, tuned, mask, fingerprint=fingerprint, storage=self.storage, dense=dense)
        )
        self._sum()

    def _state(self) -> dict[str, Tensor]:
        return dict(self.backbone.model.state_dict(keep_vars=True))

    @torch.no_grad()
    def _tuned(self) -> dict[str, Tensor]:
        """theta_t, and the model without the tuner."""
        if isinstance(self.tuner, AllWeights):
            return _copy(self._state())
        deltas = self.tuner.deltas(self.backbone.model)
        self.backbone.model = self.tuner.detach(self.backbone.model)
        return {n: t + deltas[n].to(t) if n in deltas else t for n, t in self._start.items()}

    def _sum(self, factors: Sequence[float] | None = None) -> None:
        scales = [s * factor for s, factor in zip(self._scales(), factors or [1.0] * len(self._deltas), strict=True)]
        self._load(dict(merge(self._base, self._deltas, scales, fingerprint=self.backbone.fingerprint)))
        self.backbone.version += 1

    def _scales(self) -> list[float]:
        values: dict[Any, float] = {"1/keep": 1 / self.keep, "1/T": 1 / max(1, len(self._deltas))}
        return [float(values.get(self.scale, self.scale))] * len(self._deltas)

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        """Put weights into the model; those not given are the base's."""
        for name, tensor in self._state().items():
            tensor.copy_(weights.get(name, self._base[name]))

    def files(self) -> Files:
        return {VALUES: self._deltas[-1].to_tensors(), SETTINGS: self._deltas[-1].metadata()}

    def restore(self, commits: Sequence[StoredFiles]) -> None:
        self._deltas = [stored_delta(commit) for commit in commits]
        if commits:
            self._sum()
            self.backbone.version = len(commits)

    def compose(self, commits: Mapping[str, StoredFiles], scales: Mapping[str, float]) -> None:
        """See `Consolidation.compose`. The factors multiply s; with s = 1/T, T counts the chosen tasks."""
        self._deltas = [stored_delta(commits[task]) for task in scales]
        self._sum(list(scales.values()))

    def separable(self, tuner: Tuner) -> bool:
        return True

    @property
    def independent(self) -> bool:
        return not self.sequential

    def guarantee(self) -> list[Measurement]:
        """How much a task keeps, and how often the kept entries of different tasks meet."""
        source, newest = type(self).__name__, self._deltas[-1]
        entries = sum(part.size for part in newest.parts.values())
        kept = Measurement(
            "entries kept of a task's delta", newest.count / max(1, entries), None, "share", source,
            f"{newest.count:,} values of {entries:,}",
        )  # fmt: skip
        if len(self._deltas) < 2:
            return [kept]
        met = overlap(self._deltas)
        hits = int(met.hits[1:].sum())
        bound = 0.0 if self.scheme == "disjoint" and self.vectors == "masked" else None
        note = "share of the entries that any task keeps; masks that are disjoint never meet"
        return [
            kept,
            Measurement(
                "kept entries in which tasks meet", met.collisions / max(1, hits), bound, "share", source, note
            ),
        ]


def stored_delta(commit: StoredFiles) -> Delta:
    return Delta.from_tensors(commit.tensors(VALUES), commit.json(SETTINGS))


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of one tensor stay names of one tensor."""
    copies = {id(t): t.detach().clone() for t in state.values()}
    return {name: copies[id(t)] for name, t in state.items()}
