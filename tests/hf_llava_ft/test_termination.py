"""A signal that ends a command ends it wherever it comes."""

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, time
sys.argv = ["llava-ft", *sys.argv[1:]]
from hf_llava_ft.termination import exit_on_sigterm

number = int(sys.argv[1])

class Gone:
    def __del__(self):
        os.kill(os.getpid(), number)

exit_on_sigterm()
{further}
{comes}
try:
    for _ in range(40):
        time.sleep(0.05)
finally:
    print("cleaned up")
print("lived on")
"""
COMES = {
    "in __del__": "Gone()",
    "in a hook of fork": (
        "os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), number))\nos.fork() or os._exit(0)"
    ),
}


def end_of(comes: str, number: int, further: str = "") -> tuple[int, str]:
    program = PROGRAM.format(comes=COMES[comes], further=further)
    done = subprocess.run(
        [sys.executable, "-c", program, str(int(number))], capture_output=True, text=True, env=os.environ, timeout=60
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("comes", COMES)
def test_a_signal_is_not_lost_where_errors_are_only_reported(comes, number):
    assert end_of(comes, number) == (128 + number, "cleaned up\n")


def test_without_the_hook_it_would_be():
    code, said = end_of("in __del__", signal.SIGTERM, "sys.unraisablehook = sys.__unraisablehook__")
    assert (code, said) == (0, "cleaned up\nlived on\n")


def test_other_errors_are_reported_as_before():
    further = "class Broken:\n    def __del__(self): raise ValueError('told')\nBroken(); os._exit(7)"
    program = PROGRAM.format(comes="", further=further)
    done = subprocess.run([sys.executable, "-c", program, "15"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 7 and "ValueError: told" in done.stderr


TO_ALL = """
import os, subprocess, sys
sys.argv = ["llava-ft"]
from hf_llava_ft.data import worker_pool
from hf_llava_ft.errors import exit_on_user_error
from hf_llava_ft.termination import exit_on_sigterm

def ends(item):
    if item == 1:
        subprocess.Popen(["sh", "-c", f"sleep 0.1; kill -USR1 {os.getppid()}"])
    os.kill(os.getpid(), 10)

exit_on_sigterm()
worker_pool._ON_ITS_WAY = {wait}
with exit_on_user_error():
    list(worker_pool.results_in_order(ends, [1, 2, 3, 4], 2))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no workers there")
@pytest.mark.parametrize(("wait", "code"), [("worker_pool._ON_ITS_WAY", 128 + signal.SIGUSR1), ("0", 2)])
def test_a_signal_to_all_processes_is_not_taken_for_a_lack_of_memory(wait, code):
    program = TO_ALL.replace("{wait}", wait)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, timeout=60)
    assert done.returncode == code, done.stderr
