"""Self-distillation fine-tuning (SDFT, 2601.19897): the model learns from itself with the response before its eyes.

Of every prompt x the model draws an answer y of its own, y ~ p(. | x), and learns to say it as it would with the
response c of the row in its prompt: the loss compares p(y_t | x, y_<t) with p(y_t | x, c, y_<t) token by token, the
latter without gradient, by TRL's `SDFTTrainer` with its defaults. The one model is both: `teacher_model_kind` is live.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import datasets
from transformers import Trainer, TrainerCallback

from ..core.errors import ConfigError
from ..models.backbone import Examples
from ..models.language_model import LanguageBackbone
from ..rules import Rule
from ..streams.conversations import Conversation, text_of
from .checkpoints import saving
from .token_masking import STM
from .trainer_choice import HONOURED
from .trl_training import UnderRules

SDFT = "sdft"  # the training setting: tokens of an answer of the model's own, at most
SHOWN = "{prompt}\n\nThis is an example of a response:\n\n{response}\n\nNow answer with a response of your own."
ALONE = (*sorted(HONOURED), STM)  # settings that act on the tokens of responses


def check_sdft(settings: dict[str, Any], trainer: str | None) -> None:
    """
    Raises:
        ConfigError: another trainer, a setting that acts on the tokens of responses, of which none is learned here, or
            checkpoints inside a task, of which no test says that they go on to the same bits.
    """
    if settings.get(SDFT) is None:
        return
    if trainer != "trl":
        raise ConfigError("sdft is TRL's SDFTTrainer, and TRL does not train this run: leave it out")
    if other := [name for name in ALONE if settings.get(name) not in (None, False)]:
        raise ConfigError(f"`{other[0]}` has no effect beside sdft, which learns the model's own answers: leave it out")
    if saving(settings)["save_strategy"] != "no":
        raise ConfigError("sdft goes on after whole tasks alone: leave save_steps and save_strategy out")


def demonstrated(backbone: LanguageBackbone, rows: datasets.Dataset, longest: int) -> list[list[int]]:
    """The prompt of each row with its response as an example in the last turn, in tokens.

    Args:
        longest: tokens of an answer, for which there is room after it.
    """
    responses, limit = backbone.responses_of(rows), backbone.longest_sequence
    room = (limit or 2**31) - longest
    if "messages" in rows.column_names:
        talks = [_shown(Conversation.read(c), r) for c, r in zip(rows["messages"][:], responses, strict=True)]
        found = backbone.tokens.conversations([talk.written() for talk in talks], room)
    else:
        pairs = zip(rows["prompt"][:], responses, strict=True)
        found = backbone.tokens.prompts([SHOWN.format(prompt=p, response=r) for p, r in pairs], room)
    return [prompt.tokens for prompt in found]


def _shown(talk: Conversation, response: str) -> Conversation:
    *before, last = talk.messages
    text = SHOWN.format(prompt=text_of(last), response=text_of(talk.answer) if talk.answer else response)
    return replace(talk, messages=[*before, {**last, "content": text}])


def sdft_arguments(own: dict[str, Any], longest: int) -> dict[str, Any]:
    """What `SDFTConfig` is made with: one answer of each prompt, which is tokens already, in the order of the seed."""
    again = own.get("activation_checkpointing") or own.get("gradient_checkpointing") or False
    given = {k: v for k, v in own.items() if k not in ("activation_checkpointing", "gradient_checkpointing")}
    return {
        "bf16": False,
        **given,
        "gradient_checkpointing": again,
        "max_completion_length": longest,
        "max_prompt_length": None,
        "num_generations": 1,
        "teacher_model_kind": "live",
        "disable_dropout": False,
    }


def sdft_config() -> Any:
    """TRL's configuration; that it is an experimental one is no news."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.sdft import SDFTConfig
    return SDFTConfig


@functools.cache
def ruled_sdft_trainer() -> Any:
    """The class: `SDFTTrainer` under rules, on prompts that are tokens."""
    sdft_config()
    from trl.experimental.sdft import SDFTTrainer

    # it warns of adapters, which confuse another teacher than the live one
    logging.getLogger("trl.experimental.sdft").setLevel(logging.ERROR)

    class RuledSDFTTrainer(UnderRules, SDFTTrainer):
        def _send_telemetry(self) -> None:
            """Nothing is reported of what is trained."""

        def _tokenize_prompts(self, prompts: list[Any]) -> list[Any]:
            return prompts

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return Trainer._get_train_sampler(self, dataset)  # each row once an epoch, also those of a last small batch

    return RuledSDFTTrainer


def sdft_trainer(
    backbone: LanguageBackbone,
    examples: Examples,
    arguments: Any,
    rules: Sequence[Rule],
    callbacks: list[TrainerCallback],
) -> UnderRules:
    """An `SDFTTrainer` on prepared examples with `shown`, see `demonstrated`.

    Args:
        arguments: an `SDFTConfig`; rules: have begun their task.

    Raises:
        ConfigError: the model has no room for an answer.
    """
    rows = {"prompt": [e["input_ids"] for e in examples], "privileged_context": [e["shown"] for e in examples]}
    trained = [(p, p.data) for p in backbone.model.parameters() if p.requires_grad]
    longest, limit = max(map(len, rows["prompt"])) + arguments.max_completion_length, backbone.longest_sequence
    if limit is not None and longest > limit:
        raise ConfigError(
            f"sdft: prompt and answer may take {longest} tokens, and `{backbone.name}` reads {limit}: set sdft or "
            "max_length lower"
        )
    trainer: Any = ruled_sdft_trainer()(
        model=backbone.model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=getattr(backbone.processor, "tokenizer", backbone.processor),
        callbacks=callbacks,
        rules=rules,
    )
    trainer.teacher_context_builder._compose_teacher_prompt = lambda prompt, shown: shown
    for parameter, data in trained:  # on a quantised base, TRL rounds adapters to bf16
        parameter.data = data
    return trainer
