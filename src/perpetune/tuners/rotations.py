"""What a rotation of a layer's inputs does to its weight: W <- W R^T, for peft's OFT and our Givens rotations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import ModelError
from ..core.measurement import Measurement
from ..metrics.energy import relative_energy_change, row_norm_change
from .base import base_names

ADVICE = "name linear layers in `target_modules`, or use Continue"
ROUNDING = 1e-5  # of fp32 rotations: entries of R R^T - I, and relative changes of row norms


@dataclass(frozen=True)
class Turn:
    """One rotated layer.

    Attributes:
        name: of its weight in the base model.
        layer: the peft layer.
        transposed: the weight is kept as in x out (Conv1D).
    """

    name: str
    layer: Any
    transposed: bool

    def __call__(self, weight: Tensor) -> Tensor:
        """W R^T, in fp32 or better, of a weight laid out as the layer keeps it."""
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        W = wide.T if self.transposed else wide  # out x in
        if hasattr(self.layer, "get_turned_weight"):
            turned = self.layer.get_turned_weight("default", W)
        else:
            turned = W @ self.rotation().to(W).T
        return turned.T if self.transposed else turned

    def rotation(self) -> Tensor:
        """R (in x in), fp64."""
        if hasattr(self.layer, "get_rotation"):
            return self.layer.get_rotation("default").detach().double()
        return self.layer.get_delta_weight("default").detach().double()

    def rows(self, weight: Tensor) -> Tensor:
        """A weight laid out with a neuron a row."""
        return weight.T if self.transposed else weight


def turning(kind: type) -> bool:
    """Whether layers of this kind rotate their inputs, and `Turn` knows how: peft's OFT, and ours."""
    from peft.tuners.oft import OFTLayer

    return issubclass(kind, OFTLayer) or hasattr(kind, "get_rotation")


def turns(model: nn.Module) -> Iterator[Turn]:
    """The rotated layers of a peft model with the adapter `default`.

    Raises:
        ModelError: one of them is no linear layer.
    """
    names = base_names(model)
    for module in model.modules():
        layer: Any = module
        held = getattr(layer, "oft_R", getattr(layer, "perpetune_givens_block_change", None))
        angles = getattr(layer, "perpetune_givens_angles", ())
        if "default" in getattr(layer, "oft_embedding_R", ()):
            raise ModelError(f"rotations of linear layers can be merged, not of embeddings: {ADVICE}")
        if held is not None and ("default" in held or "default" in angles):
            base = layer.get_base_layer()
            if base.weight.ndim != 2:
                raise ModelError(
                    f"only rotations of linear layers can be merged, not of {type(base).__name__}: {ADVICE}"
                )
            yield Turn(names[id(base.weight)], layer, isinstance(base, Conv1D))


@torch.no_grad()
def kept_geometry(model: nn.Module, since: Mapping[str, Tensor], promised: bool, source: str) -> list[Measurement]:
    """How far a task's rotations are from rotations, and what all of them did to lengths and angles of neurons.

    Args:
        since: weights before the first task, where they are not those under the tuner.
        promised: whether the form is one of exact rotations; else the figures are only observed.
        source: what promises it.
    """
    orthogonality, norms, energy = [], [], []
    for turn in turns(model):
        R = turn.rotation()
        gap = R @ R.T
        gap.diagonal().sub_(1)
        now = turn.layer.get_base_layer().weight.detach()
        old, new = turn.rows(since.get(turn.name, now)), turn.rows(turn(now))
        orthogonality.append((turn.name, float(gap.abs().max())))
        norms.append((turn.name, row_norm_change(new, old)))
        energy.append((turn.name, abs(relative_energy_change(new, old))))
    bound = ROUNDING if promised else None

    def worst(name: str, found: list[tuple[str, float]], note: str, unit: str = "relative") -> Measurement:
        parts = tuple((layer, value, bound) for layer, value in found)
        return Measurement(name, max(v for _, v in found), bound, unit, source, note, parts)

    return [
        worst("largest entry of R R^T - I", orthogonality, "of the rotation of the task just trained", ""),
        worst("change of row norms since the base", norms, "a rotation keeps the length of every neuron"),
        worst(
            "change of hyperspherical energy since the base",
            energy,
            "a rotation keeps the angles between neurons; energy alone does not show small losses of orthogonality",
        ),
    ]
