"""What is remembered of the inputs of a model's trained linear layers: one memory for each input, whoever reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import RuleError
from ..subspace import FrequentDirections, InputMemory, SecondMoment, restore
from .linear_sites import Batches, LinearSite, linear_sites, see_inputs, shared_inputs


@dataclass
class Input:
    """An input that one or several layers read: its second moment or sketch, and M (d x k, fp64) made of it."""

    memory: InputMemory
    M: Tensor


@dataclass
class LayerMemory:
    """The inputs of all layers, tasks summed to equal parts, on the CPU; its size does not grow with the tasks.

    Attributes:
        wide: layers of more inputs d than this keep a sketch (Frequent Directions) of `sketch_rows` rows.
        inputs: one for each tensor that is read; reads: layer -> number of its input.
    """

    wide: int = 4096
    sketch_rows: int = 256
    inputs: list[Input] = field(default_factory=list)
    reads: dict[str, int] = field(default_factory=dict)

    def of(self, site: LinearSite) -> Input:
        return self.inputs[self.reads[site.name]]

    @property
    def exact(self) -> bool:
        """Whether no input is sketched."""
        return all(isinstance(kept.memory, SecondMoment) for kept in self.inputs)

    def check(self, sites: Sequence[LinearSite]) -> None:
        """
        Raises:
            RuleError: these are not the layers that the memory is of.
        """
        now = {site.name: site.width for site in sites}
        past = {name: self.inputs[i].memory.width for name, i in self.reads.items()}
        wrong = sorted(name for name in now.keys() | past.keys() if now.get(name) != past.get(name))
        if wrong:
            has, had = (f"d = {d[wrong[0]]}" if wrong[0] in d else "not trained" for d in (now, past))
            raise RuleError(
                f"the memory of old inputs is of other layers: `{wrong[0]}` is {has}, in earlier tasks {had} "
                f"({len(wrong)} of {len(now | past)} layers differ): train the same layers in all tasks"
            )

    @torch.no_grad()
    def observe(self, model: nn.Module, batches: Batches, energy: float, cap: float | None) -> None:
        """Add one task's inputs, as the model computes them now, and make every M anew.

        Args:
            model: its trained linear layers are those remembered; the tuner must be attached.
            batches: yields keyword arguments of `model`; called twice.
            energy: share of sum sigma^2 that M holds; cap: largest share of d that it may take.

        Raises:
            RuleError: no batches, a layer that is not called, or layers that shared an input and no longer do.
        """
        sites = linear_sites(model)[0]
        shared = shared_inputs(model, sites, batches)
        reads = {site.name: i for i, group in enumerate(shared) for site in group}
        if self.inputs:
            self.check(sites)
            if reads != self.reads:
                raise RuleError("layers that shared an input in earlier tasks do not now: their memory cannot be split")
        moments = [self._new(group[0].width, group[0].weight.device) for group in shared]
        counts = [0] * len(shared)

        def see(site: LinearSite, X: Tensor, mask: Tensor | None) -> None:
            counts[reads[site.name]] += moments[reads[site.name]].add(X, mask)

        see_inputs(model, [group[0] for group in shared], batches(), see)
        if not all(counts):
            raise RuleError(f"`{shared[counts.index(0)][0].name}` saw padding alone: look at the attention masks")
        units = [moment.unit() for moment in moments]  # all are checked before anything is remembered
        if not self.inputs:
            self.inputs = [Input(self._new(group[0].width, torch.device("cpu")), torch.empty(0)) for group in shared]
        for kept, unit in zip(self.inputs, units, strict=True):
            kept.memory.merge(unit)
            width = kept.memory.width
            kept.M = kept.memory.basis(energy, None if cap is None else max(1, int(cap * width)))
        self.reads = reads

    def _new(self, width: int, device: torch.device) -> InputMemory:
        on = torch.device("cpu") if device.type == "mps" else device  # mps has no fp64
        if width > self.wide:
            return FrequentDirections(width, self.sketch_rows, device=on)
        return SecondMoment(width, device=on)

    def state(self) -> dict[str, Tensor]:
        """`reads.<layer>` (number of its input), `input.<number>.M` and `input.<number>.<tensors of its memory>`."""
        state = {f"reads.{name}": torch.tensor(index) for name, index in self.reads.items()}
        for i, kept in enumerate(self.inputs):
            parts = {"M": kept.M.clone(), **kept.memory.state()}
            state.update({f"input.{i}.{key}": value for key, value in parts.items()})
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`.

        Raises:
            RuleError: tensors that are no such state, or not all of it.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        reads: dict[str, int] = {}
        for key, value in state.items():
            kind, _, rest = key.partition(".")
            number, _, name = rest.partition(".")
            if kind == "reads":
                reads[rest] = int(value)
            elif kind == "input" and name:
                parts.setdefault(number, {})[name] = value.detach()
            else:
                raise RuleError(f"`{key}` is no part of a memory of old inputs: expected `reads.` or `input.`")
        numbers = [str(i) for i in range(len(parts))]
        if not parts.keys() == set(numbers) == {str(i) for i in reads.values()}:
            raise RuleError("the memory of old inputs is incomplete: inputs and the layers that read them do not match")
        if any("M" not in part for part in parts.values()):
            raise RuleError("the memory of old inputs is incomplete: an input has no basis M")
        bases = [parts[n].pop("M").clone() for n in numbers]
        self.inputs = [Input(restore(parts[n]), M) for n, M in zip(numbers, bases, strict=True)]
        self.reads = reads
