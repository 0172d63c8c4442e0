"""Tensors that are needed once a task: in files while the process lives, so that they take no memory beside a model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.files import writing

KEY = "t"


class OnDisk(MutableMapping[str, Tensor]):
    """A mapping of names to tensors, each in a file of its own in a temporary folder.

    What is read is a copy, on the device of the tensor that was put there: it is put back to change it.
    """

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory | None = None
        self._at: dict[str, tuple[Path, torch.device]] = {}
        self._made = 0

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        from safetensors.torch import save_file

        self._folder = self._folder or tempfile.TemporaryDirectory()
        if name in self._at:
            file = self._at[name][0]
        else:
            self._made += 1
            file = Path(self._folder.name) / f"{self._made}.safetensors"
        with writing(file):
            save_file({KEY: tensor.detach().cpu().contiguous()}, file)
        self._at[name] = file, tensor.device

    def __getitem__(self, name: str) -> Tensor:
        from safetensors.torch import load

        file, device = self._at[name]
        return load(file.read_bytes())[KEY].to(device)  # a copy of its own, and not a mapped one: the file may change

    def __delitem__(self, name: str) -> None:
        self._at.pop(name)[0].unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self._at
