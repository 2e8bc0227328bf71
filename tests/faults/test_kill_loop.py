"""What a run leaves does not tell how often it was killed."""

import pytest

from tests.faults.kill_loop import kill_loop

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("kill_loop")]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("kills", "seed"), [(5, 0), pytest.param(50, 1, marks=pytest.mark.nightly)]
)
def test_killed_runs_leave_what_undisturbed_ones_do(tmp_path, capsys, kills, processes, seed):
    found = kill_loop(kills=kills, processes=processes, seed=seed, folder=tmp_path)
    assert not found, capsys.readouterr().out
