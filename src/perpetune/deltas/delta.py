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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import DeltaError
from .seeded_mask import SeededMask
from .storage import DTYPES, GROUP, Part, Storage, Walk

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
