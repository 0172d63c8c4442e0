"""What a run will take: the loop itself on a small share of the data, and from there on arithmetic."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import datasets
import numpy as np
from scipy.optimize import nnls

from ..consolidation import Session
from ..core.environment import peak_memory
from ..learning.checkpoints import KEPT, saving
from ..learning.learner import Learner
from ..learning.opening import open_run
from ..learning.session import step_budget
from ..learning.task_loop import TaskLoop, all_due
from ..learning.trainer_choice import adopt
from ..learning.training_defaults import take_language_defaults
from ..runs.commit import Commit
from ..runs.config_file import read_config
from ..streams import Stream, Task

TRIAL_STEPS = 6  # optimizer steps of a session
TRIAL_SESSIONS = 4  # the first warms up
TRIAL_BATCHES = 3  # of test examples of a task


@dataclass(frozen=True)
class Plan:
    """Estimates for a whole run.

    Attributes:
        trainable, total: parameters; steps: optimizer steps over all tasks.
        seconds: training, evaluation and commits. memory: peak bytes of the process (or accelerator).
        disk: bytes of all commits. trial_seconds: what this estimate took. checkpoints: bytes of those inside a task,
            gone once it is learned; 0 where none are kept.
    """

    recipe: str
    tasks: int
    trainable: int
    total: int
    steps: int
    seconds: float
    memory: int
    disk: int
    trial_seconds: float
    checkpoints: int = 0

    @property
    def disk_per_task(self) -> int:
        return self.disk // max(1, self.tasks)

    def text(self) -> str:
        share = f" ({100 * self.trainable / self.total:.2f} % of {self.total:,})" if self.total else ""
        inside = f", and {self.checkpoints / 1e6:.1f} MB while one is learned" if self.checkpoints else ""
        long = self.seconds >= 90
        time = f"about {round(self.seconds / 60)} min" if long else f"about {self.seconds:.0f} s"
        return "\n".join(
            (
                f"recipe {self.recipe}, {self.tasks} tasks, {self.steps:,} steps",
                f"  trainable parameters  {self.trainable:,}{share}",
                f"  memory                {self.memory / 1e9:.1f} GB at the peak",
                f"  disk                  {self.disk / 1e6:.1f} MB, {self.disk_per_task / 1e6:.1f} MB a task{inside}",
                f"  time                  {time}",
                f"  (measured in {self.trial_seconds:.0f} s on a share of the data; nothing of it is kept)",
            )
        )


@dataclass
class _Trial:
    """One session of the trial: what it was given, what it took, and what it committed."""

    rows: int
    read: int
    steps: int
    step_seconds: float
    phases: dict[str, float]
    commit: dict[str, int]  # file -> bytes
    keys: dict[str, int]  # tensors of predictions by what they belong to: "evaluated" and "before", per task


def make_plan(learner: Learner, stream: Stream) -> Plan:
    """Run the loop over the first sessions with few rows and steps, in a temporary directory.

    Time: each phase of a session is fitted by non-negative least squares to a constant, what it reads and how many
    sessions came before; steps are timed by themselves. Disk: predictions are counted, other files are fitted to the
    classes and sessions so far.

    Raises:
        PerpetuneError: whatever would stop the run from starting.
    """
    started = perf_counter()
    here = tuple(task for task in stream if len(task.train) and len(task.test))
    stream = replace(stream, tasks=here)  # of what is learned already, the data may be gone
    if stream.modality == "language":
        take_language_defaults(learner.setup)
    size = int(learner.setup.training["per_device_train_batch_size"])
    with tempfile.TemporaryDirectory() as folder:
        untold = {**learner.setup.training, "report_to": "none"}  # a trial is nobody else's news
        kept = saving(untold)
        if kept["save_strategy"] != "no":
            untold |= {"save_strategy": "steps", "save_steps": TRIAL_STEPS // 2}
        setup = replace(learner.setup, path=Path(folder), evaluate_every=1, training=untold)
        if (learner.path / "run.yaml").is_file():
            adopt(setup, read_config(learner.path))
        short = _shortened(stream, size, setup.batch_size)
        opened = open_run(setup, short)
        loop = TaskLoop(opened, TRIAL_STEPS)
        try:
            with setup.progress:
                begun = perf_counter()
                loop.commit_untouched()
                untouched = perf_counter() - begun
                trials = [_trial(loop, session) for session in loop.sessions[:TRIAL_SESSIONS]]
        finally:
            opened.run.close()
        state, first = loop.state, opened.run.commits[0]
        trainable = opened.run.commits[-1].manifest["trainable_parameters"]
        total = sum(p.numel() for p in state.backbone.parameters())
        fixed = _fixed_bytes(first)
        memory = peak_memory(setup.device)
    sessions = learner.setup.recipe.consolidation.schedule(stream)
    moves = state.recipe.tuner.trains and state.consolidation.states is None
    counts = reads(sessions, learner.setup.evaluate_every, moves)
    steps = sum(step_budget(s, learner.setup.training) for s in sessions) if trainable else 0
    tested, shown = (sum(len(t.test) for t in s) for s in (stream, short))
    baseline = untouched * tested / max(1, shown) if fixed[1] else 0.0
    return Plan(
        state.recipe.name,
        len(stream),
        trainable,
        total,
        steps,
        baseline + _seconds(trials, sessions, counts, learner, bool(trainable)),
        memory,
        _bytes(trials, sessions, fixed, learner.setup.evaluate_every, tested),
        perf_counter() - started,
        loop.checkpoint_bytes * int(kept.get("save_total_limit", KEPT)),
    )


# ---- the trial ----


def _trial(loop: TaskLoop, session: Session) -> _Trial:
    loop.phases = {}
    commit = loop.learn(session)
    stored = commit.tensors("predictions.safetensors")
    before = sum(key.startswith(("before/", "untouched/")) for key in stored)
    files = {f: (commit.path / f).stat().st_size for f in (*commit.manifest["files"], "commit.json")}
    tests = {task.name: len(task.test) for task in loop.stream}
    now = loop.stream.tasks[: session.learned]
    payload = sum(t.numel() * t.element_size() for t in stored.values())
    files["header"] = files.pop("predictions.safetensors") - payload
    return _Trial(
        sum(len(task.train) for task in session.tasks),
        sum(tests[task.name] for task in now),
        loop.log.steps,
        loop.log.step_seconds,
        loop.phases,
        files,
        {"evaluated": (len(stored) - before) // len(now), "before": before // len(session.tasks), "all": len(stored)},
    )


def _shortened(stream: Stream, train_batch: int, test_batch: int) -> Stream:
    """Every task with few rows, the longest among them; every other task twice as many, so that what a row costs can be
    told from what a session costs."""

    def short(i: int, task: Task) -> Task:
        rows = TRIAL_STEPS * train_batch * (1 + i % 2)
        return replace(task, train=_spread(task.train, rows), test=_blocks(task.test, test_batch), validation=None)

    return replace(stream, tasks=tuple(short(i, task) for i, task in enumerate(stream)))


def _lengths(rows: datasets.Dataset) -> np.ndarray:
    """Characters of each row (n,); zeros where rows are images."""
    columns = [c for c in ("text", "text_pair", "prompt", "messages") if c in rows.column_names]
    return np.sum([[len(text) for text in rows[c]] for c in columns], axis=0) if columns else np.zeros(len(rows))


def _spread(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """Rows of all lengths, evenly, the longest among them; of every class where that is possible."""
    if len(rows) <= count:
        return rows
    labels = np.array(rows["label"][:])
    order = np.lexsort((_lengths(rows), labels))
    return rows.select(np.sort(order[np.linspace(0, len(rows) - 1, count).round().astype(int)]))


def _blocks(rows: datasets.Dataset, batch: int) -> datasets.Dataset:
    """Whole batches of rows of about one length, from the longest to the shortest, as evaluation reads them."""
    blocks = -(-len(rows) // batch)
    if blocks <= TRIAL_BATCHES:
        return rows
    order = np.argsort(-_lengths(rows), kind="stable")
    starts = np.linspace(0, len(rows) - batch, TRIAL_BATCHES).round().astype(int)
    return rows.select(np.sort(np.concatenate([order[s : s + batch] for s in starts])))


# ---- time ----


def reads(sessions: Sequence[Session], every: int, moves: bool) -> list[int]:
    """Test examples that are read after each session: those of all tasks so far where the model has changed for them
    and all are due, else its own."""
    seen, found = 0, []
    for session in sessions:
        own = sum(len(task.test) for task in session.tasks)
        seen += own
        found.append(seen if moves and all_due(session.index, len(sessions), every) else own)
    return found


def _seconds(
    trials: Sequence[_Trial], sessions: Sequence[Session], counts: Sequence[int], learner: Learner, trains: bool
) -> float:
    warm = trials[1:] if len(trials) > 2 else trials
    index = range(len(trials) - len(warm), len(trials))
    step = warm[-1].step_seconds  # rules are at full work once there is something to keep
    total = 0.0
    for phase in trials[0].phases:
        took = [t.phases[phase] - (t.steps * t.step_seconds if phase == "train" else 0.0) for t in warm]
        given = [t.read if phase == "evaluate" else t.rows for t in warm]
        weights, _ = nnls(np.array([[1.0, x, i] for x, i in zip(given, index, strict=True)]), np.maximum(took, 0))
        for session, read in zip(sessions, counts, strict=True):
            rows = sum(len(task.train) for task in session.tasks)
            total += float(weights @ np.array([1.0, read if phase == "evaluate" else rows, session.index]))
    if trains:
        total += step * sum(step_budget(s, learner.setup.training) for s in sessions)
    return total


# ---- disk ----


def _fixed_bytes(first: Commit) -> tuple[int, int]:
    """Bytes of the first commit but for what it predicts, and how many predictions it holds of each test example."""
    stored = first.tensors("predictions.safetensors")
    payload = sum(t.numel() * t.element_size() for t in stored.values())
    tasks = {key.rpartition("/")[2] for key in stored}
    return first.size - payload, len(stored) // max(1, len(tasks))


def _bytes(
    trials: Sequence[_Trial], sessions: Sequence[Session], fixed: tuple[int, int], every: int, tested: int
) -> int:
    total = fixed[0] + 4 * fixed[1] * tested
    classes: set[int] = set()
    facts = []
    for session in sessions:
        classes.update(session.classes)
        facts.append((1.0, len(classes), session.index))
    names = sorted({name for t in trials for name in t.commit if name != "header"})
    known = trials[1:] if len(trials) > 2 else trials
    first = len(trials) - len(known)
    for name in names:
        sizes = [t.commit.get(name, 0) for t in trials]
        weights = np.linalg.lstsq(np.array(facts[first : len(trials)]), np.array(sizes[first:], dtype=float))[0]
        total += sum(sizes) + round(sum(max(0.0, float(weights @ np.array(f))) for f in facts[len(trials) :]))
    header, held, seen = known[-1].commit["header"] / known[-1].keys["all"], known[-1].keys, 0
    for session in sessions:
        own = sum(len(task.test) for task in session.tasks)
        seen += own
        due = all_due(session.index, len(sessions), every)
        evaluated, count = (seen, session.learned) if due else (own, len(session.tasks))
        total += 4 * (held["evaluated"] * evaluated + held["before"] * own)
        total += round(header * (held["evaluated"] * count + held["before"] * len(session.tasks)))
    return total
