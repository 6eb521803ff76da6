"""A run on two nodes, which are two network namespaces of this machine with a virtual cable between them.

    sudo .venv/bin/python -m tests.two_nodes --output_dir /tmp/two_nodes [--engine ddp zero2 zero3 fsdp2]

Each node has a network of its own, in which the other is nothing but an address, and starts `torchrun --nnodes 2` as
on a cluster. A tiny model is trained by one process first; losses, gradient norms and the saved adapter have to be the
same. Prints what was found, with the bytes that each node has sent over the cable. Linux, as root.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.ranks import EXAMPLES, logged, saved_weights, write_rows

STEPS = 4
ADDRESSES = ("10.77.5.1", "10.77.5.2")
PORT = 29512
CABLE = "cable"  # what its end is called in either node


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """What keeps this machine from making network namespaces; `None` if nothing."""
    name = f"llava-ft-probe-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
    except FileNotFoundError:
        return "there is no command ip (iproute2)"
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted: {error.stderr.strip()}"
    return None


@contextmanager
def two_nodes() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces that reach each other, and nothing else, at `ADDRESSES`."""
    nodes = (f"llava-ft-1-{os.getpid()}", f"llava-ft-2-{os.getpid()}")
    try:
        for node in nodes:
            _ip("netns", "add", node)
        _ip("link", "add", CABLE, "netns", nodes[0], "type", "veth", "peer", "name", CABLE, "netns", nodes[1])
        for node, address in zip(nodes, ADDRESSES, strict=True):
            _ip("-n", node, "address", "add", f"{address}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                _ip("-n", node, "link", "set", device, "up")
        yield nodes
    finally:
        for node in nodes:
            subprocess.run(["ip", "netns", "delete", node], capture_output=True)


def bytes_sent(node: str) -> int:
    path = f"/sys/class/net/{CABLE}/statistics/tx_bytes"
    read = subprocess.run(["ip", "netns", "exec", node, "cat", path], check=True, capture_output=True, text=True)
    return int(read.stdout)


def train(engine: str, flags: list[str], output_dir: Path) -> list[int]:
    """Trains on one process (`single`) or two nodes; returns the bytes that each of these has sent."""
    words = [*flags, "--output_dir", str(output_dir)]
    words += ["--gradient_accumulation_steps", "2" if engine == "single" else "1"]
    program = ["-m", "hf_llava_ft.train"]
    if engine.startswith("zero"):
        words += ["--deepspeed", str(EXAMPLES / f"deepspeed/{engine}.json")]
    if engine == "fsdp2":
        program, words = [str(Path(__file__).with_name("fsdp_on_cpu.py"))], [*words, "--fsdp"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if engine == "single":
        _finish([_start([sys.executable, *program, *words], environment, output_dir.with_suffix(".log"))])
        return []
    environment["GLOO_SOCKET_IFNAME"] = CABLE
    with two_nodes() as nodes:
        started = []
        for rank, node in enumerate(nodes):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank)]
            torchrun += ["--nproc_per_node", "1", "--master_addr", ADDRESSES[0], "--master_port", str(PORT)]
            command = ["ip", "netns", "exec", node, *torchrun, *program, *words]
            started.append(_start(command, environment, output_dir.with_suffix(f".{rank}.log")))
        _finish(started)
        return [bytes_sent(node) for node in nodes]


def _start(command: list[str], environment: dict[str, str], log: Path) -> tuple[subprocess.Popen, Path]:
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT), log


def _finish(started: list[tuple[subprocess.Popen, Path]]) -> None:
    try:
        for process, log in started:
            if process.wait(timeout=400):
                raise SystemExit(f"{log}:\n{log.read_text()[-4000:]}")
    finally:
        for process, _ in started:
            process.kill()


def difference(found: Path, expected: Path) -> dict[str, float]:
    """Largest relative difference of losses and gradient norms, and largest difference of a saved weight."""
    ours, theirs = torch.tensor(logged(found)), torch.tensor(logged(expected))
    assert ours.shape == theirs.shape == (STEPS, 2)
    found_weights, expected_weights = saved_weights(found), saved_weights(expected)
    assert found_weights.keys() == expected_weights.keys()
    weights = max((found_weights[name] - tensor).abs().max().item() for name, tensor in expected_weights.items())
    return {"losses": ((ours - theirs) / theirs).abs().max().item(), "weights": weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--engine", nargs="+", default=["ddp", "zero2", "zero3", "fsdp2"])
    parser.add_argument("--model_name_or_path", type=Path, help="Default: a tiny one of random weights.")
    arguments = parser.parse_args()
    reason = why_not()
    if reason:
        raise SystemExit(reason)
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    model = arguments.model_name_or_path
    if model is None:
        from tests.tiny_models import save_tiny_checkpoint

        model = save_tiny_checkpoint(folder / "tiny")
    data = write_rows(folder)
    flags = ["--model_name_or_path", str(model), "--data_path", str(data), "--image_folder", str(folder)]
    flags += ["--use_cpu", "True", "--max_steps", str(STEPS), "--save_strategy", "no", "--logging_steps", "1"]
    flags += ["--learning_rate", "1e-3", "--lora_dropout", "0", "--per_device_train_batch_size", "1"]
    flags += ["--lora_r", "128"]  # enough to be told from the rest that is sent
    train("single", flags, folder / "single")
    print(f"one process: losses {[round(loss, 4) for loss, _ in logged(folder / 'single')]}", flush=True)
    results = {}
    for engine in arguments.engine:
        sent = train(engine, flags, folder / engine)
        results[engine] = {**difference(folder / engine, folder / "single"), "bytes_sent": sent}
        found = results[engine]
        print(
            f"{engine}: losses and gradient norms differ by {found['losses']:.1e}, weights by {found['weights']:.1e}; "
            f"the nodes sent {sent[0]:,} and {sent[1]:,} bytes",
            flush=True,
        )
    (folder / "two_nodes.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
