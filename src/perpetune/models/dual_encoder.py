"""A dual encoder seen as one thing: images and texts in, embeddings in one space out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import Backbone, Examples
from .fingerprint import fingerprint

FEW = 100  # classes whose texts are all read with every batch


def is_dual(model: Any) -> bool:
    """Whether a model is an image tower and a text tower that meet in one space: CLIP, SigLIP and the like."""
    return all(hasattr(model, name) for name in ("get_image_features", "get_text_features", "logit_scale"))


class DualBackbone(Backbone):
    """A transformers dual encoder (`model`), its image processor and its tokenizer.

    f and g are the embeddings of an image and of a text, of length 1; s is the model's own logit scale, so that s f . g
    is its logit. A class is its label text, a caption too.

    features            f of every example, (N x D): what heads read.
    label_embeddings    s g of label texts, (C x D).
    forward             of a training batch, both towers, so that rules see what the layers of both read, and what is
                        trained in both gets its gradient.

    The texts in question with a batch are those of all classes of the rows that were prepared with it, the task's own,
    where they are at most `FEW`; where they are more, captions for instance, those that the batch holds.
    """

    offers = ("features", "pairs")

    def __init__(self, model: Any, processor: Any, tokenizer: Any, *, max_length: int | None, name: str) -> None:
        """
        Args:
            max_length: longest text in tokens; None takes the model's own limit.
        """
        nn.Module.__init__(self)
        self.model: Any = model
        self.processor, self.tokenizer, self.name = processor, tokenizer, name
        self.modality, self.pooling = "image", None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        limits = [tokenizer.model_max_length, getattr(model.config.text_config, "max_position_embeddings", None)]
        self.max_length = min(limit for limit in (max_length, *limits) if limit)
        # SigLIP was trained on texts of one length, and reads their padding
        self.pads_all = "siglip" in model.config.model_type
        accepted = inspect.signature(model.get_text_features).parameters
        self._text_inputs = [name for name in accepted if not (self.pads_all and name == "attention_mask")]
        self.fingerprint = fingerprint(model)
        self.version = 0
        self.texts: tuple[str, ...] = ()
        self.paired = False
        self.width = self.label_embeddings(["a"]).shape[1]

    def open_for(self, heads: Sequence[Any], labels: Sequence[str], trained: Any = None) -> None:
        readers = [head for head in heads if head.reads == "pairs"] or list(heads)
        texts = readers[0].label_prompts(labels) if readers else labels
        self.open(texts, paired=trained is not None and trained.reads == "pairs")

    def open(self, texts: Sequence[str], *, paired: bool) -> None:
        """Say what the text of every class is (C), and whether a `ContrastiveHead` is trained."""
        self.texts, self.paired = tuple(texts), paired

    # ---- examples ----

    def prepare(self, rows: datasets.Dataset) -> Examples:
        """Rows to pixel values, with the classes among which they were drawn as `among`, where these are few."""
        classes = sorted(set(rows["label"][:]))
        among = tuple(classes) if len(classes) <= FEW else ()
        return [{**example, "among": among} for example in super().prepare(rows)]

    def contrasted(self, examples: Examples, classes: Sequence[int]) -> Examples:
        return [{**example, "among": tuple(classes[:FEW])} for example in examples]

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch: N images, T texts in question, the number of each image's own text as `own` (N,), and `labels`.

        The first n images have their texts among the first n, so that `first_examples` are a batch, too.
        """
        labels = [e["label"] for e in examples]
        asked = dict.fromkeys([*labels, *(c for e in examples for c in e["among"])])
        number = {c: i for i, c in enumerate(asked)}
        return {
            "pixel_values": torch.stack([e["pixel_values"] for e in examples]),
            **self._tokens([self.texts[c] for c in asked]),
            "own": torch.tensor([number[c] for c in labels]),
            "labels": torch.tensor(labels),
        }

    def first_examples(self, batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        """The first images of a batch, with the texts that they need, for whoever keeps some (see `Probes`)."""
        return {name: tensor[:number] for name, tensor in batch.items()}

    def _tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        padding = "max_length" if self.pads_all else True
        options = {"truncation": True, "max_length": self.max_length, "padding_side": "right", "return_tensors": "pt"}
        encoded = self.tokenizer(list(texts), padding=padding, **options)
        return {k: v for k, v in encoded.items() if k in self._text_inputs}

    # ---- reading ----

    def forward(self, **inputs: Tensor) -> Tensor:
        """Images of a batch under both towers: f (N x D); with `paired`, [s f, s g, log p] (N x (2 D + 1)), g the
        embedding of the example's own text and log p = log softmax_T(s f . g) of it, among the texts in question.

        s stands before both embeddings so that log p, which it multiplies, does not drown them where changes of all
        three are measured together.
        """
        own = inputs.pop("own")
        output = self.model(**inputs)
        f, g = (F.normalize(e.float(), dim=1) for e in (output.image_embeds, output.text_embeds))
        if not self.paired:
            return f
        s = self._scale()
        log_p = (s * f @ g.T).log_softmax(1).gather(1, own[:, None])  # N x T -> N x 1
        return torch.cat([s * f, s * g[own], log_p], 1)

    def read(self, examples: Examples) -> Tensor:
        pixels = self._here({"pixel_values": torch.stack([e["pixel_values"] for e in examples])})
        return F.normalize(_pooled(self.model.get_image_features(**pixels)), dim=1)

    @torch.inference_mode()
    def label_embeddings(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """s g of texts (C x D, fp32, CPU) under the model as it is now, in eval mode."""
        parts = []
        with self.asked():
            for start in range(0, len(texts), batch_size):
                tokens = self._here(self._tokens(texts[start : start + batch_size]))
                g = F.normalize(_pooled(self.model.get_text_features(**tokens)), dim=1)
                parts.append((self._scale() * g).float().cpu())
        return torch.cat(parts)

    def _scale(self) -> Tensor:
        return self.model.logit_scale.exp()

    def save_processors(self, folder: str) -> None:
        super().save_processors(folder)
        self.tokenizer.save_pretrained(folder)


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output
