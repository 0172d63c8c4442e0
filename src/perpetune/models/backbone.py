"""A pre-trained encoder seen as one thing: rows in, pooled features out."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import datasets
import torch
from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.tensors import relative_change
from ..streams.task import Modality

Pooling = Literal["mean", "cls", "last", "pooler"]
Reads = Literal["features", "answers", "pairs"]
Examples = list[dict[str, Any]]


class Backbone(nn.Module):
    """A transformers encoder (`model`), its tokenizer or image processor, and how its features are pooled.

    `forward(**inputs)` gives features f in R^{N x width}. Tuners replace or wrap `model` in place.

    Attributes:
        offers: what heads can read of it, see `Head.reads`.
        network: whether there are weights that could be tuned and exported.
    """

    offers: tuple[Reads, ...] = ("features",)
    network: bool = True

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
        self.processor = processor
        self.modality: Modality = modality
        self.pooling: Pooling | None = pooling
        self.max_length = max_length
        self.name = name
        self.width: int = model.config.hidden_size
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
            encoded = self.processor(*(list(rows[c]) for c in columns), truncation=True, max_length=self.max_length)
            inputs = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        else:
            if "image" not in rows.column_names:
                raise ModelError(
                    f"`{self.name}` reads images, but the task has the columns {', '.join(rows.column_names)}"
                )
            inputs = [{"pixel_values": pixels} for pixels in self._pixels(rows["image"])]
        return [{**x, "label": y, "id": i} for x, y, i in zip(inputs, rows["label"], rows["id"], strict=True)]

    def _pixels(self, images: Sequence[Any]) -> Tensor:
        channels = getattr(self.model.config, "num_channels", 3)
        mode = {1: "L", 3: "RGB"}[channels]
        pictures = [image.convert(mode) for image in images]
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
            return {**self.processor.pad(inputs, return_tensors="pt"), "labels": labels}
        return {"pixel_values": torch.stack([e["pixel_values"] for e in inputs]), "labels": labels}

    def forward(self, **inputs: Tensor) -> Tensor:
        assert self.pooling is not None
        return pool(self.model(**inputs), inputs.get("attention_mask"), self.pooling)

    @torch.inference_mode()
    def features(self, examples: Examples, batch_size: int, advance: Callable[[int], None] = lambda n: None) -> Tensor:
        """Features of all examples in their order (N x width, fp32, CPU), in eval mode, batched by length."""
        return self._read_all(examples, batch_size, advance, self.read)

    def _read_all(
        self,
        examples: Examples,
        batch_size: int,
        advance: Callable[[int], None],
        read: Callable[[Examples], Tensor],
        width: int | None = None,
    ) -> Tensor:
        """See `features`; `read` makes features (n x width) of a batch. width: None for that of the backbone."""
        out = torch.empty(len(examples), self.width if width is None else width)
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i].get("input_ids", ())))
        with self._asked():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                out[chosen] = read([examples[i] for i in chosen]).float().cpu()
                advance(len(chosen))
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
    def _asked(self) -> Iterator[None]:
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
        return self.width

    def pooled(self, examples: Examples, batch_size: int, advance: Callable[[int], None] = lambda n: None) -> Tensor:
        """What routes and boundaries are found by: one vector for each input (N x pooled_width); here its features."""
        return self.features(examples, batch_size, advance)

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

    def save_processors(self, folder: str) -> None:
        """Write the tokenizer or image processor beside an exported model."""
        self.processor.save_pretrained(folder)


def pool(output: Any, attention_mask: Tensor | None, pooling: Pooling) -> Tensor:
    """(N x tokens x width) to (N x width)."""
    if pooling == "pooler":
        if getattr(output, "pooler_output", None) is None:
            raise ModelError("this model has no pooler: choose pooling mean, cls or last")
        return output.pooler_output
    hidden = output.last_hidden_state
    if pooling == "cls":
        return hidden[:, 0]
    if attention_mask is None:
        return hidden.mean(1) if pooling == "mean" else hidden[:, -1]
    if pooling == "mean":
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    last = (attention_mask * positions).argmax(1)  # right with padding on either side
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def fingerprint(model: nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            if tensor.numel()
            else b""
        )
    return digest.hexdigest()
