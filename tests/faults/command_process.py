"""One `llava-ft` command in a process that has everything imported already, in a session of its own."""

import multiprocessing
import os
import sys

import hf_llava_ft.answering.conversation
import hf_llava_ft.checking.command
import hf_llava_ft.checkpoints.convert
import hf_llava_ft.checkpoints.merge
import hf_llava_ft.data.export
import hf_llava_ft.serving
import hf_llava_ft.train  # noqa: F401
from hf_llava_ft.cli import main


def run_command(words: list[str], log: str, folder: str) -> None:
    """Ends the process with the command's exit code; what it prints is in `log`."""
    os.setsid()  # so that what it leaves behind can be told from everything else
    # What a command has that somebody starts; a child of a forkserver would have its own kind, whose workers a kill of
    # the command does not reach.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["llava-ft", *words]
    code = 1
    try:
        main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
