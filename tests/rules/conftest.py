"""Toys for the tests of the rules: a peft model of any layer shapes, and a counter of what a piece of code computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from perpetune.rules import lora_pairs


class Side(nn.Module):
    """Linear layers side by side; layer i reads the first d_in columns. Returns a scalar loss."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d_in, d_out) for d_out, d_in in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return sum((layer(x[:, : layer.in_features]) - 1).square().mean() for layer in self.layers)


class Counter(TorchDispatchMode):
    """Counts operations and remembers the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.ops, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops += 1
        for t in out if isinstance(out, list | tuple) else [out]:
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.numel())
        return out


def make(
    shapes: Sequence[tuple[int, int]] = ((6, 8), (8, 8)),
    rank: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> peft.PeftModel:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=r"layers\.\d+")
    model = peft.get_peft_model(Side(shapes), config, autocast_adapter_dtype=False)
    for pair in lora_pairs(model):
        nn.init.normal_(pair.B)
    return model.to(dtype)


@pytest.fixture(scope="session")
def toy() -> Callable[..., peft.PeftModel]:
    """toy(shapes, rank, seed, dtype): a peft model with B not 0; its forward returns a loss."""
    return make


@pytest.fixture(scope="session")
def counter() -> type[Counter]:
    return Counter


@pytest.fixture(scope="session")
def relative() -> Callable[[Sequence[Tensor], Sequence[Tensor]], float]:
    """relative(found, expected): difference of two lists of tensors relative to the second's norm, in fp64."""

    def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        a, b = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (found, expected))
        return ((a - b).norm() / b.norm()).item()

    return difference


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory) -> Path:
    """The folder in which two processes left what tests compare with one."""
    from tests.rules import ranks

    return ranks.run(tmp_path_factory.mktemp("ranks"))
