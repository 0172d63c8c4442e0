from __future__ import annotations

from types import SimpleNamespace

import datasets
import pytest
import torch
from torch.nn import functional as F

from perpetune.models.layers import read_layers
from perpetune.models.loading import load_backbone

TEXTS = ["the parcel came late", "a refund", "where is the parcel that they asked for"]


def rows(texts=TEXTS):
    return datasets.Dataset.from_dict(
        {"text": texts, "label": [0] * len(texts), "id": list(map(str, range(len(texts))))}
    )


def test_layers_are_pooled_scaled_to_one_length_and_laid_side_by_side(tiny_bert):
    backbone = load_backbone(tiny_bert(layers=3), "text", max_length=16)
    examples, last = backbone.prepare(rows()), backbone.pooled(backbone.prepare(rows()), 8)
    read_layers(backbone, 2)
    found = backbone.pooled(examples, 8)
    assert found.shape == (3, backbone.pooled_width) == (3, 64)
    for example, vector in zip(examples, found, strict=True):
        ids = torch.tensor([example["input_ids"]])
        states = backbone.model(input_ids=ids, output_hidden_states=True).hidden_states  # embeddings, layers 1, 2, 3
        expected = [F.normalize(states[k][0].mean(0), dim=0) * 32**0.5 for k in (2, 3)]
        torch.testing.assert_close(vector, torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(F.normalize(found[:, 32:], dim=1), F.normalize(last, dim=1), atol=1e-6, rtol=1e-5)


def test_what_heads_read_stays_the_last_layer(tiny_bert):
    backbone = load_backbone(tiny_bert(), "text", max_length=16)
    examples = backbone.prepare(rows())
    before = backbone.features(examples, 8)
    read_layers(backbone, 2)
    assert torch.equal(backbone.features(examples, 8), before) and backbone.width == 32
    read_layers(backbone, 1)
    assert torch.equal(backbone.pooled(examples, 8), before) and backbone.pooled_width == 32


def test_no_more_layers_are_read_than_there_are(tiny_bert):
    backbone = load_backbone(tiny_bert(layers=2), "text", max_length=16)
    read_layers(backbone, 9)
    assert backbone.layers == 3  # and the embeddings


def test_layers_of_pictures(tiny_vit):
    backbone = load_backbone(tiny_vit(layers=2), "image")
    read_layers(backbone, 2)
    found = backbone.pooled(backbone.samples(), 8)
    assert found.shape == (2, 64)
    # the model's own closing normalisation stands behind the last layer
    torch.testing.assert_close(found[:, 32:], F.normalize(backbone.features(backbone.samples(), 8), dim=1) * 32**0.5)


@pytest.mark.parametrize(
    "states", [None, [torch.zeros(2, 8, 4, 4)] * 3, [torch.zeros(2, 5, 16), torch.zeros(2, 5, 32)]], ids=str
)
def test_a_model_without_such_layers_is_read_at_its_last(tiny_bert, states):
    backbone = load_backbone(tiny_bert(), "text", max_length=16)
    backbone.model.forward = lambda **inputs: SimpleNamespace(hidden_states=states)
    read_layers(backbone, 2)
    assert backbone.layers == 1 and backbone.pooled_width == backbone.width


def test_a_model_that_takes_no_such_argument_is_read_at_its_last(tiny_bert):
    backbone = load_backbone(tiny_bert(), "text", max_length=16)
    backbone.model.forward = lambda input_ids, attention_mask=None, token_type_ids=None: None
    read_layers(backbone, 2)
    assert backbone.layers == 1
