"""Two commands do not write one folder at once."""

import contextlib
import os
import re
import signal
import threading

import pytest

from hf_llava_ft.checkpoints.artifact import staged_folder
from hf_llava_ft.checkpoints.folder_lock import lock_files, locked_folder
from hf_llava_ft.errors import UserError
from tests import warm_python

HOLDING = """
import sys, time
from hf_llava_ft.checkpoints.folder_lock import locked_folder
sys.argv = ["/somewhere/bin/llava-ft", "train", "--hub_token", "hf_secret"]
with locked_folder({folder!r}):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path / "out"`."""
    script = HOLDING.format(folder=str(tmp_path / "out"))
    process = warm_python.Started(["-c", script])
    assert process.stdout.readline() == "held\n"
    yield process
    with contextlib.suppress(ProcessLookupError):  # the test has waited for it
        os.kill(process.pid, signal.SIGKILL)


def test_the_second_is_told_of_the_first_and_a_dead_one_does_not_block(holder, tmp_path):
    expected = rf"out is being written by process {holder.pid} on \S+ \(llava-ft train, since 20.*\): wait"
    with pytest.raises(UserError, match=expected) as error, locked_folder(tmp_path / "out"):
        pass
    assert "hf_secret" not in str(error.value)
    (tmp_path / "link").symlink_to(tmp_path / "out")  # the same folder by another name
    with pytest.raises(UserError, match="is being written by"), staged_folder(tmp_path / "link"):
        pass
    with pytest.raises(UserError, match=re.escape(str(holder.pid))), staged_folder(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert any(file.exists() for file in lock_files(tmp_path / "out"))  # what it could not remove
    with staged_folder(tmp_path / "out") as staged:
        (staged / "model").touch()
    (tmp_path / "link").unlink()
    assert os.listdir(tmp_path) == ["out"]


def test_nothing_is_left_and_threads_are_told_apart(tmp_path):
    told = []

    def second():
        try:
            with locked_folder(tmp_path / "out"):
                told.append(None)
        except UserError as error:
            told.append(str(error))

    with locked_folder(tmp_path / "out"), locked_folder(tmp_path / "other"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(told) == 1 and f"process {os.getpid()} on " in told[0]
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyError), locked_folder(tmp_path / "out"):
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_lock_is_inside_where_nothing_can_be_put_beside_the_folder(tmp_path, monkeypatch):
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert lock_files(tmp_path / "mounted")[0] == tmp_path / "mounted/.folder.lock"
    with locked_folder(tmp_path / "mounted"):
        assert os.listdir(tmp_path) == ["mounted"]
    assert os.listdir(tmp_path / "mounted") == []
