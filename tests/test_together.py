"""What goes wrong on one of two real processes is raised on both, at the same point."""

import json

import pytest

from tests.processes import run
from univg_jax.errors import UserError
from univg_jax.together import each_together, raise_together, together

PROGRAM = """
import json
from tests import processes
processes.join()
import jax
from univg_jax.errors import UserError
from univg_jax.together import each_together, together

me = jax.process_index()
found = []

def items():
    yield 1
    if me == 1:
        raise OSError("no disk")
    yield 2

def attempt(do):
    try:
        do()
    except Exception as error:
        found.append([type(error).__name__, str(error)])

@together()
def block():
    if me == 0:
        raise UserError("no data")

attempt(block)
attempt(lambda: [found.append(item) for item in each_together(items())])
with together():
    found.append("on")
found += each_together(range(3))
print(json.dumps(found))
"""


@pytest.mark.xdist_group("multiprocess")
def test_a_failure_of_one_process_is_raised_on_both():
    first, second = (json.loads(lines[-1]) for lines in run([1, 1], program=("-c", PROGRAM)))
    assert first == [
        ["UserError", "no data"],
        1,
        ["UserError", "process 1 of 2 cannot go on: OSError: no disk"],
        *("on", 0, 1, 2),
    ]
    assert second == [
        ["UserError", "process 0 of 2 cannot go on: no data"],
        1,
        ["OSError", "no disk"],
        *("on", 0, 1, 2),
    ]


def test_alone_it_is_an_ordinary_block():
    raise_together(None)
    assert list(each_together("abc")) == list("abc")
    with pytest.raises(UserError, match="here"), together():
        raise UserError("here")
