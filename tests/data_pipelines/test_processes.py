"""The processes of a build."""

import os

import pytest

from data_pipelines import processes
from univg_jax.errors import UserError


def end(_):
    os._exit(9)


def test_a_process_that_is_killed_is_one_line():
    with processes.open_pool(None, 2) as pool:
        future = pool.submit(end)
        line = "was killed, perhaps for want of memory: build again with fewer --processes"
        with pytest.raises(UserError, match=line):
            pool.result(future)
