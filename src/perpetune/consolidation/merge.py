"""A fresh tuner for every task, merged into the base afterwards."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.measurement import Measurement
from ..core.tensors import relative_change
from ..models.backbone import Backbone
from ..models.precision import check_base, precision, quantised, reduced
from ..tuners import Additive, Multiplicative, Tuner, check_base_kept
from .base import Consolidation, Files, Session, StoredFiles, stored_adapter
from .on_disk import OnDisk
from .slots import Slots
from .stack import Stack, stackable


def change_of(tuner: Tuner, backbone: Backbone) -> Additive | Multiplicative | None:
    """What kind of change a tuner will make on this model, found out before anything is trained: it is put on and taken
    off again, and random numbers go on as if it had not been."""
    if not (tuner.trains and tuner.wraps_model):
        return None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        backbone.model = tuner.attach(backbone.model)
        change = tuner.change(backbone.model)
        if change is not None:
            backbone.model = tuner.detach(backbone.model)
    return change


@dataclass
class Merge(Consolidation):
    """W_t = W_0 + sum_{i <= t} dW_i, with dW_i = s B_i A_i for LoRA; W_t = W_{t-1} R_t^T for rotations.

    The sum is kept in fp32 and added to the untouched base once, the product is kept in fp32: merged weights are
    rebuilt from the base, never un-merged by subtraction. A commit holds the adapter of its task alone, loadable in
    plain peft on top of the weights merged before it.

    On a base that is quantised or of half precision, merging would round what tasks have learned: there the past stays
    beside the weights as the low-rank factors that it is (`Stack`), and an export merges them into the fp32 base.

    Memory: nothing beside the model. Of the weights that the tuner touches, and of no others, the base and the sum (or
    the product) lie in a temporary folder: they are read and written once a task, one weight after the other.
    """

    branch = "fresh"
    adapters = "sum"
    _base: OnDisk = field(default_factory=OnDisk, init=False, repr=False, compare=False)
    _sum: OnDisk = field(default_factory=OnDisk, init=False, repr=False, compare=False)
    _product: OnDisk = field(default_factory=OnDisk, init=False, repr=False, compare=False)
    _files: Files = field(default_factory=dict, init=False, repr=False, compare=False)
    _kept: list[Measurement] = field(default_factory=list, init=False, repr=False, compare=False)
    _merge_error: float = field(default=0.0, init=False, repr=False, compare=False)
    _beside: Stack | None = field(default=None, init=False, repr=False, compare=False)

    def open(self, backbone: Backbone, tuner: Tuner, labels: Sequence[str] = ()) -> None:
        """
        Raises:
            ConfigError: the tuner's change is neither a sum nor a product, or its initialisation changes the base.
        """
        check_base_kept(tuner, "Merge")
        self._beside = Stack() if reduced(backbone.model) else None
        if self._beside is not None:
            check_base(stackable(tuner), quantised(backbone.model), precision(backbone.model), "Merge")
            self._beside.open(backbone, tuner, labels)
        elif change_of(tuner, backbone) is None:
            config = getattr(tuner, "config", tuner)
            raise ConfigError(
                f"Merge adds changes or multiplies rotations; {type(config).__name__} so set makes neither:"
                " use Continue"
            )
        super().open(backbone, tuner, labels)

    def begin_task(self, session: Session) -> None:
        if self._beside is not None:
            return self._beside.begin_task(session)
        self.backbone.model = self.tuner.attach(self.backbone.model)

    def end_task(self, session: Session) -> None:
        if self._beside is not None:
            return self._beside.end_task(session)
        self._files = self.tuner.files(self.backbone.model)
        self._kept = self.tuner.guarantee(self.backbone.model, self._base)
        probe = self._probe(session)
        free = session.tasks[0].metric is not None
        read = self.backbone.responses if free else self.backbone.outputs
        change = relative_change if free else self.backbone.change
        unmerged = read(probe, len(probe))
        touched = self._gather(self.tuner.change(self.backbone.model), 1.0, self._sum, self._product)
        self._write(touched)
        self.backbone.version += 1
        self._merge_error = change(read(probe, len(probe)), unmerged)

    def _probe(self, session: Session) -> list:
        """Few of free texts, which a language model reads twice for as much as a step of training takes."""
        test, most = session.tasks[0].test, 16 if session.tasks[0].metric is None else 4
        return self.backbone.prepare(test.select(range(min(most, len(test)))))

    @torch.no_grad()
    def _gather(
        self,
        change: Additive | Multiplicative | None,
        scale: float,
        sums: MutableMapping[str, Tensor],
        products: MutableMapping[str, Tensor],
    ) -> list[str]:
        """Add the change of the adapter that is in the model to sums, or to products; the weights it touches."""
        if isinstance(change, Multiplicative):
            turned = change.turn(products)
            products.update(turned)
            return list(turned)
        deltas = change.deltas() if isinstance(change, Additive) else {}
        for name, delta in deltas.items():
            total = sums[name] if name in sums else torch.zeros_like(delta)
            sums[name] = total.add_(delta, alpha=scale)
        return list(deltas)

    @torch.no_grad()
    def _write(self, touched: Collection[str]) -> None:
        """Take the tuner off, and bring these weights up to date."""
        self.backbone.model = self.tuner.detach(self.backbone.model)
        parameters = dict(self.backbone.model.named_parameters())
        for name in touched:
            if name not in self._base:
                self._base[name] = parameters[name]
            turned = name in self._product
            parameters[name].copy_(self._product[name] if turned else self._base[name].float() + self._sum[name])

    def files(self) -> Files:
        return self._files if self._beside is None else self._beside.files()

    def restore(self, commits: Sequence[StoredFiles]) -> None:
        if self._beside is not None:
            return self._beside.restore(commits)
        self._add((commit, 1.0) for commit in commits)

    def compose(self, commits: Mapping[str, StoredFiles], scales: Mapping[str, float]) -> None:
        """See `Consolidation.compose`. An adapter was trained on top of those merged before it: without them, it may do
        something else than it learned.

        Raises:
            ConfigError: rotations, of which none can be taken out of the product.
        """
        if self.tuner.rotates:
            raise ConfigError(
                "rotations follow one another, so no task can be chosen, left out or scaled: export the model as it is"
            )
        self._add((commit, scales[task]) for task, commit in commits.items() if task in scales)

    def separable(self, tuner: Tuner) -> bool:
        return not tuner.rotates

    def keeps_base(self, tuner: Tuner) -> bool:
        return stackable(tuner)

    def _add(self, parts: Iterable[tuple[StoredFiles, float]]) -> None:
        """Add what commits hold, each times a factor: one adapter is put on, takes the values of one after the other,
        and every weight is written once."""
        slots, touched = None, dict[str, None]()
        sums, products = dict(self._sum), dict(self._product)  # in memory while they change with every commit
        for commit, scale in parts:
            if slots is None:
                self.backbone.model = self.tuner.attach(self.backbone.model)
                slots, change = Slots(self.tuner, self.backbone.model), self.tuner.change(self.backbone.model)
            slots.put(stored_adapter(commit))
            touched |= dict.fromkeys(self._gather(change, scale, sums, products))
            self.backbone.version += 1
        if slots is not None:
            self._sum.update(sums)
            self._product.update(products)
            self._write(touched)

    def guarantee(self) -> list[Measurement]:
        if self._beside is not None:
            return []
        merged = [
            Measurement(
                "merged against unmerged outputs",
                self._merge_error,
                1e-5,
                "relative",
                "Merge",
                "merging the task's adapter into the weights must not change what the model computes",
            )
        ]
        return [*merged, *self._kept]
