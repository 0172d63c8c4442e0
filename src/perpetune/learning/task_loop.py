"""The order in which things happen to a task, written once. Knows the slots, no method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from torch import Tensor
from transformers.trainer_utils import set_seed

from ..consolidation import Session
from ..core.environment import peak_memory, quick_collection
from ..core.errors import ConfigError
from ..core.measurement import Measurement, finite
from ..core.meeting import all_there
from ..core.processes import divided
from ..rules import TaskContext
from ..runs.commit import Commit, active
from ..runs.directory import Run
from ..runs.result import BEFORE
from ..streams import Stream, Task, fingerprint, split_fingerprints
from .committing import commit_session, commit_untouched
from .evaluator import choices
from .language_losses import language_losses
from .opening import Opened, filed, open_run, reopened, task_of
from .reporting import report
from .retry import Accept, kept
from .session import Training, features_before, gather, task_seed
from .setup import Setup
from .state import LearnerState
from .trainer import TrainingLog

EVALUATING = ("before", "observe", "evaluate", "commit")  # phases of a session that train nothing


class TaskLoop:
    """Learns the tasks that a run has not learned yet.

    Args:
        opened: the run, its stream, and the state after its newest commit.
        step_limit: optimizer steps of a session at most, for a trial; None takes all.

    Attributes:
        phases: seconds of each phase of the newest session, by name; log: of its training; checkpoint_bytes: of one
            checkpoint inside it.
    """

    def __init__(self, opened: Opened, step_limit: int | None = None) -> None:
        self.run, self.stream, self.state, self.joined = opened
        self.step_limit = step_limit
        self.setup = self.state.setup
        self.sessions = self.state.consolidation.schedule(self.stream)
        self.phases: dict[str, float] = {}
        self.log = TrainingLog(0, None, None)
        self.checkpoint_bytes = 0
        self._untested = {task.name for task in self.stream if not len(task.test)}

    # ---- the order in which things happen ----

    def learn_all(self, accept: Accept | None = None, after: Callable[[], None] = lambda: None) -> bool:
        """Learn one session after another; each is a commit. With `accept`, up to the first task that is not kept.

        Args:
            after: called when a task is learned.

        Returns:
            Whether all of them stay.

        Raises:
            ConfigError: tasks that are learned all at once cannot be judged one by one.
        """
        if accept is not None and len(self.sessions) < len(self.stream):
            raise ConfigError("this recipe learns its tasks all at once: there is no newest task to judge")
        done = len(active(self.run.commits))
        if not self.run.commits:
            self.commit_untouched()
        elif 0 < done < len(self.sessions):
            with divided():
                self._refresh_caches(self.sessions[done])
        for session in self.sessions[done:]:
            self.phases = {}
            self.learn(session)
            if accept is not None and not kept(self.run, accept):
                return False
            after()
        return True

    def learn(self, session: Session) -> Commit:
        """Train on a session of tasks, measure, and commit."""
        state, rules, consolidation = self.state, self.state.recipe.rules, self.state.consolidation
        with self._phase("before"):
            before, features = self._predict_before(session), features_before(state, session)
        with self._phase("prepare"):
            set_seed(task_seed(self.setup.seed, session.name))
            consolidation.begin_task(session)
            training = Training(state, session)
            training.open_heads()
            steps = training.steps(self.step_limit) if training.learns else 0
            checkpoints = training.checkpoints(self.run, steps)
        with self._phase("rules"):
            context = TaskContext(
                state.backbone, begun(self.run), training.batches, training.losses, self.setup.progress.say
            )
            for rule in rules:
                rule.begin_task(context)
        with self._phase("train"):
            self.log = training.train(len(self.sessions), steps, checkpoints)
            self.checkpoint_bytes = checkpoints.size if checkpoints else 0
        with self._phase("rules"):
            measured = [m for rule in rules for m in rule.guarantee()]
            for rule in rules:
                rule.end_task(context)
        with self._phase("consolidate"):
            training.close_heads()
            consolidation.end_task(session)
        with self._phase("observe"):
            gather(state, self.stream.tasks[: session.learned], session.tasks, features)
            consolidation.judge(session, state.heads[0])
        with self._phase("evaluate"):
            evaluated = self._evaluated(session)
            predictions = state.evaluator.predictions(self.stream, session, state.heads, consolidation, evaluated)
            measured += consolidation.guarantee()
            measured += [m for head in state.heads for m in head.guarantee()]
            measured += [*self._stale_statistics(session), *self._feature_drift(session)]
            untouched = self.run.commits[0].manifest.get("general_loss")
            measured += language_losses(state, evaluated, untouched, self._due(session))
        with self._phase("commit"):
            facts = self._facts(session, measured, training.trainable)
            commit = commit_session(self.run, state, session.name, predictions | before, facts)
        self._note(commit, session)
        report(self.run.path, self.setup.training, state.backbone)
        return commit

    # ---- before a session ----

    def commit_untouched(self) -> None:
        """The first commit: baseline predictions of the model as it was loaded."""
        state = self.state
        with divided():
            predictions = state.evaluator.predictions(self.stream, None, state.heads, state.consolidation)
        commit_untouched(self.run, state, predictions)

    def _refresh_caches(self, session: Session) -> None:
        """What an undisturbed run would still hold of the model before this session: features and label texts."""
        state, learned = self.state, self.stream.tasks[: session.first]
        seen = {c for task in learned for c in task.classes}
        classified = [task for task in learned if task.metric is None and len(task.test)]
        for task in classified if self.setup.evaluate_every == 1 and state.consolidation.states is None else ():
            state.evaluator.features(task, "test", choices(self.stream, task, seen))
        state.evaluator.embed(state.heads, self.stream.labels, [task.candidates for task in classified])

    def _predict_before(self, session: Session) -> dict[str, Tensor]:
        """Predictions on the session's own tasks before they are learned: a(j - 1, j) of the model as it is now, and
        b_j where the first commit lacks it."""
        own = {task.name for task in session.tasks}
        found = {k: v for k, v in self.joined.items() if task_of(k) in own}
        if not session.index:
            return found
        state, last = self.state, self.sessions[session.index - 1]
        now = state.evaluator.predictions(self.stream, last, state.heads, state.consolidation, session.tasks)
        return found | filed(BEFORE, now)

    # ---- after a session ----

    def _evaluated(self, session: Session) -> Sequence[Task]:
        """The tasks that are evaluated after a session: all so far where that is due, else its own."""
        return self.stream.tasks[0 if self._due(session) else session.first : session.learned]

    def _due(self, session: Session) -> bool:
        return all_due(session.index, len(self.sessions), self.setup.evaluate_every)

    def _stale_statistics(self, session: Session) -> list[Measurement]:
        state = self.state
        stale = [head for head in state.heads if head.observes and not (head.refresh or head.carries)]
        if not stale or not state.recipe.tuner.trains or not state.consolidation.adapts(session):
            return []
        note = "tasks whose class statistics were gathered with features that have changed since (order-dependent)"
        name = "tasks with stale statistics"
        return [Measurement(name, float(session.index), None, "", type(head).__name__, note) for head in stale]

    def _feature_drift(self, session: Session) -> list[Measurement]:
        """How far the features of earlier tasks' test inputs have moved: what forgetting is made of."""
        if self.setup.evaluate_every != 1:  # how far since when would depend on where a run was stopped
            return []
        tuner = self.state.recipe.tuner
        drift = self.state.evaluator.drift
        drifts = [drift[task.name] for task in self.stream.tasks[: session.first] if task.name in drift]
        if not drifts or not tuner.trains:
            return []
        note = "the task that moved most; test inputs were never shown to any rule"
        name = "change of features on earlier tasks' test inputs"
        return [Measurement(name, max(drifts), None, "relative", type(tuner).__name__, note)]

    def _facts(self, session: Session, measured: list[Measurement], trainable: int) -> dict[str, Any]:
        learned = self.stream.tasks[: session.learned]
        return {
            "learned": [task.name for task in learned],
            "classes": sorted({c for task in learned for c in task.classes}),
            "data": {task.name: fingerprint(task) for task in session.tasks},
            "sizes": {task.name: {"train": len(task.train), "test": len(task.test)} for task in session.tasks},
            "splits": {task.name: split_fingerprints(task) for task in session.tasks},
            "task_classes": {task.name: list(task.classes) for task in session.tasks},
            "not_evaluated": [task.name for task in learned if task.name in self._untested],
            "training": {task.name: dict(task.training) for task in session.tasks if task.training},
            **({"metrics": metrics} if (metrics := {t.name: t.metric for t in session.tasks if t.metric}) else {}),
            **({"retried": True} if self._tried_before(session) else {}),
            "guarantees": [{**m.to_dict(), "task": session.name} for m in measured],
            "heads": [head.name for head in self.state.heads],
            "trainable_parameters": trainable,
        }

    def _tried_before(self, session: Session) -> bool:
        return session.name in {c.manifest["undoes"] for c in self.run.history if "undoes" in c.manifest}

    def _note(self, commit: Commit, session: Session, done: str = "learned") -> None:
        evaluating = sum(self.phases.get(name, 0.0) for name in EVALUATING)
        training = sum(self.phases.values()) - evaluating
        self.run.note(
            "task",
            index=session.index,
            task=session.name,
            steps=self.log.steps,
            **({"resumed_at": self.log.resumed} if self.log.resumed else {}),
            first_loss=finite(self.log.first_loss),
            last_loss=finite(self.log.last_loss),
            losses=[[step, finite(loss)] for step, loss in self.log.losses],
            train_seconds=round(training, 3),
            evaluate_seconds=round(evaluating, 3),
            peak_memory_bytes=peak_memory(self.setup.device),
            disk_bytes=commit.size,
        )
        seconds = training + evaluating
        self.setup.progress.say(
            f"{self.state.recipe.name}: task {session.index + 1} `{session.name}` {done} in {seconds:.1f} s"
        )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begun = perf_counter()
        with divided(name in EVALUATING):
            yield
        self.phases[name] = self.phases.get(name, 0.0) + perf_counter() - begun


@all_there()
def learn(setup: Setup, stream: Stream, accept: Accept | None = None, retry: str | None = None) -> LearnerState:
    """See `Learner.learn` and `Learner.retry`; the state after the newest commit."""
    opened = open_run(setup, stream, retry=retry)
    try:
        with setup.progress, quick_collection() as set_aside:
            stays = TaskLoop(opened).learn_all(accept, set_aside)
            if stays and (decision := opened.state.consolidation.decision()) is not None:
                setup.progress.say(f"{setup.recipe.name}: {decision}")
    except KeyboardInterrupt:
        setup.progress.say("stopped: every finished task is safe; start again with the same run directory to go on")
        raise
    finally:
        opened.run.close()
    return opened.state if stays else reopened(setup)


def all_due(index: int, of: int, every: int) -> bool:
    """Whether all tasks so far are evaluated after a session: its number, of so many, and `evaluate_every`."""
    return index == of - 1 or (every > 0 and (index + 1) % every == 0)


def begun(run: Run) -> int:
    """How many sessions rules have seen, those that were taken out again too: they remember them, and draw by
    number. Not an adopted one whose inputs they do not know."""
    seen = [c.manifest for c in run.commits[1:] if "reverts" not in c.manifest]
    return len(seen) - len([m for m in seen if "adopted" in m and m["adopted"].get("unknown")])
