"""What is remembered of the inputs of a model's trained linear layers: one memory for each input, whoever reads it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.errors import RuleError
from ..core.processes import sum_
from ..tuners.linear_map import LinearMap
from .linear_sites import Batches, see_inputs, shared_inputs
from .second_moments import DiagonalMoment, InputMemory, SecondMoment
from .sketches import FrequentDirections, restore


@dataclass
class Input:
    """An input that one or several layers read: its second moment or sketch, and M (d x k, fp64) made of it."""

    memory: InputMemory
    M: Tensor


def bytes_of_input(width: int, wide: int, sketch_rows: int, exact: bool) -> int:
    """What is stored of one input: half of C in fp32, or fp64 where every direction counts; or a sketch in fp64."""
    return 8 * sketch_rows * width if width > wide else (8 if exact else 4) * width * (width + 1) // 2


@dataclass
class LayerMemory:
    """The inputs of all layers, tasks summed to equal parts, on the CPU; its size does not grow with the tasks.

    Attributes:
        energy: share of sum sigma^2 that every M holds; cap: largest share of d that it may take.
        wide: layers of more inputs d than this keep a sketch (Frequent Directions) of `sketch_rows` rows.
        unit: every token counts as x / |x|, and not by its length.
        inputs: one for each tensor that is read; reads: layer -> number of its input.
    """

    energy: float = 0.99
    cap: float | None = None
    wide: int = 4096
    sketch_rows: int = 256
    unit: bool = False
    inputs: list[Input] = field(default_factory=list)
    reads: dict[str, int] = field(default_factory=dict)

    def of(self, site: LinearMap) -> Input:
        return self.inputs[self.reads[site.name]]

    @property
    def exact(self) -> bool:
        """Whether no input is sketched."""
        return not any(isinstance(kept.memory, FrequentDirections) for kept in self.inputs)

    @property
    def complete(self) -> bool:
        """Whether every M holds all directions that old inputs have."""
        return self.energy == 1 and self.cap is None and self.exact

    def check(self, sites: Sequence[LinearMap]) -> None:
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
    def observe(
        self, model: nn.Module, sites: Sequence[LinearMap], batches: Batches, unread: Collection[str] = ()
    ) -> None:
        """Add one task's inputs, as the model computes them now, and make every M anew.

        Args:
            model: the tuner must be attached; sites: its trained linear maps.
            batches: yields keyword arguments of `model`; called twice.
            unread: names of sites whose inputs count as 0, as they will be once what makes them is projected.

        Raises:
            RuleError: no batches, a layer that is not called, or layers that shared an input and no longer do.
        """
        shared = shared_inputs(model, sites, batches)
        reads = {site.name: i for i, group in enumerate(shared) for site in group}
        if self.inputs:
            self.check(sites)
            if reads != self.reads:
                raise RuleError("layers that shared an input in earlier tasks do not now: their memory cannot be split")
        moments = [self._new(group[0], group[0].weight.device) for group in shared]
        counts, silent = [0] * len(shared), set(unread)

        def see(site: LinearMap, X: Tensor, mask: Tensor | None) -> None:
            if {s.name for s in shared[reads[site.name]]} <= silent:
                X = torch.zeros_like(X)
            elif self.unit:
                X = self._normalised(X, moments[reads[site.name]].Delta.device)
            counts[reads[site.name]] += moments[reads[site.name]].add(X, mask)

        see_inputs(model, [group[0] for group in shared], batches(), see)
        for moment in moments:
            moment.gather()
        numbers = torch.tensor(counts)
        sum_([numbers])
        counts = numbers.tolist()
        if not all(counts):
            raise RuleError(f"`{shared[counts.index(0)][0].name}` saw padding alone: look at the attention masks")
        units = [moment.unit() for moment in moments]  # all are checked before anything is remembered
        if not self.inputs:
            self.inputs = [Input(self._new(group[0], torch.device("cpu")), torch.empty(0)) for group in shared]
        for kept, unit in zip(self.inputs, units, strict=True):
            kept.memory.merge(unit)
            kept.M = self._basis(kept.memory)
        self.reads = reads

    def _normalised(self, X: Tensor, device: torch.device) -> Tensor:
        """x / |x| for every token (... x d), in the type of the products; 0 stays 0."""
        X = X.detach().to(device, torch.promote_types(self.products, X.dtype))
        return X / X.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)

    def _new(self, site: LinearMap, device: torch.device) -> InputMemory:
        on = torch.device("cpu") if device.type == "mps" else device  # mps has no fp64
        if site.elementwise:
            return DiagonalMoment(site.width, device=on)
        if site.width > self.wide:
            return FrequentDirections(site.width, self.sketch_rows, device=on)
        rounded = self.products == torch.float32
        return SecondMoment(site.width, device=on, products=self.products, rounded=rounded)

    @property
    def products(self) -> torch.dtype:
        """fp32 where a share of the energy is asked for; every direction that inputs have can be told in fp64 alone."""
        return torch.float64 if self.energy == 1 else torch.float32

    def _basis(self, memory: InputMemory) -> Tensor:
        return memory.basis(self.energy, None if self.cap is None else max(1, int(self.cap * memory.width)))

    def state(self) -> dict[str, Tensor]:
        """`reads.<layer>` (number of its input), `input.<number>.<tensors of its memory>`; every M is made of those.
        `unit` is there where tokens count alike."""
        state = {f"reads.{name}": torch.tensor(index) for name, index in self.reads.items()}
        if self.inputs and self.unit:
            state["unit"] = torch.tensor(True)
        for i, kept in enumerate(self.inputs):
            state.update({f"input.{i}.{key}": value for key, value in kept.memory.state().items()})
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
            if key == "unit":
                continue
            if kind == "reads":
                reads[rest] = int(value)
            elif kind == "input" and name:
                parts.setdefault(number, {})[name] = value.detach()
            else:
                raise RuleError(f"`{key}` is no part of a memory of old inputs: expected `reads.` or `input.`")
        numbers = [str(i) for i in range(len(parts))]
        if not parts.keys() == set(numbers) == {str(i) for i in reads.values()}:
            raise RuleError("the memory of old inputs is incomplete: inputs and the layers that read them do not match")
        if parts:
            self.unit = "unit" in state
        memories = [restore(parts[n]) for n in numbers]
        self.inputs = [Input(memory, self._basis(memory)) for memory in memories]
        self.reads = reads
