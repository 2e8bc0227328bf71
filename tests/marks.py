"""What of a test only the nightly run has."""

import pytest


def nightly(*values: object) -> list:
    """Values of a test's parameter, or tuples of several, which the nightly run alone has."""
    return [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.nightly)
        for v in values
    ]
