"""How much each entry matters to a task, judged before anything is trained, and leaving no trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ..core.errors import RuleError
from ..core.processes import sum_
from .lora_penalty import work
from .modes import modes_kept
from .shards import ROWS, reshard, sharded

Clip = Literal["none", "per_tensor", "global"]


@contextmanager
def burn_in(model: nn.Module, *, dropout: bool, seed: int) -> Iterator[None]:
    """Gradients may be taken inside; random states, the modes of the modules and their buffers are then as before."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]  # in train mode a batch norm goes on averaging
    try:
        with modes_kept(model), torch.random.fork_rng(range(torch.cuda.device_count())), torch.enable_grad():
            torch.manual_seed(seed)
            model.train(dropout)
            yield
    finally:
        reshard(model)
        with torch.no_grad():
            for b, kept in buffers:
                b.copy_(kept)


def leaves(model: nn.Module, params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """The tensors in which a backward pass leaves the gradients of one process: of weights that FSDP2 shards, the whole
    ones that stand in their place while they are needed, of which gradients are not yet averaged over processes.

    Raises:
        RuleError: they are sharded by something else.
    """
    if not any(sharded(p) for p in params):
        return list(params)
    numbers = {id(p): i for i, p in enumerate(params)}
    places = [
        (numbers[id(p)], module, name)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if id(p) in numbers
    ]
    for module in model.modules():
        if hasattr(module, "unshard"):
            module.unshard()  # type: ignore[operator]
    found = {i: module._parameters[name] for i, module, name in places}
    reshard(model)
    ordered = [cast(nn.Parameter, found[i]) for i in range(len(params))]
    if any(sharded(p) for p in ordered):
        raise RuleError(f"scores of gradients need weights that FSDP2 shards, and these are sharded otherwise: {ROWS}")
    return ordered


def gradient_scores(
    losses: Iterable[Tensor],
    params: Sequence[nn.Parameter],
    score: Literal["fisher", "gradient", "absolute"],
    clip: Clip,
    at_most: int | None,
) -> list[Tensor] | None:
    """Of the gradients g of the losses: "fisher" sum g^2, "gradient" |sum g|, "absolute" sum |g|.

    `.grad` is left alone. Returns one tensor per parameter, fp64 where that is its type and fp32 otherwise; None where
    there is no loss. The sums are those of all processes, each of which has its own losses.
    """
    kinds = [torch.promote_types(p.dtype, torch.float32) for p in params]
    sums = [torch.zeros(p.shape, dtype=kind, device=p.device) for p, kind in zip(params, kinds, strict=True)]
    count = 0
    for loss in islice(losses, at_most):
        count += 1
        gradients = torch.autograd.grad(loss, params, materialize_grads=True)  # zeros where the loss does not reach
        g = clipped([work(gradient) for gradient in gradients], clip)
        with torch.no_grad():
            if score == "fisher":
                torch._foreach_addcmul_(sums, g, g)
            else:
                torch._foreach_add_(sums, torch._foreach_abs(g) if score == "absolute" else g)
    numbers = torch.tensor([count])
    sum_([numbers, *sums])
    if not numbers.item():
        return None
    torch._foreach_abs_(sums)
    return sums


def clipped(gradients: list[Tensor], clip: Clip) -> list[Tensor]:
    """Scaled to norm 1 where it is above: each tensor alone, all together, or not at all."""
    if clip == "none":
        return gradients
    norms = list(torch._foreach_norm(gradients))
    if clip == "global":
        total = torch.stack([norm.to(norms[0].device) for norm in norms]).norm()
        norms = [total.to(norm.device) for norm in norms]
    return [g / (norm + 1e-6).clamp(min=1) for g, norm in zip(gradients, norms, strict=True)]
