"""The grid of a comparison: its runs, each of which some worker makes, and what becomes of those that fail."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import PerpetuneError, first_line
from ..core.progress import Progress
from ..learning.config import CompareConfig

HeadSpec = str | dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    recipe: str | dict[str, Any]
    name: str
    seed: int
    heads: tuple[HeadSpec, ...] | None
    path: Path

    @property
    def label(self) -> str:
        """What it is called where people look."""
        return f"{self.name} seed {self.seed}" + (f" ({self.path.name})" if self.heads else "")


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        error: why it has no records, in one line.
        again: whether the error is the machine's, so that another try may end well.
        elsewhere: whether another comparison is making it now.
        trace: where an error was raised that nobody foresaw.
    """

    records: Sequence[dict[str, Any]] = ()
    error: str = ""
    again: bool = False
    elsewhere: bool = False
    trace: str = ""


Make = Callable[[Job, bool], Outcome]  # the run of this job; where it is made elsewhere, waits for it or does not
Workers = Callable[[Sequence[Job], bool], Iterable[tuple[Job, Outcome]]]  # the same of many, in whatever order they end


def outcomes(workers: Workers, todo: Sequence[Job], progress: Progress) -> Iterator[tuple[Job, Outcome]]:
    """Every job with what became of it. Those that another comparison is making are left to it until all others are
    made; then each is waited for, and gone on with where the other left it."""
    for wait in (False, True):
        elsewhere = []
        for job, outcome in workers(todo, wait):
            if outcome.elsewhere:
                progress.say(f"{job.label}: another comparison is making it; its turn comes when the others are made")
                elsewhere.append(job)
            else:
                yield job, outcome
        todo = elsewhere


def in_turn(make: Make) -> Workers:
    """This process, which makes one run after the other."""
    return lambda todo, wait: ((job, make(job, wait)) for job in todo)


def given_up(outcome: Outcome, retries: int) -> Outcome:
    """An outcome that was the machine's fault each time, and what to do about it."""
    return replace(
        outcome,
        error=f"{outcome.error}, {retries + 1} times: start the same command again, with more --retries, or with fewer "
        "runs at a time where memory runs out",
    )


def attempt(config: CompareConfig, threads: int | None, job: Job, wait: bool) -> Outcome:
    """Make a run, or take up where an earlier try stopped. Raises nothing: what went wrong is told."""
    import torch

    from ..runs.locks import claimed

    machine = (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
    try:
        with claimed(job.path, wait) as mine:
            return Outcome(run_job(config, job, threads)) if mine else Outcome(elsewhere=True)
    except PerpetuneError as error:
        return Outcome(error=" ".join(str(error).split()))
    except Exception as error:
        told = ": ".join(dict.fromkeys((type(error).__name__, first_line(error))))  # some say no more than their kind
        if isinstance(error, machine):
            return Outcome(error=told, again=True, trace=traceback.format_exc())
        return Outcome(error=f"{told} (unforeseen; PERPETUNE_TRACEBACK=1 shows where)", trace=traceback.format_exc())


def run_job(config: CompareConfig, job: Job, threads: int | None = None) -> list[dict[str, Any]]:
    """Learn the stream with one recipe, or take up where an earlier try stopped."""
    import torch

    from ..learning.learner import Learner
    from ..learning.task_free import learn
    from ..recipes import make_recipe
    from ..recipes.user_pieces import import_modules

    if threads:
        torch.set_num_threads(threads)
    import_modules(config.imports)  # in a process of its own
    recipe = make_recipe(job.recipe)
    recipe.name = job.name
    learner = Learner.from_config(config, recipe=recipe, run=job.path, heads=job.heads, seed=job.seed)
    result = learn(learner, config.stream.load(), config.stream.drift)
    return [r.model_dump() for r in result.records()]
