"""A task that is tried, and thrown away again: by a judge, or to be learned with other settings. The run then is what
it would be without the try."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..core.errors import ConfigError, PerpetuneError
from ..core.processes import from_first
from ..runs.commit import active
from ..runs.directory import Run
from ..runs.result import Result
from ..streams import Stream

Accept = Callable[[Result], Sequence[str]]  # why the newest task of a run may not stay; nothing where it may


def kept(run: Run, accept: Accept) -> bool:
    """Judge the newest task of a run, and throw it away where it may not stay, or cannot be judged. Of several
    processes all judge, and the first decides: one that went on alone would wait for the others for ever.

    Raises:
        PerpetuneError: of the judge.
    """
    error: PerpetuneError | None = None
    try:
        reasons = tuple(accept(Result(run.path)))
    except PerpetuneError as found:
        reasons, error = (f"it cannot be judged: {found}",), found
    reasons = from_first(reasons)
    if reasons:
        run.undo(reasons)
    if error is not None:
        raise error
    return not reasons


def set_aside(run: Run, task: str) -> bool:
    """Look at a run as if its newest task were not learned; nothing is written.

    Returns:
        Whether there was anything to set aside: nothing where the task was thrown away already and not learned since.

    Raises:
        ConfigError: it is not the newest task, or was learned together with others.
    """
    learned = run.commits[-1].manifest["learned"] if run.commits else []
    if task not in learned and task in {commit.manifest.get("undoes") for commit in run.history}:
        return False
    newest = active(run.commits)[-1] if learned else None
    if newest is None or newest is not run.commits[-1] or newest.manifest["task"] != task:
        newest_name = f"that is `{learned[-1]}`" if learned else "and it has learned none"
        if newest is not None and newest is not run.commits[-1]:
            newest_name = f"and here `{run.commits[-1].manifest['reverts']}` was taken out since"
        raise ConfigError(
            f"{run.path}: the newest task alone can be learned again, {newest_name}; an earlier one is taken out with "
            "`perpetune revert`"
        )
    run.commits.pop()
    return True


def with_settings(stream: Stream, task: str, training: Mapping[str, Any]) -> Stream:
    """The stream in which a task has these training settings over its own.

    Raises:
        ConfigError: the stream has no such task.
    """
    if task not in {each.name for each in stream}:
        raise ConfigError(f"stream `{stream.name}` has no task `{task}` to learn again: its data is needed")
    tasks = [replace(t, training={**t.training, **training}) if t.name == task else t for t in stream]
    return replace(stream, tasks=tuple(tasks))
