"""COFT: every block of a rotation stays in a ball around the identity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, RuleError
from ..core.measurement import Measurement
from .base import Rule, TaskContext
from .lora_penalty import work
from .shards import local, whole


class Blocks(NamedTuple):
    """The r blocks of one OFT layer (r = 1 where all blocks are one), b x b each.

    Attributes:
        name: of the layer.
        layer: peft's.
        adapter: its trained adapter; holder: the module that has Q.
        Q: r x b(b-1)/2, the entries of each block above the diagonal.
        start: values of Q when the task began.
        b: width of a block.
        exact: the rotation is the Cayley transform itself, not terms of its Neumann series.
    """

    name: str
    layer: Any
    adapter: str
    holder: nn.Module
    Q: nn.Parameter
    start: Tensor
    b: int
    exact: bool


@dataclass
class RotationBall(Rule):
    """After each step every block Q_i that has left |Q_i|_F <= radius * b^2 / sqrt(r) is scaled back to that length.

    Q_i is skew-symmetric, b x b, and R_i = (I - Q_i)(I + Q_i)^-1; so |R_i - I|_F <= 2 |Q_i|_F. Because it is done to
    the weights after the step, whatever the optimizer, they are never outside. It acts block by block, on the `oft_R`
    of `peft.OFTConfig`.

    Leave `OFTConfig.coft` off: that projection has a radius without b^2, in which next to nothing can be learned (1000
    times less at b = 32), and is made in the forward pass. With `use_cayley_neumann=True`, the default of peft 0.21,
    R_i is only nearly a rotation, and what is said of |R_i - I|_F is not promised.

    Source: COFT, Qiu et al., 2306.07280, which bounds |R - I|; the ball of Q and the factors b^2 and 1 / sqrt(r) are
    those of the released layer code. Published radius (epsilon): 6e-5 and 1e-3 with r = 4.

    Args:
        radius: epsilon.

    Raises:
        ConfigError: the radius is not a finite number above 0.
        RuleError: (from `begin_task`) the model trains no OFT, or one with peft's own projection.
    """

    radius: float = 6e-5
    _groups: list[list[Blocks]] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        if not math.isfinite(self.radius) or self.radius <= 0:
            raise ConfigError(f"RotationBall: radius={self.radius} must be a finite number above 0")

    def begin_task(self, task: TaskContext) -> None:
        groups: dict[tuple, list[Blocks]] = {}
        for blocks in _oft_blocks(task.model):
            Q = blocks.Q
            groups.setdefault((Q.shape, Q.dtype, Q.device), []).append(blocks)
        if not groups:
            raise RuleError(
                "RotationBall acts on the blocks of OFT (peft.OFTConfig), and this model trains none: use that tuner, "
                "or take the rule out"
            )
        self._groups = list(groups.values())

    def parameters(self) -> Sequence[nn.Parameter]:
        return [blocks.Q for group in self._groups for blocks in group]

    def length(self, blocks: Blocks) -> float:
        """The largest |Q_i|_F of a layer."""
        return self.radius * blocks.b**2 / math.sqrt(len(blocks.Q))

    @torch.no_grad()
    def on_update(self, before: Sequence[Tensor]) -> None:
        for group in self._groups:
            weights: list[Tensor] = [local(blocks.Q) for blocks in group]
            rows = work(torch.stack(weights))  # n x r x b(b-1)/2
            rows = rows * (self.length(group[0]) / _lengths(rows)).clamp_(max=1)  # 1 leaves a block to the bit
            torch._foreach_copy_(weights, rows.unbind())

    @torch.no_grad()
    def guarantee(self) -> list[Measurement]:
        """Lengths of Q and of R - I against the ball's, and whether it left any room to move."""
        if not self._groups:
            return []
        inside, turned = [], []
        count = rest = edge = 0
        for blocks in (blocks for group in self._groups for blocks in group):
            length, eps = self.length(blocks), torch.finfo(blocks.Q.dtype).eps
            Q = whole(blocks.Q)
            shares = _lengths(Q.cpu().double()) / length  # r x 1
            inside.append((blocks.name, shares.max().item(), 1 + 8 * eps))
            bound = 1 + blocks.b * eps / (2 * length) if blocks.exact else None  # entries of R are rounded at 1
            turned.append((blocks.name, _turned(blocks) / (2 * length), bound))
            count += len(shares)
            rest += int((Q == whole(blocks.start)).all(1).sum())
            edge += int((shares > 0.999).sum())
        exact = all(bound is not None for *_, bound in turned)
        unless = "" if exact else "Only observed: use_cayley_neumann=True makes rotations that are not exact ones."
        source = "RotationBall"
        return [
            _worst("largest |Q|_F over the radius of its ball", inside, "1: on the edge. Above 1: outside."),
            _worst("largest |R - I|_F over twice the radius", turned, unless or "How far a block turns at most."),
            Measurement(
                "blocks that did not move", rest / count, 1 - 1 / count, "share", source,
                "All of them: nothing was learned. The radius may be too small for the type of the weights.",
            ),
            Measurement(
                "blocks on the edge of their ball", edge / count, None, "share", source,
                "Where it is most of them, the radius decides what is learned.",
            ),
        ]  # fmt: skip

    def end_task(self, task: TaskContext) -> None:
        self._groups = []


def _lengths(rows: Tensor) -> Tensor:
    """|Q_i|_F of entries above the diagonal, ... x r x b(b-1)/2: ... x r x 1."""
    return math.sqrt(2) * torch.linalg.vector_norm(rows, dim=-1, keepdim=True)


def _turned(blocks: Blocks) -> float:
    """The largest |R_i - I|_F of a layer, of the rotation as it is used."""
    holder = blocks.holder
    kept = holder._parameters["weight"]
    holder._parameters["weight"] = nn.Parameter(whole(blocks.Q), requires_grad=False)  # of shards, all
    try:
        R = blocks.layer.get_delta_weight(blocks.adapter)  # d x d, of which the blocks on the diagonal are taken
    finally:
        holder._parameters["weight"] = kept
    b = blocks.b
    on_diagonal = R.view(-1, b, len(R) // b, b).diagonal(dim1=0, dim2=2)  # b x b x d/b
    I = torch.eye(b, dtype=torch.float64).unsqueeze(-1)  # noqa: E741
    return (on_diagonal.cpu().double() - I).norm(dim=(0, 1)).max().item()


def _worst(name: str, parts: Sequence[tuple[str, float, float | None]], note: str) -> Measurement:
    _, value, bound = max(parts, key=lambda part: math.inf if math.isnan(part[1]) else part[1] / (part[2] or 1))
    return Measurement(name, value, bound, "", "RotationBall", note, tuple(parts))


def _oft_blocks(model: nn.Module) -> Iterator[Blocks]:
    """The blocks of active OFT adapters that train.

    Raises:
        RuleError: peft projects them as well.
    """
    from peft.tuners.oft.layer import OFTLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, OFTLayer) or layer.disable_adapters:
            continue
        for adapter in layer.active_adapters:
            for held in (layer.oft_R, layer.oft_embedding_R):
                part: Any = held[adapter] if adapter in held else None
                if part is None or not part.weight.requires_grad:
                    continue
                if part.coft:
                    raise RuleError(
                        "OFTConfig(coft=True) projects the blocks as well, to another radius and in the forward pass: "
                        "leave `coft` off where RotationBall is used"
                    )
                start = part.weight.detach().clone()
                yield Blocks(
                    name, layer, adapter, part, part.weight, start, part.block_size, not part.use_cayley_neumann
                )
