"""One process that runs `llava-ft` commands against a loopback Hub, since each new one pays for importing torch.

Waiting is cut short in it, and written down: what is tested is that and how long somebody would have waited.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_PROGRAM = """
import contextlib, io, json, os, shutil, sys, time, traceback
import huggingface_hub
from hf_llava_ft.cli import app

sleep, waited, answers = time.sleep, [], sys.stdout
time.sleep = lambda seconds: (waited.append(seconds), sleep(min(seconds, 0.01)))
for line in sys.stdin:
    asked = json.loads(line)
    os.environ.update(asked["environment"])
    # Read once, when it is imported.
    huggingface_hub.constants.HF_HUB_OFFLINE = os.environ["HF_HUB_OFFLINE"] == "1"
    out, err, code = io.StringIO(), io.StringIO(), 0
    waited.clear()
    huggingface_hub.utils.close_session()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(asked["arguments"], standalone_mode=False)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            code = 1
            traceback.print_exc()
    done = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "waited": list(waited)}
    print(json.dumps(done), file=answers, flush=True)
"""


@dataclass(frozen=True)
class Done:
    """
    Args:
        code (`int`): exit code; 1 with a traceback in `err` for whatever is no `UserError`.
        out, err (`str`): what it printed.
        waited (`list[float]`): seconds it would have slept, one after the other.
    """

    code: int
    out: str
    err: str
    waited: list[float]


class HubClient:
    """
    Args:
        environment (`dict[str, str]`): of `LoopbackHub.environment`.
    """

    def __init__(self, environment: dict[str, str]):
        self._environment = environment
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._process.stdin.close()
        self._process.wait(60)

    def run(self, *arguments: str, **environment: str) -> Done:
        """Runs `llava-ft` with these arguments, and with variables that hold for this command only."""
        asked = {"arguments": [str(each) for each in arguments], "environment": {**self._environment, **environment}}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process has ended"
        return Done(**json.loads(line))


def push(client: HubClient, folder: Path, name: str, *arguments: str, **environment: str) -> Done:
    """`llava-ft push` that loads nothing, which takes no time."""
    return client.run("push", folder, "--repo_id", name, "--no_verify", *arguments, **environment)


def files(hub, name: str, revision: str = "main") -> dict[str, bytes]:
    """The files that were pushed to a repository of a loopback Hub."""
    found = hub.repositories[name].at(revision).files
    return {path: file.content for path, file in found.items() if path != ".gitattributes"}


# What `trained` becomes on the Hub.
MODEL_FILES = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "processor_config.json"),
    *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}
