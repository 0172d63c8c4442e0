"""When a generated answer counts as an expected one, and how much of it is there."""

from __future__ import annotations

import string
from functools import cache
from typing import Any

from ..core.errors import ConfigError

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """Lower case, without ASCII punctuation, blanks squeezed: as the O-LoRA and N-LoRA code compares answers."""
    return " ".join(answer.lower().translate(_PUNCTUATION).split())


@cache
def scorer() -> Any:
    """The library's scorer: lower case, letters a to z and digits alone, Porter's stems.

    Raises:
        ConfigError: the library is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError("rouge_l needs the package rouge-score: pip install 'perpetune[rouge]'") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, response: str) -> float:
    """F1 of the longest common subsequence of words: 2 P R / (P + R), P = LCS / words of the answer, R = LCS / words of
    the response."""
    return float(scorer().score(response, answer)["rougeL"].fmeasure)
