"""TRL's `SFTTrainer` on a language model, under the rules of a recipe."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from ..models.backbone import Backbone, Examples
from ..models.language_model import IGNORED
from ..models.loading import quiet
from ..rules import Attached, Rule, attach
from ..streams.quiet import without_bars
from ..tuners.decay import decays
from .resumable import Resumable


class UnderRules(Resumable):
    """Any Trainer, with rules hanging on its optimizer and with its losses kept, none of which any step waits for.

    Attributes:
        rules: have begun their task; attached: once there is an optimizer.
        losses: of every batch; first_bad_step: the first whose loss was not finite, -1 while there is none.
    """

    rules: Sequence[Rule] = ()
    attached: Attached | None = None

    def __init__(self, *args: Any, rules: Sequence[Rule], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rules = rules
        self.losses: list[Tensor] = []
        self.first_bad_step = torch.tensor(-1)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if decays(name)]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        self.regroup(optimizer)
        scaler = getattr(self.accelerator, "scaler", None)
        self.attached = attach(self.model, optimizer, self.rules, begin=False, scaler=scaler)  # type: ignore[arg-type]
        return optimizer

    def regroup(self, optimizer: torch.optim.Optimizer) -> None:
        """Give some parameters settings of their own."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = self.loss_of(*args, **kwargs)
        detached = (loss[0] if isinstance(loss, tuple) else loss).detach()
        self.losses.append(detached)
        first = self.first_bad_step.to(detached.device, non_blocking=True)  # stays there: no step waits for it
        bad = (first < 0) & ~torch.isfinite(detached)
        self.first_bad_step = torch.where(bad, self.state.global_step, first)
        return loss

    def loss_of(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


@functools.cache
def ruled_sft_trainer() -> Any:
    """The class: `SFTTrainer` under rules. Importing TRL takes seconds."""
    from trl import SFTTrainer

    class RuledSFTTrainer(UnderRules, SFTTrainer):
        def _send_telemetry(self) -> None:
            """Nothing is reported of what is trained."""

    return RuledSFTTrainer


def sft_trainer(
    backbone: Backbone,
    examples: Examples,
    arguments: TrainingArguments,
    settings: dict[str, Any],
    rules: Sequence[Rule],
    callbacks: list[TrainerCallback],
) -> UnderRules:
    """An `SFTTrainer` that trains a language model on prepared examples.

    Args:
        arguments: an `SFTConfig`; settings: decide which tokens carry loss, see `token_rows`.
        rules: have begun their task.
    """
    kind = ruled_sft_trainer()
    tokenizer = getattr(backbone.processor, "tokenizer", backbone.processor)
    rows = token_rows(examples, settings)
    trained = [(p, p.data) for p in backbone.model.parameters() if p.requires_grad]
    with without_bars():
        trainer: UnderRules = kind(
            model=backbone.model,
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=callbacks,
            rules=rules,
        )
    for parameter, data in trained:  # on a quantised base, TRL rounds adapters to bf16
        parameter.data = data
    return trainer


def token_rows(examples: Examples, settings: dict[str, Any]) -> datasets.Dataset:
    """Each example as `input_ids`, its prompt and its answer, and `labels`, in which tokens without loss are -100.

    The loss is that of the response and its end. `assistant_only_loss` adds the assistant's earlier turns,
    `completion_only_loss=False` the whole prompt.
    """
    whole = settings.get("completion_only_loss") is False
    ids = [[*e["input_ids"], *e["answer"]] for e in examples]
    labels = []
    for e in examples:
        prompt = e["input_ids"]
        spoken = e.get("spoken") if settings.get("assistant_only_loss") else None
        before: list[int] = prompt if whole else [IGNORED] * len(prompt)
        if spoken and not whole:
            before = [token if own else IGNORED for token, own in zip(prompt, spoken, strict=True)]
        labels.append([*before, *(e["targets"] if "targets" in e else e["answer"])])
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


def longest_row(backbone: Backbone, examples: Examples) -> int:
    """Tokens of a packed row: the longest text of the run, or more where prompt and response are longer together, so
    that packing cuts nothing."""
    return max([backbone.max_length, *(len(e["input_ids"]) + len(e["answer"]) for e in examples)])


def packed_count(backbone: Backbone, examples: Examples, strategy: str) -> int:
    """How many rows packing makes of the examples: what an epoch is made of."""
    from trl import pack_dataset

    ids = [[*e["input_ids"], *e["answer"]] for e in examples]
    with without_bars():
        return len(
            pack_dataset(datasets.Dataset.from_dict({"input_ids": ids}), longest_row(backbone, examples), strategy)
        )


@contextlib.contextmanager
def scored_where_told(model: nn.Module) -> Iterator[None]:
    """On a CPU, TRL's fused head computes the logits of every position, so that a compiled graph need not be compiled
    anew for every batch, and on a GPU those of the tokens with loss alone. Nothing is compiled here: these are enough
    on a CPU, too, where the others took two fifths of a step."""
    from trl.trainer import utils

    theirs = getattr(utils, "_use_triton", None)
    if theirs is None or next(model.parameters()).device.type != "cpu":
        yield
        return
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = theirs


@contextlib.contextmanager
def lent(backbone: Backbone) -> Iterator[None]:
    """The model as `SFTTrainer` takes it, and afterwards as it was.

    The trainer gives it another `forward` (a fused head), hooks (offloading), and other special tokens, which stand in
    its settings, in those of generation and in the tokenizer's; what transformers says of that is not shown.
    """
    model = backbone.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokenizer = getattr(backbone.processor, "tokenizer", backbone.processor)
    settings = [base.config, base.config.get_text_config(), getattr(base, "generation_config", None)]
    kept = [(thing, dict(vars(thing))) for thing in settings if thing is not None]
    forwards = [(m, name, m.__dict__.get(name)) for m in (model, base) for name in ("forward", "_original_forward")]
    hooks = [(m, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in base.modules()]
    tags, pad = getattr(base, "model_tags", None), tokenizer.pad_token
    backbone.train()
    try:
        with quiet(), scored_where_told(model):
            yield
    finally:
        for module, name, before in forwards:
            module.__dict__.pop(name, None)
            if before is not None:
                module.__dict__[name] = before
        for thing, before in kept:
            vars(thing).clear()
            vars(thing).update(before)
        for module, after, ahead in hooks:
            for now, then in ((module._forward_hooks, after), (module._forward_pre_hooks, ahead)):
                for key in [key for key in now if key not in then]:
                    del now[key]
        base.model_tags, tokenizer.pad_token = tags, pad
