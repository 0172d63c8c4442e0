"""Answers are compared as published."""

import pytest

from perpetune.metrics.text import normalised


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("  Science or\tTechnology\n", "science or technology"),
        ("Society & Culture.", "society culture"),
        ("Society and Culture", "society and culture"),
        ("don't", "dont"),
        ("-", ""),
        ("“Quoted”", "“quoted”"),  # ASCII punctuation alone
    ],
)
def test_normalised(answer, expected):
    assert normalised(answer) == expected
