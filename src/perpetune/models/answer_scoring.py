"""What a language model that has read a batch of prompts says of answers, the prompts read once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutput

from ..core.errors import ModelError
from .pooling import pool
from .tokenizer_check import first_position

Read = Literal["options", "generate"]  # how answers are read: scored, or generated
LONGEST = 50  # tokens that are generated at most, as in the O-LoRA and N-LoRA code


class PromptsRead:
    """A language model, and its state after N prompts.

    Args:
        model: a transformers language model, or a peft model around it.
        inputs: `input_ids` and `attention_mask` (N x P) of the prompts; for a decoder padded on the left. What else the
            model reads with them, images for instance, is read this once.
        start: the token with which the answers of an encoder-decoder model start; None for a decoder.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], start: int | None) -> None:
        self.model, self.start = model, start
        self.mask = inputs["attention_mask"]
        self.following: Tensor | None = None  # the position of an answer's first token: N, or 3 x N
        if start is None:
            place = positions(model, inputs)
            if place:
                last = place["position_ids"].amax(-1)
                self.following = (last if last.ndim == 1 else last.amax(0).expand_as(last)) + 1
            output = model(**inputs, **place, **last_logits(model, 1), use_cache=True)
            self.encoded = None
        else:
            first = torch.full((len(self.mask), 1), start, device=self.mask.device)
            output = model(**inputs, decoder_input_ids=first, use_cache=True)
            self.encoded = output.encoder_last_hidden_state
        self.next = output.logits[:, -1].float().log_softmax(-1)  # log p of the first token of an answer, N x V
        self.cache: Any = getattr(output, "past_key_values", None)

    @property
    def continues(self) -> bool:
        """Whether the model's state can be continued in several ways."""
        return isinstance(self.cache, Cache)

    def log_likelihoods(self, options: Tensor, rows: int) -> Tensor:
        """log p(option | prompt), (N x C); may be asked once.

        Args:
            options: tokens of the options, N x C x K, padded on the right with negative numbers.
            rows: about how many sequences are read at a time.
        """
        known, tokens = options >= 0, options.clamp(min=0)
        total = self.next.gather(1, tokens[:, :, 0])  # N x C
        C, some = options.shape[1], max(1, rows // len(options))
        for first in range(0, C if options.shape[2] > 1 else 0, some):
            part = slice(first, first + some)
            total[:, part] += self._rest(tokens[:, part], known[:, part], last=first + some >= C)
        return total

    def _rest(self, tokens: Tensor, known: Tensor, last: bool) -> Tensor:
        """log p of all tokens but the first, (N x g)."""
        longest = int(known.sum(2).max())
        N, g, _ = tokens.shape
        tokens, known = tokens[..., :longest].flatten(0, 1), known[..., :longest].flatten(0, 1)  # N g x K
        cache = self.cache if last else copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(g)
        mask, fed = self.mask.repeat_interleave(g, 0), tokens[:, :-1]
        if self.encoded is not None:
            encoded = BaseModelOutput(last_hidden_state=self.encoded.repeat_interleave(g, 0))
            inputs = {"attention_mask": mask, "encoder_outputs": encoded, "decoder_input_ids": fed}
        else:
            inputs = {"attention_mask": torch.cat([mask, torch.ones_like(fed)], 1), "input_ids": fed}
            if self.following is not None:
                steps = torch.arange(fed.shape[1], device=fed.device)
                inputs["position_ids"] = self.following.repeat_interleave(g, -1)[..., None] + steps
        logits = self.model(**inputs, past_key_values=cache, use_cache=True).logits  # N g x (K - 1) x V
        return (log_p_of(logits, tokens[:, 1:]) * known[:, 1:]).sum(1).unflatten(0, (N, g))


def mean_state(model: Any, inputs: dict[str, Tensor], start: int | None) -> Tensor:
    """Last hidden states of prompts, of the encoder where there is one, averaged over their tokens (N x width)."""
    mask = inputs["attention_mask"]
    if start is None:
        extra = {**positions(model, inputs), **last_logits(model, 1)}
        hidden = model(**inputs, **extra, use_cache=False, output_hidden_states=True).hidden_states[-1]
    else:
        first = torch.full((len(mask), 1), start, device=mask.device)
        hidden = model(**inputs, decoder_input_ids=first, use_cache=False).encoder_last_hidden_state
    hidden = hidden[:, -mask.shape[1] :]  # without virtual tokens in front
    return pool(BaseModelOutput(last_hidden_state=hidden), mask, "mean")


def log_p_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token], in fp32 at least: (... x T x V), (... x T) -> (... x T)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def positions(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Positions that do not count padding on the left, for models that are told them: N x T, or 3 x N x T where the
    model gives the tokens of an image a place in time, height and width (Qwen2-VL, 2409.12191)."""
    if not _takes(model, "position_ids"):
        return {}
    mask = inputs["attention_mask"]
    if "image_grid_thw" in inputs:
        told = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        reader = next((m for m in model.modules() if hasattr(m, "get_rope_index")), None)
        if reader is not None:
            return {"position_ids": reader.get_rope_index(**{k: inputs[k] for k in told if k in inputs})[0]}
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0) + first_position(model)}


def last_logits(model: Any, count: int) -> dict[str, int]:
    """Asks for the logits of the last `count` tokens alone, where a model can leave out the others."""
    return {"logits_to_keep": count} if _takes(model, "logits_to_keep") else {}


def _takes(model: Any, name: str) -> bool:
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(plain.forward).parameters


def start_token(config: Any, name: str) -> int | None:
    """The token with which the answers of an encoder-decoder model start; None for a decoder.

    Raises:
        ModelError: its configuration does not say.
    """
    if not config.is_encoder_decoder:
        return None
    start = getattr(config, "decoder_start_token_id", None)
    start = config.get_text_config(decoder=True).bos_token_id if start is None else start
    if start is None:
        raise ModelError(f"`{name}` does not say how its answers start: set decoder_start_token_id")
    return start


def stop_tokens(model: Any, *own: int) -> tuple[int, ...]:
    """Tokens with which a generated answer may end: these, and those that the model's generation settings name."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return tuple(dict.fromkeys([*own, *([named] if isinstance(named, int) else named or [])]))


def generate(
    model: Any,
    inputs: dict[str, Tensor],
    start: int | None,
    ends: Sequence[int],
    pad: int,
    longest: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    streamer: Any = None,
    decided: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Answers (N, of at most `longest` tokens each, without their end), with nothing of the model's own generation
    settings.

    Args:
        ends: tokens with which an answer may end.
        temperature: 0 takes the likeliest token; above it tokens are drawn, with top_p as in nucleus sampling.
        streamer: of transformers, shown the tokens of one prompt as they come.
        decided: of which answer (its row) nothing is to be learned any more, by the tokens that it has: it ends there.
    """
    own = {"bos_token_id": None, "decoder_start_token_id": start, "eos_token_id": list(ends), "pad_token_id": pad}
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    how = drawn if temperature else {"do_sample": False}
    plain = GenerationConfig(max_new_tokens=longest, num_beams=1, **how, **own)
    holder = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept, holder.generation_config = holder.generation_config, plain  # what is not set is taken from there
    first = 1 if start is not None else inputs["input_ids"].shape[1]
    stops = StoppingCriteriaList([_Decided(first, decided)] if decided is not None else [])
    try:
        tokens = model.generate(**inputs, generation_config=plain, streamer=streamer, stopping_criteria=stops)
    finally:
        holder.generation_config = kept
    answers = tokens[:, first:].tolist()
    return [list(takewhile(lambda token: token not in ends, answer)) for answer in answers]


class _Decided(StoppingCriteria):
    """Ends answers, which begin at token `first`, one by one."""

    def __init__(self, first: int, decided: Callable[[int, list[int]], bool]) -> None:
        self.first, self.decided = first, decided

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        found = [self.decided(row, answer) for row, answer in enumerate(input_ids[:, self.first :].tolist())]
        return input_ids.new_tensor(found, dtype=torch.bool)
