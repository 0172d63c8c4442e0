"""Parameters that weight decay must leave alone: it pulls to 0, and they do not start there."""

from __future__ import annotations

import re

# Factors of peft's tuners that start at 1, or at another constant, where they change nothing. (Ours that do are trained
# as their change since the start.)
_FACTORS = re.compile(
    r"\.(ia3_l|boft_s|road_alpha|lora_magnitude_vector|p?vera_lambda_d|randlora_gamma|delora_lambda)\b"
)


def decays(name: str) -> bool:
    """Whether 0 is where this parameter starts, or as good as any other place."""
    return _FACTORS.search(name) is None
