"""Pictures seen several times, turned, zoomed and moved a little: what all views agree on is what a picture shows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import ConfigError
from .layers import layered

if TYPE_CHECKING:
    from .backbone import Backbone, Examples

TURN, ZOOM, SHIFT = math.radians(12), 0.12, 0.06  # a shift is a share of the side
COUNTS = (0, 4, 8)


def read_views(backbone: Backbone, views: int, features: bool = False) -> None:
    """Let `Backbone.pooled` read so many views (0, 4 or 8) of every picture beside it, and give their mean.

    Texts, raw pixels and models that take patches in place of pictures are read once.

    Args:
        features: also `Backbone.features`, which heads read: for models that are not trained.
    """
    pictures = views and backbone.network and backbone.modality == "image"
    backbone.views = views if pictures and backbone.samples()[0]["pixel_values"].ndim == 3 else 0
    backbone.all_views = features and backbone.views > 0


def check_views(views: int) -> None:
    """
    Raises:
        ConfigError: another number than 0, 4 or 8.
    """
    if views not in COUNTS:
        raise ConfigError(f"views={views} must be 0, 4 or 8")


def mean_of_views(backbone: Backbone, examples: Examples) -> Tensor:
    """Features of the last layers of one batch (n x pooled_width), fp32: the mean over the inputs as they are and
    `backbone.views` views of them."""
    read = backbone.read if backbone.layers == 1 else partial(layered, backbone)
    total = read(examples).float()
    if not backbone.views:
        return total
    pictures = torch.stack([e["pixel_values"] for e in examples]).to(total.device)
    for seen in views(pictures, backbone.views):
        total += read([{**e, "pixel_values": x} for e, x in zip(examples, seen, strict=True)]).float()
    return total / (1 + backbone.views)


def views(pictures: Tensor, count: int) -> Iterator[Tensor]:
    """Pictures (n x channels x height x width) as seen 4 or 8 times: turned by 12 degrees either way, larger or smaller
    by 12 %, and moved by 6 % of the side; what comes into sight continues the border.

    The signs are those of a fractional factorial design: of 8 views every pair of changes comes in all four ways, of 4
    all pairs but turn and shift downwards.
    """
    shape = pictures.shape[3] / pictures.shape[2]
    for turn, zoom, right, down in _signs(count):
        size = 1 + zoom * ZOOM
        cos, sin = size * math.cos(turn * TURN), size * math.sin(turn * TURN)
        # coordinates reach from -1 to 1 along either side
        where = torch.tensor([[cos, -sin / shape, 2 * right * SHIFT], [sin * shape, cos, 2 * down * SHIFT]])
        grid = F.affine_grid(where.to(pictures).expand(len(pictures), 2, 3), list(pictures.shape), align_corners=False)
        yield F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def _signs(count: int) -> list[tuple[int, int, int, int]]:
    """Of turn, zoom, and the shifts to the right and down."""
    if count == 4:
        return [(a, b, a * b, a) for a, b in itertools.product((1, -1), repeat=2)]
    return [(a, b, c, a * b * c) for a, b, c in itertools.product((1, -1), repeat=3)]
