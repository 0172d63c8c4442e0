"""Deltas are combined on their base: in fp32, in one order, each weight rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import DeltaError
from .combination import Chunk, Combination, Sum
from .delta import Delta
from .storage import Walk


def tied_names(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the same memory, together."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        groups.setdefault(place, []).append(name)
    return list(groups.values())


def same(a: Tensor, b: Tensor) -> bool:
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(b.device, wide), b.to(wide))


def merge(
    base: Mapping[str, Tensor],
    deltas: Sequence[Delta],
    scales: Sequence[float] | None = None,
    *,
    fingerprint: str,
    combine: Combination | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """theta_0 + combine_t(scale_t * (m_t * d_t)): every tensor of the base with its name, one at a time, on the CPU.

    The change is built in fp32 in the order of the task keys, whatever the order in which the deltas are given, and
    then added to theta_0: each weight is rounded to its type once. Nothing is ever subtracted: without a delta the
    result has the bits of a merge in which it never existed. Beside the base and the deltas, memory holds the tensor
    that is given out and a few chunks, if it is let go of (`del tensor`) before the next one is asked for.

    Args:
        base: theta_0, as in `state_dict()`; not changed.
        deltas: of different tasks; none gives the base.
        scales: one for each delta (default 1); 0 leaves a delta out.
        fingerprint: of the base model.
        combine: how the deltas become one change; None adds them up.

    Returns:
        An iterator over (name, tensor). A tensor that no delta changes is the base's own, not a copy. Names of one
        tensor come one after the other, with one tensor.

    Raises:
        DeltaError: a delta belongs to another base, two have the same task key, or tensors do not fit the base.

    Example:
        >>> state = model.state_dict()
        >>> for name, tensor in merge(base, deltas, fingerprint=backbone.fingerprint):
        ...     state[name].copy_(tensor)
        ...     del tensor
    """
    scales = [1.0] * len(deltas) if scales is None else scales
    if len(scales) != len(deltas):
        raise DeltaError(f"there are {len(deltas)} deltas and {len(scales)} scales: give one scale for each delta")
    check_compatible(deltas, fingerprint)
    for delta in deltas:
        for name, part in delta.parts.items():
            if name not in base or tuple(base[name].shape) != part.shape:
                raise DeltaError(f"the base has no tensor `{name}` of shape {part.shape}: give the model of the delta")
    ordered = sorted(zip(deltas, map(float, scales), strict=True), key=lambda pair: pair[0].task_key)
    return _merged(base, [(delta, scale) for delta, scale in ordered if scale != 0], combine or Sum())


def check_compatible(deltas: Sequence[Delta], fingerprint: str) -> None:
    """
    Raises:
        DeltaError: a delta belongs to another base, or two have the same task key.
    """
    for delta in deltas:
        if delta.base != fingerprint:
            raise DeltaError(
                f"the delta of task {delta.task_key:#x} belongs to another base model (weights {delta.base[:12]}, "
                f"these are {fingerprint[:12]}): give the model that it was taken from"
            )
    keys = sorted(delta.task_key for delta in deltas)
    for key, following in zip(keys, keys[1:], strict=False):
        if key == following:
            raise DeltaError(f"two deltas have the task key {key:#x}: give every task a key of its own")


@torch.no_grad()
def _merged(
    base: Mapping[str, Tensor], deltas: Sequence[tuple[Delta, float]], combine: Combination
) -> Iterator[tuple[str, Tensor]]:
    for names in tied_names(base):
        terms = [(delta.walk(stored), scale) for delta, scale in deltas for stored in _stored(delta, names)]
        tensor = _changed(base[names[0]], terms, combine) if terms else base[names[0]]
        for name in names:
            yield name, tensor
        del tensor  # or it would live on until the next one is there


def _stored(delta: Delta, names: Sequence[str]) -> list[str]:
    """The name, if any, under which a delta holds the tensor of these names."""
    found = sorted({stored for name in names if (stored := delta.tied.get(name, name)) in delta.parts})
    if len(found) > 1:
        raise DeltaError(
            f"{', '.join(found)}: one tensor in the base, but not in the delta of task {delta.task_key:#x}: take the "
            "delta from models whose weights are tied"
        )
    return found


def _changed(tensor: Tensor, terms: Sequence[tuple[Walk, float]], combine: Combination) -> Tensor:
    theta_0 = tensor.detach().cpu().reshape(-1)
    out = torch.empty_like(theta_0)
    window = terms[0][0].window
    for start in range(0, len(theta_0), window):
        stop = min(start + window, len(theta_0))
        change = combine((Chunk(*walk.until(stop), scale) for walk, scale in terms), stop - start)
        torch.add(theta_0[start:stop], torch.from_numpy(change), out=out[start:stop])
    return out.view(tensor.shape)
