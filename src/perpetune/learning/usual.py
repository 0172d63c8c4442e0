"""The recipe of a run that names none."""

from __future__ import annotations

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
