"""What a language model answers to prompts, each under the state of its task where every task has one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import datasets
import torch

from ..core.errors import ConfigError, ModelError, nearest
from ..models.backbone import Examples
from ..streams.predict_inputs import table
from .prediction import answers
from .state import LearnerState

if TYPE_CHECKING:
    from ..models.language_model import LanguageBackbone

USUAL = 256  # tokens of an answer at most, where nothing else is said


@dataclass(frozen=True)
class Generation:
    """How answers are generated.

    Attributes:
        max_new_tokens: of an answer at most; it ends before where the model says so. None: `USUAL`, or half of what a
            small model reads.
        temperature: 0 takes the likeliest token (greedy); above it tokens are drawn.
        top_p: draw from the likeliest tokens that have this share of the probability together (1904.09751).
        seed: of the draws of one call.
        batch_size: prompts at a time; None: as in evaluation.

    Raises:
        ConfigError: out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: an answer has at least one token")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} is 0, the likeliest tokens, or above")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is a share above 0 and up to 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}: at least one prompt at a time")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Generation:
        """
        Raises:
            ConfigError: an unknown setting.
        """
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"generate has no setting `{name}`: {nearest(name, known)}")
        return cls(**settings)

    def longest(self, limit: int | None) -> int:
        """Tokens of an answer at most, of a model that reads so many."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return USUAL if limit is None else min(USUAL, max(1, limit // 2))

    def options(self) -> dict[str, Any]:
        """Of `LanguageBackbone.answers`."""
        return {"temperature": self.temperature, "top_p": self.top_p} if self.temperature else {}


def generate(
    state: LearnerState, inputs: Sequence[Any], how: Generation, task: str | None = None, streamer: Any = None
) -> list[str]:
    """See `Learner.generate`.

    Args:
        streamer: of transformers, shown the tokens of one prompt as they come.
    """
    if "answers" not in state.backbone.offers:
        raise ConfigError(f"`{state.backbone.name}` is no language model and generates nothing: use predict")
    if not state.known.tasks:
        raise ConfigError("no task is learned yet: call learn(stream) first")
    if streamer is not None and len(inputs) != 1:
        raise ConfigError(f"one prompt alone can be shown as it is generated, not {len(inputs)}")
    backbone, given = cast("LanguageBackbone", state.backbone), questions(inputs, state.known.inputs)
    if not len(inputs):
        return []
    blank = {"response": [""] * len(inputs), "label": [-1] * len(inputs), "id": [""] * len(inputs)}
    longest = how.longest(backbone.longest_sequence)
    with _room(backbone, longest):
        examples: Examples = backbone.prepare(datasets.Dataset.from_dict({**given, **blank}))
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))  # little padding
    device = next(backbone.model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    drawn = torch.random.fork_rng(devices) if how.temperature else nullcontext()
    with drawn:
        if how.temperature:
            torch.manual_seed(how.seed)
        size = how.batch_size or state.setup.batch_size
        sorted_ = [examples[i] for i in order]
        texts = answers(state, sorted_, task, size, longest=longest, streamer=streamer, **how.options())
    return [text for _, text in sorted(zip(order, texts, strict=True))]


def questions(inputs: Sequence[Any], columns: Sequence[str]) -> dict[str, list[Any]]:
    """Prompts, or lists of messages, by column. Where the run learned conversations, a text is a user's turn; what the
    assistant says last is what is asked for, and left out.

    Args:
        columns: the input columns of the stream that was learned.

    Raises:
        ConfigError: something else, or conversations and prompts in one list.
    """
    if isinstance(inputs, (str, bytes, Mapping)):
        raise ConfigError(
            'generate takes a list of prompts, and one alone is a list of one, as in generate(["a prompt"])'
        )
    if "image" in columns:
        return table(inputs, tuple(columns))
    talks = [isinstance(x, list) for x in inputs]
    if any(talks) and not all(talks):
        raise ConfigError("some inputs are lists of messages and some are prompts: call generate once for each kind")
    if not any(talks) and "messages" not in columns:
        return table(inputs, ("prompt",))
    given = [list(x) if t else [{"role": "user", "content": x}] for x, t in zip(inputs, talks, strict=True)]
    return table([_asked(messages) for messages in given], ("messages",))


def _asked(messages: list[Any]) -> list[Any]:
    last = messages[-1] if messages else None
    answered = isinstance(last, Mapping) and last.get("role") == "assistant" and len(messages) > 1
    return messages[:-1] if answered else messages


@contextmanager
def _room(backbone: LanguageBackbone, longest: int) -> Iterator[None]:
    """Prompts are cut so that an answer of this length fits behind them."""
    limit, before = backbone.longest_sequence, backbone.room
    if limit is not None:
        backbone.room = min(before, limit - longest)
        if backbone.room < 1:
            backbone.room = before
            raise ModelError(f"`{backbone.name}` reads {limit} tokens: set max_new_tokens below that, not {longest}")
    try:
        yield
    finally:
        backbone.room = before
