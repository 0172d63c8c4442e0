"""A few raw inputs of earlier tasks and what the model made of them then: the drift of its outputs, seen directly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import RuleError
from ..core.measurement import Measurement
from ..core.processes import from_first
from .modes import modes_kept
from .shards import reshard


@dataclass
class Probes:
    """The first inputs of every task, each with the model's output right after that task was learned.

    Attributes:
        tasks: one (inputs as keyword arguments, output) for every task.
    """

    tasks: list[tuple[dict[str, Tensor], Tensor]] = field(default_factory=list)

    def add(self, model: nn.Module, batches: Iterable[dict[str, Tensor]], number: int) -> None:
        """Keep the first `number` inputs of the first batch (of the first process), and the model's output for them. A
        model whose inputs are not one row for each example may say what they are, by `first_examples(batch, number)`.

        Raises:
            RuleError: an input that has not one row for each example, as the patches of Qwen2-VL's images.
        """
        first = getattr(model, "first_examples", _first_rows)
        for batch in islice(batches, 1):
            inputs = {k: v.cpu().clone() for k, v in first(batch, number).items()}
            self.tasks.append(from_first((inputs, _output(model, inputs))))

    def drift(self, model: nn.Module) -> float:
        """Largest |f(x) - f_then(x)| / |f_then(x)| over all probes x; 0 where there are none."""
        worst = 0.0
        for inputs, then in self.tasks:
            change = (_output(model, inputs).double() - then.double()).flatten(1).norm(dim=1)
            worst = max(worst, float((change / then.double().flatten(1).norm(dim=1).clamp_min(1e-300)).max()))
        return worst

    def measurement(self, model: nn.Module, bound: float | None, source: str) -> Measurement:
        note = f"{len(self.tasks)} tasks' probes. Measured against the outputs right after each was learned."
        return Measurement("worst change of outputs on probes", self.drift(model), bound, "relative", source, note)

    def state(self) -> dict[str, Tensor]:
        state = {}
        for i, (inputs, output) in enumerate(self.tasks):
            state.update({f"{i}.input.{k}": v.clone() for k, v in inputs.items()})
            state[f"{i}.output"] = output.clone()
        return state

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Probes:
        found: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            number, _, name = key.partition(".")
            found.setdefault(int(number), {})[name] = value.clone()
        tasks = [found[i] for i in sorted(found)]
        return cls(
            [({k[len("input.") :]: v for k, v in t.items() if k.startswith("input.")}, t["output"]) for t in tasks]
        )


def _first_rows(batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    rows = {name: len(tensor) for name, tensor in batch.items()}
    odd = [name for name, count in rows.items() if count != min(rows.values())]
    if odd:
        raise RuleError(f"no probes can be taken of `{odd[0]}`, whose rows are not examples: set probes to 0")
    return {name: tensor[:number] for name, tensor in batch.items()}


@torch.no_grad()
def _output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's first output tensor (N x ...) in eval mode, on the CPU."""
    device = next(model.parameters()).device
    try:
        with modes_kept(model):
            model.eval()
            output: Any = model(**{k: v.to(device) for k, v in inputs.items()})
    finally:
        reshard(model)
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output.cpu()
