"""The delta of one task is taken."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..core.errors import DeltaError
from .combine import same, tied_names
from .delta import Delta
from .seeded_mask import SeededMask
from .storage import Part, Storage, take


@torch.no_grad()
def extract(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    mask: SeededMask,
    *,
    fingerprint: str,
    storage: Storage = "fp32",
    dense: Collection[str] = (),
    bits: Mapping[str, Tensor] | None = None,
) -> Delta:
    """The delta m * (tuned - base) of one task.

    Args:
        base, tuned: tensors of the same names and shapes, as in `state_dict()`. Names are those of the base model.
        mask: where to keep values, and the key of the task.
        fingerprint: of the base model (`backbone.fingerprint`).
        storage: of the values; int8 with one fp16 scale for 256 values.
        dense: names of tensors to keep whole.
        bits: boolean masks of the named tensors, for masks that depend on data; stored as they are, one bit an entry.
            Each is read once, for tensors that changed.

    Raises:
        DeltaError: names, shapes or ties of the two models differ, a kept value is not finite, `dense` or `bits` name
            a tensor that is not there, or a mask in `bits` does not fit.
    """
    bits = bits or {}
    if lonely := {*base} ^ {*tuned}:
        raise DeltaError(f"`{min(lonely)}` is in one of the two models alone: give tensors of the same names")
    if unknown := {*dense, *bits} - {*base}:
        raise DeltaError(f"there is no tensor `{min(unknown)}` to choose from: give a name of the base model")
    parts: dict[str, Part] = {}
    tied: dict[str, str] = {}
    left_out: list[str] = []
    for names in min(tied_names(base), tied_names(tuned), key=len):  # a copied state has lost its ties
        name, *others = sorted(names)
        theta_0, theta_t = base[name], tuned[name]
        if theta_0.shape != theta_t.shape:
            raise DeltaError(f"`{name}` has shape {tuple(theta_0.shape)} in the base and {tuple(theta_t.shape)} tuned")
        if any(not same(base[o], theta_0) or not same(tuned[o], theta_t) for o in others):
            raise DeltaError(f"{', '.join(sorted(names))}: one tensor in one of the models, but not alike in both")
        if same(theta_0, theta_t):
            continue
        if not theta_0.is_floating_point():
            left_out += names
            continue
        tied.update(dict.fromkeys(others, name))
        chosen = next((bits[n] for n in names if n in bits), None)
        if chosen is not None and (chosen.shape != theta_0.shape or chosen.dtype != torch.bool):
            raise DeltaError(f"the mask of `{name}` must be boolean and of shape {tuple(theta_0.shape)}")
        whole = any(n in dense for n in names)
        parts[name] = take(theta_0, theta_t, mask, name, storage, bits=chosen, dense=whole)
    return Delta(mask, fingerprint, storage, dict(sorted(parts.items())), tied, tuple(sorted(left_out)))
