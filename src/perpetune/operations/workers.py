"""Processes on this machine that make runs: each has its share of the devices, and a lost one is replaced."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue

from ..core.errors import ConfigError
from ..core.progress import Progress
from ..learning.config import CompareConfig
from .grid import Job, Make, Outcome, Workers, given_up

VISIBLE = "CUDA_VISIBLE_DEVICES"
IDLE = 10.0  # seconds that a process without work has to end


class Worker:
    """A process that makes one run after another, and ends with the process that started it.

    Args:
        environment: variables that are set before anything is imported there.
    """

    def __init__(self, make: Make, environment: dict[str, str]) -> None:
        self._work = (make, environment)
        self._process: multiprocessing.process.BaseProcess | None = None
        self._starting, self._closed, self._busy = threading.Lock(), False, False

    def make(self, job: Job, wait: bool) -> Outcome:
        """The run of this job; if the process is lost with it, an outcome that says so."""
        with self._starting:
            if self._closed:
                return Outcome(error="stopped")
            if self._process is None:
                self._start()
            process = self._process
        assert process is not None
        self._busy = True
        try:
            self._pipe.send((job, wait))
            found: Outcome = self._pipe.recv()
        except (EOFError, OSError):
            process.join()
            return Outcome(error=_lost(process.exitcode), again=True)
        finally:
            self._busy = False
        return found

    def _start(self) -> None:
        # not forked: what torch and CUDA hold does not survive it, and the pipe's other end would never close
        new = multiprocessing.get_context("spawn")
        self._pipe, there = new.Pipe()
        self._process = new.Process(target=_serve, args=(there, *self._work))
        self._process.start()
        there.close()

    def stop(self) -> None:
        """End the process; the next run is made by a new one."""
        if self._process is not None:
            if not self._busy:
                self._pipe.close()  # it ends by itself, and leaves nothing to the resource tracker
                self._process.join(IDLE)
            self._process.terminate()  # in the midst of a run it may be: commits are there or not there
            self._process.join()
            self._process = None

    def close(self) -> None:
        """End the process for good."""
        with self._starting:
            self._closed = True
            self.stop()


def _serve(pipe: multiprocessing.connection.Connection, make: Make, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the parent hears, too, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(make(*pipe.recv()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # a run that nobody waits for: it is gone on with when the comparison is started again


def _lost(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed (SIGKILL, as when memory runs out)"
    if code is not None and code < 0:
        return f"its process ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


@contextlib.contextmanager
def processes(
    make: Make, environments: Sequence[dict[str, str]], retries: int, progress: Progress
) -> Iterator[Workers]:
    """A process for each of these environments. A run whose process is lost, or that the machine fails, is tried again
    in a new one, as often as `retries` says; the others go on."""
    workers = [Worker(make, environment) for environment in environments]
    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def tried(job: Job, wait: bool) -> Outcome:
        worker = idle.get()
        try:
            for left in range(retries, -1, -1):
                outcome = worker.make(job, wait)
                if outcome.trace or outcome.again:
                    worker.stop()  # who knows in what state it is
                if not outcome.again:
                    return outcome
                if left:
                    progress.say(f"{job.label}: {outcome.error}; it is gone on with in a new process")
            return given_up(outcome, retries)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(len(workers))

    def made(todo: Sequence[Job], wait: bool) -> Iterator[tuple[Job, Outcome]]:
        futures = {threads.submit(tried, job, wait): job for job in todo}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield made
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()
        threads.shutdown()


# ---- what each worker is given ----


def environments(config: CompareConfig) -> list[dict[str, str]]:
    """Of each worker: its threads, and its devices where there are several to deal.

    Raises:
        ConfigError: there are fewer devices than a run wants.
    """
    threads = str(run_threads(config))
    shares = dealt(visible_devices(), config) if deals_devices(config) else [None] * config.jobs
    base = {"OMP_NUM_THREADS": threads}
    return [base if share is None else {**base, VISIBLE: ",".join(share)} for share in shares]


def run_threads(config: CompareConfig) -> int:
    """Threads of each run."""
    return max(1, int(config.num_cpus)) if config.num_cpus else threads_each(config.jobs)


def threads_each(jobs: int) -> int:
    """Threads of each of several runs at a time: as many as the machine has for it, but no more than a run alone would
    take (OMP_NUM_THREADS)."""
    import torch

    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // jobs))


def deals_devices(config: CompareConfig) -> bool:
    """Whether runs may be given other GPUs than those that all see: not where the user names a device.

    Raises:
        ConfigError: the user names one, and wants to have them dealt.
    """
    free = config.device in (None, "cuda")
    if not free and config.num_gpus:
        raise ConfigError(f"--num-gpus deals GPUs to runs, --device {config.device} names one: leave one of them out")
    return free


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    told = os.environ.get(VISIBLE)
    if told is None:
        import torch

        return [str(number) for number in range(torch.cuda.device_count())]
    names = [name.strip() for name in told.split(",")]
    return names[: next((i for i, name in enumerate(names) if name in ("", "-1")), None)]  # CUDA stops there, too


def dealt(devices: Sequence[str], config: CompareConfig) -> list[list[str]] | list[None]:
    """The GPUs of each of `config.jobs` workers: `num_gpus` for each, of which several runs may share one where it is
    below 1, or where there are fewer than all runs together want. By default one for each; with a `device_map` an
    equal share. None: there are none.

    Raises:
        ConfigError: a run wants more than there are.
    """
    jobs, each = config.jobs, config.num_gpus
    if each is None:
        each = max(1, len(devices) // jobs) if config.device_map else 1
    elif each > len(devices):
        raise ConfigError(f"--num-gpus {each:g} for each run, and {len(devices)} can be seen here: give fewer")
    if not devices:
        return [None] * jobs
    count = int(each) if each >= 1 else 1 if each else 0
    starts = [int(worker * each) for worker in range(jobs)]
    return [[devices[(start + k) % len(devices)] for k in range(count)] for start in starts]
