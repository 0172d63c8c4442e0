"""A Trainer that goes on from checkpoints inside a task: no pickle, and nothing that the Trainer's own lose is lost."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ..core.errors import TrainingError
from ..core.processes import from_all
from .checkpoints import KEPT, Checkpoint, Checkpoints

UNLOGGED = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")  # of the Trainer: losses since it last logged


def random_state() -> dict[str, Any]:
    """Of all generators that a training draws from."""
    found = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.accelerator.is_available():
        device: Any = getattr(torch, torch.accelerator.current_accelerator().type)  # type: ignore[union-attr]
        found["accelerator"] = device.get_rng_state()
    return found


def set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if "accelerator" in state and torch.accelerator.is_available():
        device: Any = getattr(torch, torch.accelerator.current_accelerator().type)  # type: ignore[union-attr]
        device.set_rng_state(state["accelerator"])


class _Mark(TrainerCallback):
    """What the Trainer's own checkpoints lose: where the epoch began to draw its data, and losses not logged yet."""

    def __init__(self, trainer: Resumable) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = self.trainer.found
        if found is None:
            return
        state.compute_steps(args, state.max_steps)  # save_steps and logging_steps as they are now
        losses = found.part("losses")[args.process_index]
        self.trainer.losses[:] = losses["all"].to(args.device).unbind()
        self.trainer.first_bad_step = losses["bad"]
        for name in UNLOGGED:
            held = getattr(self.trainer, name, None)
            value = losses[name]
            setattr(self.trainer, name, value.to(held.device) if isinstance(held, Tensor) else value)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = self.trainer.found
        if found is not None and not self.trainer.epoch_begun:
            set_random_state(found.part("epoch")[args.process_index])
        self.trainer.epoch_begun = random_state()


class Resumable(Trainer):
    """A Trainer whose checkpoints are `Checkpoints`: no pickle, the trained weights alone, and the state of rules.

    Attributes:
        checkpoints: where they go; None writes none.
        losses: of every batch; first_bad_step: see `UnderRules`.
    """

    checkpoints: Checkpoints | None = None
    losses: list[Tensor]
    first_bad_step: Tensor
    epoch_begun: dict[str, Any]

    @property
    def found(self) -> Checkpoint | None:
        return self.checkpoints.found if self.checkpoints is not None else None

    def go(self, checkpoints: Checkpoints | None) -> None:
        """Train, from the beginning or from the checkpoint that was found."""
        self.checkpoints, self.epoch_begun = checkpoints, {}
        if checkpoints is not None:
            self.add_callback(_Mark(self))
        self.train(resume_from_checkpoint=str(self.found.path) if self.found else None)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        model: Any = self.model
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.checkpoints is None or self.state.global_step >= self.state.max_steps:
            return  # what is trained to its end is committed next
        scaler = getattr(self.accelerator, "scaler", None)
        losses: dict[str, Any] = {"all": torch.stack(self.losses).cpu(), "bad": self.first_bad_step.cpu()}
        for name in UNLOGGED:
            held = getattr(self, name, None)
            losses[name] = held.cpu() if isinstance(held, Tensor) else held
        ends = float(self.state.epoch or 0).is_integer()  # the next epoch begins with what this one has left
        begun = random_state() if ends else self.epoch_begun
        parts = {
            "model": dict(self._trained()),
            "optimizer": self.optimizer.state_dict(),  # type: ignore[union-attr]
            "scheduler": self.lr_scheduler.state_dict(),  # type: ignore[union-attr]
            "scaler": scaler.state_dict() if scaler is not None else None,
            "random": from_all(random_state()),
            "epoch": from_all(begun),
            "rules": [rule.state() for rule in self.checkpoints.rules],
            "losses": from_all(losses),
        }
        self.checkpoints.save(self.state.global_step, parts, self.state, self.args.save_total_limit or KEPT)

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self.found is not None
        stored, mine = self.found.part("model"), self._trained()
        if {name: tuple(p.shape) for name, p in mine.items()} != {name: tuple(p.shape) for name, p in stored.items()}:
            raise TrainingError(
                f"{self.found.path} holds other weights than this task trains: remove that folder, and the task is "
                "learned from its beginning"
            )
        for name, p in mine.items():
            p.copy_(stored[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.found is not None:
            self.optimizer.load_state_dict(self.found.part("optimizer"))  # type: ignore[union-attr]
            self.lr_scheduler.load_state_dict(self.found.part("scheduler"))  # type: ignore[union-attr]

    def _load_scaler(self, checkpoint: str | None) -> None:
        state = self.found.part("scaler") if self.found is not None else None
        if state is not None:
            self.accelerator.scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.found is not None:
            set_random_state(self.found.part("random")[self.args.process_index])
