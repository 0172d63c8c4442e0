"""The garbage collector, which the Trainer calls for before every task, does not look at all that was ever imported."""

from __future__ import annotations

import gc
import weakref

from perpetune.core import environment
from perpetune.core.environment import quick_collection, uncollected


class Left:
    """What a task leaves behind in a cycle."""


def test_what_was_there_is_not_looked_at_again(monkeypatch):
    gc.unfreeze()  # what other tests have frozen
    monkeypatch.setattr(environment, "_set_aside", False)
    kept = [[] for _ in range(1000)]
    before = len(gc.get_objects())
    with quick_collection() as set_aside:
        inside = len(gc.get_objects())
        with quick_collection() as nothing:  # a learner within another
            assert gc.get_freeze_count() >= 1000
            frozen = gc.get_freeze_count()
            made = [[] for _ in range(500)]
            nothing()
            assert gc.get_freeze_count() <= frozen
        set_aside()
        assert gc.get_freeze_count() > frozen + 400 and made
    assert inside < before / 20 and kept and not gc.get_freeze_count()


def test_what_a_task_left_behind_is_collected_before_the_rest_is_set_aside(monkeypatch):
    gc.unfreeze()
    monkeypatch.setattr(environment, "_set_aside", False)
    with quick_collection() as set_aside:
        left = Left()
        left.itself = left
        gone = weakref.ref(left)
        del left
        set_aside()
        assert gone() is None


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
