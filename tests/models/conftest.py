"""Here every model is read from its files: that is what is tested."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import held_models


@pytest.fixture(scope="module", autouse=True)
def read_anew() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_models, "TINY", 0)
        yield
