"""Folders appear whole, and nothing is left of what did not."""

import errno
import os
import signal
import sys
import time

import pytest

from hf_llava_ft.checkpoints.artifact import check_writable_file, staged_files, staged_folder
from hf_llava_ft.errors import UserError
from tests import warm_python


def test_a_dash_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^- does not stand for standard output"):
        check_writable_file("-")
    check_writable_file(tmp_path / "result.json")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_command_left_is_removed_and_said(tmp_path, caplog):
    left, of_others = tmp_path / ".out.partial-1234", tmp_path / ".output.partial-1234"
    for folder in (left, of_others):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    with staged_folder(tmp_path / "out") as staged:
        (staged / "config.json").write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [of_others.name, "out"]
    assert "was left by a command that was killed" in caplog.text and str(left) in caplog.text
    (tmp_path / "out" / ".partial-77").mkdir()
    with staged_files(tmp_path / "out", last="config.json") as staged:
        (staged / "config.json").write_text("[]")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, number):
    with pytest.raises(UserError, match="there is no room for what is written to .*out: free some space"):
        with staged_folder(tmp_path / "out") as staged:
            (staged / "config.json").write_text("{}")
            raise OSError(number, "No space left on device" if number == errno.ENOSPC else "Disk quota exceeded")
    assert list(tmp_path.iterdir()) == []


PROGRAM = """
import sys, time
from hf_llava_ft.checkpoints.artifact import staged_folder
from hf_llava_ft.termination import exit_on_sigterm
if sys.argv[2] == "ours":
    exit_on_sigterm()
with staged_folder(sys.argv[1]) as staged:
    (staged / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("whose", "code", "left"), [("ours", 143, 0), ("python's", -signal.SIGTERM, 1)])
def test_sigterm_cleans_up_as_ctrl_c_does(tmp_path, whose, code, left):
    """Without our handler the folder stays, which shows that the test would see one."""
    process = warm_python.Started(["-c", PROGRAM, str(tmp_path / "out"), whose])
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == code
    time.sleep(0.1)
    assert len(list(tmp_path.glob(".out.partial-*"))) == left and not (tmp_path / "out").exists()


FORKED = """
import os, signal
from hf_llava_ft.termination import exit_on_sigterm
exit_on_sigterm()
child = os.fork()
if child == 0:
    os._exit(0 if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else 1)
assert os.waitpid(child, 0)[1] == 0
assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
"""


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is forked there")
def test_workers_that_are_forked_end_at_once():
    """With a handler of Python's, a worker that just begins to wait for its pool never would."""
    done = warm_python.run(["-c", FORKED])
    assert done.returncode == 0, done.stderr
