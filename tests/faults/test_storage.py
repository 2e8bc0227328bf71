"""Storage that fails ends a run with the path and the cause, and harms no checkpoint before."""

import pytest

from tests.faults.storage import FAULTS, may_mount, run


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_run_ends_with_the_path_and_the_cause(tmp_path, fault):
    if fault.needs_mount and not may_mount():
        pytest.skip("no tmpfs can be mounted here")
    assert run(fault, tmp_path / "disk") == []
