"""Features without a network, for controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from ..streams.pictures import eight_bits
from ..streams.task import Modality
from .backbone import Backbone, Examples


class FixedFeatures(Backbone):
    """Features without a network, for the controls `tfidf_ridge` and `pixels_ridge`.

    Hashed words: sublinear term counts in `width` buckets, length-normalised (scikit-learn's `HashingVectorizer`);
    inverse document frequencies come from the first task seen and stay fixed, so no later text is needed.
    Pixels: grey values of the picture resized to side x side.
    """

    network = False

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
        return [{"x": x, "label": y, "id": i} for x, y, i in zip(values, rows["label"][:], rows["id"][:], strict=True)]

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
        return [torch.from_numpy(np.asarray(eight_bits(i, "L").resize(size), "float32").ravel() / 255) for i in images]

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
