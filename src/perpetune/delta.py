"""Sparse deltas m_t * d_t of a model, d_t = theta_t - theta_0: taken, stored by seed and added up.

A delta holds the kept values of every floating-point tensor that fine-tuning changed, and how to find their positions.
Left out are tensors whose values did not change and all others (integers, booleans): a merge leaves them as they are in
the base. Those of the latter that did change are named in `Delta.left_out`. Weights that are one tensor under several
names are stored once, under the first name in alphabetical order.

Deltas are taken and added up in fp32, whatever the type of the weights. SoTU (2411.02813) adds random masks of
1 - p = 0.1 without rescaling.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DeltaError
from .kept import DTYPES, GROUP, Part, Storage, Walk, take
from .masks import SeededMask

FORMAT = 1
BODY, CHECKSUM = "perpetune.delta", "perpetune.sha256"  # keys of the metadata


@dataclass(frozen=True)
class Delta:
    """The sparse delta of one task.

    Attributes:
        mask: the seeded mask; its task key names the delta and gives its place in a merge, seeded or not.
        base: `fingerprint` of the model theta_0.
        storage: of the values: fp32, bf16 or int8.
        parts: what is held of each tensor, by its name in the base model.
        tied: other names of stored tensors.
        left_out: tensors that differ from the base and are not stored, because they hold no floating-point numbers.
    """

    mask: SeededMask
    base: str
    storage: Storage
    parts: dict[str, Part]
    tied: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def task_key(self) -> int:
        return self.mask.task_key

    @property
    def count(self) -> int:
        """How many values are held."""
        return sum(len(part.values) for part in self.parts.values())

    def walk(self, name: str) -> Walk:
        """Through the kept entries of a stored tensor."""
        return Walk(self.parts[name], self.mask, name)

    def dense(self, name: str) -> Tensor:
        """m * d of one stored tensor in its shape, fp32: 0 where nothing is kept."""
        part = self.parts[name]
        out = np.zeros(part.size, dtype=np.float32)
        walk = self.walk(name)
        for start in range(0, part.size, walk.window):
            window = out[start : start + walk.window]
            positions, values = walk.until(start + len(window))
            window[positions] = values
        return torch.from_numpy(out).view(part.shape)

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors of a safetensors file: `values.<name>`, and `scales.<name>` or `bits.<name>` where needed."""
        return {f"{kind}.{name}": t for name, part in self.parts.items() for kind, t in part.tensors().items()}

    def metadata(self) -> dict[str, str]:
        """The metadata of the same file: the settings as JSON, and the SHA-256 of that text."""
        entries = {
            name: {
                "mask": part.mask,
                "shape": list(part.shape),
                "count": len(part.values),
                "exponent": part.exponent,
                "sha256": part.checksum(),
            }
            for name, part in self.parts.items()
        }
        body = {
            "format": FORMAT,
            "base": self.base,
            "storage": self.storage,
            "group": GROUP,
            "mask": self.mask.to_json(),
            "tensors": entries,
            "tied": self.tied,
            "left_out": list(self.left_out),
        }
        text = json.dumps(body, sort_keys=True)
        return {BODY: text, CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> Delta:
        """Inverse of `to_tensors` and `metadata`: from what a safetensors file gives back.

        Raises:
            DeltaError: this is no delta, its format or scheme is not known here, a tensor is missing or surplus, or
                anything differs from what was stored.
        """
        body = _read(metadata)
        mask, storage = SeededMask.from_json(body["mask"]), body["storage"]
        whose = f"of the delta of task {mask.task_key:#x}"
        parts: dict[str, Part] = {}
        surplus = {*tensors}
        for name, entry in body["tensors"].items():
            kinds = ["values", *["scales"] * (storage == "int8"), *["bits"] * (entry["mask"] == "bits")]
            for kind in kinds:
                if f"{kind}.{name}" not in tensors:
                    raise DeltaError(f"tensor `{kind}.{name}` {whose} is missing: restore its file from a copy")
            held = {kind: tensors[f"{kind}.{name}"] for kind in kinds}
            surplus -= {f"{kind}.{name}" for kind in kinds}
            part = Part(tuple(entry["shape"]), entry["mask"], exponent=entry["exponent"], **held)
            if part.values.dtype != DTYPES[storage] or part.checksum() != entry["sha256"]:
                raise DeltaError(f"tensor `{name}` {whose} is damaged: restore its file from a copy")
            kept = part.kept(mask, name)
            if not kept == len(part.values) == entry["count"]:
                raise DeltaError(
                    f"tensor `{name}` {whose} holds {len(part.values)} values, but its mask keeps {kept}: take the "
                    "delta again"
                )
            parts[name] = part
        if surplus:
            raise DeltaError(f"tensor `{min(surplus)}` is no part {whose}: restore its file from a copy")
        return cls(mask, body["base"], storage, parts, body["tied"], tuple(body["left_out"]))


def _read(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if not metadata or BODY not in metadata or CHECKSUM not in metadata:
        raise DeltaError("this is no delta, it lacks the metadata that every delta has: give the file of a delta")
    text = metadata[BODY]
    if hashlib.sha256(text.encode()).hexdigest() != metadata[CHECKSUM]:
        raise DeltaError("the metadata of this delta are damaged: restore its file from a copy")
    body = json.loads(text)
    if (body["format"], body["group"]) != (FORMAT, GROUP):
        raise DeltaError(
            f"deltas of format {body['format']} with groups of {body['group']} are not known here, only format "
            f"{FORMAT} with {GROUP}: use a perpetune that knows them"
        )
    return body


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

    Raises:
        DeltaError: names, shapes or ties of the two models differ, a kept value is not finite, `dense` or `bits` name
            a tensor that is not there, or a mask in `bits` does not fit.
    """
    bits = bits or {}
    if lonely := {*base} ^ {*tuned}:
        raise DeltaError(f"`{min(lonely)}` is in one of the two models alone: give tensors of the same names")
    if unknown := {*dense, *bits} - {*base}:
        raise DeltaError(f"there is no tensor `{min(unknown)}` to choose from: give a name of the base model")
    for name, m in bits.items():
        if m.shape != base[name].shape or m.dtype != torch.bool:
            raise DeltaError(f"the mask of `{name}` must be boolean and of shape {tuple(base[name].shape)}")
    parts: dict[str, Part] = {}
    tied: dict[str, str] = {}
    left_out: list[str] = []
    for names in min(_ties(base), _ties(tuned), key=len):  # a copied state has lost its ties
        name, *others = sorted(names)
        theta_0, theta_t = base[name], tuned[name]
        if theta_0.shape != theta_t.shape:
            raise DeltaError(f"`{name}` has shape {tuple(theta_0.shape)} in the base and {tuple(theta_t.shape)} tuned")
        if any(not _same(base[o], theta_0) or not _same(tuned[o], theta_t) for o in others):
            raise DeltaError(f"{', '.join(sorted(names))}: one tensor in one of the models, but not alike in both")
        if _same(theta_0, theta_t):
            continue
        if not theta_0.is_floating_point():
            left_out += names
            continue
        tied.update(dict.fromkeys(others, name))
        chosen = next((bits[n] for n in names if n in bits), None)
        whole = any(n in dense for n in names)
        parts[name] = take(theta_0, theta_t, mask, name, storage, bits=chosen, dense=whole)
    return Delta(mask, fingerprint, storage, dict(sorted(parts.items())), tied, tuple(sorted(left_out)))


def _ties(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the same memory, together."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        groups.setdefault(place, []).append(name)
    return list(groups.values())


def _same(a: Tensor, b: Tensor) -> bool:
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(b.device, wide), b.to(wide))


def merge(
    base: Mapping[str, Tensor],
    deltas: Sequence[Delta],
    scales: Sequence[float] | None = None,
    *,
    fingerprint: str,
) -> Iterator[tuple[str, Tensor]]:
    """theta_0 + sum_t scale_t * (m_t * d_t): every tensor of the base with its name, one at a time, on the CPU.

    The sum is built in fp32 in the order of the task keys, whatever the order in which the deltas are given, and then
    added to theta_0: each weight is rounded to its type once. Nothing is ever subtracted: without a delta the result
    has the bits of a merge in which it never existed. Beside the base and the deltas, memory holds the tensor that is
    given out and a few chunks, if it is let go of (`del tensor`) before the next one is asked for.

    Args:
        base: theta_0, as in `state_dict()`; not changed.
        deltas: of different tasks; none gives the base.
        scales: one for each delta (default 1); 0 leaves a delta out.
        fingerprint: of the base model.

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
    return _merged(base, [(delta, scale) for delta, scale in ordered if scale != 0])


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
def _merged(base: Mapping[str, Tensor], deltas: Sequence[tuple[Delta, float]]) -> Iterator[tuple[str, Tensor]]:
    for names in _ties(base):
        terms = [(delta.walk(stored), scale) for delta, scale in deltas for stored in _stored(delta, names)]
        tensor = _sum(base[names[0]], terms) if terms else base[names[0]]
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


def _sum(tensor: Tensor, terms: Sequence[tuple[Walk, float]]) -> Tensor:
    theta_0 = tensor.detach().cpu().reshape(-1)
    out = torch.empty_like(theta_0)
    window = terms[0][0].window
    S = np.empty(min(window, len(theta_0)), dtype=np.float32)
    for start in range(0, len(theta_0), window):
        stop = min(start + window, len(theta_0))
        chunk = S[: stop - start]
        chunk.fill(-0.0)  # x + -0.0 is x to the bit, also for x = -0.0
        for walk, scale in terms:
            positions, values = walk.until(stop)
            scaled = values if scale == 1 else values * np.float32(scale)
            np.add.at(chunk, positions, scaled)  # in one pass; no position comes twice
        torch.add(theta_0[start:stop], torch.from_numpy(chunk), out=out[start:stop])
    return out.view(tensor.shape)
