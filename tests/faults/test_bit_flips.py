"""Every damage to the files of a checkpoint is found and named."""

import pytest

from tests.faults.bit_flips import bit_flips
from tests.marks import nightly


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("flips", [40, *nightly(500)])
def test_every_damage_is_found_and_named(tmp_path, flips, processes):
    counts, missed = bit_flips(
        flips=flips, seed=flips, folder=tmp_path / "run", processes=processes
    )
    assert missed == []
    assert sum(counts.values()) == flips
    assert set(counts) == {"flip", "cut", "swap", "missing", "additional"}
