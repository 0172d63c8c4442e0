"""Scores in [0, 1] of a generated answer beside the expected response: the metrics that a task of free texts names."""

from __future__ import annotations

import math
import string
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

from ..core.errors import ConfigError, nearest

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


def exact_match(answer: str, response: str) -> float:
    """1 where both are `normalised` to the same text."""
    return float(normalised(answer) == normalised(response))


def contains(answer: str, response: str) -> float:
    """1 where the normalised response stands in the normalised answer, at whole words."""
    return float(f" {normalised(response)} " in f" {normalised(answer)} ")


def token_f1(answer: str, response: str) -> float:
    """F1 of the words that both share, normalised, as SQuAD computes it (1606.05250): 2 P R / (P + R)."""
    found, expected = normalised(answer).split(), normalised(response).split()
    shared = sum((Counter(found) & Counter(expected)).values())
    return 2 * shared / (len(found) + len(expected)) if found or expected else 1.0


TAIL = 8  # characters at the end of an answer that is not whole, which its next token may change


def decided(name: str, response: str, begun: str) -> bool:
    """Whether the score of an answer is known from its beginning, however it goes on: it cannot be an `exact_match` any
    more, or it `contains` the response already. False for metrics of which nobody knows that."""
    sure = normalised(begun.lower()[:-TAIL])
    if name == "exact_match":
        return not normalised(response).startswith(sure)
    return name == "contains" and bool(contains(sure.rpartition(" ")[0], response))


LIKELIHOOD = "likelihood"  # of the expected response, which is no answer's: see `mean_probability`


def mean_probability(log_p: float, tokens: float) -> float:
    """exp(log p(response | prompt) / tokens): the geometric mean of the probabilities of its tokens, 1 / perplexity."""
    return math.exp(min(0.0, log_p / max(1.0, tokens)))


Metric = Callable[[str, str], float]
METRICS: dict[str, Metric] = {f.__name__: f for f in (exact_match, rouge_l, token_f1, contains)}


def metric(name: str) -> Metric:
    """The metric of generated answers of this name, or a user's own, `module:function`, of a module that the user has
    imported: data must not decide which code runs.

    Raises:
        ConfigError: no such metric, or its module is not imported.
    """
    module, _, function = name.partition(":")
    if not function:
        if name not in METRICS:
            known = (*METRICS, LIKELIHOOD)
            raise ConfigError(f"no metric is called `{name}`: {nearest(name, known)}, or your own, module:function")
        return METRICS[name]
    if module not in sys.modules:
        raise ConfigError(
            f"metric `{name}` is in a module that is not imported: --import {module} (or imports: in YAML)"
        )
    found = getattr(sys.modules[module], function, None)
    if not callable(found):
        raise ConfigError(f"module `{module}` has no function `{function}` for the metric `{name}`")
    return found


def graded(name: str, answers: list[str], responses: list[str]) -> list[float]:
    """The score of each answer.

    Raises:
        ConfigError: see `metric`; a score that is not a number in [0, 1].
    """
    score = metric(name)
    scores = [float(score(a, r)) for a, r in zip(answers, responses, strict=True)]
    if bad := [x for x in scores if not 0 <= x <= 1]:
        raise ConfigError(f"metric `{name}` gave {bad[0]}: a score is a number from 0 to 1")
    return scores
