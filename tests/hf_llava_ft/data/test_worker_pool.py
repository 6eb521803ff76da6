"""Worker processes end with the process that started them."""

import os
import signal
import sys
import time

import pytest

from tests import warm_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are no worker processes")

PROGRAM = """
import os, sys, time
from hf_llava_ft.data.worker_pool import results_in_order, results_of_stream

def work(index):
    print(os.getpid(), flush=True)
    time.sleep(0.05 if index < 2 else 600)
    return index

pool = {
    "items": lambda: results_in_order(work, list(range(9)), 3),
    "stream": lambda: results_of_stream(work, range(9), 3),
}
for _ in pool[sys.argv[1]]():
    pass
"""


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("pool", ["items", "stream"])
def test_a_kill_leaves_no_worker(pool):
    parent, workers = warm_python.Started(["-c", PROGRAM, pool]), set()
    try:
        while len(workers) < 3:
            line = parent.stdout.readline()
            assert line, "the program ended by itself"
            workers |= {int(line)} if line.strip().isdigit() else set()  # libraries print too
        assert all(map(is_alive, workers))
    finally:
        os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < end:
        time.sleep(0.02)
    left = [worker for worker in workers if is_alive(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert left == []
