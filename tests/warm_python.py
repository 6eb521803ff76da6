"""Fresh processes that start in a moment: forks of one that has imported the libraries, and nothing of ours.

A new Python needs five seconds of a core for importing torch and transformers, and most that is asked of one in these
tests takes a tenth of that. A fork is as good: it has an empty `__main__`, its own arguments, folder, environment and
exit code, and whether it can import `hf_llava_ft` is up to its program. `pytest --new-python` runs everything in a new
Python, and so do, always, the tests that are marked `new_python`.

There is one such process for all workers of pytest-xdist, which the first that needs it starts. It imports the
libraries, leaves a copy of itself that goes on to what reads the environment, and both fork a server for each worker.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

from filelock import FileLock

# Importing these reads no variable of the environment that a test sets.
_LIBRARIES = [
    *("numpy", "pandas", "PIL.Image", "pyarrow.parquet", "safetensors.torch", "sympy", "tokenizers"),
    *("torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.decomposition", "torch.distributed.tensor"),
]
# Importing these reads HF_HOME, HF_ENDPOINT and their like.
_OF_HUGGING_FACE = [
    *("accelerate", "bitsandbytes", "datasets", "peft", "transformers.trainer", "transformers.pipelines"),
    *(
        f"transformers.models.{name}.modeling_{name}"
        for name in ("clip", "siglip", "llama", "mistral", "qwen2", "llava", "llava_next")
    ),
    *("transformers.models.auto.processing_auto", "transformers.models.llava.processing_llava"),
]
# What a fork may have otherwise than what it is forked from. transformers keeps the first, the rest is read late.
_MODULES_CACHE = "HF_MODULES_CACHE"
_PARENT = "HF_LLAVA_FT_PARENT"
_READ_WHEN_NEEDED = {
    *(_MODULES_CACHE, _PARENT, "PYTHONPATH", "PYTEST_CURRENT_TEST", "COLUMNS", "RANK", "LOCAL_RANK"),
    "TORCHINDUCTOR_CACHE_DIR",  # which torch sets itself
}
_FIRST_ENVIRONMENT = dict(os.environ)
_BARE, _HUGGING_FACE = "libraries", "hugging_face"  # sockets

ALWAYS_NEW = not hasattr(os, "fork")  # whether `run` starts a new Python each time


def run(
    arguments: list[str], cwd: Path | str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """
    What `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)` would give, with nothing to be
    read from stdin.

    Args:
        arguments (`list[str]`): `-I` or not, then `-c PROGRAM`, `-m MODULE` or a file, then the program's own.
        env (`dict`, *optional*): the whole environment. A variable that torch reads when it is imported is that of
            the tests.
    """
    environment = dict(os.environ) if env is None else dict(env)
    if ALWAYS_NEW:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    return _warm_for(environment).run(arguments, os.fspath(cwd or os.getcwd()), environment)


class Started:
    """
    A program of `run` that is going on.

    Args:
        pid (`int`): of the process.
        stdout (file): what it prints, as it prints it.
    """

    def __init__(self, arguments: list[str]):
        self._folder = tempfile.TemporaryDirectory()
        out, err = (os.path.join(self._folder.name, name) for name in ("stdout", "stderr"))
        os.mkfifo(out)
        self._server = _warm_for(dict(os.environ))
        self.pid = self._server.start(arguments, os.getcwd(), dict(os.environ), out, err)
        self.stdout = open(out)

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        code = self._server.wait(self.pid)
        self.stdout.close()
        self._folder.cleanup()
        return code


def _warm_for(environment: dict[str, str]) -> "_WarmProcess":
    names = environment.keys() | _FIRST_ENVIRONMENT.keys()
    differing = {name for name in names if environment.get(name) != _FIRST_ENVIRONMENT.get(name)}
    return _warm(differing <= _READ_WHEN_NEEDED)


@functools.cache
def _warm(of_hugging_face: bool) -> "_WarmProcess":
    return _WarmProcess(_HUGGING_FACE if of_hugging_face else _BARE)


@functools.cache
def _folder() -> Path:
    """Where the sockets of this run of pytest lie."""
    run_of_pytest = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"{os.getpid()}-{time.time_ns()}")
    return Path(tempfile.gettempdir(), f"warm-{run_of_pytest}")  # short, as the name of a socket has to be


def _connected(address: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(address))
    except OSError:
        connection.close()
        return None
    return connection


class _WarmProcess:
    """One that is forked for this process, from the one that all share."""

    def __init__(self, name: str):
        _folder().mkdir(mode=0o700, exist_ok=True)
        with FileLock(_folder() / "lock"):
            connection = _connected(_folder() / name)
            if connection is None:  # nobody has started it, or who did has ended
                self._start()
                connection = _connected(_folder() / name)
        if connection is None:
            raise RuntimeError(f"the warm process does not start: {(_folder() / 'log').read_text()}")
        self._asked, self._answers = connection.makefile("w"), connection.makefile("r")
        connection.close()
        self._pid = int(self._answers.readline())

    def _start(self) -> None:
        for name in (_BARE, _HUGGING_FACE):
            (_folder() / name).unlink(missing_ok=True)
        # Not where the test that happens to be first looks at what is printed.
        with open(_folder() / "log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-I", __file__, str(_folder())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=os.path.dirname(__file__),
                env=_FIRST_ENVIRONMENT,
            )
        assert process.stdin is not None and process.stdout is not None
        process.stdout.read()  # to its end, when both listen

        def end(stdin=process.stdin):
            stdin.close()
            process.wait(60)
            shutil.rmtree(_folder(), ignore_errors=True)

        atexit.register(end)

    def run(self, arguments: list[str], cwd: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as folder:
            out, err = (os.path.join(folder, name) for name in ("stdout", "stderr"))
            code = self.wait(self.start(arguments, cwd, environment, out, err))
            printed = [Path(path).read_text(errors="replace") for path in (out, err)]
        return subprocess.CompletedProcess([sys.executable, *arguments], code, *printed)

    def start(self, arguments: list[str], cwd: str, environment: dict[str, str], out: str, err: str) -> int:
        """The id of the process."""
        if environment.get(_PARENT) == str(os.getpid()):
            environment[_PARENT] = str(self._pid)
        return self._ask(
            {"arguments": list(map(str, arguments)), "cwd": cwd, "environment": environment, "printed": [out, err]}
        )

    def wait(self, pid: int) -> int:
        return self._ask({"wait": pid})

    def _ask(self, question: dict) -> int:
        self._asked.write(json.dumps(question) + "\n")
        self._asked.flush()
        answer = self._answers.readline()
        if not answer:
            raise RuntimeError(f"the warm process has ended: {(_folder() / 'log').read_text()}")
        return int(answer)


# ---------------------------------------------------------------- the process that is forked, which is this file


def _serve(folder: str) -> dict:
    """In a fork for which somebody has asked, returns what it is to run."""
    _import(_LIBRARIES)
    listening = _listen(os.path.join(folder, _BARE))
    if os.fork() == 0:
        listening.close()
        _import(_OF_HUGGING_FACE)
        listening = _listen(os.path.join(folder, _HUGGING_FACE))
    os.dup2(2, 1)  # whoever started this reads stdout until both have closed it
    with listening:
        while True:
            ready, _, _ = select.select([listening, 0], [], [])
            if 0 in ready:  # has been closed
                sys.exit()
            connection = listening.accept()[0]
            if os.fork() == 0:
                break
            connection.close()
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)  # the stdin of the forks
    return _answer(connection)


def _import(modules: list[str]) -> None:
    for module in modules:
        with contextlib.suppress(ImportError):  # not installed, or elsewhere in this release
            importlib.import_module(module)
    gc.freeze()  # else each fork would copy what its collector looks at
    sys.stdout.flush()  # and print what has been printed here
    sys.stderr.flush()


def _listen(address: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    return listening


def _answer(connection: socket.socket) -> dict:
    """
    Takes a question a line: what to run, which is answered with the id of a fork, or the id of one to wait for, which
    is answered with its exit code. In a fork, returns what it is to run.
    """
    asked, answers = connection.makefile("r"), connection.makefile("w")
    connection.close()
    print(os.getpid(), file=answers, flush=True)
    while line := asked.readline():
        question = json.loads(line)
        if "wait" in question:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                asked.close()
                answers.close()
                return question
        print(answer, file=answers, flush=True)
    sys.exit()


def _become(arguments: list[str], cwd: str, environment: dict[str, str], printed: list[str]) -> None:
    """Makes of this fork what a Python with these arguments is, and runs it."""
    for number, path in zip((1, 2), printed, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.chdir(cwd)
    _take_on_modules_cache(environment.get(_MODULES_CACHE))
    os.environ.clear()
    os.environ.update(environment)
    sys.orig_argv = [sys.executable, *arguments]
    is_isolated = arguments[0] == "-I"
    kind, *own = arguments[1:] if is_isolated else arguments
    if not is_isolated:
        sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        with contextlib.suppress(ImportError):  # as Python itself does when it starts
            importlib.import_module("sitecustomize")
    if kind == "-c":
        program, *own = own
        sys.argv = ["-c", *own]
        if not is_isolated:
            sys.path.insert(0, "")
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(program, "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        module, *own = own
        sys.argv = ["-m", *own]
        if not is_isolated:
            sys.path.insert(0, cwd)
        # Not by runpy, which would put another `__main__` back before an error is told.
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
        if spec is None or spec.origin is None:
            sys.exit(f"No module named {module}")
        main = importlib.util.module_from_spec(spec)
        main.__name__, sys.argv[0], sys.modules["__main__"] = "__main__", spec.origin, main
        exec(compile(Path(spec.origin).read_bytes(), spec.origin, "exec"), main.__dict__)
    else:
        sys.argv = [kind, *own]
        if not is_isolated:
            sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")


def _take_on_modules_cache(folder: str | None) -> None:
    """Where transformers imports the code of folders from: read from the environment when it is imported."""
    if folder is None:
        return
    for module in list(sys.modules.values()):
        if _MODULES_CACHE in getattr(module, "__dict__", {}):
            setattr(module, _MODULES_CACHE, folder)


def _exit_code_of(question: dict) -> int:
    """Of the program that is asked for, by the rules of Python."""
    try:
        _become(**question)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _end_at_once() -> None:
    """To take the libraries apart again would need two seconds."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    exit_code = 0
    atexit.register(_end_at_once)  # before others are registered, so that it comes last
    exit_code = _exit_code_of(_serve(sys.argv[1]))
    sys.exit(exit_code)
