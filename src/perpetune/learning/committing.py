"""What a learner and a trainer with `Keep` write down, in one way: the untouched model, and what a session left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from ..core.processes import divided
from ..models.language_model import LanguageBackbone
from ..runs.commit import Commit
from ..runs.directory import Run
from .harness import Harness
from .language_losses import general_loss, measured_language
from .state import LearnerState

UNTOUCHED = "untouched"


def commit_untouched(run: Run, state: LearnerState, predictions: Mapping[str, Tensor]) -> None:
    """The first commit: baseline predictions of the model as it was loaded."""
    facts: dict[str, Any] = {"learned": [], "classes": [], "guarantees": []}
    if measured_language(state):
        with divided():
            facts["general_loss"] = general_loss(cast(LanguageBackbone, state.backbone), state.setup.batch_size)
        for each in state.general:
            if isinstance(each, Harness):
                facts["lm_eval"] = each.facts()
    run.commit(UNTOUCHED, {"predictions.safetensors": dict(predictions)}, facts)


def commit_session(
    run: Run, state: LearnerState, name: str, predictions: Mapping[str, Tensor], facts: dict[str, Any]
) -> Commit:
    """What a session leaves, written down, and the state told that it is."""
    files = {**state.consolidation.files(), **state.files(dict(predictions))}
    commit = run.commit(name, files, facts)
    state.consolidation.committed(commit)
    state.learned(commit.manifest["classes"], commit.manifest["learned"])
    return commit
