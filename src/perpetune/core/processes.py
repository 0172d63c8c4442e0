"""Several processes that train one model together, as `torchrun` and `accelerate launch` start them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ConfigError, LostProcess, PerpetuneError, RunError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

OTHER_ENGINES = {  # what `accelerate launch` sets, and what it means
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}


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


def join(device: str | torch.device | None) -> torch.device:
    """Meet the other processes that were started, if there are any.

    Args:
        device: None takes an accelerator where there is one.

    Returns:
        The device of this process: of several accelerators the one that is its own.

    Raises:
        ConfigError: they were started for an engine that keeps weights where rules do not find them, or compiled.
    """
    for name, engine in OTHER_ENGINES.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            raise ConfigError(
                f"accelerate was told to use {engine}, and runs train under DDP: take it out of accelerate's "
                "configuration (FSDP2: pt.attach in a loop of your own, docs/how-to/several-processes.md)"
            )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("", "no"):
        raise ConfigError(
            "accelerate was told to compile the model (dynamo_backend), and compiled code follows no adapters that "
            "come and go with tasks: take it out of accelerate's configuration"
        )
    import torch

    from .environment import default_device

    device = default_device() if device is None else torch.device(device)
    if launched() == 1:
        return device
    from accelerate import PartialState

    with all_there():
        PartialState(cpu=device.type == "cpu")
    return device if device.type == "cpu" else torch.device(device.type, int(os.environ["LOCAL_RANK"]))


@contextmanager
def all_there() -> Iterator[None]:
    """Turn what a collective call says of a process that has ended into what a user can do about it.

    Raises:
        LostProcess: one of the processes that were started together is not there any more.
    """
    try:
        yield
    except RuntimeError as error:
        if launched() == 1 or not _lost(error):
            raise
        raise LostProcess(
            "another of the processes that were started together has ended, or cannot be reached: every finished task "
            "is safe, the same command for all of them goes on after it"
        ) from error


def _lost(error: RuntimeError) -> bool:
    """Whether an error is of torch's own about other processes; gloo's has no kind, but names the file it is from."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or "/gloo/" in str(error) or "process group" in str(error).lower()


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
    """Let the first process do something while the others wait; whatever keeps it from being done is raised on all."""
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
