"""What a task keeps of its delta theta_t - theta_0."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError
from .combine import tied_names
from .seeded_mask import Scheme, SeededMask, tensor_id

State = Mapping[str, Tensor]
HALF = 2**16  # values of half of the bits of an fp32 number


class Masks(Mapping[str, Tensor]):
    """Boolean masks by the names of tensors, each made when it is asked for, so that one is there at a time."""

    def __init__(self, names: Collection[str], make: Callable[[str], Tensor]) -> None:
        self.names, self.make = names, make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Kept:
    """What is not left to the seeded mask: names of tensors kept whole (`dense`), and `masks` that follow from data."""

    dense: Collection[str] = ()
    masks: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Keep:
    """Which entries of its delta a task keeps. One of your own is a dataclass with a `mask` or a `__call__`."""

    def mask(self, task: str, taken: Collection[int | None] = ()) -> SeededMask:
        """The seeded mask of a task, which keeps all entries unless it is overridden.

        Args:
            taken: the slots of the tasks before it.

        Raises:
            ConfigError: a setting out of range, or no slot is left.
        """
        return SeededMask.of("bernoulli", 1.0, seed=0, task_key=tensor_id(task))

    def __call__(self, theta_0: State, theta_t: State) -> Kept:
        """What of the delta is kept otherwise than the seeded mask says."""
        return Kept()

    @property
    def never_meets(self) -> bool:
        """Whether the kept entries of two tasks are never the same."""
        return False


@dataclass
class Everything(Keep):
    """Every entry is kept."""


@dataclass
class RandomMask(Keep):
    """A random share of the entries, which costs no storage: positions follow from a seed.

    Args:
        share: of the entries that a task keeps.
        scheme: "bernoulli"; "stratified", one entry of every 1/share; "disjoint", the same, and up to 1/share tasks
            never meet: each takes the first slot that no other has, a task that is taken out frees its own.
        vectors: "masked" like all else, or "dense": biases and norms (0.1 % of a ViT) are kept whole.
        seed: of the masks; a task's own key is made of its name.

    Raises:
        ConfigError: a setting out of range; more disjoint tasks than 1/share.
    """

    share: float = 0.1
    scheme: Scheme = "bernoulli"
    vectors: Literal["masked", "dense"] = "masked"
    seed: int = 0

    def __post_init__(self) -> None:
        self.mask("any")
        if self.vectors not in ("masked", "dense"):
            raise ConfigError(f"RandomMask: vectors=`{self.vectors}` must be masked, dense")

    def mask(self, task: str, taken: Collection[int | None] = ()) -> SeededMask:
        slot = min({*range(len(taken) + 1)} - {*taken}) if self.scheme == "disjoint" else None
        return SeededMask.of(self.scheme, self.share, seed=self.seed, task_key=tensor_id(task), slot=slot)

    def __call__(self, theta_0: State, theta_t: State) -> Kept:
        return Kept([n for n, t in theta_t.items() if t.ndim <= 1] if self.vectors == "dense" else ())

    @property
    def never_meets(self) -> bool:
        return self.scheme == "disjoint" and self.vectors == "masked"


@dataclass
class TopMagnitude(Keep):
    """The share of the entries that changed most, |theta_t - theta_0|; those that did not change are never kept.

    Positions are stored, one bit an entry. Entries that tie with the last one kept are kept, too.

    Source: the step "trim" of TIES-merging (2306.01708): the top 20 % over all parameters of a task.

    Args:
        share: of the entries that a task keeps.
        over: of which entries this is a share: those of the whole "model", or of each "tensor".

    Raises:
        ConfigError: a setting out of range.
    """

    share: float = 0.2
    over: Literal["model", "tensor"] = "model"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"TopMagnitude: share={self.share} must be above 0 and at most 1")
        if self.over not in ("model", "tensor"):
            raise ConfigError(f"TopMagnitude: over=`{self.over}` must be model or tensor")

    def __call__(self, theta_0: State, theta_t: State) -> Kept:
        names = [name for name, t in theta_0.items() if t.is_floating_point()]

        def magnitudes(name: str) -> Tensor:
            return _magnitudes(theta_0[name], theta_t[name])

        once = [group[0] for group in tied_names({n: theta_0[n] for n in names})]  # tied weights count once
        least = _least_kept(lambda: map(magnitudes, once), self.share) if self.over == "model" else None

        def make(name: str) -> Tensor:
            found = magnitudes(name)
            floor = _least_kept(lambda: iter([found]), self.share) if least is None else least
            return (found >= floor) & (found > 0)

        return Kept(masks=Masks(names, make))


def _magnitudes(theta_0: Tensor, theta_t: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(theta_0.dtype, theta_t.dtype), torch.float32)
    return (theta_t.detach().to(wide) - theta_0.detach().to(wide)).float().abs().cpu()


def _least_kept(magnitudes: Callable[[], Iterator[Tensor]], share: float) -> float:
    """The k-th largest of all values, k = floor(share * count) and at least 1, with one tensor in memory at a time.

    fp32 numbers that are not negative are in the order of their bits: the upper half of the bits is found by one count
    over all tensors, the lower half by a second.
    """
    upper = torch.zeros(HALF, dtype=torch.int64)
    for values in magnitudes():
        upper += torch.bincount(_bits(values) >> 16, minlength=HALF)
    k = max(1, int(share * int(upper.sum())))
    high, k = _bin_of(upper, k)
    lower = torch.zeros(HALF, dtype=torch.int64)
    for values in magnitudes():
        bits = _bits(values)
        lower += torch.bincount(bits[bits >> 16 == high] & (HALF - 1), minlength=HALF)
    low, _ = _bin_of(lower, k)
    return float(torch.tensor((high << 16) + low, dtype=torch.int32).view(torch.float32))


def _bits(values: Tensor) -> Tensor:
    return values.reshape(-1).view(torch.int32)


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin of the k-th largest, and its place among those in the bin."""
    above = counts.sum() - counts.cumsum(0)  # in higher bins
    found = int((above >= k).sum())
    return found, k - int(above[found])


KEEPS = {k.__name__: k for k in (Everything, RandomMask, TopMagnitude)}
