"""How long a run may take for a step; tests/test_heartbeat.py has what happens then."""

import signal
import subprocess
import sys
import time

PROGRAM = """
import sys, time
from univg_jax.settings import Train
from univg_jax.training.watchdog import Watchdog
with Watchdog(sys.argv[1], Train(watchdog=8.0)) as watchdog:
    watchdog.beat("step 1")
    print("step 1", flush=True)
    time.sleep(1)
    time.sleep(1)
"""


def test_the_time_in_which_a_process_was_stopped_does_not_count(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"step 1\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(9)
        process.send_signal(signal.SIGCONT)
        said = process.communicate()[1].decode()
    assert (process.returncode, said) == (0, "")
    assert list(tmp_path.iterdir()) == []
