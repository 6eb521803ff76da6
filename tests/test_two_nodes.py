"""Training on two nodes, each with a network of its own, is the run of one process."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.two_nodes import why_not

ENGINES = ["ddp", "fsdp2", *(["zero2", "zero3"] if find_spec("deepspeed") else [])]


@pytest.mark.slow
def test_two_nodes_give_the_run_of_one_process(tiny_checkpoint, tmp_path, checkout):
    reason = why_not()
    if reason:
        pytest.skip(f"two nodes are two network namespaces here, and {reason}")
    command = [sys.executable, "-m", "tests.two_nodes", "--output_dir", tmp_path, "--model_name_or_path"]
    command += [tiny_checkpoint, "--engine", *ENGINES]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=checkout, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "two_nodes.json").read_text())
    assert list(results) == ENGINES
    for found in results.values():
        assert found["losses"] < 1e-5 and found["weights"] < 1e-5
        # Each has sent gradients of 262,144 weights of LoRA, and of the projector, four times.
        assert min(found["bytes_sent"]) > 4 * 262_144
