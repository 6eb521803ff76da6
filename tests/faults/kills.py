"""`kill -9` at a random moment of each command that writes something, then the same command again.

After a kill an output is whole or not there; no process lives on; and when the command has run again, the folder is
that of a run that nobody killed, byte for byte, with nothing beside it. A run of training goes on from its last
checkpoint and ends with the weights, bit for bit, of the unbroken run.
"""

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.commands import Command, digests, run
from tests.ranks import write_rows

# Files that say when, how fast or with how much memory: no two runs write the same.
_OF_THE_MOMENT = ("train_summary.json", "trainer_state.json", "report.html", "loss.png", "complete.json")
_OF_THE_MOMENT += ("training.json", "run.json")


@dataclass(frozen=True)
class Operation:
    """
    Args:
        name (`str`): of the row in the table.
        words (`list[str]`): of the command, run in a folder of its own with `model`, `adapter` and `data.json` in it.
        output (`str`): the folder or file that it writes there.
        appears_whole (`bool`): whether the output is whole as soon as it is there.
        again (`tuple[str, ...]`): further words for the second time.
        leave_out (`tuple[str, ...]`): parts of names of files that no two runs write the same.
    """

    name: str
    words: list[str]
    output: str
    appears_whole: bool = True
    again: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()


_TRAIN = [
    *("train", "--model_name_or_path", "model", "--data_path", "data.json", "--image_folder", "."),
    *("--output_dir", "out", "--use_cpu", "True", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1"),
    *("--save_total_limit", "2", "--learning_rate", "1e-3", "--per_device_train_batch_size", "2", "--lora_r", "4"),
    *("--lora_alpha", "8", "--lora_dropout", "0.1", "--logging_steps", "1"),
]
OPERATIONS = [
    Operation(
        "train", _TRAIN, "out", False, ("--resume_from_checkpoint", "auto"), ("checkpoint-", *_OF_THE_MOMENT, "runs/")
    ),
    Operation("merge", ["merge", "--adapter", "adapter", "--output_dir", "out"], "out"),
    Operation("convert", ["convert", "--model", "model", "--format", "llava-hf", "--output_dir", "out"], "out"),
    Operation("export", ["export", "--model", "adapter", "--for", "vllm", "--output_dir", "out"], "out"),
    Operation("check", ["check", "data.json", "--image_folder", ".", "--json", "out.json"], "out.json"),
]


def prepared(folder: Path, checkpoint: Path) -> Path:
    """A folder with a model, an adapter on it and rows, for commands to start from."""
    folder.mkdir(parents=True)
    shutil.copytree(checkpoint, folder / "model")
    write_rows(folder, 12)
    run([*_TRAIN[:-2], "--max_steps", "1", "--save_strategy", "no"], folder)
    (folder / "out").rename(folder / "adapter")
    folder.with_suffix(".log").unlink()
    return folder


def outcome_of_kill(operation: Operation, start: Path, expected: dict[str, str], folder: Path, moment: float) -> str:
    """
    Kills `operation` after `moment` seconds, runs it again and compares.

    Args:
        start (`Path`): what `prepared` made; it is copied to `folder`.
        expected (`dict`): files of the unbroken run, all of its folder.

    Returns:
        `str`: "killed", or "ended before the kill".

    Raises:
        AssertionError: if something was lost, half-written or left.
    """
    shutil.copytree(start, folder)
    command = Command(operation.words, folder)
    was_killed = not command.ends_within(moment)
    command.kill()
    assert not (alive := command.left_alive()), f"processes live on: {alive}"
    output = folder / operation.output
    if was_killed and operation.appears_whole and output.exists():
        found = digests(folder, leave_out=operation.leave_out)
        whole = {name: digest for name, digest in expected.items() if name.startswith(operation.output)}
        assert {name: found.get(name) for name in whole} == whole, "the output is there and is not whole"
    if was_killed or not operation.appears_whole:
        if operation.appears_whole and output.exists():
            shutil.rmtree(output) if output.is_dir() else output.unlink()
        again = Command([*operation.words, *operation.again], folder)
        assert again.wait() == 0, again.printed()
    found = digests(folder, leave_out=operation.leave_out)
    assert found == expected, f"other files: {sorted(set(found.items()) ^ set(expected.items()))[:6]}"
    return "killed" if was_killed else "ended before the kill"


def kill_often(
    root: Path, checkpoint: Path, count: int, seed: int, only: str | None = None, tell: Callable[[str], None] = print
) -> dict[str, Counter]:
    """Kills the operations in turn, `count` times in all; what came out, by operation."""
    start = prepared(root / "start", checkpoint)
    chosen = [operation for operation in OPERATIONS if only in (None, operation.name)]
    rng = random.Random(seed)
    unbroken, outcomes = {}, {operation.name: Counter() for operation in chosen}
    for operation in chosen:
        folder = root / f"unbroken-{operation.name}"
        shutil.copytree(start, folder)
        began = time.monotonic()
        run(operation.words, folder)
        unbroken[operation.name] = digests(folder, leave_out=operation.leave_out), time.monotonic() - began
    for number in range(count):
        operation = chosen[number % len(chosen)]
        expected, seconds = unbroken[operation.name]
        moment = rng.uniform(0, seconds)
        folder = root / f"{operation.name}-{number}"
        try:
            outcome = outcome_of_kill(operation, start, expected, folder, moment)
        except AssertionError as error:
            outcome = "failed"
            tell(f"{operation.name}, kill {number} of seed {seed} after {moment:.3f} s: {error}")
        outcomes[operation.name][outcome] += 1
        shutil.rmtree(folder)
    return outcomes


def as_json(outcomes: dict[str, Counter]) -> str:
    return json.dumps({name: dict(counts) for name, counts in outcomes.items()}, indent=1)
