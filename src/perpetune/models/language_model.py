"""A pre-trained language model seen as one thing: prompts in, and what it says of answers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.processes import dealt, parts
from ..core.tensors import relative_change
from ..metrics.text import normalised, rouge_l
from . import answer_scoring as scoring
from . import prompt_examples
from .answer_scoring import LONGEST, PromptsRead, Read, last_logits, log_p_of, positions
from .backbone import Backbone, Examples
from .fingerprint import fingerprint
from .prompt_tokens import Prompt, PromptTokenizer, pad_rows
from .tokenizer_check import check_ids, embedding_rows, longest_text

IGNORED = -100


class LanguageBackbone(Backbone):
    """A transformers language model (`model`), decoder or encoder and decoder, and its tokenizer.

    The outputs of an example are what the model predicts of answers, read by a `LanguageHead`:

    in training    `forward(**inputs)`: log p(response | prompt) and the number of its tokens, (N x 2);
    when asked     `outputs`: log p(answer | prompt) of every class, -inf where it was not asked for ("options");
                   ROUGE-L of the generated answer to the example's own, where that is measured; and the class that the
                   greedily generated answer names, -1 for none ("generate"): (N x width).

    The label texts of a stream are its answers. `open` says which they are, and how they are read.
    """

    offers = ("answers",)

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int, name: str, picture: int | None = None) -> None:
        """
        Args:
            max_length: longest prompt, in tokens.
            picture: see `PromptTokenizer`.

        Raises:
            ModelError: see `PromptTokenizer`; an encoder-decoder model that does not say how answers start.
        """
        nn.Module.__init__(self)
        self.model: Any = model
        self.processor, self.modality, self.name, self.max_length = tokenizer, "language", name, max_length
        self.pooling = None
        self.start = scoring.start_token(model.config, name)
        self.tokens = PromptTokenizer(tokenizer, decoder=self.start is None, picture=picture)
        self._embedded = embedding_rows(model)
        self.ends = scoring.stop_tokens(model, self.tokens.end, self.tokens.turn_end)
        self.fingerprint = fingerprint(model)
        self.version, self.width = 0, 0
        self.labels: tuple[str, ...] = ()
        self.reads: tuple[Read, ...] = ()
        self.rouge_l, self.longest = False, LONGEST
        self.limit: int | None = None  # of a prompt, in tokens

    def open_for(self, heads: Sequence[Any], labels: Sequence[str], trained: Any = None) -> None:
        readers = [head for head in heads if head.reads == "answers"]
        self.open(
            labels,
            [head.read for head in readers],
            rouge_l=any(head.rouge_l for head in readers),
            longest=max((head.longest for head in readers if head.read == "generate"), default=LONGEST),
        )

    def open(
        self, labels: Sequence[str], reads: Sequence[Read], *, rouge_l: bool = False, longest: int = LONGEST
    ) -> None:
        """Say which answers there are (C label texts), and how they will be read.

        Args:
            rouge_l: whether ROUGE-L of generated answers is measured.
            longest: how many tokens are generated at most.
        """
        self.labels, self.reads = tuple(labels), tuple(dict.fromkeys(sorted(reads, reverse=True)))
        self.rouge_l, self.longest = rouge_l, longest
        self.width = len(self.labels) * ("options" in self.reads) + ("generate" in self.reads) + rouge_l
        self._named = {normalised(text): c for c, text in reversed(list(enumerate(self.labels))) if normalised(text)}
        self.room, self.limit, limit = self.max_length, None, self.longest_sequence
        for text in self.labels:
            check_ids(self.tokens.tokenizer, list(self.tokens.answer(text)), self._embedded, self.name)
        if limit is not None:
            answer = max((len(self.tokens.answer(text)) for text in self.labels), default=0)
            self.limit = limit - max(answer, longest * ("generate" in self.reads))
            self.room = min(self.max_length, self.limit)
            if self.room < 1:
                raise ModelError(f"`{self.name}` reads {limit} tokens, and its answers take all of them")

    @property
    def longest_sequence(self) -> int | None:
        """How long a sequence of prompt and answer may be; None where they have a sequence each, or it may be any."""
        config = self.model.config.get_text_config(decoder=True)
        return longest_text(self.model, config) if self.start is None else None

    # ---- examples ----

    def prepare(self, rows: datasets.Dataset, *, all_turns: bool = False) -> Examples:
        """Rows with `prompt` or `messages` to tokens, see `prompt_examples`; the answer ends the sequence.

        Args:
            all_turns: find out which tokens of conversations are the assistant's.
        """
        column = next((c for c in ("prompt", "messages") if c in rows.column_names), None)
        if column is None:
            raise ModelError(
                f"`{self.name}` is a language model and reads prompts, but the task has the columns "
                f'{", ".join(rows.column_names)}: pose texts as instructions (pose="instruction")'
            )
        if "image" in rows.column_names:
            raise ModelError(f"`{self.name}` reads no images: use a model that does (LLaVA), or leave out the column")
        turn = column == "messages"
        read = partial(self.tokens.conversations, all_turns=all_turns) if turn else self.tokens.prompts
        return self._examples(read(rows[column][:], self.room), rows, turn)

    def _examples(self, prompts: Sequence[Prompt], rows: datasets.Dataset, turn: bool = False) -> Examples:
        made = prompt_examples.examples(self.tokens, prompts, rows, self.responses_of(rows), self.room, turn)
        return [{**e, "answer": self._fitted(e["answer"], e["input_ids"])} for e in made]

    def responses_of(self, rows: datasets.Dataset) -> list[str]:
        """The expected response of each row: its own text, or the label text of its class."""
        return rows["response"][:] if "response" in rows.column_names else [self.labels[y] for y in rows["label"][:]]

    def _fitted(self, answer: tuple[int, ...], prompt: list[int]) -> tuple[int, ...]:
        """
        Raises:
            ModelError: prompt and response are longer than the model reads, or hold a token that it does not know.
        """
        check_ids(self.tokens.tokenizer, [*prompt, *answer], self._embedded, self.name)
        limit = self.longest_sequence
        if limit is not None and len(prompt) + len(answer) > limit:
            raise ModelError(
                f"a response of {len(answer)} tokens behind a prompt of {len(prompt)} is longer than the {limit} that "
                f"`{self.name}` reads: set max_length to at most {max(1, limit - len(answer))}, or shorten the response"
            )
        return answer

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A training batch: model inputs, the tokens that carry loss as `answers` (N x A, others -100), and `labels`.

        A decoder reads prompt and answer in one sequence, padded on the left, so that `answers` are its last A tokens.
        The decoder of an encoder-decoder model reads the answer shifted by its start token, padded on the right.
        """
        answers = [list(e["answer"]) for e in examples]
        targets = [list(e.get("targets", e["answer"])) for e in examples]  # some tokens may carry no loss
        labels = torch.tensor([e["label"] for e in examples])
        if self.start is None:
            both = [[*e["input_ids"], *e["answer"]] for e in examples]
            known = {"answers": pad_rows(targets, IGNORED, left=True), "labels": labels}
            return {**self._padded(both), **self._pictures(examples), **known}
        shifted = [[self.start, *answer[:-1]] for answer in answers]
        return {
            **self._padded([e["input_ids"] for e in examples]),
            **{f"decoder_{k}": v for k, v in self._padded(shifted).items()},
            "answers": pad_rows(targets, IGNORED, left=False),
            "labels": labels,
        }

    def _padded(self, sequences: list[list[int]]) -> dict[str, Tensor]:
        left = self.start is None
        mask = pad_rows([[1] * len(s) for s in sequences], 0, left)
        return {"input_ids": pad_rows(sequences, self.tokens.pad, left), "attention_mask": mask}

    def _pictures(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """What a batch reads besides tokens: nothing."""
        return {}

    # ---- reading ----

    def forward(self, **inputs: Tensor) -> Tensor:
        """log p(answer | prompt) and the number of its tokens, the end-of-sequence token among them: (N x 2)."""
        known = inputs["answers"] != IGNORED
        log_p = self.token_log_p(**inputs)
        return torch.stack([log_p.sum(1), known.sum(1).to(log_p)], 1)

    def token_log_p(self, answers: Tensor, **inputs: Tensor) -> Tensor:
        """log p of each token of the answers (N x A), 0 where these are -100."""
        if self.start is None:
            keep = answers.shape[1] + 1
            extra = {**positions(self.model, inputs), **last_logits(self.model, keep)}
            logits = self.model(**inputs, **extra, use_cache=False).logits[:, -keep:-1]
        else:
            logits = self.model(**inputs, use_cache=False).logits
        return log_p_of(logits, answers.clamp(min=0)) * (answers != IGNORED)

    @torch.inference_mode()
    def outputs(
        self,
        examples: Examples,
        batch_size: int,
        advance: Callable[[int], None] = lambda n: None,
        classes: Sequence[int] | None = None,
    ) -> Tensor:
        """What the model says of the answers to each prompt (N x width, fp32, CPU), batched by length.

        Args:
            classes: the options whose likelihoods are asked for; None: those among the examples' own answers.
        """
        asked = sorted({e["label"] for e in examples} if classes is None else set(classes))
        return self._read_all(examples, batch_size, advance, partial(self.read, classes=asked))

    def read(self, examples: Examples, classes: Sequence[int] = ()) -> Tensor:
        """See `outputs`; of one batch, on the CPU."""
        out = torch.full((len(examples), self.width), -torch.inf)
        if "options" in self.reads:
            out[:, list(classes)] = self._likelihoods(examples, classes).float().cpu()
        if "generate" in self.reads:
            answers = self._answers(examples)
            if self.rouge_l:
                own = [self.labels[e["label"]] for e in examples]
                out[:, -2] = torch.tensor([rouge_l(a, b) for a, b in zip(answers, own, strict=True)])
            out[:, -1] = torch.tensor([self._named.get(normalised(text), -1) for text in answers])
        return out

    def _likelihoods(self, examples: Examples, classes: Sequence[int]) -> Tensor:
        """log p(answer | prompt), (N x len(classes)); each prompt is read once, where the model can go on from it."""
        read = PromptsRead(self.model, self.inputs(examples), self.start)
        if not read.continues:
            return torch.stack([self._alone(examples, c) for c in classes], 1)
        options = [[self.tokens.answer(self.labels[c], e["blank"], e["turn"]) for c in classes] for e in examples]
        longest = max(len(answer) for row in options for answer in row)
        padded = torch.tensor([[[*a, *[IGNORED] * (longest - len(a))] for a in row] for row in options])
        return read.log_likelihoods(padded.to(read.next.device), rows=2 * len(examples))

    def _alone(self, examples: Examples, c: int) -> Tensor:
        answers = [self.tokens.answer(self.labels[c], e["blank"], e["turn"]) for e in examples]
        return super().read([{**e, "answer": a} for e, a in zip(examples, answers, strict=True)])[:, 0]

    @torch.inference_mode()
    def answers(self, examples: Examples, batch_size: int, longest: int | None = None, **how: Any) -> list[str]:
        """Generated answers, of at most so many tokens; `how` as in `answer_scoring.generate`, by default greedily. An
        answer ends where `decided` of its example, if there is one, is true of its text so far."""
        mine = [(k, i) for k, i in enumerate(range(0, len(examples), batch_size)) if dealt(k)]
        with self.asked():
            found = {i: self._answers(examples[i : i + batch_size], longest, **how) for _, i in mine}
        every = {i: texts for part in parts(found) for i, texts in part.items()}
        return [text for i in sorted(every) for text in every[i]]

    def _answers(self, examples: Examples, longest: int | None = None, **how: Any) -> list[str]:
        ends = (self.start, self.ends, self.tokens.pad, longest or self.longest)
        if any("decided" in e for e in examples):
            text = partial(self.processor.decode, skip_special_tokens=True)
            how["decided"] = lambda row, tokens: examples[row]["decided"](text(tokens))
        tokens = scoring.generate(self.model, self.inputs(examples), *ends, **how)
        return self.processor.batch_decode(tokens, skip_special_tokens=True)

    def inputs(self, examples: Examples) -> dict[str, Tensor]:
        return self._here({**self._padded([e["input_ids"] for e in examples]), **self._pictures(examples)})

    @torch.inference_mode()
    def responses(self, examples: Examples, batch_size: int, advance: Callable[[int], None] = lambda n: None) -> Tensor:
        """log p(answer | prompt) of the examples' own answers and the numbers of their tokens, (N x 2, fp32, CPU)."""
        return self._read_all(examples, batch_size, advance, super().read, 2)

    @property
    def pooled_width(self) -> int:
        config = self.model.config
        return getattr(config, "encoder", config).get_text_config().hidden_size

    @torch.inference_mode()
    def pooled(self, examples: Examples, batch_size: int, advance: Callable[[int], None] = lambda n: None) -> Tensor:
        """Last hidden states of the prompts, of the encoder where there is one, averaged over their tokens."""
        return self._read_all(examples, batch_size, advance, self._mean_state, self.pooled_width)

    def _mean_state(self, examples: Examples) -> Tensor:
        return scoring.mean_state(self.model, self.inputs(examples), self.start)

    def halves(self, texts: Sequence[str]) -> Examples:
        """Texts as examples: the first half of the words is the prompt, and up to 50 tokens of the rest the answer,
        without an end. None at all where the model has no room for them."""
        limit = self.longest_sequence
        room = self.room if limit is None else min(self.room, limit - LONGEST)
        return self.tokens.halves(texts, room, LONGEST) if room >= 1 else []

    # ---- what others ask ----

    def label_embeddings(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """The number of tokens of each answer, (C x 1)."""
        return torch.tensor([[float(len(self.tokens.answer(text)))] for text in texts])

    def holds(self, features: Tensor, classes: Sequence[int]) -> bool:
        return "options" not in self.reads or bool((features[:1, list(classes)] > -torch.inf).all())

    def change(self, new: Tensor, old: Tensor) -> float:
        """Relative change of the log-likelihoods that were asked for both times; else the share of other answers."""
        if "options" not in self.reads:
            return float((new != old).any(1).double().mean())
        C = len(self.labels)
        both = (new[:1, :C] > -torch.inf) & (old[:1, :C] > -torch.inf)
        return relative_change(new[:, :C][:, both[0]], old[:, :C][:, both[0]])
