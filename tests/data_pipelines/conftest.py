"""No reading thread outlives its test."""

import pytest

from tests.data_pipelines import toy
from tests.memory_bucket import bucket  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def _streams_are_closed():
    """Their threads would use `random` (by beartype), which hypothesis forbids during its tests."""
    yield
    while toy.OPEN:
        toy.OPEN.pop().close()
