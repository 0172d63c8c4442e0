"""A task is taken out of what a run has learned."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

from ..core.errors import ConfigError
from ..core.meeting import all_there
from ..runs.commit import Commit, active, commit_of, reverted
from ..runs.directory import Run
from ..streams import Stream
from .language_losses import language_losses
from .opening import open_run
from .session import gather
from .setup import Setup
from .state import LearnerState, head_states


@all_there()
def revert(setup: Setup, stream: Stream, task: str) -> LearnerState:
    """See `Learner.revert`; the state without the task."""
    own, started = commit_of(Run.read(setup.path).commits, task), perf_counter()
    consolidation, tuner = setup.recipe.consolidation, setup.recipe.tuner
    if not consolidation.separable(tuner):
        raise ConfigError(
            f"{type(consolidation).__name__} with {type(getattr(tuner, 'config', tuner)).__name__} keeps no change "
            "of each task by itself, so none can be taken out: use a recipe with DeltaMerge (`sotu`) or Merge "
            "(`lora`), or learn the other tasks in another run directory (--out)"
        )
    run, stream, state, _ = open_run(setup, stream, without=task)
    try:
        with setup.progress:
            learned = [name for name in run.commits[-1].manifest["learned"] if name != task]
            stream = replace(stream, tasks=stream.tasks[: len(learned)])
            _forget(run, own, state, stream)
            sessions = state.consolidation.schedule(stream)
            last = sessions[-1] if sessions else None
            predictions = state.evaluator.predictions(stream, last, state.heads, state.consolidation)
            name, classes = f"revert-{task}", sorted({c for t in stream for c in t.classes})
            measured = [m for head in state.heads for m in head.guarantee()]
            measured += language_losses(state, stream.tasks, run.commits[0].manifest.get("general_loss"))
            facts = {
                "reverts": task,
                "reverted": [*reverted(run.commits), task],
                "learned": learned,
                "classes": classes,
                "guarantees": [{**m.to_dict(), "task": name} for m in measured],
                "not_evaluated": [task.name for task in stream if not len(task.test)],
                "heads": [head.name for head in state.heads],
            }
            commit = run.commit(name, state.files(predictions, whole=True), facts)
            run.note("revert", task=name, evaluate_seconds=round(perf_counter() - started, 3), disk_bytes=commit.size)
    finally:
        run.close()
    state.learned(classes, learned)
    return state


def _forget(run: Run, own: Commit, state: LearnerState, stream: Stream) -> None:
    """Heads without the task of a commit; `stream` has the tasks that remain."""
    number, position = run.commits.index(own), active(run.commits).index(own)
    heads = dict(state.named_heads())
    before, after = (head_states(run.commits[: number + end], heads) for end in (0, 1))
    left = {c for task in stream for c in task.classes}
    classes = [c for c in run.commits[-1].manifest["classes"] if c not in left]
    for name, head in state.named_heads():
        if not head.refresh and name in after:  # the language head of free texts keeps nothing
            head.forget(position, classes, before.get(name, {}), after[name])
    gather(state, stream.tasks)
