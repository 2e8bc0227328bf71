"""A pipeline that is not trained."""

import pytest

from tests.evaluation.tiny_pipeline import make_pipeline
from univg_jax.pipeline import Pipeline


@pytest.fixture(scope="session")
def pipeline() -> Pipeline:
    """A model at its initialization."""
    return make_pipeline()
