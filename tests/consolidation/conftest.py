"""What every consolidation is tried on."""

from __future__ import annotations

import pytest

import perpetune as pt


@pytest.fixture(scope="module")
def word_stream(many_words):
    return many_words


@pytest.fixture(scope="module")
def stream(word_stream):
    return pt.load_stream(word_stream, tasks=["films", "news", "mood"])


@pytest.fixture(scope="module")
def model(tiny_bert):
    return tiny_bert()
