"""General ability of a language model, on prompts of no task: how far it has moved from the untouched model.

KL(p_0 || p_t) of next-token distributions, in nats, mean over positions of the prompts and of the untouched model's
greedy answers to them; and the share of prompts whose greedy answer is still the same, token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
import torch
from torch import Tensor

from ..consolidation.states import PerTaskStates, by_likeliest_state
from ..core.errors import ConfigError, StreamError
from ..core.measurement import Measurement
from ..models.answer_scoring import generate, last_logits, positions
from ..models.backbone import Examples
from ..models.language_model import LanguageBackbone
from ..streams.predict_files import asked, read_prompts
from .evaluator import read_by_state
from .harness import Harness
from .language_losses import SOURCE

if TYPE_CHECKING:
    from ..runs.commit import Commit
    from .state import LearnerState

POSITIONS = (
    512  # whose distributions are compared, evenly spread: each takes a number for every token of the vocabulary
)
LONGEST = 50  # tokens of a greedy answer at most
Routed = Callable[[Callable[[list[int]], list[Any]]], list[Any]]  # what is read of some examples, of all of them
KL, SAME = "KL from the untouched model on general prompts", "general prompts answered otherwise"


def read_general(given: str | Path | Sequence[Any] | None) -> tuple[Any, ...]:
    """Prompts as they are, or of a file, see `read_prompts`.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    if given is None:
        return ()
    if not isinstance(given, (str, Path)):
        return tuple(given)
    try:
        found = [asked(row) for row in read_prompts(Path(given))]
    except StreamError as error:
        raise ConfigError(f"general: {error}") from error
    if len({isinstance(each, str) for each in found}) > 1:
        raise ConfigError(f"general: {given} mixes prompts and messages: give one kind")
    return tuple(found)


@dataclass
class General:
    """What the untouched model says of general prompts.

    Attributes:
        examples: the prompts as tokens, each with the untouched model's greedy answer as `answer`.
        chosen: (example, position) pairs, P.
        log_p: log p_0 of the next token there, (P x V, fp32, CPU).
        total: how many positions there are in all.
    """

    examples: Examples
    chosen: list[tuple[int, int]]
    log_p: Tensor
    total: int

    @classmethod
    @torch.inference_mode()
    def of(cls, backbone: LanguageBackbone, prompts: Sequence[Any], batch_size: int) -> General:
        """Read by a model that is not trained yet."""
        column = "prompt" if isinstance(prompts[0], str) else "messages"
        given = {column: list(prompts), "response": [""] * len(prompts)}
        rows = {**given, "label": [-1] * len(prompts), "id": [""] * len(prompts)}
        examples = backbone.prepare(datasets.Dataset.from_dict(rows))
        limit = backbone.longest_sequence
        if limit is not None:
            examples = [e for e in examples if len(e["input_ids"]) + LONGEST <= limit]
        answers = _greedy(backbone, examples, batch_size)
        examples = [{**e, "answer": tuple(a)} for e, a in zip(examples, answers, strict=True)]
        every = [(i, t) for i, e in enumerate(examples) for t in range(_length(backbone, e))]
        count = min(POSITIONS, len(every))
        chosen = [every[k * len(every) // count] for k in range(count)]
        return cls(examples, chosen, _log_p(backbone, examples, chosen, batch_size), len(every))

    @torch.inference_mode()
    def kl(self, backbone: LanguageBackbone, batch_size: int, routed: Routed | None = None) -> float:
        """KL(p_0 || p_t) of the model as it is now, nats, mean over the chosen positions."""

        def read(rows: list[int]) -> list[Tensor]:
            of = {i: [n for n, (j, _) in enumerate(self.chosen) if j == i] for i in rows}
            chosen = [(k, self.chosen[n][1]) for k, i in enumerate(rows) for n in of[i]]
            if not chosen:
                return [self.log_p[:0, 0]] * len(rows)
            then = self.log_p[[n for i in rows for n in of[i]]]
            now = _log_p(backbone, [self.examples[i] for i in rows], chosen, batch_size)
            return list((then.exp() * (then - now)).sum(1).split([len(of[i]) for i in rows]))

        return max(0.0, float(torch.cat(self._each(read, routed)).double().mean()))

    @torch.inference_mode()
    def answers(
        self, backbone: LanguageBackbone, batch_size: int, routed: Routed | None = None
    ) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """For every prompt the greedy answers of the untouched model and of this one, in tokens."""

        def read(rows: list[int]) -> list[list[int]]:
            return _greedy(backbone, [self.examples[i] for i in rows], batch_size)

        answers = self._each(read, routed)
        return [(e["answer"], tuple(a)) for e, a in zip(self.examples, answers, strict=True)]

    @torch.inference_mode()
    def routed(self, backbone: LanguageBackbone, batch_size: int, states: PerTaskStates | None) -> Routed | None:
        """Reads every prompt under its likeliest state, where every task has one; None where the model is one."""
        if states is None:
            return None
        weights = states.weights(read_by_state(backbone, states, self.examples, batch_size))
        return partial(by_likeliest_state, states, weights)

    def _each(self, read: Callable[[list[int]], list[Any]], routed: Routed | None) -> list[Any]:
        return routed(read) if routed is not None else read(list(range(len(self.examples))))

    def measure(
        self, backbone: LanguageBackbone, batch_size: int, states: PerTaskStates | None = None
    ) -> list[Measurement]:
        """The model as it is now against the untouched one.

        Args:
            states: of a model that has one for every task, among which each prompt is routed.
        """
        routed = self.routed(backbone, batch_size, states)
        other = sum(old != new for old, new in self.answers(backbone, batch_size, routed))
        of = f"{len(self.examples)} prompts" + (", each under the state that it is routed to" if routed else "")
        where = f"mean over {len(self.chosen)} of {self.total} positions of {of} and of the greedy answers to them"
        same = f"greedy answers to {of}, of up to {LONGEST} tokens, that are not those of the untouched model"
        return [
            Measurement(KL, self.kl(backbone, batch_size, routed), None, "nats", SOURCE, where),
            Measurement(SAME, other / len(self.examples), None, "share", SOURCE, same),
        ]


def _length(backbone: LanguageBackbone, example: dict[str, Any]) -> int:
    """Positions of an example at which a next token is predicted: of prompt and answer, or of the decoder alone."""
    return len(example["answer"]) + (len(example["input_ids"]) if backbone.start is None else 1)


def _greedy(backbone: LanguageBackbone, examples: Examples, batch_size: int) -> list[list[int]]:
    found: list[list[int]] = []
    with backbone.asked():
        for start in range(0, len(examples), batch_size):
            inputs = backbone.inputs(examples[start : start + batch_size])
            found += generate(backbone.model, inputs, backbone.start, backbone.ends, backbone.tokens.pad, LONGEST)
    return found


def _log_p(
    backbone: LanguageBackbone, examples: Examples, chosen: Sequence[tuple[int, int]], batch_size: int
) -> Tensor:
    """log p of the next token at (example, position) pairs, (P x V, fp32, CPU); pairs of an example stand together."""
    parts: list[Tensor] = []
    with backbone.asked():
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            wanted = [(i - start, t) for i, t in chosen if start <= i < start + len(batch)]
            if wanted:
                logits = _logits(backbone, batch)
                first = [logits.shape[1] - _length(backbone, e) if backbone.start is None else 0 for e in batch]
                rows = torch.stack([logits[i, first[i] + t] for i, t in wanted])
                parts.append(rows.float().log_softmax(-1).cpu())
    return torch.cat(parts)


def _logits(backbone: LanguageBackbone, batch: Examples) -> Tensor:
    """(N x T x V): a decoder reads prompt and answer in one sequence, padded on the left."""
    if backbone.start is None:
        inputs = backbone.inputs([{**e, "input_ids": [*e["input_ids"], *e["answer"]]} for e in batch])
        longest = max(_length(backbone, e) for e in batch)
        extra = {**positions(backbone.model, inputs), **last_logits(backbone.model, longest)}
        return backbone.model(**inputs, **extra, use_cache=False).logits
    answers = [[backbone.start, *e["answer"]] for e in batch]
    longest = max(map(len, answers))
    fed = torch.tensor([[*a, *[backbone.tokens.pad] * (longest - len(a))] for a in answers])
    inputs = backbone.inputs(batch)
    return backbone.model(**inputs, decoder_input_ids=fed.to(inputs["input_ids"].device), use_cache=False).logits


def general_of(state: LearnerState, begun: Sequence[Commit] = ()) -> tuple[General | Harness, ...]:
    """What a model will be compared with, read while it is untouched: prompts and tasks of the harness, as far as the
    setup has some (`Learner(general=, lm_eval=)`). Where every task has a state of its own, prompts are routed, and
    nothing is measured that cannot be.

    Args:
        begun: the commits of the run.

    Raises:
        ConfigError: no language model, or one that has no room for an answer; see `Harness.of`.
    """
    setup, backbone = state.setup, state.backbone
    given = [name for name, there in (("general", setup.general), ("lm_eval", setup.lm_eval)) if there]
    if not given:
        return ()
    said = " and ".join(given)
    if "answers" not in backbone.offers:
        raise ConfigError(f"{said}: `{backbone.name}` is no language model, and answers no prompts: leave it out")
    language, found, states = cast(LanguageBackbone, backbone), list[General | Harness](), state.consolidation.states
    if setup.general and states is not None and states.needs_task:
        setup.progress.say(
            "general: this recipe must be told the task of an input, and prompts have none: not measured"
        )
    elif setup.general:
        if language.longest_sequence is not None and language.longest_sequence <= LONGEST:
            raise ConfigError(
                f"general: `{backbone.name}` reads {language.longest_sequence} tokens, no room for an answer"
            )
        found.append(General.of(language, setup.general, setup.batch_size))
    if setup.lm_eval and states is not None:
        setup.progress.say(
            "lm_eval: every task has a state of its own, and no model is one for all prompts: not measured"
        )
    elif setup.lm_eval:
        setup.progress.say(f"lm_eval: {', '.join(setup.lm_eval)}, before the first task and after each that is due")
        found.append(Harness.of(setup.lm_eval, language, setup.batch_size, begun))
    return tuple(found)
