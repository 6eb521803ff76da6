"""A side of a benchmark: a process of its own with one thread, which waits for words and answers each with JSON."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


class Process:
    """
    Args:
        side (`str`): its name.
        command: what is started.
        code (`Path`): the checkout whose package it imports.
        folder (`Path`): where its log is kept, whose end is told if it ends.
    """

    def __init__(self, side: str, command: list[str], code: Path, folder: Path):
        self.side, self.log = side, folder / f"{side.replace(' ', '_')}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | ONE_THREAD | {"PYTHONPATH": str(code)},
            )
        self.versions = self.answer()["versions"]

    def ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.side} ended: {self.log.read_text()[-2000:]}")
        return json.loads(line)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
