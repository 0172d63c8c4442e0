"""A recipe in somebody else's trainer: one callback, and what was learned lies in a run directory."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed

from ..consolidation import Session
from ..core.environment import peak_memory
from ..core.errors import ConfigError, RuleError, TrainingError
from ..core.measurement import Measurement, finite
from ..recipes.recipe import Recipe
from ..rules import Attached, TaskContext, attach
from ..runs.commit import Commit
from ..runs.config_check import SAVING
from ..runs.directory import Run
from ..runs.result import BEFORE
from ..streams import Task, fingerprint, split_fingerprints
from ..streams.tokens import METRIC, as_rows, without_rows
from . import kept
from .committing import commit_session, commit_untouched
from .given_model import GivenModel
from .keep_checks import (
    check_finite,
    check_kind,
    check_optimizer_holds,
    check_recipe,
    check_trainer,
    trainer_of,
)
from .likelihoods import HEAD, filed, likelihoods, losses
from .session import Training, task_seed
from .state import LearnerState
from .task_loop import begun
from .token_rows import TokenBackbone, token_rows
from .trainer import check_buffers
from .training_settings import HONOURED

PROBE = 16  # rows


class Keep(TrainerCallback):
    """Keeps what a training leaves, and what trainings before it left: give it to an unmodified `transformers.Trainer`
    or `trl.SFTTrainer`.

    When the trainer is made, the model becomes what the run directory says: earlier tasks merged or stacked, and the
    recipe's adapter on it. When training begins, the recipe's rules hang on the trainer's optimizer. When it ends,
    adapter, rule state and scores become a commit, from which the next process goes on. A training that is
    interrupted leaves nothing; the same script then starts it anew.

    The model is a plain one, or one with an adapter of the recipe's settings at its start; its initial values are drawn
    anew, from the run's seed and the task's name. A plain model is afterwards what the run predicts with; one with an
    adapter is as training left it, so that `trainer.save_model()` writes this adapter.

    Scores: exp of the mean log-likelihood of an example's targets, on the trainer's `eval_dataset`, before and after;
    where that is a dict, those of its data sets that are called as this task or an earlier one.

    Args:
        recipe: a name, plain data, or a `Recipe`; None: as the run has it.
        run: the run directory, of `Keep` or `Learner`.
        task: what this training is called, unique in the run.
        inputs: what predictions read, "prompt" or "messages"; None: messages where the tokenizer has a chat template.

    Raises:
        ConfigError, ModelError, RunError, RuleError: (from the trainer's constructor, or when training begins) whatever
            would keep the rules from acting.

    Example:
        >>> keep = pt.Keep("olora", run="runs/weekly", task="2026-w48")
        >>> SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[keep]).train()
    """

    _writing: ClassVar[dict[Path, Run]] = {}  # runs that trainings of this process hold, ended or not

    def __init__(
        self,
        recipe: str | dict[str, Any] | Recipe | None = None,
        *,
        run: str | Path,
        task: str,
        inputs: str | None = None,
    ) -> None:
        if inputs not in (None, "prompt", "messages"):
            raise ConfigError(f"inputs is prompt or messages, not {inputs!r}")
        self.task, self.path, self.inputs = kept.named(task), Path(run), inputs
        self.written, self.commits = kept.earlier(self.path)
        self.recipe = kept.recipe_of(recipe, self.path, self.written)
        check_recipe(self.recipe)
        kept.stream_of(self.path, self.written, self.commits, without_rows(self.task), {}, "prompt")
        self._trainer: Any = None
        self._given: Any = None
        self._attached: Attached | None = None
        self._done = False

    # ---- when the trainer is made ----

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        """Make the model what the run says, with the recipe's adapter on it, before the optimizer is made."""
        self._trainer, self._given = trainer_of(args), model
        check_trainer(self._trainer)
        if Path(args.output_dir).resolve() == self.path.resolve():
            raise ConfigError(f"{self.path} is the run directory: give the trainer another output_dir")
        tokenizer = kwargs.get("processing_class")
        check_kind(model.get_base_model() if hasattr(model, "get_base_model") else model, tokenizer)
        self._model = GivenModel(model, self.recipe, kept.newest_adapter(self.recipe, self.commits))
        base = self._model.base
        if not self._model.peft and kwargs.get("optimizer") is not None:
            raise RuleError("an optimizer that is made already lacks the recipe's adapter: leave optimizers= out")
        longest = kept.longest_prompt(base, self.written, getattr(args, "max_length", None))
        backbone = TokenBackbone(base, tokenizer, max_length=longest, name=base.config.name_or_path)
        setup = kept.setup_of(self.recipe, self.path, self.written, backbone, args)
        setup.recipe.tuner.check(base)
        self.inputs = self.inputs or ("messages" if getattr(tokenizer, "chat_template", None) else "prompt")
        old = (self.written or {"stream": {"labels": (), "inputs": (self.inputs,)}})["stream"]
        with kept.random_numbers_kept():
            self.state = LearnerState(setup, backbone, old["labels"], tuple(old["inputs"])).restore(self.commits)
            set_seed(task_seed(setup.seed, self.task))
            self.state.consolidation.begin_task(_session(without_rows(self.task), self._learned))
            self._random = torch.get_rng_state()  # from which rules go on
        self._model.dressed(backbone)

    @property
    def _learned(self) -> list[str]:
        return list(self.commits[-1].manifest["learned"]) if self.commits else []

    # ---- when training begins ----

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        """Score the model before, and hang the rules on the optimizer."""
        if self._trainer is None:
            raise RuleError("Keep was added too late: give it to the trainer's constructor, callbacks=[pt.Keep(...)]")
        if self._done or self._attached is not None:
            raise RuleError(f"task `{self.task}` has one training: make a new trainer and a new Keep for the next")
        if model is not self._given or model is not self._trainer.model:
            raise RuleError("the model is not the one that the trainer was made with: load it, then make the trainer")
        if state.global_step:
            raise ConfigError(
                "a training that goes on from a checkpoint does not go with Keep, whose rules have seen its beginning "
                "or not: leave resume_from_checkpoint out"
            )
        optimizer = kwargs["optimizer"]
        check_optimizer_holds(self.state.backbone.model, optimizer)
        self._began = perf_counter()
        with kept.random_numbers_kept(), self._model.in_its_precision():
            self.session, self.stream = self._rows()
            self.run = self._open()
            try:
                self._before = likelihoods(self.state, self.stream, len(self._learned), ended=False)
                if not self.run.commits:
                    commit_untouched(self.run, self.state, filed(self._before))
                self.training = Training(self.state, self.session)
                self.context = TaskContext(
                    self.state.backbone, begun(self.run), self.training.batches, self.training.losses, warnings.warn
                )
                torch.set_rng_state(self._random)
                self.training.open_heads()
                rules = self.state.recipe.rules
                for rule in rules:
                    rule.begin_task(self.context)
                scaler = getattr(self._trainer.accelerator, "scaler", None)
                self._attached = attach(self.state.backbone.model, optimizer, rules, begin=False, scaler=scaler)
            except BaseException:
                self.run.close()
                raise
        self._buffers = {name: b.clone() for name, b in self.state.backbone.model.named_buffers()}

    def _rows(self) -> tuple[Session, Any]:
        """The task and the stream with it, as rows of tokens."""
        trainer = self._trainer
        tests = trainer.eval_dataset
        found: dict[str, Any] = tests if isinstance(tests, dict) else {} if tests is None else {self.task: tests}
        known = {*self._learned, self.task}
        self._unread = sorted(set(found) - known)
        rows = {name: token_rows(trainer, data) for name, data in found.items() if name in known}
        train, nothing = token_rows(trainer, trainer.train_dataset), as_rows([])
        task = Task(self.task, (), train, rows.get(self.task, nothing), metric=METRIC)
        stream = kept.stream_of(self.path, self.written, self.commits, task, rows, str(self.inputs))
        return _session(task, self._learned), stream

    def _open(self) -> Run:
        """The run, locked until training ends. One that an earlier training of this process did not end is let go."""
        key = self.path.resolve()
        if key in self._writing:
            self._writing.pop(key).close()
        config = self.written or self.state.setup.config(self.stream, self.state.backbone)
        run = self._writing[key] = Run.open(self.path, config)
        if self.written is not None:
            kept.as_before(run, self.commits[-1].digest)
        return run

    # ---- when training ends ----

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        """Measure, and commit what the training left."""
        try:
            with kept.random_numbers_kept(), self._model.in_its_precision():
                self._end(state)
        finally:
            self._let_go()

    def _end(self, state: Any) -> None:
        learner, rules, began = self.state, self.state.recipe.rules, perf_counter()
        backbone, consolidation = learner.backbone, learner.consolidation
        if not state.global_step or any(not rule._stepped for rule in rules):
            raise TrainingError(f"task `{self.task}`: no step was made that the rules saw; nothing was committed")
        trained = [p for p in backbone.model.parameters() if p.requires_grad]
        check_finite(trained, self.task)
        check_buffers(backbone, self._buffers)
        measured = [m for rule in rules for m in rule.guarantee()]
        for rule in rules:
            rule.end_task(self.context)
        assert self._attached is not None
        self._attached.remove()
        self.training.close_heads()
        self._model.trained(backbone)
        probe = self.session.tasks[0]
        if not len(probe.test):  # merging is checked on what there is
            probe = replace(probe, test=probe.train.select(range(min(PROBE, len(probe.train)))))
        consolidation.end_task(replace(self.session, tasks=(probe,)))
        scores = likelihoods(learner, self.stream, len(self._learned), ended=True)
        measured += [
            *consolidation.guarantee(),
            *losses(learner, self._before, scores, self.run.commits[0].manifest.get("general_loss")),
        ]
        predictions = filed(scores)
        if self._learned:
            predictions |= filed({k: v for k, v in self._before.items() if k == self.task}, BEFORE)
        self.run.grow({"stream": learner.setup.config(self.stream, backbone)["stream"]})
        facts = self._facts(measured, sum(p.numel() for p in trained), list(scores))
        commit = commit_session(self.run, learner, self.task, predictions, facts)
        self._done = True
        self._note(commit, state, began)
        self._model.hand_back(backbone)

    def _facts(self, measured: list[Measurement], trainable: int, scored: Sequence[str]) -> dict[str, Any]:
        task, args = self.session.tasks[0], self._trainer.args
        said = {name: getattr(args, name) for name in sorted(HONOURED.difference(SAVING)) if hasattr(args, name)}
        left_out = [] if task.name in scored else ["scores: the trainer has no eval_dataset of this task"]
        left_out += [f"eval_dataset `{name}`: it is called as no task" for name in self._unread]
        heads = [head.name for head in self.state.heads if head.observes]
        left_out += [f"head `{name}`: it reads labels, and a trainer has tokens" for name in heads]
        return {
            "learned": [*self._learned, task.name],
            "classes": self.commits[-1].manifest["classes"] if self.commits else [],
            "data": {task.name: fingerprint(task)},
            "splits": {task.name: split_fingerprints(task)},
            "task_classes": {task.name: []},
            "not_evaluated": [each.name for each in self.stream if each.name not in scored],
            "guarantees": [{**m.to_dict(), "task": task.name} for m in measured],
            "heads": [*(head.name for head in self.state.heads), HEAD],
            "trainable_parameters": trainable,
            "trainer": {
                "class": type(self._trainer).__name__,
                "seed": args.seed,
                "settings": {k: v for k, v in said.items() if isinstance(v, (int, float, str, bool))},
                "left_out": left_out,
            },
        }

    def _note(self, commit: Commit, state: Any, ended: float) -> None:
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self.run.note(
            "task",
            index=len(self._learned),
            task=self.task,
            steps=state.global_step,
            first_loss=finite(losses[0]) if losses else None,
            last_loss=finite(losses[-1]) if losses else None,
            train_seconds=round(ended - self._began, 3),
            evaluate_seconds=round(perf_counter() - ended, 3),
            peak_memory_bytes=peak_memory(self.state.setup.device),
            disk_bytes=commit.size,
        )

    def _let_go(self) -> None:
        if self._attached is not None:
            self._attached.remove()
        self._writing.pop(self.path.resolve(), None)
        self.run.close()


def _session(task: Task, learned: Sequence[str]) -> Session:
    return Session(len(learned), task.name, (task,), len(learned))
