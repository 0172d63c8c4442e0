"""Features of several layers side by side: what the middle of an encoder knows, and its last layer has given up."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .pooling import pool_states

if TYPE_CHECKING:
    from .backbone import Backbone, Examples


def read_layers(backbone: Backbone, layers: int) -> None:
    """Let `Backbone.pooled` read so many of the last layers.

    It goes on reading one where the model gives no hidden states of its tokens, or some of another width (networks of
    convolutions); and of language models and pairs of encoders, which have what is read in other places.
    """
    backbone.layers = 1
    if layers > 1 and backbone.network and backbone.pooling is not None and backbone.modality != "language":
        backbone.layers = _readable(backbone, layers)


def _readable(backbone: Backbone, layers: int) -> int:
    try:
        with backbone.asked(), torch.inference_mode():
            inputs = backbone.taken(backbone.batch(backbone.samples()))
            states = backbone.model(**inputs, output_hidden_states=True).hidden_states
    except TypeError:  # it takes no such argument
        return 1
    alike = [state.ndim == 3 and state.shape[2] == backbone.width for state in states or ()]
    return min(layers, len(alike)) if alike and all(alike[-layers:]) else 1


def layered(backbone: Backbone, examples: Examples) -> Tensor:
    """The pooled hidden states of the last layers of one batch side by side, (N x layers L), fp32.

    Each has the length sqrt(L), so that no layer outweighs the others. Of the last one it is the state that the model
    itself gives, behind a closing normalisation where there is one.
    """
    assert backbone.pooling is not None
    batch = backbone.batch(examples)
    output = backbone.model(**backbone.taken(batch), output_hidden_states=True)
    states = [*output.hidden_states[-backbone.layers : -1], output.last_hidden_state]  # each (N x tokens x L)
    pooled = torch.stack([pool_states(h, batch.get("attention_mask"), backbone.pooling) for h in states], 1)
    return (F.normalize(pooled.float(), dim=2) * math.sqrt(backbone.width)).flatten(1)
