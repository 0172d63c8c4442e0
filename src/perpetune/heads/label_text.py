"""The label-text head: the class scores are similarities to fixed embeddings of the label texts."""

from __future__ import annotations

import string
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import ConfigError, HeadError
from .readout import Readout
from .trained import Classes, TrainedHead

SAME = 0.99  # cosine: label embeddings of one model differ by rounding alone


class LabelTextHead(TrainedHead):
    """Scores cos(f, e_c) / temperature, e_c the fixed embedding of the text of label c under the untouched model.

    No parameters: the loss shapes the features alone, a new class needs only its name, and every class is known from
    the start (scores are finite for all of them; the caller restricts the columns).

    Args:
        temperature: divides the cosine; 0.05 spreads scores over +-20.
        loss: cross entropy over "current" (the task's classes) or "seen" (all classes so far).
        template: how a label text becomes the text that is embedded, "{}" stands for it; see `label_prompts`.

    Raises:
        ConfigError: a temperature that is not positive, an unknown loss, a template without one "{}".
    """

    name = "label_text"
    weighs = True
    embeddings: Tensor  # e, (C, L), rows of length 1
    needs_label_embeddings = True

    def __init__(self, temperature: float = 0.05, loss: Classes = "current", template: str = "{}") -> None:
        super().__init__(loss)
        if not temperature > 0:
            raise ConfigError(f"label_text head: temperature={temperature}; give a positive number")
        self.temperature, self.template = temperature, checked_template(self.name, template)

    def label_prompts(self, labels: Sequence[str]) -> list[str]:
        """The texts to embed for these labels."""
        return [self.template.format(label) for label in labels]

    def open(self, width: int, labels: Sequence[str], *, seed: int, label_embeddings: Tensor | None = None) -> None:
        """See `Head.open`; `label_embeddings` (C x width) of `label_prompts(labels)` are required.

        Raises:
            HeadError: they are missing, of another shape, or not finite.
        """
        super().open(width, labels, seed=seed)
        expected = (len(labels), width)
        if label_embeddings is None or tuple(label_embeddings.shape) != expected:
            found = "none" if label_embeddings is None else tuple(label_embeddings.shape)
            raise HeadError(
                f"head `{self.name}`: expected label embeddings of shape {expected}, found {found}; "
                "this head needs a model that can embed the label texts"
            )
        if not torch.isfinite(label_embeddings).all():
            raise HeadError(f"head `{self.name}`: label embeddings are not finite; the model gives NaN or infinity")
        self.register_buffer("embeddings", F.normalize(label_embeddings.detach().float(), dim=1))

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        self.check_features(features)
        self._check_begun()
        return self.cross_entropy(self.similarities(features, self.embeddings[self.in_loss]), labels)

    @torch.no_grad()
    def scores(self, features: Tensor, task: int | None = None) -> Tensor:
        """See `Head.scores`; every class has a finite score, seen or not."""
        self.check_features(features)
        return self.similarities(features, self.embeddings)

    def similarities(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """cos(f, e) / temperature: (N x L), (k x L) -> (N x k)."""
        return F.normalize(features.float(), dim=1) @ embeddings.to(features.device).T / self.temperature

    def readout(self, classes: Sequence[int], task: int | None = None) -> Readout | None:
        weight = self.embeddings[self.checked_classes(classes)] / self.temperature
        return Readout(weight, weight.new_zeros(len(weight)), normalised=True)

    def knows(self, classes: Sequence[int]) -> bool:
        self.checked_classes(classes)
        return True

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "embeddings": self.embeddings.cpu()[self.seen]}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See `Head.load_state`; saved embeddings replace ours, to the bit.

        Raises:
            HeadError: also where saved embeddings are those of another model or template.
        """
        columns = self.columns(state)
        saved = self.take(state, "embeddings", (len(columns), self.width)).to(self.embeddings)
        columns = columns.to(self.embeddings.device)
        cosine = F.cosine_similarity(saved, self.embeddings[columns], dim=1)
        if (cosine < SAME).any():
            c = int(columns[cosine.argmin()])
            raise HeadError(
                f"head `{self.name}` no longer fits its checkpoint: the embedding of `{self.labels[c]}` has cosine "
                f"{float(cosine.min()):.3f} to the saved one; use the model and template it was made with"
            )
        super().load_state(state)
        self.embeddings[columns] = saved


def checked_template(head: str, template: str) -> str:
    """The template as it is.

    Raises:
        ConfigError: there is not exactly one "{}" in it.
    """
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError:  # an unbalanced brace
        fields = []
    if fields != [""]:
        raise ConfigError(f'{head} head: template={template!r}; give a text with one "{{}}" for the label')
    return template
