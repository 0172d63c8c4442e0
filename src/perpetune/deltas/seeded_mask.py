"""Masks that need no storage: every kept position follows from a seed, bit for bit and on every platform.

The words come from the raw stream of `numpy.random.Philox` (Philox4x64-10, Salmon et al. 2011), which numpy promises
to keep; never from its distributions, nor from torch, whose draws differ between devices and releases. Key words: k0 =
seed, k1 = task key. Counter words: c1 = chunk, c2 = tensor id, c3 = version of the scheme; c0 counts blocks from 1.
Each 64-bit word gives four lanes of 16 bits, the least significant first. Thus any chunk of any tensor of any task can
be had alone, and neither the order of tensors nor that of tasks matters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ConfigError, DeltaError

Scheme = Literal["bernoulli", "stratified", "disjoint"]
VERSION, LANE_BITS, CHUNK = 0, 16, 2**18
LANES = 2**LANE_BITS  # values of a lane


@lru_cache(maxsize=4096)
def tensor_id(name: str) -> int:
    """The first 8 bytes, little-endian, of the SHA-256 of a parameter's name in the base model.

    A task's name gives a task key in the same way.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


@lru_cache(maxsize=8)
def _starts(B: int) -> NDArray[np.intp]:
    """Where the blocks of a chunk begin."""
    starts = np.arange(0, CHUNK // B * B, B, dtype=np.intp)
    starts.flags.writeable = False
    return starts


@dataclass(frozen=True)
class SeededMask:
    """Which entries of every tensor one task keeps; with the lanes u and flattened (C order) tensors:

    * bernoulli: entry i is kept iff u_i < Thr; a chunk is 2^18 entries;
    * stratified: entry (u_b B) >> 16 of block b of B entries is kept, exactly one; a chunk is floor(2^18 / B) blocks, a
      tail shorter than B keeps nothing;
    * disjoint: as stratified, with entry (s_b + slot) mod B, where s_b comes from key (seed, 0): tasks of different
      slots never meet.

    `SeededMask.of` makes one from the share to keep.

    Attributes:
        seed: k0, the same for all tasks of a run.
        task_key: k1, the task's own and not its position in the stream (0 is reserved for `disjoint`).
        Thr: round(65536 keep), for bernoulli alone.
        B: the length of a block, for the other two.
        slot: for disjoint alone, 0 <= slot < B; chosen once and stored with the delta.
        version: of the scheme.

    Raises:
        ConfigError: a setting is out of its range, missing, or belongs to another scheme.
    """

    scheme: Scheme
    seed: int
    task_key: int
    Thr: int | None = None
    B: int | None = None
    slot: int | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ConfigError(
                f"mask version {self.version} is not known here, only {VERSION}: use a perpetune that knows it"
            )
        if self.scheme not in get_args(Scheme):
            raise ConfigError(f"there is no mask scheme `{self.scheme}`: use {', '.join(get_args(Scheme))}")
        _within("seed", self.seed, 0, 2**64 - 1)
        _within("task_key", self.task_key, 1, 2**64 - 1)
        bernoulli, disjoint = self.scheme == "bernoulli", self.scheme == "disjoint"
        for name, value, wanted, least, most in (
            ("Thr", self.Thr, bernoulli, 1, LANES),
            ("B", self.B, not bernoulli, 1, LANES),
            ("slot", self.slot, disjoint, 0, (self.B or 1) - 1),
        ):
            if wanted:
                hint = ": at most B tasks can be disjoint, keep less for more of them" if name == "slot" else ""
                _within(name, value, least, most, hint)
            elif value is not None:
                raise ConfigError(f"{name} does not belong to a {self.scheme} mask: leave it out")

    @classmethod
    def of(cls, scheme: Scheme, keep: float, *, seed: int, task_key: int, slot: int | None = None) -> SeededMask:
        """A mask that keeps the share `keep`.

        Args:
            keep: above 0, at most 1; rounded to Thr / 65536. For stratified and disjoint it must be 1 / B.

        Raises:
            ConfigError: `keep` is out of range or not 1 / B.
        """
        if not 1 / LANES <= keep <= 1:  # also refuses NaN
            raise ConfigError(f"keep must be from 1/{LANES} to 1, not {keep}")
        if scheme == "bernoulli":
            return cls(scheme, seed, task_key, Thr=round(LANES * keep), slot=slot)
        B = round(1 / keep)
        if abs(keep * B - 1) > 1e-3:
            raise ConfigError(
                f"a {scheme} mask keeps one entry of every B, so keep must be 1/B, not {keep}: "
                f"use {1 / B:.6g} (B = {B}), or scheme bernoulli"
            )
        return cls(scheme, seed, task_key, B=B, slot=slot)

    @property
    def keep(self) -> float:
        """The share that is kept: Thr / 65536 or 1 / B."""
        return self.Thr / LANES if self.Thr is not None else 1 / self._B

    @property
    def chunk(self) -> int:
        """Entries of a chunk."""
        return CHUNK if self.Thr is not None else CHUNK // self._B * self._B

    @property
    def _B(self) -> int:
        assert self.B is not None  # as __post_init__ has seen to
        return self.B

    def positions(self, tensor: int, size: int, chunk: int) -> NDArray[np.intp]:
        """The kept positions of one chunk, ascending, counted from where the chunk begins (chunk * `self.chunk`).

        Args:
            tensor: its `tensor_id`.
            size: entries of the tensor.
            chunk: 0-based; none is kept in a chunk past the end.
        """
        length = max(0, min(self.chunk, size - chunk * self.chunk))
        if self.Thr is not None:
            # numpy looks for fewer than 1 in 10 with branches that random bits make 2 to 3 times slower: never fewer
            kept = np.ones(length + length // 8, dtype=np.bool_)
            np.less(self._lanes(tensor, chunk, length), self.Thr, out=kept[:length])
            return np.flatnonzero(kept)[: np.count_nonzero(kept[:length])]
        B = self._B
        blocks = length // B
        digits = self._lanes(tensor, chunk, blocks).astype(np.uint32)
        digits *= B
        digits >>= LANE_BITS
        if self.slot:
            digits += self.slot
            digits -= (digits >= B) * np.uint32(B)
        return _starts(B)[:blocks] + digits

    def chunks(self, tensor: int, size: int) -> Iterator[tuple[int, int, NDArray[np.intp]]]:
        """All chunks in order: where each begins and ends, and its `positions`."""
        for chunk, start in enumerate(range(0, size, self.chunk)):
            yield start, min(size, start + self.chunk), self.positions(tensor, size, chunk)

    def count(self, tensor: int, size: int) -> int:
        """How many entries of a tensor are kept."""
        Thr = self.Thr
        if Thr is None:
            return size // self._B
        lanes = (self._lanes(tensor, chunk, min(CHUNK, size - chunk * CHUNK)) for chunk in range(-(-size // CHUNK)))
        return sum(int(np.count_nonzero(u < Thr)) for u in lanes)

    def _lanes(self, tensor: int, chunk: int, count: int) -> NDArray[np.uint16]:
        """The first lanes of a chunk's stream: lane j of word w is decision 4 w + j."""
        key = np.array([self.seed, 0 if self.slot is not None else self.task_key], dtype=np.uint64)
        counter = np.array([0, chunk, tensor, self.version], dtype=np.uint64)
        words = np.random.Philox(counter=counter, key=key).random_raw(-(-count // 4))
        return words.astype("<u8", copy=False).view("<u2")[:count]

    def to_json(self) -> dict[str, Any]:
        """JSON-able; 64-bit numbers as hexadecimal text, which every reader of JSON keeps whole."""
        size = {"Thr": self.Thr} if self.Thr is not None else {"B": self.B}
        slot = {} if self.slot is None else {"slot": self.slot}
        keys = {"seed": f"{self.seed:#018x}", "task_key": f"{self.task_key:#018x}"}
        return {"scheme": self.scheme, "version": self.version, "lane_bits": LANE_BITS, **keys, **size, **slot}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SeededMask:
        """Inverse of `to_json`.

        Raises:
            DeltaError: a scheme or version that is not known here, or settings that are damaged.
        """
        try:
            settings = dict(data)
            lane_bits, version = settings.pop("lane_bits"), settings.pop("version")
            if lane_bits != LANE_BITS:
                raise ConfigError(f"lanes of {lane_bits} bits are not known here, only {LANE_BITS}")
            seed, task_key = (int(settings.pop(name), 16) for name in ("seed", "task_key"))
            return cls(seed=seed, task_key=task_key, version=version, **settings)
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise DeltaError(f"the mask of this delta cannot be made again: {error}") from error


def _within(name: str, value: int | None, least: int, most: int, hint: str = "") -> None:
    if not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name} must be a whole number from {least} to {most}, not {value}{hint}")
