"""When a generated answer counts as an expected one."""

from __future__ import annotations

import string

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """Lower case, without ASCII punctuation, blanks squeezed: as the O-LoRA and N-LoRA code compares answers."""
    return " ".join(answer.lower().translate(_PUNCTUATION).split())
