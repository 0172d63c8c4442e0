"""What subspace projection promises of every layer, and what was measured of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.measurement import Measurement
from ..tuners.linear_map import LinearMap
from .bases import squared_norm
from .layer_memory import LayerMemory

SOURCE = "SubspaceProjection"
# |dW M| / |W| that one projection and one rounding to the type of the weights leave.
LEAK = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Certificate:
    """What was measured at one weight: leak = |dW M| / |W|, drift = |dW X| / |X|, and what they cannot pass.

    `token`: what |dW x| / |x| cannot pass for any one old token x, however short or rare.
    """

    name: str
    leak: float
    leak_bound: float
    drift: float
    drift_bound: float
    token: float


@torch.no_grad()
def certificates(memory: LayerMemory, changes: Sequence[tuple[LinearMap, Tensor]]) -> list[Certificate]:
    """One for every protected weight. Where weights are sharded, every process must call it, and gets the same.

    Args:
        memory: of the old inputs.
        changes: each map with its W_ref (out x d): dW = W - W_ref.
    """
    found = []
    for site, W_ref in changes:
        kept = memory.of(site)
        moments, M = kept.memory, kept.M
        W = site.whole(site.matrix(site.weight)).to("cpu", torch.float64)
        D = W - site.whole(W_ref).to(W)  # rows x d
        norm, leak = W.norm(), (D @ M).norm()
        promised = LEAK.get(site.weight.dtype, LEAK[torch.bfloat16])
        # D = D (I - M M^T) + D M M^T: the bound holds for the first term, the promised leak for the second. The
        # sums that C is made of round, too.
        rounding = torch.finfo(memory.products).eps * len(M) * moments.total * D.square().sum()
        bound = (moments.bound(D, M).sqrt() + promised * norm * moments.total.sqrt()).square() + rounding
        found.append(
            Certificate(
                site.name,
                (leak / norm.clamp_min(torch.finfo(norm.dtype).tiny)).item(),
                promised,
                (moments.drift(D) / moments.total).sqrt().item(),
                (bound / moments.total).sqrt().item(),
                # where all old directions are kept, x lies in M
                squared_norm(D @ M if memory.complete else D).sqrt().item(),
            )
        )
    return found


def worst(found: Sequence[Certificate]) -> tuple[Certificate, Certificate]:
    """The weight that comes nearest to its bound on the leak, and the one that does on the drift."""
    return (
        max(found, key=lambda c: _ratio(c.leak, c.leak_bound)),
        max(found, key=lambda c: _ratio(c.drift, c.drift_bound)),
    )


def _ratio(value: float, bound: float) -> float:
    return math.inf if math.isnan(value) else value / bound if bound else value


def measurements(
    found: Sequence[Certificate], memory: LayerMemory, energy: float, cap: float | None, promises: bool, unsafe: int
) -> list[Measurement]:
    """What is promised of the layer that is worst off, and how full the memory is.

    Args:
        found: at least one certificate.
        energy, cap: how much of the old inputs is protected.
        promises: whether leak and drift are promised, or only observed.
        unsafe: trained parameters that are not protected.
    """
    leak, drift = worst(found)
    residuals = [float(kept.memory.residual(kept.M)) for kept in memory.inputs]
    exact = cap is None and memory.exact
    token = max(found, key=lambda c: math.inf if math.isnan(c.token) else c.token)
    counted = "Every old token counts alike" if memory.unit else "Old tokens count by their squared lengths"
    used = [kept.M.shape[1] / len(kept.M) for kept in memory.inputs]
    full = sum(share == 1 for share in used)
    loose = f" {unsafe} trained parameters are not protected." if unsafe else ""
    return [
        Measurement(
            "change inside the protected space |dW M| / |W|", leak.leak,
            leak.leak_bound if promises else None, "relative", SOURCE,
            f"Worst layer: `{leak.name}`. 0 but for rounding: what old inputs read of the weights has not changed.",
        ),
        Measurement(
            "drift of a layer on old inputs |dW X| / |X|", drift.drift,
            drift.drift_bound if promises else None, "relative", SOURCE,
            f"Worst layer: `{drift.name}`. {counted}. The bound is that of the directions left unprotected.{loose}",
            tuple((c.name, c.drift, c.drift_bound if promises else None) for c in found),
        ),
        Measurement(
            "old inputs left unprotected", max(residuals), 1 - energy + 1e-9 if exact else None, "share",
            SOURCE,
            f"Share of old inputs that later tasks may change, in the worst layer. {counted}, so that single ones may "
            "be changed entirely.",
        ),
        Measurement(
            "input directions in use", sum(used) / len(used), None, "share", SOURCE,
            f"1: nothing more can be learned. {full} of {len(used)} inputs are full.",
        ),
        Measurement(
            "what the drift |dW x| / |x| of any one old token cannot pass", token.token, None, "relative", SOURCE,
            f"Worst layer: `{token.name}`. The drift above is a mean over tokens and promises nothing of one.",
            tuple((c.name, c.token, None) for c in found),
        ),
    ]  # fmt: skip


def unseen_changes(buffers: Sequence[str], promises: bool, source: str = SOURCE) -> Measurement:
    """Buffers of the model that are not what they were when the task began: no projection sees them."""
    note = f"The first: `{buffers[0]}`." if buffers else "Running statistics and their like, compared bit by bit."
    bound = 0 if promises else None
    return Measurement("buffers that training changed", len(buffers), bound, "", source, note)
