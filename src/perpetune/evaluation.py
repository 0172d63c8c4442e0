"""What a model predicts on every task so far; features are computed once for every state of the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backbone import Backbone, Examples
from .consolidation import Consolidation, Step
from .heads import Head
from .progress import Progress
from .streams import Stream, Task
from .tuners.base import relative_change


class Evaluator:
    """Features and predictions of whole splits.

    Args:
        batch_size: examples a forward pass.

    Attributes:
        drift: of every task's test inputs, the relative change of their features when the model last changed.
    """

    def __init__(self, backbone: Backbone, batch_size: int, progress: Progress) -> None:
        self.backbone, self.batch_size, self.progress = backbone, batch_size, progress
        self._examples: dict[tuple[str, str], Examples] = {}
        self._features: dict[tuple[str, str], tuple[int, Tensor]] = {}
        self.drift: dict[str, float] = {}

    def features(self, task: Task, split: str) -> Tensor:
        """Features of a split (N x width) under the model as it is now."""
        key = (task.name, split)
        version, before = self._features.get(key, (-1, None))
        features = before
        if features is None or version != self.backbone.version:
            rows = getattr(task, split)
            examples = self._examples.get(key) or self.backbone.prepare(rows)
            with self.progress.bar(f"features of {task.name}", len(rows)) as advance:
                features = self.backbone.features(examples, self.batch_size, advance)
            if split == "test":  # read again after every task; training data is not
                self.drift[task.name] = 0.0 if before is None else relative_change(features, before)
                self._features[key] = (self.backbone.version, features)
                if self.backbone.modality == "text":  # pixels would fill the memory
                    self._examples[key] = examples
        return features

    def predictions(
        self, stream: Stream, step: Step | None, heads: Sequence[Head], consolidation: Consolidation
    ) -> dict[str, Tensor]:
        """Predicted classes of every head on the tasks learned so far, and on the next ones that it can name already.

        Args:
            step: the step just learned; None for the untouched model, which is asked about all tasks.

        Returns:
            `target/TASK` and `HEAD/SCENARIO/TASK`, each (n_j,) int32.
        """
        learned = step.learned if step is not None else 0
        seen = {c for task in stream.tasks[:learned] for c in task.classes}
        ahead = stream.tasks[learned : learned + 1] if step is not None else stream.tasks
        learned_in = {t.name: s.index for s in consolidation.schedule(stream) for t in s.tasks}
        out: dict[str, Tensor] = {}
        for position, task in enumerate((*stream.tasks[:learned], *ahead)):
            known = position < learned
            # b_j of the untouched model and a(j - 1, j) must choose among the same classes
            before = {c for t in stream.tasks[:position] for c in t.classes} if step is None else seen
            able = [head for head in heads if known or head.knows(task.classes)]
            if not able:
                continue
            features = self.features(task, "test")
            out[f"target/{task.name}"] = torch.tensor(task.test["label"][:], dtype=torch.int32)
            for head in able:
                for scenario in readings(stream):
                    own = None
                    if scenario == "task" and step is not None and known:
                        own = consolidation.reads(learned_in[task.name], step.index)
                    scores = head.scores(features, own)
                    allowed = sorted(task.classes) if scenario == "task" else sorted({*before, *task.classes})
                    choice = scores[:, allowed].argmax(1).cpu()
                    out[f"{head.name}/{scenario}/{task.name}"] = torch.tensor(allowed)[choice].to(torch.int32)
        return out


def readings(stream: Stream) -> tuple[str, ...]:
    """In which scenarios a run on this stream is read: class-incremental runs are read with the task given as well."""
    return {"class": ("class", "task"), "domain": ("domain",), "task": ("task",)}[stream.scenario]
