"""Training runs of one process or two that start in a moment, for tests of many runs.

A launcher starts a new Python for each rank, which takes longer to import its libraries than the tiny model takes to
train. Here each rank is a process forked from one with everything imported, and has the variables that a launcher
would set; the launchers themselves are tested in `test_launchers.py`.
"""

import functools
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parent.parent / "examples"
_CONTEXT: Any = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.rank_process"])
_PATIENCE = 300  # seconds

_needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is an extra of this package")
# All with two processes, by the files of `examples/`.
ENGINES = [
    pytest.param("ddp", id="ddp"),
    pytest.param("zero2", id="zero2", marks=_needs_deepspeed),
    pytest.param("zero3", id="zero3", marks=_needs_deepspeed),
    pytest.param("fsdp2", id="fsdp2"),
]
# The optimiser of DeepSpeed that they need is compiled once, for minutes.
OFFLOADS = [
    pytest.param(
        f"zero{stage}_offload", id=f"zero{stage}_offload", marks=[_needs_deepspeed, pytest.mark.timeout(1800)]
    )
    for stage in "23"
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(*arguments) -> None:
    # Not imported above: the tests' own process shall not hold what the ranks import.
    importlib.import_module("tests.rank_process").run_rank(*arguments)


@functools.cache
def _compile_cpu_adam() -> None:
    # By itself: two ranks that compile are two compilers, one of which waits.
    program = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def num_processes(engine: str) -> int:
    return 1 if engine == "single" else 2


class Run:
    """
    A run that is going on: `python -m hf_llava_ft.train`, or another module of ours, in each rank.

    Args:
        engine (`str`): `single`, `ddp`, `fsdp2`, or the name of a file in `examples/deepspeed`.
        argv (`list`): the command line, less what chooses the engine.
        logs (`Path`): folder for what the ranks print, `rank0.log` and so on.
        before (`str`): each a `module:function` that each rank calls first.
        module (`str`): whose `main` the ranks call.
    """

    def __init__(self, engine: str, argv: list, logs: Path, *before: str, module: str = "hf_llava_ft.train"):
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = logs
        argv = list(map(str, argv))
        if engine.startswith("zero"):
            argv += ["--deepspeed", str(EXAMPLES / f"deepspeed/{engine}.json")]
        if engine == "fsdp2":
            settings = yaml.safe_load((EXAMPLES / "accelerate/fsdp2.yaml").read_text())["fsdp_config"]
            (logs / "fsdp.json").write_text(json.dumps(settings))
            argv += ["--fsdp", "--fsdp_config", str(logs / "fsdp.json")]
            before = ("tests.fsdp_on_cpu:allow", *before)
        if engine.endswith("_offload"):
            _compile_cpu_adam()
        count = num_processes(engine)
        launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        launched |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        self.processes = []
        for rank in range(count):
            environment = {} if count == 1 else {**launched, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            (logs / f"rank{rank}.log").write_text("")
            arguments = (argv, environment, str(logs / f"rank{rank}.log"), before, module)
            process = _CONTEXT.Process(target=_start, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)

    def printed(self, rank: int = 0) -> str:
        return (self.logs / f"rank{rank}.log").read_text(errors="replace")

    def all_printed(self) -> str:
        return "\n".join(f"rank {rank}:\n{self.printed(rank)[-3000:]}" for rank in range(len(self.processes)))

    def wait(self) -> int:
        """Exit code, negative for a signal; when a rank fails, the others are ended, as launchers do."""
        end = time.monotonic() + _PATIENCE
        while True:
            codes = [process.exitcode for process in self.processes]
            failed = next((code for code in codes if code), None)
            if failed is None and None not in codes:
                return 0
            if failed is not None or time.monotonic() > end:
                self.kill()
                assert failed is not None, f"the run hangs: {self.all_printed()}"
                return failed
            time.sleep(0.02)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Waits for `condition`, and says whether it came while the run was going on."""
        end = time.monotonic() + _PATIENCE
        while not condition():
            if not all(process.is_alive() for process in self.processes):
                return False
            assert time.monotonic() < end, f"the run hangs: {self.all_printed()}"
            time.sleep(0.001)
        return True

    def kill(self) -> None:
        """As `kill -9`, all ranks at once."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()


def run(engine: str, argv: list, logs: Path, *before: str, module: str = "hf_llava_ft.train") -> str:
    """Runs to the end, and gives what the first rank printed."""
    going_on = Run(engine, argv, logs, *before, module=module)
    code = going_on.wait()
    assert code == 0, going_on.all_printed()
    return going_on.printed()


def write_rows(folder: Path, count: int = 16) -> Path:
    """A LLaVA JSON of `count` rows, every second with a picture beside it."""
    rows = []
    for index in range(count):
        turns = [
            {"from": "human", "value": f"What is number {index}?"},
            {"from": "gpt", "value": f"It is {7 * index}."},
        ]
        row = {"id": str(index), "conversations": turns}
        if index % 2:
            Image.new("RGB", (40 + index, 50), (15 * index, 80, 90)).save(folder / f"{index}.png")
            row["image"], turns[0]["value"] = f"{index}.png", f"<image>\n{turns[0]['value']}"
        rows.append(row)
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def logged(output_dir: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry]


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").is_file() else "model.safetensors"
    return load_file(folder / name)
