"""How processes that were started together meet, and how long they wait for one another."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, LostProcess
from .processes import launched, rank, together

if TYPE_CHECKING:
    import torch

OTHER_ENGINES = {  # what `accelerate launch` sets, and what it means
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
WAIT = "PERPETUNE_WAIT_MINUTES"
MINUTES = 30.0  # how long one process waits for another, where the user does not say
TO_MEET = 1 / 3  # of that: they were started together, and nothing is loaded yet
ALONE = timedelta(days=1)  # while the first works for all
TOLD, LOOK = 5.0, 0.05  # seconds for the first to tell the error that another one has, too; and between two looks
_WORD = "perpetune/told"

_store: Any = None  # in which processes leave words for one another, once they have met


def minutes() -> float:
    """How long one process waits for another.

    Raises:
        ConfigError: the user says something else than a number.
    """
    given = os.environ.get(WAIT) or MINUTES
    try:
        found = float(given)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e6:
        raise ConfigError(f"{WAIT} must be a number of minutes above 0, not {given!r}")
    return found


def join(device: str | torch.device | None) -> torch.device:
    """Meet the other processes that were started, if there are any.

    Args:
        device: None takes an accelerator where there is one.

    Returns:
        The device of this process: of several accelerators the one that is its own.

    Raises:
        ConfigError: no such device; they were started for an engine that keeps weights where rules do not find them, or
            compiled; or the place where they meet is taken.
        LostProcess: the others do not come.
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

    try:
        device = default_device() if device is None else torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"there is no device `{device}`: give cpu, cuda or cuda:1, or leave it out") from error
    if launched() == 1:
        return device
    from accelerate import PartialState

    cpu = device.type == "cpu"
    if together() > 1:  # a script has done it
        PartialState(cpu=cpu)
    else:
        _meet(lambda **how: PartialState(cpu=cpu, **how))
    return device if cpu else torch.device(device.type, int(os.environ["LOCAL_RANK"]))


def _meet(make_group: Any) -> None:
    """Wait for the others, for a third of the time that is given to work later on."""
    global _store
    from torch import distributed

    wait = timedelta(minutes=TO_MEET * minutes())
    os.environ.setdefault("MASTER_PORT", "29500")  # as Accelerate does
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ['MASTER_PORT']}"
    try:
        _store, number, count = _found(wait)
        _check_alone(_store, where)
        make_group(store=distributed.PrefixStore("default_pg", _store), rank=number, world_size=count, timeout=wait)
    except ValueError as error:  # names what is missing in the environment
        raise ConfigError(f"{launched()} processes cannot meet: {error}: start them with torchrun") from error
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"another program, or what is left of an earlier start, has the port {os.environ['MASTER_PORT']} "
                "on which the processes are to meet: end it, or give another port (torchrun --master-port)"
            ) from error
        raise LostProcess(
            f"process {rank()} of {launched()} has waited {TO_MEET * minutes():.3g} minutes at {where}, and not all "
            f"have come: start all of them, and none twice; {WAIT} gives them longer (three times as long as to meet)"
        ) from error
    _store.set_timeout(timedelta(minutes=minutes()))
    waiting(timedelta(minutes=minutes()))


def _found(wait: timedelta) -> tuple[Any, int, int]:
    """The store of all processes, the number of this one, and how many there are.

    In a thread, since torch waits without an end where whoever listens at the port says nothing.

    Raises:
        RuntimeError: the others do not come; ValueError: the environment does not say where.
    """
    from torch.distributed.rendezvous import rendezvous

    found: list[Any] = []

    def meet() -> None:
        try:
            found.append(next(rendezvous("env://", timeout=wait)))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(wait.total_seconds() + 1)
    if not found:
        raise RuntimeError("whoever is there does not answer")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _check_alone(store: Any, where: str) -> None:
    """
    Raises:
        ConfigError: another process has this one's number: left of an earlier start that had the same port, it would
            take its place, and one of the two would wait for ever.
    """
    me = f"{socket.gethostname()}, pid {os.getpid()}"
    key = f"perpetune/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{rank()}"
    found = store.compare_set(key, "", me).decode()
    if found != me:
        raise ConfigError(
            f"there are two processes of number {rank()} at {where}: the other ({found}) may be left of an earlier "
            "start: end all of them, and start again"
        )


def waiting(limit: timedelta) -> None:
    """From now on a process waits so long for another in a collective call."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(limit)


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Within, the first process works for all, and the others wait for it a day: unless it ends, which they see."""
    if together() == 1:
        yield
        return
    waiting(ALONE)
    try:
        yield
    finally:
        waiting(timedelta(minutes=minutes()))


@contextlib.contextmanager
def all_there() -> Iterator[None]:
    """Turn what a collective call says of a process that has ended into what a user can do about it.

    Raises:
        LostProcess: one of the processes that were started together is not there any more, or does not come.
    """
    try:
        yield
    except RuntimeError as error:
        if launched() == 1 or not _lost(error):
            raise
        safe = "every finished task is safe, the same command for all of them goes on after it"
        if "timed out" in str(error).lower():
            raise LostProcess(
                f"another of the processes that were started together has not come for {minutes():.3g} minutes: end "
                f"all of them; {safe} ({WAIT} gives a slow one longer)"
            ) from error
        raise LostProcess(
            f"another of the processes that were started together has ended, or cannot be reached: {safe}"
        ) from error


def _lost(error: RuntimeError) -> bool:
    """Whether an error is of torch's own about other processes; gloo's has no kind, but names the file it is from."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or "/gloo/" in str(error) or "process group" in str(error).lower()


def tell(line: str) -> None:
    """Leave word of the error that ends the first process, see `first_tells`."""
    if _store is not None:
        with contextlib.suppress(RuntimeError):
            _store.set(_WORD, line)


def first_tells(line: str) -> bool:
    """Whether the first process tells this error, as it does where all of them have it; it is given some seconds."""
    if _store is None:  # before they met: what is wrong with the command is wrong for all
        return True
    end = time.monotonic() + TOLD
    with contextlib.suppress(RuntimeError):  # whoever keeps the words has ended
        while time.monotonic() < end:
            if _store.check([_WORD]) and _store.get(_WORD).decode() == line:
                return True
            time.sleep(LOOK)
    return False
