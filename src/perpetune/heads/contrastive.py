"""The contrastive head: an image belongs to the label text that a dual encoder places next to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import HeadError
from ..core.measurement import Measurement
from .label_text import checked_template
from .trained import TrainedHead


class ContrastiveHead(TrainedHead):
    """Scores s f . g_c: f the embedding of the image, g_c that of the text of label c, both of length 1 and under the
    model as it is now; s is the model's own logit scale.

    Trained with -log softmax_c(s f . g_c) of the example's own text, over the texts in question (see `DualBackbone`):
    CLIP's loss (Radford et al., 2103.00020) in one of its two directions, image to text. Its gradient reaches both
    towers. No parameters of its own; a class needs only its name, and may be a caption.

    Its features come from a `DualBackbone`. Nobody keeps the text embeddings: they are given anew with `embed` whenever
    the model has changed, and a class that was not given has no score.

    Args:
        template: how a label text becomes the text that is read, "{}" stands for it; "a photo of a {}." is CLIP's for
            names of classes.

    Raises:
        ConfigError: a template without one "{}".
    """

    name = "contrastive"
    follows_texts = True
    reads = "pairs"
    embeddings: Tensor  # s g, (C, D), NaN for texts that were not given

    def __init__(self, template: str = "{}") -> None:
        super().__init__("current")
        self.template = checked_template(self.name, template)

    def label_prompts(self, labels: Sequence[str]) -> list[str]:
        return [self.template.format(label) for label in labels]

    def open(self, width: int, labels: Sequence[str], *, seed: int, label_embeddings: Tensor | None = None) -> None:
        super().open(width, labels, seed=seed)
        self.register_buffer("embeddings", torch.full((len(labels), width), torch.nan))
        self._earlier = torch.zeros(len(labels), dtype=torch.bool)  # classes of the tasks before the current one
        self._moved: float | None = None

    def begin_task(self, classes: Sequence[int]) -> None:
        self._check_open()
        earlier = self.seen.clone()
        super().begin_task(classes)
        self._earlier, self._moved = earlier, None

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """See `Head.loss`; the last column of the features is log p(own text | image), see `DualBackbone.forward`."""
        self._check_begun()
        return -features[:, -1].mean()

    def embed(self, classes: Sequence[int], label_embeddings: Tensor) -> None:
        """See `Head.embed`."""
        chosen = self.checked_classes(classes)
        expected = (len(chosen), self.width)
        if tuple(label_embeddings.shape) != expected or not torch.isfinite(label_embeddings).all():
            raise HeadError(
                f"head `{self.name}`: expected finite label embeddings of shape {expected}, found "
                f"{tuple(label_embeddings.shape)}: give it a model with a text tower"
            )
        new = label_embeddings.to(self.embeddings)
        before = self.embeddings[chosen]
        known = self._earlier[chosen] & torch.isfinite(before[:, 0]).cpu()
        if known.any():
            moved = (new - before)[known].norm(dim=1) / before[known].norm(dim=1)
            self._moved = max(self._moved or 0.0, float(moved.max()))
        self.embeddings[chosen] = new

    @torch.no_grad()
    def scores(self, features: Tensor, task: int | None = None) -> Tensor:
        """See `Head.scores`; seen or not, a class whose text was given has a finite score."""
        self.check_features(features)
        embeddings = self.embeddings.to(features.device)
        return (features.float() @ embeddings.T).masked_fill(embeddings[:, 0].isnan(), -torch.inf)

    def knows(self, classes: Sequence[int]) -> bool:
        self.checked_classes(classes)
        return True

    def guarantee(self) -> list[Measurement]:
        """How far the label texts of earlier tasks have moved in the current one; no promise."""
        if self._moved is None:
            return []
        note = "the text that moved most; images are measured with the features"
        name = "change of the embeddings of earlier tasks' label texts"
        return [Measurement(name, self._moved, None, "relative", type(self).__name__, note)]
