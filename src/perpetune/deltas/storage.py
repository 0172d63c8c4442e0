"""What a sparse delta holds of one tensor: the kept values, and how to find where they belong."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import DeltaError
from .seeded_mask import CHUNK, SeededMask, tensor_id

Storage = Literal["fp32", "bf16", "int8"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
GROUP = 256  # int8 values that share a scale


@dataclass(frozen=True)
class Part:
    """What a delta holds of one tensor.

    Attributes:
        shape: of the tensor.
        mask: where the values belong: positions that follow from the seed, positions set in `bits`, or everywhere.
        values: the kept values in the order of their positions (C order); fp32, bf16 or int8.
        scales: for int8 alone, fp16, one for 256 values: value = q * (scale * 2^exponent).
        exponent: keeps the scales where fp16 is accurate, however small the delta.
        bits: uint8, 8 entries of the tensor a byte, the first entry in the lowest bit.
    """

    shape: tuple[int, ...]
    mask: Literal["seed", "bits", "dense"]
    values: Tensor
    scales: Tensor | None = None
    exponent: int = 0
    bits: Tensor | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by kind."""
        kinds = {"values": self.values, "scales": self.scales, "bits": self.bits}
        return {kind: tensor for kind, tensor in kinds.items() if tensor is not None}

    def checksum(self) -> str:
        """SHA-256 of the bytes of values, scales and bits, in this order."""
        digest = hashlib.sha256()
        for tensor in self.tensors().values():
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def chunks(self, mask: SeededMask, name: str) -> Iterator[tuple[int, int, NDArray[np.intp]]]:
        """Where each chunk begins and ends, and the positions of what is kept in it, ascending, from its beginning."""
        if self.mask == "seed":
            yield from mask.chunks(tensor_id(name), self.size)
            return
        for start in range(0, self.size, CHUNK):
            stop = min(start + CHUNK, self.size)
            if self.bits is None:
                yield start, stop, np.arange(stop - start)
            else:
                bits = np.unpackbits(self.bits[start // 8 : -(-stop // 8)].numpy(), bitorder="little")
                yield start, stop, np.flatnonzero(bits[: stop - start])

    def kept(self, mask: SeededMask, name: str) -> int:
        """How many entries the mask keeps: what `values` must hold."""
        if self.mask == "seed":
            return mask.count(tensor_id(name), self.size)
        return sum(len(positions) for _, _, positions in self.chunks(mask, name))

    def decode(self, first: int, last: int) -> NDArray[np.float32]:
        """The values number `first` up to `last`, in fp32."""
        values = self.values[first:last].float().numpy()
        if self.scales is None:
            return values
        scales = self.scales[first // GROUP : -(-last // GROUP)].float().numpy()
        offset = first % GROUP
        return values * np.repeat(np.ldexp(scales, self.exponent), GROUP)[offset : offset + len(values)]


class Walk:
    """Goes through the kept entries of one part once, in windows of any length, each from where the last one ended."""

    def __init__(self, part: Part, mask: SeededMask, name: str) -> None:
        self.part = part
        self.window = mask.chunk if part.mask == "seed" else CHUNK  # windows of this length are the part's own chunks
        self._chunks = part.chunks(mask, name)
        self._start = self._known = self._passed = 0
        self._waiting = np.empty(0, dtype=np.intp)  # positions in the tensor, known and not yet passed

    def until(self, stop: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """The kept entries before `stop`: their positions, from the beginning of the window, and their values."""
        start, self._start = self._start, stop
        aligned = start == self._known  # nothing waits: a chunk as long as the window is the answer as it is
        while self._known < stop:
            first, self._known, more = next(self._chunks)
            if aligned and self._known == stop:
                return more, self._values(len(more))
            aligned = False
            self._waiting = np.concatenate([self._waiting, more + first])
        cut = int(np.searchsorted(self._waiting, stop))
        positions, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return positions - start, self._values(cut)

    def _values(self, count: int) -> NDArray[np.float32]:
        first, self._passed = self._passed, self._passed + count
        return self.part.decode(first, self._passed)


def take(
    theta_0: Tensor, theta_t: Tensor, mask: SeededMask, name: str, storage: Storage, *, bits: Tensor | None, dense: bool
) -> Part:
    """m * (theta_t - theta_0) of one tensor, the difference in fp32 (fp64 where the weights are).

    Args:
        bits: boolean, of the tensor's shape: what to keep instead of the seeded mask.
        dense: keep everything.

    Raises:
        DeltaError: a kept value is not finite.
    """
    shape = tuple(theta_0.shape)
    wide = torch.promote_types(torch.promote_types(theta_0.dtype, theta_t.dtype), torch.float32)
    packed = None if bits is None or dense else np.packbits(bits.cpu().reshape(-1).numpy(), bitorder="little")
    kind: Literal["seed", "bits", "dense"] = "dense" if dense else "seed" if packed is None else "bits"
    part = Part(shape, kind, torch.empty(0), bits=None if packed is None else torch.from_numpy(packed))
    before, after = (t.detach().cpu().reshape(-1) for t in (theta_0, theta_t))
    kept = [part.values]
    for start, stop, positions in part.chunks(mask, name):
        index = torch.from_numpy(positions)
        old, new = (t[start:stop].index_select(0, index).to(wide) for t in (before, after))
        kept.append((new - old).float())
    values = torch.cat(kept)
    if not torch.isfinite(values).all():
        raise DeltaError(f"`{name}` has changed by values that are not finite: train the task again, more slowly")
    if storage == "int8":
        return Part(shape, kind, *quantise(values.numpy()), bits=part.bits)
    return Part(shape, kind, values.to(DTYPES[storage]), bits=part.bits)


def quantise(values: NDArray[np.float32]) -> tuple[Tensor, Tensor, int]:
    """q = round(v / (s 2^e)) with s 2^e = max |v| / 127 over 256 values; s is rounded up to fp16, so that no q is
    clipped, and e puts the largest s of the tensor between 1/2 and 1."""
    groups = -(-len(values) // GROUP)
    v = np.zeros((groups, GROUP), dtype=np.float32)
    v.reshape(-1)[: len(values)] = values
    wanted = np.abs(v).max(1) / np.float32(127)
    e = int(np.frexp(wanted.max(initial=0))[1])
    wanted = np.ldexp(wanted, -e)
    s = wanted.astype(np.float16)
    s = np.where(s < wanted, np.nextafter(s, np.float16(2)), s)
    step = np.ldexp(s.astype(np.float32), e)[:, None]
    q = np.rint(np.divide(v, step, out=np.zeros_like(v), where=step > 0)).astype(np.int8)
    return torch.from_numpy(q.reshape(-1)[: len(values)].copy()), torch.from_numpy(s), e
