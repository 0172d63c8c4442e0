"""The garbage collector, which the Trainer calls for before every task, does not look at all that was ever imported."""

from __future__ import annotations

import gc

from perpetune.core import environment
from perpetune.core.environment import quick_collection, uncollected


def test_what_was_there_is_not_looked_at_again(monkeypatch):
    gc.unfreeze()  # what other tests have frozen
    monkeypatch.setattr(environment, "_set_aside", False)
    kept = [[] for _ in range(1000)]
    before = len(gc.get_objects())
    with quick_collection():
        inside = len(gc.get_objects())
        with quick_collection():  # a learner within another
            assert gc.get_freeze_count() >= 1000
    assert inside < before / 20 and kept and not gc.get_freeze_count()


def test_collection_is_switched_on_again():
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
