"""What a run leaves does not tell how often it was killed."""

import pytest

from tests.faults.kill_loop import kill_loop
from tests.marks import nightly

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("kill_loop")]


@pytest.mark.parametrize(
    ("kills", "processes"),
    [(5, 1), *nightly((50, 1), (50, 2))],
)
def test_killed_runs_leave_what_undisturbed_ones_do(tmp_path, capsys, kills, processes):
    found = kill_loop(kills=kills, processes=processes, seed=processes, folder=tmp_path)
    assert not found, capsys.readouterr().out
