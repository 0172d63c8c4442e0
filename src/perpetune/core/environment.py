"""Facts about the machine: where to compute, how much memory was used, which versions run."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


def default_device() -> torch.device:
    """An accelerator where there is one, else the CPU."""
    return (
        torch.accelerator.current_accelerator() or torch.device("cpu")
        if torch.accelerator.is_available()
        else torch.device("cpu")
    )


def cache_folder() -> Path:
    """Where what can be made again is kept: `$PERPETUNE_CACHE`, or else `~/.cache/perpetune`."""
    return Path(os.environ.get("PERPETUNE_CACHE") or Path.home() / ".cache" / "perpetune").expanduser()


def peak_memory(device: torch.device) -> int:
    """Largest memory in use so far, bytes: of the accelerator where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector, which would look at all that is alive again and again while millions of small
    objects are made that no cycle holds."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


_set_aside = False


@contextlib.contextmanager
def quick_collection() -> Iterator[Callable[[], None]]:
    """What is alive now is not looked at by the garbage collector any more: a full collection, as the Trainer asks for
    before every task, then looks at what was made since, and not at all of torch and transformers (half a second).

    Yields:
        What does so again, with what is alive then: after a task, so that a thousand of them are not looked at either.
    """
    global _set_aside
    if _set_aside or gc.get_freeze_count():  # which takes the time to count them
        yield lambda: None
        return

    def set_aside() -> None:
        gc.collect()
        gc.freeze()

    set_aside()
    _set_aside = True
    try:
        yield set_aside
    finally:
        _set_aside = False
        gc.unfreeze()


def versions() -> dict[str, str]:
    return {**_installed_versions(), "python": sys.version.split()[0], "threads": str(torch.get_num_threads())}


@functools.cache
def _installed_versions() -> dict[str, str]:
    """Read once: each is a file of thousands of lines to parse."""
    from importlib.metadata import version

    names = ("perpetune", "torch", "transformers", "peft", "datasets", "safetensors")
    return {name: version(name) for name in names if _installed(name)}


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
