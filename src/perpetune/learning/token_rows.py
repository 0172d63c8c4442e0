"""What a trainer of transformers trains on, as rows of tokens: the same for rules, routers and losses as a stream's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from ..core.errors import StreamError
from ..models.backbone import Examples
from ..models.language_model import IGNORED, LanguageBackbone
from ..models.prompt_tokens import pad_rows
from ..streams.tokens import as_rows


class TokenBackbone(LanguageBackbone):
    """A language model that also takes rows of tokens: `input_ids`, and `targets`, which are -100 where there is no
    loss. Of a decoder both have one length; of an encoder and a decoder, `targets` are the answer."""

    def prepare(self, rows: datasets.Dataset, *, all_turns: bool = False) -> Examples:
        if "targets" not in rows.column_names:
            return super().prepare(rows, all_turns=all_turns)
        columns = (rows[name][:] for name in ("input_ids", "targets", "id"))
        return [self._example(*row) for row in zip(*columns, strict=True)]

    def _example(self, ids: list[int], targets: list[int], name: str) -> dict[str, Any]:
        if self.start is None:  # nothing is before the first token, so that nothing predicts it
            first = next((i for i, t in enumerate(targets) if i and t != IGNORED), len(ids))
            prompt, answer, kept = ids[:first], ids[first:], targets[first:]
        else:
            prompt = ids
            answer = kept = [t for t in targets if t != IGNORED]
        row = {"input_ids": prompt, "answer": tuple(answer), "targets": tuple(kept)}
        return {**row, "blank": False, "turn": False, "label": -1, "id": name}

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().collate(examples)
        if self.start is None and examples and "targets" in examples[0]:  # a user's turn amid the answer has no loss
            batch["answers"] = pad_rows([list(e["targets"]) for e in examples], IGNORED, left=True)
        return batch


def token_rows(trainer: Any, data: Any) -> datasets.Dataset:
    """A data set of a trainer, as its collator makes batches of it.

    Args:
        trainer: a `transformers.Trainer`; data: one of its data sets, or the name of one.

    Raises:
        StreamError: a data set without a length, or rows without tokens or labels.
    """
    loader = trainer.get_eval_dataloader(data)
    if not hasattr(loader.dataset, "__len__"):
        raise StreamError(
            "Keep reads the training data once more, and this data set has no length: give the trainer one that has"
        )
    rows = (loader.dataset[i] for i in range(len(loader.dataset)))
    return as_rows(text for row in rows for text in _documents(loader.collate_fn([row])))


def _documents(batch: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """The texts of a batch of one row, which may be several packed into it: (input_ids, targets) without padding."""
    if batch.get("labels") is None or batch.get("input_ids") is None:
        lacks = "labels" if batch.get("labels") is None else "input_ids"
        raise StreamError(
            f"the trainer's batches have no `{lacks}` ({', '.join(batch)}): give rows or a data_collator that make them"
        )
    ids, targets = batch["input_ids"][0], batch["labels"][0]
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        kept = mask[0].bool()
        yield ids[kept].tolist(), (targets[kept] if len(targets) == len(ids) else targets).tolist()
        return
    positions = batch.get("position_ids")
    starts = [0] if positions is None else torch.nonzero(positions[0] == 0).flatten().tolist() or [0]
    for first, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        yield ids[first:end].tolist(), targets[first:end].tolist()
