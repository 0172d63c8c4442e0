"""The adapter that is in a model, whose values are exchanged for those of other tasks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..tuners import Tuner


class Slots:
    """Where the values of an adapter lie in an attached model: any tuner can be kept, however many tasks there are.

    Where its tensors are the model's own, values are copied into them, which costs nothing but the copy; else the tuner
    loads them.
    """

    def __init__(self, tuner: Tuner, model: nn.Module) -> None:
        self.tuner, self.model = tuner, model
        self.places = tuner.tensors(model)
        own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.in_place = all(t.data_ptr() in own for t in self.places.values())

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        alike = self.in_place and values.keys() == self.places.keys()
        if alike and all(v.shape == self.places[name].shape for name, v in values.items()):
            torch._foreach_copy_([self.places[name] for name in values], list(values.values()))
        else:
            self.tuner.load(self.model, dict(values))
