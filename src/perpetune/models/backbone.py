"""A pre-trained encoder seen as one thing: rows in, pooled features out."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import datasets
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..core.errors import ModelError
from ..core.processes import dealt, joined
from ..core.tensors import relative_change
from ..streams.pictures import eight_bits
from ..streams.task import Modality
from .classifier import Classifier
from .fingerprint import fingerprint
from .pooling import Pooling, in_full, pool
from .tokenizer_check import check_ids, embedding_rows, spare_token
from .views import mean_of_views

Reads = Literal["features", "answers", "pairs"]
Examples = list[dict[str, Any]]


class Backbone(nn.Module):
    """A transformers encoder (`model`), its tokenizer or image processor, and how its features are pooled.

    `forward(**inputs)` gives features f in R^{N x width}. Tuners replace or wrap `model` in place. Texts are padded on
    the right, whatever the tokenizer says: positions that are counted from the left must not count padding.

    Attributes:
        offers: what heads can read of it, see `Head.reads`.
        network: whether there are weights that could be tuned and exported.
        pads_all: texts are all padded to `max_length`, for models that read their padding (see `settle_padding`).
        left_out: what the classes of the model's own head are called, which is not read; nothing where it has none.
        classifier: reads that head, see `load_classifier`.
        layers: how many of its last layers `pooled` reads side by side, see `read_layers`.
        views, all_views: of every picture, beside the picture itself, see `read_views`.
    """

    offers: tuple[Reads, ...] = ("features",)
    network: bool = True
    pads_all: bool = False
    left_out: tuple[str, ...] = ()
    classifier: Callable[[], Classifier] | None = None
    layers: int = 1
    views: int = 0
    all_views: bool = False

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        modality: Literal["text", "image"],
        pooling: Pooling,
        max_length: int,
        name: str,
    ) -> None:
        super().__init__()
        self.model: Any = model  # a transformers model, or a peft model around it
        self.processor, self.name, self.max_length = processor, name, max_length
        self.modality: Modality = modality
        self.pooling: Pooling | None = pooling
        self.width: int = model.config.hidden_size
        self._embedded = embedding_rows(model)
        self._reads = inspect.signature(model.forward).parameters
        self.fingerprint = fingerprint(model)
        self.version = 0  # counted up by whoever changes weights, so that features can be cached

    def open_for(self, heads: Sequence[Any], labels: Sequence[str], trained: Any = None) -> None:
        """Prepare what heads read of it.

        Args:
            heads: `Head`s; labels: the label texts of all classes (C); trained: the head whose loss is trained with.
        """

    def weights_changed(self) -> bool:
        """Whether any weight or buffer differs from what was loaded."""
        return fingerprint(self.model) != self.fingerprint

    def prepare(self, rows: datasets.Dataset) -> Examples:
        """Rows of a task (see `Task`) to model inputs, once: tokenised text without padding, or pixel values."""
        if self.modality == "text":
            columns = [c for c in ("text", "text_pair") if c in rows.column_names]
            if not columns:
                raise ModelError(
                    f"`{self.name}` reads text, but the task has the columns {', '.join(rows.column_names)}"
                )
            inputs = self._tokenised(*(rows[c][:] for c in columns))
        else:
            if "image" not in rows.column_names:
                raise ModelError(
                    f"`{self.name}` reads images, but the task has the columns {', '.join(rows.column_names)}"
                )
            inputs = [{"pixel_values": pixels} for pixels in self._pixels(rows["image"])]
        return [{**x, "label": y, "id": i} for x, y, i in zip(inputs, rows["label"][:], rows["id"][:], strict=True)]

    def _tokenised(self, *texts: list[str]) -> Examples:
        """Texts, or pairs of texts, as token ids with what else the model reads of them.

        Raises:
            ModelError: a token that the model has no embedding for.
        """
        encoded = self.processor(*texts, truncation=True, max_length=self.max_length)
        unread = set() if self._takes("token_type_ids") else {"token_type_ids"}
        columns = {name: values for name, values in encoded.items() if name not in unread}
        found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for example in found:
            if not example["input_ids"]:  # an empty text, and a tokenizer that adds nothing
                nothing = {"input_ids": spare_token(self.processor, self._embedded), "attention_mask": 1}
                example.update({name: [nothing.get(name, 0)] for name in example})
            check_ids(self.processor, example["input_ids"], self._embedded, self.name)
        return found

    def samples(self) -> Examples:
        """Two inputs of no task, a short one and a longer one, for checks."""
        if self.modality == "image":
            from PIL import Image

            pictures = [Image.radial_gradient("L"), Image.linear_gradient("L")]
            return [{"pixel_values": pixels, "label": 0, "id": ""} for pixels in self._pixels(pictures)]
        texts = ["the", "the parcel came late and so they asked for a refund"]
        return [{**x, "label": 0, "id": ""} for x in self._tokenised(texts)]

    def _takes(self, name: str) -> bool:
        """Whether the model reads an input of this name; token types only where it has more than one of them."""
        if name == "token_type_ids" and (getattr(self.model.config, "type_vocab_size", None) or 2) < 2:
            return False
        return name in self._reads or any(p.kind is p.VAR_KEYWORD for p in self._reads.values())

    def _pixels(self, images: Sequence[Any]) -> Tensor:
        channels = getattr(self.model.config, "num_channels", 3)
        mode: Literal["L", "RGB"] = "L" if channels == 1 else "RGB"
        pictures: list[Any] = [eight_bits(image, mode) for image in images]
        if channels == 1:  # processors expect a channel axis that PIL's mode L does not have
            import numpy as np

            pictures = [np.asarray(p)[None] for p in pictures]
            return self.processor(images=pictures, input_data_format="channels_first", return_tensors="pt").pixel_values
        return self.processor(images=pictures, return_tensors="pt").pixel_values

    def contrasted(self, examples: Examples, classes: Sequence[int]) -> Examples:
        """Prepared rows of one class, to be told from these classes, where the loss reads the texts of others."""
        return examples

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch: model inputs, padded to the longest, and `labels` (N,)."""
        labels = torch.tensor([e["label"] for e in examples])
        inputs = [{k: v for k, v in e.items() if k not in ("label", "id")} for e in examples]
        if self.modality == "text":
            to: dict[str, Any] = {"padding": "max_length", "max_length": self.max_length} if self.pads_all else {}
            return {**self.processor.pad(inputs, padding_side="right", return_tensors="pt", **to), "labels": labels}
        return {"pixel_values": torch.stack([e["pixel_values"] for e in inputs]), "labels": labels}

    def forward(self, **inputs: Tensor) -> Tensor:
        assert self.pooling is not None
        mask = inputs.get("attention_mask")
        return in_full(pool(self.model(**self.taken(inputs)), mask, self.pooling), self.model)

    def taken(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a batch, what the model itself reads: a mask may be for pooling alone."""
        return {k: v for k, v in inputs.items() if k != "attention_mask" or self._takes(k)}

    def train(self, mode: bool = True) -> Backbone:
        """As any module, but running statistics (BatchNorm) stay what pre-training made them: no rule sees them move,
        and no adapter could be taken out of them again."""
        super().train(mode)
        for module in self.model.modules() if mode else ():
            if isinstance(module, _NormBase) and module.track_running_stats:
                module.eval()
        return self

    @torch.inference_mode()
    def features(self, examples: Examples, batch_size: int, advance: Callable[[int], None] = lambda n: None) -> Tensor:
        """Features of all examples in their order (N x width, fp32, CPU), in eval mode, batched by length."""
        read = partial(mean_of_views, self) if self.all_views else self.read
        return self._read_all(examples, batch_size, advance, read)

    def _read_all(
        self,
        examples: Examples,
        batch_size: int,
        advance: Callable[[int], None],
        read: Callable[[Examples], Tensor],
        width: int | None = None,
    ) -> Tensor:
        """See `features`; `read` makes those of a batch (n x width, by default that of the backbone). Batches are those
        of one process, however many share them (`divided`)."""
        out = torch.zeros(len(examples), self.width if width is None else width)
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i].get("input_ids", ())))
        with self.asked():
            for number, start in enumerate(range(0, len(order), batch_size)):
                chosen = order[start : start + batch_size]
                if dealt(number):
                    out[chosen] = read([examples[i] for i in chosen]).float().cpu()
                advance(len(chosen))
        joined(out)
        return out

    def read(self, examples: Examples) -> Tensor:
        """Features of one batch (N x width), where the model is, in the mode it is in."""
        return self(**self.batch(examples))

    def batch(self, examples: Examples) -> dict[str, Tensor]:
        """What `forward` takes of some examples, where the model is."""
        batch = self.collate(examples)
        batch.pop("labels")
        return self._here(batch)

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """In eval mode, and afterwards in the mode it had."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def _here(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Where the model is."""
        device = next(self.model.parameters()).device
        return {k: v.to(device) for k, v in batch.items()}

    @property
    def pooled_width(self) -> int:
        return self.layers * self.width

    @torch.inference_mode()
    def pooled(self, examples: Examples, batch_size: int, advance: Callable[[int], None] = lambda n: None) -> Tensor:
        """What routes and boundaries are found by: one vector for each input (N x pooled_width); here its features, or
        those of several layers (`layered`), of pictures the mean over several views (`mean_of_views`)."""
        if self.layers == 1 and not self.views:
            return self.features(examples, batch_size, advance)
        return self._read_all(examples, batch_size, advance, partial(mean_of_views, self), self.pooled_width)

    def outputs(
        self,
        examples: Examples,
        batch_size: int,
        advance: Callable[[int], None] = lambda n: None,
        classes: Sequence[int] | None = None,
    ) -> Tensor:
        """What heads read of all examples in their order (N x width, fp32, CPU): here their features.

        Args:
            classes: among which a choice is to be made, where it depends on them.
        """
        return self.features(examples, batch_size, advance)

    def responses(self, examples: Examples, batch_size: int, advance: Callable[[int], None] = lambda n: None) -> Tensor:
        """Of a language model: log p(response | prompt) of the examples' own responses and the numbers of their tokens
        (N x 2, fp32, CPU)."""
        raise ModelError(f"`{self.name}` answers no prompts")

    def answers(self, examples: Examples, batch_size: int) -> list[str]:
        """Of a language model: greedily generated answers."""
        raise ModelError(f"`{self.name}` answers no prompts")

    def holds(self, features: Tensor, classes: Sequence[int]) -> bool:
        """Whether outputs tell what a choice among these classes needs."""
        return True

    def change(self, new: Tensor, old: Tensor) -> float:
        """How far features have moved, relative."""
        return relative_change(new, old)

    def label_embeddings(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Features of label texts (C x width) under the model as it is now.

        Raises:
            ModelError: the model reads no text.
        """
        if self.modality != "text":
            raise ModelError(
                f"label texts need a text encoder, `{self.name}` reads images: use another head (linear, ncm, ridge)"
            )
        rows = datasets.Dataset.from_dict({"text": list(texts), "label": [0] * len(texts), "id": [""] * len(texts)})
        return self.features(self.prepare(rows), batch_size)

    def own_head(self) -> Classifier:
        """The head of a model that was fine-tuned as a classifier. The model must be untouched.

        Raises:
            ModelError: see `load_classifier`.
        """
        if self.classifier is None:
            raise ModelError(f"`{self.name}` has no classifier's head of its own: use the head linear")
        return self.classifier()

    def save_processors(self, folder: str) -> None:
        """Write the tokenizer or image processor beside an exported model."""
        self.processor.save_pretrained(folder)
