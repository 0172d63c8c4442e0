"""What a task left, told to the trackers that `report_to` names, through the integrations of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import DefaultFlowCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler

from ..core.processes import first
from ..metrics.accuracy import AccuracyMatrix, summary
from ..runs.result import Result
from .trainer_choice import OLD
from .training_settings import REPORTING, one_line, training_arguments

FOLDER = "tasks"  # of figures after each task, beside one for the losses of each task


def figures(result: Result) -> dict[str, float]:
    """What is known after the newest task, by name.

    `accuracy/HEAD/SCENARIO/TASK`: a(T, j) of every task j evaluated then; `HEAD/SCENARIO/FIGURE`: final accuracy,
    forgetting and all others that are defined; `measured/SOURCE/NAME` with `.../promised`: guarantees of the newest
    task and what else was measured of it. Names begin with `eval_`, which transformers' integrations write as `eval/`.
    """
    found: dict[str, float | None] = {}
    for head, scenario in result.readings:
        matrix = result.matrix(head, scenario)
        found |= {f"accuracy/{head}/{scenario}/{task}": value for task, value in _newest(matrix)}
        found |= {f"{head}/{scenario}/{name}": value for name, value in summary(matrix).items()}
    newest = result.commits[-1].manifest
    for g in newest["guarantees"]:
        name = f"measured/{g['source']}/{g['name']}".replace(" ", "_")
        found |= {name: g["value"], f"{name}/promised": g["bound"]}
    return {f"eval_{name}": float(value) for name, value in found.items() if value is not None and value == value}


def _newest(matrix: AccuracyMatrix) -> Iterable[tuple[str, float]]:
    return zip(matrix.tasks, matrix.values[-1].tolist(), strict=True)


def report(path: Path, settings: dict[str, Any], model: Any) -> None:
    """Tell the figures after the newest task, at the number of tasks learned; nothing where `report_to` names nothing.

    Args:
        path: the run, in whose `logs` integrations write files; settings: its training settings.

    Raises:
        ConfigError: an integration fails; the task is committed.
    """
    named = settings.get("report_to", "none")
    if named in (None, "none", [], ["none"]) or not first():
        return
    result = Result(path)
    with one_line("report_to"):
        told = {"run_name": str(path)} | {name: value for name, value in settings.items() if name in REPORTING}
        arguments = training_arguments(told, str(path / "logs" / FOLDER), 0, use_cpu=True, by=OLD)
        callbacks = [DefaultFlowCallback()]  # without which the handler warns
        callbacks += [kind() for kind in get_reporting_integration_callbacks(arguments.report_to)]
        handler = CallbackHandler(callbacks, model, None, None, None)
        count = len(result.tasks)
        state, control = TrainerState(global_step=count, epoch=float(count), max_steps=count), TrainerControl()
        handler.on_train_begin(arguments, state, control)
        handler.on_log(arguments, state, control, figures(result))
        handler.on_train_end(arguments, state, control)
