"""A Ray cluster that makes runs: Ray finds them a machine with what they need, and tries again what is lost."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, first_line
from ..core.progress import Progress
from ..learning.config import CompareConfig
from .grid import Job, Make, Outcome, Workers, given_up


class TryAgain(Exception):
    """What the machine has done to a run, for Ray to try again."""


@contextlib.contextmanager
def on_ray(make: Make, config: CompareConfig, out: Path, progress: Progress) -> Iterator[Workers]:
    """The cluster at `config.address`, or the one that Ray finds by itself; where there is none, one on this machine.

    Raises:
        ConfigError: Ray is not installed, or nothing answers at the address.
    """
    from ..core.files import writing  # not on the machines that make runs: it takes torch along

    with connected(config) as ray:
        needs = wants(config, [node["Resources"] for node in ray.nodes() if node["Alive"]], progress)
        task = ray.remote(**needs, max_retries=config.retries, retry_exceptions=[TryAgain])(_there)
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            seen = tempfile.NamedTemporaryFile(dir=out.resolve(), prefix=".seen-everywhere-")
        pending: list[Any] = []

        def made(todo: Sequence[Job], wait: bool) -> Iterator[tuple[Job, Outcome]]:
            pending[:] = [task.options(name=job.label).remote(make, job, wait, os.getcwd(), seen.name) for job in todo]
            futures = {ref.future(): job for ref, job in zip(pending, todo, strict=True)}
            for future in as_completed(futures):
                try:
                    outcome = future.result()
                except ray.exceptions.RayError as error:
                    outcome = _told(error, ray.exceptions, config.retries)
                yield futures[future], outcome

        with seen:
            try:
                yield made
            finally:
                for ref in pending:  # those that are made do not mind
                    ray.cancel(ref, force=True)


@contextlib.contextmanager
def connected(config: CompareConfig) -> Iterator[Any]:
    """Ray, connected to a cluster; a connection that is there already is used and stays."""
    # before Ray is imported; otherwise a run that takes all memory would be tried for ever
    os.environ.setdefault("RAY_task_oom_retries", str(config.retries))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError('--on ray needs Ray: pip install "perpetune[ray]"') from error
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = config.address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise ConfigError(
            f"no Ray cluster at {where} ({first_line(error)}): start one with `ray start --head`, or give --address"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def wants(config: CompareConfig, machines: Sequence[dict[str, float]], progress: Progress) -> dict[str, float]:
    """What Ray reserves for a run. Says so where no machine has as much."""
    gpus = config.num_gpus
    if gpus is None:
        gpus = 1 if config.device in (None, "cuda") and any(m.get("GPU") for m in machines) else 0
    cpus = 1 if config.num_cpus is None else config.num_cpus
    if not any(m.get("CPU", 0) >= cpus and m.get("GPU", 0) >= gpus for m in machines):
        progress.say(
            f"no machine of the cluster has {cpus:g} CPUs and {gpus:g} GPUs for a run: the comparison waits until one "
            "joins; give less with --num-cpus and --num-gpus"
        )
    return {"num_cpus": cpus, "num_gpus": gpus}


def _there(make: Make, job: Job, wait: bool, folder: str, seen: str) -> Outcome:
    """Make a run on whichever machine this is, as if it were made where the comparison was started."""
    for path in (folder, seen):
        if not Path(path).exists():
            where = Path(path) if path == folder else Path(path).parent
            return Outcome(
                error=f"the machine {platform.node()} does not see {where}: start the comparison in a folder on a disk "
                "that all machines share, with --out on it, too"
            )
    os.chdir(folder)
    outcome = make(job, wait)
    if outcome.again:
        raise TryAgain(outcome.error)
    return outcome


def _told(error: Exception, kinds: Any, retries: int) -> Outcome:
    cause = getattr(error, "cause", None)
    if isinstance(cause, TryAgain):
        return given_up(Outcome(error=str(cause)), retries)
    if isinstance(error, kinds.OutOfMemoryError):
        return given_up(Outcome(error="its machine ran out of memory, and Ray killed it"), retries)
    if isinstance(error, kinds.WorkerCrashedError | kinds.NodeDiedError):
        return given_up(Outcome(error="its process or its machine was lost"), retries)
    return Outcome(error=f"Ray could not make it: {type(error).__name__}: {first_line(error)}")
