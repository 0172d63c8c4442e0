"""Every task leaves a delta; the model is the base plus what all of them are combined to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError, nearest
from ..core.measurement import Measurement
from ..core.validation import as_written, call_checked
from ..deltas.combination import COMBINATIONS, Combination
from ..deltas.combine import merge
from ..deltas.delta import Delta
from ..deltas.extract import extract
from ..deltas.keep import KEEPS, Keep
from ..deltas.overlap import Meetings
from ..models.backbone import Backbone
from ..runs.earlier import delta_merge
from ..tuners import Additive, AllWeights, Tuner, check_base_kept
from .base import Consolidation, Files, Session, StoredFiles
from .merge import change_of

VALUES, SETTINGS = "delta.safetensors", "delta.json"


@dataclass
class DeltaMerge(Consolidation):
    """theta = theta_0 + combine_t(s m_t * d_t), with d_t = theta_t - theta_0 and m_t what a task keeps of it.

    Each task is tuned from the base, so that d_t does not depend on the tasks before it; only their combination does.
    A commit holds m_t * d_t, and the seed of m_t or its bits. The combination is made in fp32 from all commits, in the
    order of the tasks' keys and a stretch of one tensor at a time, and added to the untouched base once.

    Memory: one copy of the base beside the model, the tensor that is being combined, and two bits for each weight to
    count where tasks meet: 2.1 model sizes between tasks, however many there are (with `sequential` one more while a
    task is trained). Deltas are mapped from the files of their commits, and read a stretch at a time. A task costs a
    pass through all deltas: sums of fp32 numbers in the order of learning would not have the same bits in any order of
    tasks, nor those of a run that never learned a task that is taken out; for `ElectSign` there is no running form.

    Args:
        keep: what a task keeps, a `Keep`: `Everything`, `RandomMask`, `TopMagnitude`; its name, or
            `{type: NAME, setting: value}`.
        combine: how the kept deltas of all tasks become one change, a `Combination`: `Sum` or `ElectSign`; in the same
            ways.
        scale: s: a number, "1/keep" (the expectation of a random masked delta is then d_t), or "1/T" (the average).
        sequential: tune from the model as it is after the tasks before, d_t is then the change since.
        storage: of the values: "fp32", "bf16", or "int8" with a scale for 256.

    Raises:
        ConfigError: an unknown hook, or a setting out of range.
    """

    keep: Any = field(default_factory=lambda: KEEPS["RandomMask"]())
    combine: Any = "Sum"
    scale: float | Literal["1/keep", "1/T"] = 1.0
    sequential: bool = False
    storage: Literal["fp32", "bf16", "int8"] = "fp32"
    _base: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _start: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _deltas: list[Delta] = field(default_factory=list, init=False, repr=False, compare=False)
    _meetings: Meetings | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.keep: Keep = _made(self.keep, KEEPS, Keep, "keep")
        self.combine: Combination = _made(self.combine, COMBINATIONS, Combination, "combine")
        if self.storage not in ("fp32", "bf16", "int8"):
            raise ConfigError(f"DeltaMerge: storage=`{self.storage}` must be fp32, bf16, int8")
        if isinstance(self.scale, str) and self.scale not in ("1/keep", "1/T"):
            raise ConfigError(f"DeltaMerge: scale=`{self.scale}` must be a number, 1/keep or 1/T")

    @property
    def branch(self) -> Literal["kept", "fresh"]:
        return "kept" if self.sequential else "fresh"

    def open(self, backbone: Backbone, tuner: Tuner, labels: Sequence[str] = ()) -> None:
        """
        Raises:
            ConfigError: the tuner's change is not a sum on the weights, or its initialisation changes the base.
        """
        check_base_kept(tuner, "DeltaMerge")
        if not (isinstance(tuner, AllWeights) or isinstance(change_of(tuner, backbone), Additive)):
            kind = type(getattr(tuner, "config", tuner)).__name__
            raise ConfigError(f"DeltaMerge adds up changes of weights, and that of this {kind} is none: use Continue")
        super().open(backbone, tuner, labels)
        self._base = _copy(self._state())
        self._keep_deltas([])

    def begin_task(self, session: Session) -> None:
        if not self.sequential:
            self._load({})
        self._start = _copy(self._state()) if self.sequential else self._base
        self.backbone.model = self.tuner.attach(self.backbone.model)

    def end_task(self, session: Session) -> None:
        tuned = self._tuned()
        mask = self.keep.mask(session.tasks[0].name, [delta.mask.slot for delta in self._deltas])
        kept = self.keep(self._start, tuned)
        settings: dict[str, Any] = {"fingerprint": self.backbone.fingerprint, "storage": self.storage}
        self._deltas.append(extract(self._start, tuned, mask, dense=kept.dense, bits=kept.masks, **settings))
        self._count()
        del tuned, kept
        self._combine()

    def _count(self) -> None:
        """Where the newest delta meets the others."""
        new = self._deltas[-1:]
        if self._meetings is None:
            self._meetings, new = Meetings(), self._deltas
        for delta in new:
            self._meetings.add(delta)

    def _keep_deltas(self, deltas: Sequence[Delta]) -> None:
        self._deltas, self._meetings = list(deltas), None  # counted when a task is added: opening does not need it

    def _state(self) -> dict[str, Tensor]:
        return dict(self.backbone.model.state_dict(keep_vars=True))

    @torch.no_grad()
    def _tuned(self) -> dict[str, Tensor]:
        """theta_t, and the model without the tuner."""
        if isinstance(self.tuner, AllWeights):
            return self._state()  # read before anything is written to it
        change = self.tuner.change(self.backbone.model)
        deltas = change.deltas() if isinstance(change, Additive) else {}
        self.backbone.model = self.tuner.detach(self.backbone.model)
        return {n: t + deltas[n].to(t) if n in deltas else t for n, t in self._start.items()}

    def _combine(self, factors: Sequence[float] | None = None) -> None:
        scales = [s * factor for s, factor in zip(self._scales(), factors or [1.0] * len(self._deltas), strict=True)]
        merged = merge(self._base, self._deltas, scales, fingerprint=self.backbone.fingerprint, combine=self.combine)
        state = self._state()
        for name, tensor in merged:
            state[name].data.copy_(tensor)
            del tensor
        self.backbone.version += 1

    def _scales(self) -> list[float]:
        share = getattr(self.keep, "share", 1.0)
        values: dict[Any, float] = {"1/keep": 1 / share, "1/T": 1 / max(1, len(self._deltas))}
        return [float(values.get(self.scale, self.scale))] * len(self._deltas)

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        """Put weights into the model; those not given are the base's."""
        for name, tensor in self._state().items():
            tensor.copy_(weights.get(name, self._base[name]))

    def files(self) -> Files:
        return {VALUES: self._deltas[-1].to_tensors(), SETTINGS: self._deltas[-1].metadata()}

    def committed(self, commit: StoredFiles) -> None:
        self._deltas[-1] = stored_delta(commit)

    def restore(self, commits: Sequence[StoredFiles]) -> None:
        self._keep_deltas([stored_delta(commit) for commit in commits])
        if commits:
            self._combine()
            self.backbone.version = len(commits)

    def compose(self, commits: Mapping[str, StoredFiles], scales: Mapping[str, float]) -> None:
        """See `Consolidation.compose`. The factors multiply s; with s = 1/T, T counts the chosen tasks."""
        self._deltas = [stored_delta(commits[task]) for task in scales]
        self._combine(list(scales.values()))

    def separable(self, tuner: Tuner) -> bool:
        return True

    def keeps_base(self, tuner: Tuner) -> bool:
        return False

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
        if len(self._deltas) < 2 or self._meetings is None:
            return [kept]
        bound = 0.0 if self.keep.never_meets else None
        note = "share of the entries that any task keeps; masks that are disjoint never meet"
        return [
            kept,
            Measurement(
                "kept entries in which tasks meet",
                self._meetings.met / max(1, self._meetings.kept),
                bound,
                "share",
                source,
                note,
            ),
        ]


def SparseSum(
    keep: float = 0.1,
    scheme: Literal["bernoulli", "stratified", "disjoint"] = "bernoulli",
    scale: float | Literal["1/keep", "1/T"] = 1.0,
    sequential: bool = False,
    vectors: Literal["masked", "dense"] = "masked",
    storage: Literal["fp32", "bf16", "int8"] = "fp32",
    seed: int = 0,
) -> DeltaMerge:
    """`DeltaMerge` of seeded masks that are added up, under the name that it had."""
    return DeltaMerge(**delta_merge(locals()))


def _made(hook: Any, known: Mapping[str, type], base: type, slot: str) -> Any:
    """A hook from its name, from `{type: NAME, setting: value, ...}`, or as it is."""
    if isinstance(hook, base):
        return hook
    name, settings = as_written(f"`{slot}` of DeltaMerge", hook)
    if name not in known:
        raise ConfigError(f"DeltaMerge: {slot} is no `{name}`: {nearest(name, known)}")
    accepted = [f.name for f in fields(known[name])]
    for key in settings:
        if key not in accepted:
            raise ConfigError(f"{name} has no setting `{key}`: {nearest(key, accepted) if accepted else 'it has none'}")
    return call_checked(name, known[name], settings)


def stored_delta(commit: StoredFiles) -> Delta:
    return Delta.from_tensors(commit.tensors(VALUES), commit.json(SETTINGS))


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of one tensor stay names of one tensor."""
    copies = {id(t): t.detach().clone() for t in state.values()}
    return {name: copies[id(t)] for name, t in state.items()}
