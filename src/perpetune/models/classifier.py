"""The own head of a model that was fine-tuned as a classifier: named where it is left out, read where it is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError, first_line
from ..core.tensors import relative_change
from .tokenizer_check import ROUNDING

if TYPE_CHECKING:
    from .backbone import Backbone

KINDS = ("ForSequenceClassification", "ForImageClassification")


@dataclass(frozen=True)
class Classifier:
    """W (C x width), b (C,) and what the classes are called."""

    weight: Tensor
    bias: Tensor
    labels: tuple[str, ...]


def classifier_labels(config: Any) -> tuple[str, ...]:
    """What the classes of a model's own head are called; nothing where it has none."""
    if not any(name.endswith(KINDS) for name in getattr(config, "architectures", None) or ()):
        return ()
    return tuple(str(label) for _, label in sorted((config.id2label or {}).items()))


def load_classifier(backbone: Backbone, source: str, trust_remote_code: bool) -> Classifier:
    """The rows of a fine-tuned classifier, if they make its logits of the backbone's features: W f + b.

    Args:
        backbone: untouched.

    Raises:
        ModelError: the model is no classifier, or its head reads something else than these features.
    """
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    labels = classifier_labels(backbone.model.config)
    if not labels:
        raise ModelError(f"`{source}` is no fine-tuned classifier: use the head linear")
    auto: Any = AutoModelForSequenceClassification if backbone.modality == "text" else AutoModelForImageClassification
    try:
        whole = auto.from_pretrained(source, trust_remote_code=trust_remote_code, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"cannot load the head of `{source}` ({first_line(error)})") from error
    shape = (len(labels), backbone.width)
    last = [m for m in whole.modules() if isinstance(m, nn.Linear) and tuple(m.weight.shape) == shape]
    found = _rows(last[-1], labels) if last else None
    if found is None or not _explains(found, whole, backbone):
        raise ModelError(
            f"the head of `{source}` is not one linear layer on features pooled by `{backbone.pooling}`, so its rows "
            "cannot be taken over: try pooling pooler, cls or last, or use the head linear"
        )
    return found


def _rows(layer: nn.Linear, labels: tuple[str, ...]) -> Classifier:
    bias = torch.zeros(len(labels)) if layer.bias is None else layer.bias.detach().clone()
    return Classifier(layer.weight.detach().clone(), bias, labels)


@torch.inference_mode()
def _explains(found: Classifier, whole: Any, backbone: Backbone) -> bool:
    for example in backbone.samples():
        inputs = backbone.collate([example])
        inputs.pop("labels")
        logits = backbone.features([example], 1) @ found.weight.T + found.bias
        if relative_change(logits, whole(**inputs).logits) > ROUNDING:
            return False
    return True
