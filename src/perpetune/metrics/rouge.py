"""ROUGE-L of generated answers (Lin 2004), as the library `rouge-score` computes it."""

from __future__ import annotations

from functools import cache
from typing import Any

from ..errors import ConfigError


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
