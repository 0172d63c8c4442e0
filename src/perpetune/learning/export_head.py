"""The head of an exported model: as a classifier of plain transformers where its class pools as the run did, else as
files beside the model."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.errors import ConfigError, first_line, nearest
from ..core.files import write_text
from ..core.tensors import relative_change
from ..heads import Head
from ..heads.readout import Readout
from ..models.backbone import Backbone
from .state import LearnerState

CLOSE = 1e-4  # relative: far above rounding in fp32, far below what another pooling changes
GRID = 1e-2  # relative: heads of exact sums read features on a grid
LINEAR_PART = 2.0**-16  # tanh(x) is x to 3e-8 where |x| is at most 3e-4
FILES = ("classifier.safetensors", "classifier.json")


class ExportedHead(NamedTuple):
    """What became of the head.

    Attributes:
        model: what to write: the classifier, or the model as it was.
        beside: whether the head is written into files of its own.
        told: all that in words.
        readout, labels: the head, where it is linear.
    """

    model: nn.Module
    beside: bool
    told: str
    readout: Readout | None = None
    labels: tuple[str, ...] = ()


def chosen_head(state: LearnerState, name: str | bool) -> Head:
    """The head of this name; the first, where none is named.

    Raises:
        ConfigError: the run reads no such head.
    """
    by_name = {head.name: head for head in state.heads}
    if not isinstance(name, str):
        return state.heads[0]
    if name not in by_name:
        raise ConfigError(f"this run reads no head `{name}`: {nearest(name, by_name)}")
    return by_name[name]


def linear_head(state: LearnerState, head: Head, classes: list[int], task: int | None = None) -> Readout | None:
    """The head as one linear map of the features, fp32 on the CPU; None where its scores are not that.

    Args:
        task: whose own rows, where a head keeps some for every task.
    """
    readout = head.readout(classes, task) if classes and head.reads == "features" else None
    if readout is None:
        return None
    readout = Readout(readout.weight.cpu().float(), readout.bias.cpu().float(), readout.normalised)
    return readout if _is_linear(state.backbone, head, classes, readout, task) else None


def with_head(state: LearnerState, model: nn.Module, name: str | bool = True) -> ExportedHead:
    """
    Args:
        state: that of the run, whose features and scores are the truth.
        model: its transformers model, adapters merged.
        name: of the head; True for the first.
    """
    head, classes = chosen_head(state, name), sorted(state.known.classes)
    if state.backbone.all_views:
        why = "reads several views of a picture, which no other library does, and stays in the run"
        return ExportedHead(model, False, f"its head `{head.name}` {why}")
    if head.reads != "features":
        return ExportedHead(model, False, f"its head `{head.name}` needs nothing but the model")
    if not classes or head.readout(classes) is None:
        why = "is no linear map of its features"
        return ExportedHead(model, False, f"its head `{head.name}` {why}, and stays in the run")
    labels = tuple(state.known.labels[c] for c in classes)
    readout = linear_head(state, head, classes)
    if readout is None:
        why = "reads features on a grid whose steps its weights magnify, and is not linear to a hundredth"
        return ExportedHead(model, False, f"its head `{head.name}` {why}: it stays in the run")
    whole, why = as_classifier(state.backbone, readout, labels, model)
    if whole is None:
        told = f"its head `{head.name}` lies beside it in {FILES[0]}, and README.md shows how to use it: {why}"
        return ExportedHead(model, True, told, readout, labels)
    scale = ", times the length of the features (their order is the same)" if readout.normalised else ""
    named = ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
    told = f"{type(whole).__name__} for {named}; its logits are the scores of head `{head.name}`{scale}"
    return ExportedHead(whole, False, told, readout, labels)


def as_classifier(backbone: Backbone, readout: Readout, labels: tuple[str, ...], model: nn.Module) -> tuple[Any, str]:
    """(The model as its architecture's own class for classification, ""), or (None, why there is none).

    Every way of putting the head into such a class is tried, and taken if its logits on inputs are the scores.
    """
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    auto: Any = AutoModelForSequenceClassification if backbone.modality == "text" else AutoModelForImageClassification
    config: Any = copy.deepcopy(model.config)
    kind = auto._model_mapping.get(type(config), None)
    kind = kind[0] if isinstance(kind, (tuple, list)) else kind
    if kind is None or backbone.pooling is None:
        return None, f"transformers has no {auto.__name__.removeprefix('AutoModel')} of {type(model).__name__}"
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    other = f"{kind.__name__} does not pool as the run did ({backbone.pooling})"
    try:
        with torch.random.fork_rng(devices=[]):
            whole = kind(config).eval()
        base = getattr(whole, whole.base_model_prefix)
        state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        missing, unexpected = base.load_state_dict(state, strict=False)
        if unexpected or any("pooler" not in name for name in missing):
            return None, other
        for put in _ways(whole, base, readout, backbone.pooling):
            put()
            if _agrees(whole, backbone, readout):
                return whole, ""
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return None, f"{kind.__name__} cannot be made of it ({first_line(error)})"
    return None, other


def _ways(whole: Any, base: Any, readout: Readout, pooling: str) -> Iterator[Callable[[], None]]:
    """How a head W f + b may fit into a class for classification."""
    width = readout.weight.shape[1]
    last: Any = getattr(whole, "classifier", None) or getattr(whole, "score", None)
    dense = getattr(last, "dense", None)  # RoBERTa's and its like: W tanh(dense f)
    if isinstance(getattr(last, "out_proj", None), nn.Linear):
        if isinstance(dense, nn.Linear) and pooling == "cls":
            yield lambda: _through_tanh(dense, last.out_proj, readout)
        return
    if not isinstance(last, nn.Linear) or (last.bias is None and bool(readout.bias.any())):
        return
    if last.in_features == 2 * width:  # DINOv2's: the class token and the mean of the others
        yield lambda: _set(last, torch.cat([readout.weight, torch.zeros_like(readout.weight)], 1), readout.bias)
    if last.in_features == width:
        yield lambda: _set(last, readout.weight, readout.bias)
        pooler = getattr(base, "pooler", None)  # BERT's and its like: W tanh(pooler f), and the run had no pooler
        pooler = getattr(pooler, "dense", pooler)
        if isinstance(pooler, nn.Linear) and pooling == "cls":
            yield lambda: _through_tanh(pooler, last, readout)


@torch.no_grad()
def _set(layer: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)


def _through_tanh(dense: nn.Linear, last: nn.Linear, readout: Readout) -> None:
    """W f as (W / e) tanh(e f) with e so small that tanh is the identity to rounding; e is a power of two, so that
    nothing is rounded by it."""
    _set(dense, LINEAR_PART * torch.eye(dense.in_features))
    _set(last, readout.weight / LINEAR_PART, readout.bias)


@torch.inference_mode()
def _is_linear(backbone: Backbone, head: Head, classes: list[int], readout: Readout, task: int | None) -> bool:
    """Whether the scores are what the readout makes of the features."""
    device = next((t.device for t in (*head.parameters(), *head.buffers())), torch.device("cpu"))
    features = backbone.features(backbone.samples(), 2)
    scores = head.scores(features.to(device), task)[:, classes].cpu()
    given = nn.functional.normalize(features, dim=1) if readout.normalised else features
    return relative_change(given @ readout.weight.T + readout.bias, scores) < GRID


@torch.inference_mode()
def _agrees(whole: Any, backbone: Backbone, readout: Readout) -> bool:
    """Whether the logits are W f + b."""
    for example in backbone.samples():
        inputs = backbone.collate([example])
        inputs.pop("labels")
        linear = backbone.features([example], 1) @ readout.weight.T + readout.bias
        if not relative_change(whole(**inputs).logits, linear) < CLOSE:
            return False
    return True


def write_beside(folder: Path, readout: Readout, labels: Sequence[str], backbone: Backbone) -> None:
    """Into the folder of a model or of an adapter: W and b, and what they are."""
    save_file({"weight": readout.weight.contiguous(), "bias": readout.bias.contiguous()}, folder / FILES[0])
    about = {"labels": list(labels), "pooling": backbone.pooling, "normalised": readout.normalised}
    write_text(folder / FILES[1], json.dumps(about, indent=1, ensure_ascii=False))


POOLED = {
    "mean": "(hidden * mask).sum(1) / mask.sum(1)",
    "cls": "hidden[:, 0]",
    "last": "hidden[torch.arange(len(hidden)), (mask[..., 0] * torch.arange(hidden.shape[1])).argmax(1)]",
    "pooler": "output.pooler_output",
    None: "torch.nn.functional.normalize(model.get_image_features(**inputs).pooler_output, dim=1)",
}


def base_of(backbone: Backbone) -> Any:
    """The transformers model, without what peft has put around it; adapters may still be inside."""
    return backbone.model.get_base_model() if hasattr(backbone.model, "peft_config") else backbone.model


def beside_usage(backbone: Backbone, normalised: bool, load: Sequence[str], folder: str = "") -> list[str]:
    """The lines that classify with a head that lies beside a model.

    Args:
        load: the lines that bring `model` and `reader`.
        folder: that of the head, with a slash behind it.
    """
    if backbone.modality == "text":
        limit = f"padding=True, truncation=True, max_length={backbone.max_length}"
        takes = set(inspect.signature(base_of(backbone).forward).parameters)
        drop = "" if "token_type_ids" in takes else '\ninputs.pop("token_type_ids", None)'
        inputs = f'inputs = reader(["a text", "another"], return_tensors="pt", {limit}){drop}'
        mask = 'mask = inputs["attention_mask"][..., None]'
    else:
        inputs = 'inputs = reader(images=[picture], return_tensors="pt")  # PIL, in RGB'
        mask = "mask = torch.ones(*hidden.shape[:2], 1)"
    lines = [
        "import json, torch",
        "from safetensors.torch import load_file",
        *load,
        f'head, about = load_file("{folder}{FILES[0]}"), json.load(open("{folder}{FILES[1]}", encoding="utf-8"))',
        inputs,
    ]
    if backbone.pooling is not None:
        lines += ["output = model(**inputs)"]
    if backbone.pooling in ("mean", "cls", "last"):
        lines += ["hidden = output.last_hidden_state"]
    if backbone.pooling in ("mean", "last"):
        lines += [mask]
    lines += [f"features = {POOLED[backbone.pooling]}"]
    if normalised:
        lines += ["features = torch.nn.functional.normalize(features, dim=1)"]
    lines += [
        'scores = features @ head["weight"].T + head["bias"]',
        'print([about["labels"][i] for i in scores.argmax(1)])',
    ]
    return lines
