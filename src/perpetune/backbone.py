"""A pre-trained encoder seen as one thing: rows in, pooled features out."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch import Tensor, nn

from .errors import ModelError
from .streams.task import Modality
from .tuners.base import relative_change

Pooling = Literal["mean", "cls", "last", "pooler"]
Examples = list[dict[str, Any]]
Features = Callable[..., Tensor]  # see `Backbone.features`


class Backbone(nn.Module):
    """A transformers encoder (`model`), its tokenizer or image processor, and how its features are pooled.

    `forward(**inputs)` gives features f in R^{N x width}. Tuners replace or wrap `model` in place.
    """

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
        self, examples: Examples, batch_size: int, advance: Callable[[int], None], read: Callable[[Examples], Tensor]
    ) -> Tensor:
        """See `features`; `read` is what makes features (n x width) of a batch."""
        out = torch.empty(len(examples), self.width)
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i].get("input_ids", ())))
        with self._asked():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                out[chosen] = read([examples[i] for i in chosen]).float().cpu()
                advance(len(chosen))
        return out

    def read(self, examples: Examples) -> Tensor:
        """Features of one batch (N x width), where the model is, in the mode it is in."""
        batch = self.collate(examples)
        batch.pop("labels")
        return self(**self._here(batch))

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

    def about(self, classes: Sequence[int]) -> Features:
        """`features`, as far as a choice among these classes needs them: here always all."""
        return self.features

    def holds(self, features: Tensor, classes: Sequence[int]) -> bool:
        """Whether features say what a choice among these classes needs."""
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


def choose_pooling(source: str, model: nn.Module, modality: str) -> Pooling:
    """What the model was trained with, where it says so; else what its architecture suggests."""
    from transformers.utils import cached_file

    missing = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")
    }
    saved = cached_file(source, "config.json", subfolder="1_Pooling", **missing)  # as sentence-transformers writes it
    if saved is not None:
        modes = json.loads(Path(saved).read_text())
        chosen: dict[str, Pooling] = {"cls_token": "cls", "lasttoken": "last", "mean_tokens": "mean"}
        for mode, pooling in chosen.items():
            if modes.get(f"pooling_mode_{mode}"):
                return pooling
    if modality == "image":
        names = [name for name, _ in model.named_parameters()]
        return "cls" if any(n.endswith(("cls_token", "class_embedding")) for n in names) else "mean"
    config: Any = model.config
    causal = any("CausalLM" in a for a in getattr(config, "architectures", None) or [])
    return "last" if causal or getattr(config, "is_decoder", False) else "mean"


def load_backbone(
    name: str | Path,
    modality: Literal["text", "image"],
    *,
    pooling: Pooling | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> Backbone:
    """Load any transformers encoder by hub id or local folder; for images a dual encoder, too (see `DualBackbone`).

    Args:
        name: hub id or folder that `AutoModel` loads.
        modality: what the stream holds; decides between tokenizer and image processor.
        pooling: "mean" over tokens that are not padding, "cls", "last" or "pooler"; None chooses from the architecture.
        max_length: longest text in tokens; None takes the model's own limit, at most 256.

    Raises:
        ModelError: it cannot be loaded, or does not read this modality.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    source, trust = str(name), trust_remote_code
    auto = AutoTokenizer if modality == "text" else AutoImageProcessor
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
            model = _load_model(AutoModel, source, config, pooling, trust)
            processor = auto.from_pretrained(source, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = "tokenizer" if modality == "text" else "image processor"
        raise ModelError(
            f"cannot load `{name}` as a transformers model with a {kind} ({reason}): give a hub id or a folder with "
            "config.json, weights and the processor's files"
        ) from error
    from .dual import is_dual, load_dual

    if is_dual(model):
        if modality == "text":
            raise ModelError(
                f"`{name}` ({config.model_type}) reads images and texts into one space: give it a stream of images "
                "with labels or captions, and a text encoder for this one"
            )
        return load_dual(model, processor, source, max_length, pooling=pooling, trust_remote_code=trust)
    if not hasattr(config, "hidden_size"):
        raise ModelError(f"`{name}` ({config.model_type}) has no single hidden size: it is not a plain encoder")
    if modality == "text":
        limit = min(getattr(processor, "model_max_length", 256), getattr(config, "max_position_embeddings", 256))
        max_length = min(max_length or 256, limit)
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
    return Backbone(
        model,
        processor,
        modality=modality,
        pooling=pooling or choose_pooling(source, model, modality),
        max_length=max_length or 0,
        name=str(name),
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: perpetune has a display of its own."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _load_model(auto: Any, source: str, config: Any, pooling: Pooling | None, trust: bool) -> nn.Module:
    kwargs: dict[str, Any] = {"config": config, "trust_remote_code": trust, "dtype": torch.float32}
    if pooling != "pooler":
        # an unused pooler is often randomly initialised, gets no gradient, and is hit by `all-linear`
        try:
            return auto.from_pretrained(source, add_pooling_layer=False, **kwargs)
        except TypeError:
            pass  # this architecture has no such switch, so it is loaded as it is
    return auto.from_pretrained(source, **kwargs)


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


class FixedFeatures(Backbone):
    """Features without a network, for the controls `tfidf_ridge` and `pixels_ridge`.

    Hashed words: sublinear term counts in `width` buckets, length-normalised (scikit-learn's `HashingVectorizer`);
    inverse document frequencies come from the first task seen and stay fixed, so no later text is needed.
    Pixels: grey values of the picture resized to side x side.
    """

    def __init__(self, modality: Modality, *, words: int = 2048, side: int = 28) -> None:
        nn.Module.__init__(self)
        self.modality = modality
        self.name = "pixels" if modality == "image" else "tfidf"
        self.width = side * side if modality == "image" else words
        self.side = side
        self.model = nn.Module()
        self.idf: Tensor
        self.register_buffer("idf", torch.zeros(0))
        self.pooling, self.max_length, self.version, self.processor = "mean", 0, 0, None
        self.fingerprint = f"{self.name}-{self.width}"

    def weights_changed(self) -> bool:
        return False  # there are none

    def prepare(self, rows: datasets.Dataset) -> Examples:
        values = self._grey(rows["image"]) if self.modality == "image" else self._words(rows)
        return [{"x": x, "label": y, "id": i} for x, y, i in zip(values, rows["label"], rows["id"], strict=True)]

    def _words(self, rows: datasets.Dataset) -> list[Tensor]:
        from sklearn.feature_extraction.text import HashingVectorizer

        columns = [c for c in ("text", "text_pair", "prompt", "messages") if c in rows.column_names]
        texts = [" ".join(r) for r in zip(*(rows[c] for c in columns), strict=True)]
        counts = HashingVectorizer(n_features=self.width, alternate_sign=False, norm=None).transform(texts)
        counts.data = 1 + torch.from_numpy(counts.data).log().numpy()
        return [torch.from_numpy(row.toarray()[0]).float() for row in counts]

    def _grey(self, images: Sequence[Any]) -> list[Tensor]:
        import numpy as np

        size = (self.side, self.side)
        return [torch.from_numpy(np.asarray(i.convert("L").resize(size), "float32").ravel() / 255) for i in images]

    def features(self, examples: Examples, batch_size: int, advance: Callable[[int], None] = lambda n: None) -> Tensor:
        x = torch.stack([e["x"] for e in examples])
        if self.modality != "image":
            if not len(self.idf):
                seen = (x > 0).sum(0)
                self.idf = (1 + len(x)) / (1 + seen)
                self.idf = self.idf.log() + 1
            x = nn.functional.normalize(x * self.idf.to(x.device), dim=1)
        advance(len(examples))
        return x
