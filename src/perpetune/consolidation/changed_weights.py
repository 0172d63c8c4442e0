"""What training has changed of all weights, stored as what it is: entries and their places, or whole tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FILE = "changed.safetensors"
BASE = "base.safetensors"


class BaseWeights:
    """The weights of an untouched model, on disk while the process lives: they take no memory beside those that train.

    Tied weights are one tensor, under the first of their names.
    """

    def __init__(self, model: nn.Module) -> None:
        from safetensors.torch import save_file

        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / BASE
        save_file({name: t.detach().cpu().contiguous() for name, t in own_tensors(model).items()}, self._path)

    def changed(self, model: nn.Module) -> dict[str, Tensor]:
        """`values.<name>` and `places.<name>` (a bit an entry, uint8) of what differs from the base, bit by bit;
        `whole.<name>` where that is smaller. What has not changed is left out."""
        from safetensors import safe_open

        found: dict[str, Tensor] = {}
        with safe_open(self._path, "pt") as base:
            for name, tensor in own_tensors(model).items():
                now = tensor.detach().cpu().contiguous()
                places = _bytes_of(now).ne(_bytes_of(base.get_tensor(name))).any(1)
                count, size = int(places.sum()), now.element_size()
                if count and count * size + -(-now.numel() // 8) < now.numel() * size:
                    found[f"values.{name}"] = now.flatten()[places]
                    found[f"places.{name}"] = torch.from_numpy(np.packbits(places.numpy()))
                elif count:
                    found[f"whole.{name}"] = now
        return found

    @torch.no_grad()
    def load(self, model: nn.Module, stored: Mapping[str, Tensor]) -> None:
        """The base, and on it what was stored."""
        from safetensors import safe_open

        with safe_open(self._path, "pt") as base:
            for name, tensor in own_tensors(model).items():
                weight = stored.get(f"whole.{name}")
                if weight is None:
                    weight = base.get_tensor(name)
                    if f"values.{name}" in stored:
                        bits = np.unpackbits(stored[f"places.{name}"].numpy(), count=weight.numel()).astype(bool)
                        weight.view(-1)[torch.from_numpy(bits)] = stored[f"values.{name}"]
                tensor.copy_(weight)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones once."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            found[name] = tensor
        seen.add(id(tensor))
    return found


def _bytes_of(tensor: Tensor) -> Tensor:
    """(entries x bytes) of each entry."""
    return tensor.reshape(-1, 1).view(torch.uint8)
