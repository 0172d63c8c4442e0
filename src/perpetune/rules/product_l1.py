"""L1 penalties on the change that a LoRA makes: N-LoRA as in the paper, as released, and on the factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.errors import RuleError
from ..core.measurement import Measurement
from .base import TaskContext
from .lora_penalty import LoraPenalty, gradient, same_shape, stack, work
from .lora_sites import LoraPair
from .shards import cut, local, sharded, whole

# Entries of a chunk of B A. A megabyte stays in a core's cache, where the sign and both products read it again;
# an accelerator wants few launches.
CPU_CHUNK = 2**18
DEVICE_CHUNK = 2**24


@dataclass
class _LoraL1(LoraPenalty):
    """What the three forms share: the product in row chunks, and how sparse it became."""

    _buffers: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def _product(self, A: Tensor, B: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, B[rows] A), chunk after chunk, in one buffer that the next chunk overwrites."""
        d_out, d_in = B.shape[0], A.shape[1]
        step = min(max((CPU_CHUNK if A.device.type == "cpu" else DEVICE_CHUNK) // d_in, 1), d_out)
        key = (A.device, A.dtype)
        if key not in self._buffers or self._buffers[key].numel() < step * d_in:
            self._buffers[key] = torch.empty(step * d_in, dtype=A.dtype, device=A.device)
        for start in range(0, d_out, step):
            rows = slice(start, min(start + step, d_out))
            chunk = self._buffers[key][: (rows.stop - start) * d_in].view(-1, d_in)  # chunk x d_in
            yield rows, torch.mm(B[rows], A, out=chunk)

    @torch.no_grad()
    def guarantee(self) -> list[Measurement]:
        """How sparse the change of the task just trained is: observed figures, an L1 penalty promises none of them."""
        if not self._pairs:
            return []
        total = above = zeros = 0
        norm = 0.0
        for pair in self._pairs:
            A, B = work(pair.A), work(pair.B)
            largest = max(chunk.abs().max().item() for _, chunk in self._product(A, B))
            for _, chunk in self._product(A, B):
                total += chunk.numel()
                zeros += int((chunk == 0).sum())
                above += int((chunk.abs_() > 0.01 * largest).sum())
                norm += chunk.sum().item()
        source = type(self).__name__
        return [
            Measurement(
                "entries of BA above 1 % of their layer's largest", above / total, None, "share", source,
                "How much of the weights this task really changed; without a penalty it is about 0.9.",
            ),
            Measurement(
                "entries of BA that are exactly 0", zeros / total, None, "share", source,
                "A penalty under Adam makes entries small, not zero.",
            ),
            Measurement(
                "L1 norm of BA", norm, None, "", source, "Summed over all layers, scaling s not included.",
            ),
        ]  # fmt: skip


@dataclass
class ProductL1(_LoraL1):
    """N-LoRA's penalty on the change itself: strength * sum over layers of ||B A||_1, scaling s not included.

    With S = sign(B A), d_out x d_in:  dB = S A^T,  dA = B^T S.  S is made in row chunks of B in one reused buffer, so
    that never more than one chunk of B A exists, and any rectangular layer will do.

    A useful strength depends on the layer's size, for the sum has d_out d_in entries: 0.4 r^2 / (d_out d_in) is where
    to begin the search. A strong one 'rescues' old tasks by not learning new ones: look at plasticity beside it.

    Source: N-LoRA (2410.10179), the paper's form.
    """

    @torch.no_grad()
    def on_gradient(self) -> None:
        if self.before_clipping:
            return
        for pair in self._pairs:
            dA, dB = _accumulator(pair.A), _accumulator(pair.B)
            self._add_slopes(pair, dA, dB)
            for p, d in ((pair.A, dA), (pair.B, dB)):
                if d is not None and p.grad is not None and d is not p.grad:
                    local(p.grad).add_(cut(d, p))

    def terms(self) -> Iterator[tuple[Sequence[nn.Parameter], Sequence[Tensor], float]]:
        for pair in self._pairs:
            slopes = [torch.zeros_like(work(p)) for p in (pair.A, pair.B)]
            self._add_slopes(pair, *slopes)
            yield (pair.A, pair.B), slopes, 1.0

    def _add_slopes(self, pair: LoraPair, dA: Tensor | None, dB: Tensor | None) -> None:
        A, B = work(pair.A), work(pair.B)
        for rows, S in self._product(A, B):
            S.sign_()
            if dB is not None:
                dB[rows].addmm_(S, A.T, alpha=self.strength)
            if dA is not None:
                dA.addmm_(B[rows].T, S, alpha=self.strength)

    @torch.no_grad()
    def penalty(self) -> Tensor:
        total: Tensor | float = 0.0
        for pair in self._pairs:
            total = total + sum(chunk.abs_().sum() for _, chunk in self._product(work(pair.A), work(pair.B)))
        return torch.as_tensor(total) * self.strength


def _accumulator(p: nn.Parameter) -> Tensor | None:
    """Where to add up p's gradient: `.grad` itself, or zeros in the working type beside a half-precision or sharded
    one."""
    if not p.requires_grad:
        return None
    grad = gradient(p)
    if sharded(grad):
        return torch.zeros_like(work(p))
    return grad if grad.dtype in (torch.float32, torch.float64) else torch.zeros_like(grad, dtype=torch.float32)


@dataclass
class ReleasedProductL1(_LoraL1):
    """N-LoRA's penalty as its released code has it: strength * sum over layers of ||A B||_1, with A B of size r x r.

    With S = sign(A B):  dA = S B^T,  dB = A^T S.  The product exists only where d_in = d_out. It pushes the eigenvalues
    of B A to 0, not its entries, and makes nothing sparse: for replication, `ProductL1` is the paper's form.

    Source: released code of N-LoRA (2410.10179), published strength 0.4.

    Raises:
        RuleError: (from `begin_task`) a layer is not square.
    """

    _groups: list[list[LoraPair]] = field(init=False, repr=False, compare=False, default_factory=list)

    def begin_task(self, task: TaskContext) -> None:
        super().begin_task(task)
        for pair in self._pairs:
            d_out, d_in = pair.shape
            if d_in != d_out:
                raise RuleError(
                    f"ReleasedProductL1 multiplies A by B, impossible in layer `{pair.name}` ({d_in} -> {d_out}): "
                    "use ProductL1, or adapt square layers only"
                )
        self._groups = same_shape(self._pairs)

    def terms(self) -> Iterator[tuple[Sequence[nn.Parameter], Sequence[Tensor], float]]:
        for group in self._groups:
            A, B = stack([pair.A for pair in group]), stack([pair.B for pair in group])  # n x r x d, n x d x r
            S = torch.bmm(A, B).sign_()  # n x r x r
            yield [pair.A for pair in group], torch.bmm(S, B.mT).unbind(), self.strength
            yield [pair.B for pair in group], torch.bmm(A.mT, S).unbind(), self.strength

    @torch.no_grad()
    def penalty(self) -> Tensor:
        return torch.as_tensor(sum((work(p.A) @ work(p.B)).abs().sum() for p in self._pairs)) * self.strength


@dataclass
class FactorL1(_LoraL1):
    """L1 on the factors: strength * sum over layers of ||A||_1 + ||B||_1, as re-implementations of N-LoRA have it.

    dA = sign(A),  dB = sign(B).  Too strong, the whole adapter collapses to 0.
    """

    def terms(self) -> Iterator[tuple[Sequence[nn.Parameter], Sequence[Tensor], float]]:
        params = [p for pair in self._pairs for p in (pair.A, pair.B)]
        if params:
            yield params, torch._foreach_sign([whole(p) for p in params]), self.strength

    @torch.no_grad()
    def penalty(self) -> Tensor:
        return torch.as_tensor(sum(work(p).abs().sum() for q in self._pairs for p in (q.A, q.B))) * self.strength
