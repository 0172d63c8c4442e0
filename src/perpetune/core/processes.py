"""Several processes that train one model together, as `torchrun` and `accelerate launch` start them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ConfigError, PerpetuneError, RunError, first_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def launched() -> int:
    """How many processes were started together: 1 where this is a lone one."""
    return int(os.environ.get("WORLD_SIZE", 1)) if {"RANK", "LOCAL_RANK"} <= os.environ.keys() else 1


def rank() -> int:
    """Which of the processes that were started together this is, from 0."""
    return int(os.environ["RANK"]) if launched() > 1 or together() > 1 else 0


def first() -> bool:
    """Whether this is the process that alone writes and speaks."""
    return launched() == 1 or rank() == 0


def together() -> int:
    """How many processes have joined, so that they must make collective calls alike; 1 where there is no group."""
    from torch import distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def from_first(found: T) -> T:
    """What the first process found, on every one. A collective call."""
    if together() == 1:
        return found
    from torch import distributed

    box: list[Any] = [found if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def from_all(found: T) -> list[T]:
    """What every process found, in their order. A collective call."""
    if together() == 1:
        return [found]
    from torch import distributed

    box: list[Any] = [None] * together()
    distributed.all_gather_object(box, found)
    return box


def sum_(tensors: Sequence[Tensor]) -> None:
    """Add up over all processes, in place. A collective call."""
    if together() == 1:
        return
    from torch import distributed

    for t in tensors:
        there = t.contiguous()
        if distributed.get_backend() == "nccl" and there.device.type == "cpu":
            there = there.cuda()
        distributed.all_reduce(there)
        t.copy_(there)


_dividing: ContextVar[bool] = ContextVar("dividing", default=False)


@contextmanager
def divided(whether: bool = True) -> Iterator[None]:
    """Inside, batches that are read without gradients are dealt to the processes, which all come here alike."""
    token = _dividing.set(whether)
    try:
        yield
    finally:
        _dividing.reset(token)


def dealt(number: int) -> bool:
    """Whether the batch of this number is this process's own to read; outside of `divided` each reads all."""
    return not _dividing.get() or together() == 1 or number % together() == rank()


def joined(rows: Tensor) -> None:
    """Put together, in place, what each process has read of `rows` (fp32), which are 0 where it has not: to the bit,
    since they are added up as whole numbers. A collective call inside of `divided`."""
    if _dividing.get():
        import torch

        sum_([rows.view(torch.int32)])


def parts(found: T) -> list[T]:
    """What each process has found of batches dealt to it. A collective call inside of `divided`."""
    return from_all(found) if _dividing.get() else [found]


def by_first(do: Callable[[], object]) -> None:
    """Let the first process do something while the others wait; whatever keeps it from being done is raised on all.

    It begins when all have come: what another process still reads is not changed under its eyes, so that all decide
    alike by what is on disk.
    """
    from_all(None)
    error: Exception | None = None
    if together() == 1 or first():
        try:
            do()
        except Exception as found:
            error = found
    told = from_first(error if error is None or isinstance(error, PerpetuneError) else RunError(first_line(error)))
    if error is not None:
        raise error
    if told is not None:
        raise told


def agree(found: Mapping[str, Any]) -> None:
    """Check that all processes are about to do the same: of other data or settings they would make other collective
    calls, and wait for one another. A collective call.

    Args:
        found: by what users call it; plain data.

    Raises:
        ConfigError: on all of them.
    """
    first, *others = from_all({name: repr(value) for name, value in found.items()})
    for number, other in enumerate(others, 1):
        differs = [name for name, value in first.items() if other.get(name) != value]
        if differs:
            raise ConfigError(
                f"process {number} was started with another {' and another '.join(differs)} than the first: start all "
                "of them with the same command, on the same files"
            )
