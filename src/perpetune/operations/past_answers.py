"""What runs answered to the same questions at different times: every state is the base model and commits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from ..learning.learner import Learner
from ..learning.prediction import answers
from ..learning.state import LearnerState
from ..metrics.text import LIKELIHOOD, graded
from ..runs.commit import active
from ..runs.directory import Run
from ..streams import Task


@dataclass(frozen=True)
class Answers:
    """Of one state of one run: the answer to each question, and its score.

    Attributes:
        recipe, after: None before anything was learned; then the run's recipe, and the task that it learned last.
    """

    recipe: str | None
    after: str | None
    texts: tuple[str, ...]
    scores: tuple[float, ...]


def past_answers(runs: Sequence[Path], task: Task, after: Sequence[str], longest: int) -> list[Answers]:
    """Answers to the test questions of a task: of the untouched model, then of every run after each of some tasks.

    The runs have one base model, which is loaded once.

    Args:
        runs: run directories of a language model.
        task: of free texts, with a metric of generated answers.
        after: tasks that all the runs have learned, one by one; longest: tokens of an answer at most.

    Raises:
        ConfigError: a task without such a metric.
        PerpetuneError: a run is missing or damaged, or its base model is another one now.
    """
    if task.metric in (None, LIKELIHOOD):
        raise ConfigError(f"task `{task.name}` has no metric of generated answers (metric: exact_match)")
    base: Any = None
    found: list[Answers] = []
    for path in runs:
        run = Run.read(path)
        learner = Learner.described(path, **({} if base is None else {"model": base}))
        setup, model, stream = learner.setup, run.config["model"], run.config["stream"]
        for name in after if found else (None, *after):
            backbone: Any = setup.load_base(model["modality"], model["fingerprint"])
            if base is None:  # a copy of what is loaded is quicker than loading it again
                base = (copy.deepcopy(backbone.model), backbone.processor)
                setup = Learner.described(path, model=base).setup
            done = active(run.commits)
            count = 0 if name is None else [c.manifest["task"] for c in done].index(name) + 1
            state = LearnerState(setup, backbone, stream["labels"], stream["inputs"])
            state.restore([run.commits[0], *done[:count]])
            examples, size = backbone.prepare(task.test), setup.batch_size
            if name is None:
                texts = backbone.answers(examples, size, longest)
            else:
                texts = answers(state, examples, None, size, longest=longest)
            scores = graded(str(task.metric), texts, task.test["response"][:])
            recipe = None if name is None else run.config["recipe"]["name"]
            found.append(Answers(recipe, name, tuple(texts), tuple(scores)))
    return found
