"""The recipe of a run that names none, and the metric of its later tasks."""

from __future__ import annotations

from pathlib import Path

from ..metrics.text import LIKELIHOOD
from ..runs.commit import active
from ..runs.config_file import CONFIG, read_config
from ..runs.directory import Run
from ..streams import Stream
from .config import RunConfig
from .opening import going_on


def usual_recipe(stream: Stream, drift: bool = False) -> tuple[str, str]:
    """Its name, and why it is taken.

    Args:
        drift: whether the tasks are not told.
    """
    if drift:
        return "lora", "the tasks are not told"
    if stream.modality == "language":
        return "routed", "a language model learns them"
    if stream.captions:
        return "lora", "they are pictures with captions"
    return "default", "their classes can be predicted from features"


def names_no_recipe(config: RunConfig) -> bool:
    """Whether neither the configuration names a recipe nor the run that it goes on with has one."""
    return "recipe" not in config.model_fields_set and not going_on(config)


def usual_metrics(path: Path, stream: Stream) -> dict[str, str]:
    """The metric of each task that names none, where a run has only had free texts, and scored their answers by one
    metric: that one."""
    if not (path / CONFIG).exists() or stream.modality != "language":
        return {}
    written = read_config(path)["stream"]
    commits = active(Run.read(path).commits)
    of = {name: metric for commit in commits for name, metric in commit.manifest.get("metrics", {}).items()}
    scored = set(of.values()) - {LIKELIHOOD}
    if written["labels"] or len(scored) != 1:
        return {}
    return {task.name: of.get(task.name, *scored) for task in stream if task.metric is None}
