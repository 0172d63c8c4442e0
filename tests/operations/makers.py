"""Ways to make a run, for workers of tests: light ones, which import neither torch nor a model."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from perpetune.operations.grid import Job, Outcome


def tries(folder: Path, job: Job) -> int:
    """Notes a try of this job; how many there were, this one among them."""
    for number in range(1, 100):
        try:
            os.close(os.open(folder / f"{job.name}-{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return number
    raise AssertionError("so many tries")


def made(folder: Path, job: Job, wait: bool) -> Outcome:
    """As the job's name says: `once` and `always` are killed, `flaky` fails at first, `broken` always, others are made
    as soon as there are as many workers at it as their seed says."""
    number = tries(folder, job)
    if job.name == "always" or (job.name == "once" and number == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if job.name == "flaky" and number == 1:
        return Outcome(error="OSError: the disk went away", again=True, trace="there")
    if job.name == "broken":
        return Outcome(error="it cannot be made")
    while len(list(folder.glob("meet-*"))) < job.seed:
        time.sleep(0.01)
    return Outcome(
        [{"name": job.name, "pid": os.getpid(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "wait": wait}]
    )


def slow(folder: Path, job: Job, wait: bool) -> Outcome:
    """Tells which process it is, and is never done."""
    (folder / "pid.tmp").write_text(str(os.getpid()))
    (folder / "pid.tmp").rename(folder / "pid")
    time.sleep(600)
    raise AssertionError


def node(folder: Path, job: Job, wait: bool) -> Outcome:
    """`made`, and on which machine of the cluster, and in which folder."""
    import ray

    outcome = made(folder, job, wait)
    for record in outcome.records:
        record |= {"node": ray.get_runtime_context().get_node_id(), "folder": os.getcwd()}
    return outcome
