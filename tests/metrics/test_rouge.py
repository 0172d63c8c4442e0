"""ROUGE-L against the longest common subsequence, written out."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpetune.core.errors import ConfigError
from perpetune.heads import make_head
from perpetune.metrics import text

WORDS = ("red", "blue", "fish", "two", "7")  # Porter's stemmer leaves them as they are


def longest_common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


@given(st.lists(st.sampled_from(WORDS), max_size=6), st.lists(st.sampled_from(WORDS), min_size=1, max_size=6))
def test_it_is_the_f1_of_the_longest_common_subsequence(answer, response):
    common = longest_common(tuple(answer), tuple(response))
    P, R = common / max(1, len(answer)), common / len(response)
    expected = 2 * P * R / (P + R) if common else 0.0
    assert text.rouge_l(" ".join(answer), " ".join(response)) == pytest.approx(expected)


def test_words_are_compared_by_their_stems_and_without_case():
    assert text.rouge_l("The dogs barked!", "the dog barks") == pytest.approx(1.0)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    text.scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match=r"pip install 'perpetune\[rouge\]'"):
        make_head("language_generated", rouge_l=True)


def test_options_have_no_rouge():
    with pytest.raises(ConfigError, match="generate"):
        make_head("language", rouge_l=True)
