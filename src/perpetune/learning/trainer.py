"""One task: a transformers Trainer whose optimizer carries the rules."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed

from ..core.errors import TrainingError
from ..core.processes import from_all, sum_, together
from ..heads import Head
from ..models.backbone import Backbone, Examples
from ..models.language_model import LanguageBackbone
from ..rules import Rule
from .checkpoints import Checkpoints
from .loss_log import curve
from .self_distillation import SDFT, sdft_trainer
from .trainer_choice import TrainerName
from .training_settings import one_line, training_arguments
from .trl_training import UnderRules, lent, longest_row, sft_trainer


class TaskModel(nn.Module):
    """Backbone and training head as one module, as the Trainer wants it."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        if hasattr(backbone.model, "hf_device_map"):  # dealt to several devices: the Trainer leaves it where it is
            self.hf_device_map = backbone.model.hf_device_map

    def forward(self, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        return {"loss": self.head.loss(self.backbone(**inputs), labels)}

    def get_input_embeddings(self) -> nn.Module:
        """Where NEFTune adds its noise."""
        return self.backbone.model.get_input_embeddings()

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **settings: Any) -> None:
        own = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        self.backbone.model.activation_checkpointing_enable(activation_checkpointing_kwargs=own, **settings)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """The same, as older versions of transformers call it."""
        own = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self.backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=own)

    def checkpointing_disable(self) -> None:
        model = self.backbone.model
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        model.disable_input_require_grads()


@dataclass(frozen=True)
class TrainingLog:
    """Optimizer steps taken, the mean loss over the first and the last tenth of them, and the mean seconds of a step
    (all but the first, which warms up); the losses in between, see `loss_log.curve`; and at which step training went on
    from a checkpoint, 0 where it did not."""

    steps: int
    first_loss: float | None
    last_loss: float | None
    step_seconds: float = 0.0
    losses: tuple[tuple[int, float], ...] = ()
    resumed: int = 0


class _Finite(TrainerCallback):
    """Stops at the first loss that is not finite, looked at only when the Trainer logs, so that no step waits."""

    def __init__(self, trainer: UnderRules, task: str) -> None:
        self.trainer, self.task = trainer, task

    def check(self) -> None:
        bad = max(from_all(int(self.trainer.first_bad_step)))
        if bad >= 0:
            raise self._refusal(f"the loss was not finite at step {bad + 1}")

    def check_weights(self) -> None:
        """Once, at the end: no loss was computed with what the last step left."""
        model: Any = self.trainer.model
        trained = [p for p in model.parameters() if p.requires_grad]
        if not bool(torch.stack([p.isfinite().all() for p in trained]).all()):
            raise self._refusal("training left weights that are not finite")

    def _refusal(self, what: str) -> TrainingError:
        return TrainingError(
            f"task `{self.task}`: {what}; nothing of this task was committed: lower learning_rate, set max_grad_norm, "
            "or look at the data, then start again (where tasks are learned already, other settings need another run "
            "directory)"
        )

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check()


class _Advance(TrainerCallback):
    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance
        self.ends: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:  # made before a checkpoint
            self.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(perf_counter())
        self.advance(1)

    @property
    def step_seconds(self) -> float:
        return (self.ends[-1] - self.ends[0]) / max(1, len(self.ends) - 1) if self.ends else 0.0


class TaskTrainer(UnderRules):
    """The stock Trainer on a `TaskModel`, whose head has a learning rate of its own."""

    def __init__(self, *args: Any, head_learning_rate: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head_learning_rate = head_learning_rate
        # ours is a mean over the batch, so that the Trainer must divide by the accumulation steps itself
        self.model_accepts_loss_kwargs = False

    def regroup(self, optimizer: torch.optim.Optimizer) -> None:
        model: Any = self.model
        head = {id(p) for p in model.head.parameters()}
        for group in list(optimizer.param_groups):
            mine = [p for p in group["params"] if id(p) in head]
            if mine:
                group["params"] = [p for p in group["params"] if id(p) not in head]
                settings = {k: v for k, v in group.items() if k != "params"}
                optimizer.add_param_group({**settings, "params": mine, "lr": self.head_learning_rate})
        optimizer.param_groups = [g for g in optimizer.param_groups if g["params"]]

    def loss_of(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return model(**inputs)["loss"]


def train_task(
    backbone: Backbone,
    head: Head,
    rules: Sequence[Rule],
    examples: Examples,
    settings: dict[str, Any],
    *,
    task: str,
    seed: int,
    steps: int,
    advance: Callable[[int], None] = lambda n: None,
    logs: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    by: TrainerName = "perpetune",
    checkpoints: Checkpoints | None = None,
) -> TrainingLog:
    """Train the backbone's and the head's trainable parameters on one task.

    Everything random is drawn from `seed`, so that a task trained again gives the same bits.

    Args:
        logs: folder for integrations (`report_to`) that write files; None throws them away.
        by: "trl" trains a language model by `SFTTrainer`; see `choose_trainer`.
        callbacks: of transformers; they see what is logged.
        checkpoints: where those inside the task go, and the one that training goes on from.

    Raises:
        ConfigError: settings with which no Trainer can be made; see `check_training`, which says so beforehand.
        TrainingError: the loss is not finite; says at which step. Or a buffer changed that nothing keeps.
    """
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as around:
        on_cpu = next(backbone.model.parameters()).device.type == "cpu"
        reports = settings.get("report_to", "none") not in ("none", ["none"], [], None)
        into, told = folder, settings
        if logs is not None and reports:  # to trackers a run is one over all its tasks
            into, told = str(logs), {"run_name": str(logs.parent.parent), **settings}
        block = longest_row(backbone, examples) if by == "trl" else None
        arguments = training_arguments({**told, "max_steps": steps}, into, seed, on_cpu, by, block)
        steps_taken = _Advance(advance)
        around.enter_context(lent(backbone) if by == "trl" else nullcontext())
        with one_line():
            heard = [steps_taken, *callbacks]
            if by == "trl":
                trainer: UnderRules = (
                    sdft_trainer(cast(LanguageBackbone, backbone), examples, arguments, rules, heard)
                    if settings.get(SDFT)
                    else sft_trainer(backbone, examples, arguments, settings, rules, heard)
                )
            else:
                trainer = TaskTrainer(
                    model=TaskModel(backbone, head),
                    args=arguments,
                    train_dataset=examples,
                    data_collator=backbone.collate,
                    rules=rules,
                    head_learning_rate=float(settings["head_learning_rate"]),
                    callbacks=heard,
                )
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        finite = _Finite(trainer, task)
        trainer.add_callback(finite)
        buffers = {name: buffer.clone() for name, buffer in backbone.model.named_buffers()}
        try:
            trainer.go(checkpoints)
        finally:
            if trainer.attached is not None:
                trainer.attached.remove()
            if arguments.gradient_checkpointing:
                TaskModel(backbone, head).checkpointing_disable()
        check_buffers(backbone, buffers)
        finite.check()
        finite.check_weights()
    means = torch.stack(trainer.losses).float().cpu() if trainer.losses else torch.empty(0)
    sum_([means])  # every process had its part of each batch
    losses = [float(x) / together() for x in means]
    tenth = max(1, len(losses) // 10)
    return TrainingLog(
        trainer.state.global_step,
        sum(losses[:tenth]) / tenth if losses else None,
        sum(losses[-tenth:]) / tenth if losses else None,
        steps_taken.step_seconds,
        curve(losses, trainer.state.global_step),
        trainer.found.step if trainer.found else 0,
    )


def check_buffers(backbone: Backbone, before: dict[str, Tensor]) -> None:
    """What neither rules nor commits see must not move (running statistics of normalisations do not: see
    `Backbone.train`)."""
    kept = backbone.model.state_dict().keys()
    for name, buffer in backbone.model.named_buffers():
        if name in kept and name in before and not torch.equal(buffer, before[name]):
            raise TrainingError(
                f"`{name}` of `{backbone.name}` changes while the model trains, and no rule or commit would see it: "
                "nothing of this task was committed; use another model, or one in which it is fixed"
            )
