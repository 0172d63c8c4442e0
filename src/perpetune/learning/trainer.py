"""One task: a transformers Trainer whose optimizer carries the rules."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from ..core.errors import ConfigError, TrainingError, nearest
from ..core.validation import number
from ..heads import Head
from ..models.backbone import Backbone, Examples
from ..rules import Attached, Rule, attach
from .class_weights import SETTING, checked

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "num_train_epochs": 3,
    "learning_rate": 1e-3,
    "head_learning_rate": 1e-2,
    "weight_decay": 0.01,
    "warmup_steps": 0,
}
REFUSED = {
    "label_smoothing_factor": "the head computes the loss",
    "gradient_checkpointing": "it is not supported yet",
    "activation_checkpointing": "it is not supported yet",
}
QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "logging_steps": 50}
OURS = ("output_dir", "seed", "data_seed", "eval_strategy", "save_strategy", "remove_unused_columns")


class TaskModel(nn.Module):
    """Backbone and training head as one module, as the Trainer wants it."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        return {"loss": self.head.loss(self.backbone(**inputs), labels)}


@dataclass(frozen=True)
class TrainingLog:
    """Optimizer steps taken, the mean loss over the first and the last tenth of them, and the mean seconds of a step
    (all but the first, which warms up)."""

    steps: int
    first_loss: float | None
    last_loss: float | None
    step_seconds: float = 0.0


class _Finite(TrainerCallback):
    """Stops at the first loss that is not finite, looked at only when the Trainer logs, so that no step waits."""

    def __init__(self, trainer: TaskTrainer, task: str) -> None:
        self.trainer, self.task = trainer, task

    def check(self) -> None:
        bad = int(self.trainer.first_bad_step)
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

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(perf_counter())
        self.advance(1)

    @property
    def step_seconds(self) -> float:
        return (self.ends[-1] - self.ends[0]) / max(1, len(self.ends) - 1) if self.ends else 0.0


class TaskTrainer(Trainer):
    """The stock Trainer; ours: rules hang on its optimizer, and the head has a learning rate of its own."""

    def __init__(self, *args: Any, rules: Sequence[Rule], head_learning_rate: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rules = rules
        self.head_learning_rate = head_learning_rate
        self.attached: Attached | None = None
        self.losses: list[Tensor] = []
        self.first_bad_step = torch.tensor(-1)
        # ours is a mean over the batch, so that the Trainer must divide by the accumulation steps itself
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        model: Any = self.model
        head = {id(p) for p in model.head.parameters()}
        for group in list(optimizer.param_groups):
            mine = [p for p in group["params"] if id(p) in head]
            if mine:
                group["params"] = [p for p in group["params"] if id(p) not in head]
                settings = {k: v for k, v in group.items() if k != "params"}
                optimizer.add_param_group({**settings, "params": mine, "lr": self.head_learning_rate})
        optimizer.param_groups = [g for g in optimizer.param_groups if g["params"]]
        self.attached = attach(model, optimizer, self.rules, begin=False)
        return optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = model(**inputs)["loss"].mean()  # several devices give several losses
        detached = loss.detach()
        self.losses.append(detached)
        first = self.first_bad_step.to(loss.device, non_blocking=True)  # stays there: no step waits for it
        bad = (first < 0) & ~torch.isfinite(detached)
        self.first_bad_step = torch.where(bad, self.state.global_step, first)
        return loss


def resolve_training(*layers: dict[str, Any]) -> dict[str, Any]:
    """Training settings: our defaults, then the recipe's, then the user's.

    Raises:
        ConfigError: a name that `transformers.TrainingArguments` does not have, or one that the learner sets itself.
    """
    import inspect

    known = {*inspect.signature(TrainingArguments.__init__).parameters, "head_learning_rate", SETTING} - {"self"}
    settings = dict(DEFAULTS)
    for layer in layers:
        for key, value in layer.items():
            if key in OURS:
                raise ConfigError(f"`{key}` is set by the learner: use the run's own option (seed, out)")
            if key in REFUSED:
                raise ConfigError(f"`{key}` has no effect here: {REFUSED[key]}")
            if key not in known:
                raise ConfigError(f"transformers.TrainingArguments has no `{key}`: {nearest(key, known)}")
            settings[key] = number(value)
    if SETTING in settings and (weights := checked(settings.pop(SETTING))) is not None:
        settings[SETTING] = weights
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs"):
        if not (isinstance(settings[key], (int, float)) and settings[key] > 0):
            raise ConfigError(f"`{key}` must be a number above 0, not {settings[key]!r}")
    return settings


def training_arguments(settings: dict[str, Any], folder: str, seed: int, use_cpu: bool) -> TrainingArguments:
    """
    Raises:
        ConfigError: a value that TrainingArguments refuses.
    """
    own = {k: v for k, v in settings.items() if k not in ("head_learning_rate", SETTING)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return TrainingArguments(
                output_dir=folder,
                seed=seed,
                save_strategy="no",
                eval_strategy="no",
                remove_unused_columns=False,
                **{**QUIET, "dataloader_pin_memory": torch.accelerator.is_available(), "use_cpu": use_cpu, **own},
            )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training settings: {str(error).splitlines()[0]}") from error


def count_steps(examples: int, settings: dict[str, Any]) -> int:
    """Optimizer steps of one task with this many examples."""
    if settings.get("max_steps", -1) > 0:
        return int(settings["max_steps"])
    batches = -(-examples // int(settings["per_device_train_batch_size"]))
    per_epoch = max(1, -(-batches // int(settings.get("gradient_accumulation_steps", 1))))
    return max(1, int(-(-per_epoch * float(settings["num_train_epochs"]) // 1)))


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
) -> TrainingLog:
    """Train the backbone's and the head's trainable parameters on one task.

    Everything random is drawn from `seed`, so that a task trained again gives the same bits.

    Raises:
        TrainingError: the loss is not finite; says at which step.
    """
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        on_cpu = next(backbone.model.parameters()).device.type == "cpu"
        arguments = training_arguments({**settings, "max_steps": steps}, folder, seed, on_cpu)
        steps_taken = _Advance(advance)
        trainer = TaskTrainer(
            model=TaskModel(backbone, head),
            args=arguments,
            train_dataset=examples,
            data_collator=backbone.collate,
            rules=rules,
            head_learning_rate=float(settings["head_learning_rate"]),
            callbacks=[steps_taken],
        )
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        finite = _Finite(trainer, task)
        trainer.add_callback(finite)
        try:
            trainer.train()
        finally:
            if trainer.attached is not None:
                trainer.attached.remove()
        finite.check()
        finite.check_weights()
    losses = [float(x) for x in torch.stack(trainer.losses).float()] if trainer.losses else []
    tenth = max(1, len(losses) // 10)
    return TrainingLog(
        trainer.state.global_step,
        sum(losses[:tenth]) / tenth if losses else None,
        sum(losses[-tenth:]) / tenth if losses else None,
        steps_taken.step_seconds,
    )
