"""The training loss as it falls: beside the progress bar, in a file of the run, and as a curve in the journal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..core.files import write_text, writing

FILE = "losses.jsonl"
POINTS = 60  # of a curve in the journal, at most
OFTEN = 50  # steps between two losses of a long task; a short one tells ten


def logging_steps(steps: int) -> int:
    """How many steps lie between two losses that are told, where the user does not say."""
    return max(1, min(OFTEN, steps // 10))


class LossLog(TrainerCallback):
    """Tells what the Trainer logs, when it logs: no step waits for it.

    Args:
        task: its name, for the file.
        path: the file, one line of JSON for every loss; None writes none.
        show: shows one line.
    """

    def __init__(self, task: str, path: Path | None, show: Callable[[str], None]) -> None:
        self.task, self.path, self.show = task, path, show

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the losses of steps that are made again: those of a training that was interrupted stand last."""
        if self.path is None or not state.is_world_process_zero or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        stay = len(lines)
        while stay and self._again(lines[stay - 1], state.global_step):
            stay -= 1
        if stay < len(lines):
            write_text(self.path, "".join(lines[:stay]))

    def _again(self, line: str, step: int) -> bool:
        try:
            found = json.loads(line)
        except ValueError:  # cut short by a crash
            return True
        return bool(found["task"] == self.task and found["step"] > step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self.show(f"loss {float(logs['loss']):.4g} at step {state.global_step} of {state.max_steps}")
        if self.path is None:
            return
        known = {name: float(logs[name]) for name in ("loss", "learning_rate", "grad_norm", "epoch") if name in logs}
        line = json.dumps({"task": self.task, "step": state.global_step, **known})
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def curve(losses: Sequence[float], steps: int) -> tuple[tuple[int, float], ...]:
    """(optimizer step, mean loss up to it since the point before) in `POINTS` points at most.

    Args:
        losses: of every forward pass; steps: optimizer steps that these were for.
    """
    count = min(POINTS, steps, len(losses))
    bounds = [round(i * len(losses) / count) for i in range(count + 1)] if count else []
    return tuple(
        (round(b * steps / len(losses)), sum(losses[a:b]) / (b - a)) for a, b in zip(bounds, bounds[1:], strict=False)
    )
