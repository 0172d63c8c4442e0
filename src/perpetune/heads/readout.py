"""A head as one linear map of the features, for use without perpetune."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Readout(NamedTuple):
    """Scores W f + b of k classes, or W f / |f| + b.

    Attributes:
        weight: W, (k x L); bias: b, (k,).
        normalised: whether features are divided by their length first. Without that, the order of scores is the same
            where b is 0.
    """

    weight: Tensor
    bias: Tensor
    normalised: bool
