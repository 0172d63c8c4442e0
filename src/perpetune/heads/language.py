"""The language head: a language model's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from ..core.errors import ConfigError, HeadError, nearest
from ..metrics.text import normalised, scorer
from ..models.answer_scoring import LONGEST, Read
from .base import Head
from .trained import TrainedHead

MANY = 300  # options, each of which is read with every prompt


class LanguageHead(TrainedHead):
    """Reads a language model's own answers to its prompts. Where a stream has classes, a class is its label text.

    Tasks of free texts have no classes: their answers are generated, and scored by the metric that the task names.

    Trained with -sum log p(token) / number of tokens over the tokens of the batch's responses, the end-of-sequence
    token among them; the prompt carries no loss.

    read="options"   the score of a class is log p(label text | prompt), the sum over its tokens and the end of the
                     sequence. Every answer has the right form, and every class has a score.
    read="generate"  at most `longest` tokens, greedily; a class is predicted if the answer equals its label text in
                     lower case, without ASCII punctuation and with blanks squeezed, as the O-LoRA (2310.14152) and
                     N-LoRA (2410.10179) code compares them. An answer that names no class is never right.

    No parameters of its own, and every class is known from the start by its name. Its features come from a
    `LanguageBackbone`.

    Args:
        read: "options" or "generate".
        length_normalised: divide the log-likelihood of an option by its number of tokens.
        rouge_l: measure ROUGE-L of generated answers to the responses of each task as well; decides no prediction.
        longest: how many tokens are generated at most.

    Raises:
        ConfigError: an unknown reading; generated answers normalised by length; ROUGE-L of options, or without the
            package rouge-score; nothing to be generated.
    """

    name = "language"
    reads = "answers"
    needs_label_embeddings = True
    contrasts = False
    lengths: Tensor  # of the answers in tokens, (C,)
    same: Tensor  # the first class of the same normalised text, (C,)

    def __init__(
        self,
        read: Read = "options",
        length_normalised: bool = False,
        rouge_l: bool = False,
        longest: int = LONGEST,
    ) -> None:
        super().__init__("current")
        if read not in get_args(Read):
            raise ConfigError(f"LanguageHead: read={read!r}; {nearest(str(read), get_args(Read))}")
        if read == "generate" and length_normalised:
            raise ConfigError("LanguageHead: length_normalised is for options; generated answers have no likelihood")
        if rouge_l and read != "generate":
            raise ConfigError('LanguageHead: rouge_l compares generated answers: read="generate"')
        if rouge_l:
            scorer()
        self.read: Read = read
        if longest < 1:
            raise ConfigError(f"LanguageHead: longest={longest} tokens; an answer has at least one")
        self.rouge_l, self.longest = rouge_l, longest
        self.length_normalised = length_normalised
        if read == "generate":
            self.name = "language_generated"

    def open(self, width: int, labels: Sequence[str], *, seed: int, label_embeddings: Tensor | None = None) -> None:
        """See `Head.open`; `label_embeddings` are the numbers of tokens of the label texts, (C x 1).

        Raises:
            HeadError: they are missing.
            ConfigError: more options than can be read with every prompt.
        """
        self._begun = False
        if not labels:  # all tasks have free texts
            self.width, self.labels, self.seed, self.seen = width, (), seed, torch.zeros(0, dtype=torch.bool)
            self.in_loss, self.task_classes = [], []
            return
        super().open(width, labels, seed=seed)
        if self.read == "options" and len(labels) > MANY:
            raise ConfigError(
                f"this stream has {len(labels)} different answers, too many to read each with every prompt (at most "
                f"{MANY}): generate them, heads: [language_generated]"
            )
        if label_embeddings is None or label_embeddings.shape != (len(labels), 1):
            raise HeadError(f"head `{self.name}`: needs the lengths of the answers; give it a language model")
        self.register_buffer("lengths", label_embeddings[:, 0].float())
        first: dict[str, int] = {}
        same = [first.setdefault(normalised(label), c) for c, label in enumerate(labels)]
        self.register_buffer("same", torch.tensor(same))

    @property
    def kept_width(self) -> int:
        """Its features are the answers of the stream, which may grow."""
        return 1

    def trainer(self) -> Head:
        return self

    def begin_task(self, classes: Sequence[int]) -> None:
        """See `Head.begin_task`; a task of free texts has no classes."""
        if self._begun:
            raise HeadError(f"head `{self.name}`: a task has begun already; call `end_task` first")
        if classes:
            super().begin_task(classes)
        self._begun = True

    def end_task(self) -> None:
        self._check_begun()
        self.in_loss, self.in_training, self.task_classes, self._begun = [], [], [], False

    def _check_begun(self) -> None:
        if not self._begun:
            raise HeadError(f"head `{self.name}`: no task has begun; call `begin_task(classes)` first")

    def state(self) -> dict[str, Tensor]:
        return super().state() if self.labels else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state:
            super().load_state(state)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """See `Head.loss`; features are log p(response | prompt) and the number of tokens, (N x 2)."""
        self._check_begun()
        log_p, tokens = features.sum(0)
        return -log_p / tokens.clamp(min=1)  # no token of a batch may carry loss

    @torch.no_grad()
    def scores(self, features: Tensor, task: int | None = None) -> Tensor:
        """See `Head.scores`; -inf for options that were not asked for, and for what the generated answer does not
        name."""
        self.check_features(features)
        C = len(self.labels)
        if self.read == "generate":
            named = features[:, -1].long()
            hit = (self.same[None] == self.same[named.clamp(min=0)][:, None]) & (named >= 0)[:, None]
            return torch.zeros(len(features), C, device=features.device).masked_fill(~hit, -torch.inf)
        scores = features[:, :C]
        return scores / self.lengths.to(scores) if self.length_normalised else scores

    def knows(self, classes: Sequence[int]) -> bool:
        return True
