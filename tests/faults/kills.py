"""A signal at a random moment of each command that writes something, then the same command again.

After it an output is whole or not there; no process lives on; and when the command has run again, the folder is
that of a run that nobody killed, byte for byte, with nothing beside it. A run of training goes on from its last
checkpoint and ends with the weights, bit for bit, of the unbroken run. SIGKILL leaves no time for anything; after
SIGTERM and SIGUSR1 the exit code says which it was, and nothing that was staged is left.
"""

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.commands import Command, digests, run
from tests.ranks import write_rows

# Files that say when, how fast or with how much memory: no two runs write the same.
_OF_THE_MOMENT = ("train_summary.json", "trainer_state.json", "report.html", "loss.png", "complete.json")
_OF_THE_MOMENT += ("training.json", "run.json", "README.md")


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
        begins (`str`, *optional*): the moments are counted from when such a file is there.
        lasts (`float`): share of the time of the whole command that the moments are drawn from.
    """

    name: str
    words: list[str]
    output: str
    appears_whole: bool = True
    again: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    begins: str | None = None
    lasts: float = 1.0


_TRAIN = [
    *("train", "--model_name_or_path", "model", "--data_path", "data.json", "--image_folder", "."),
    *("--output_dir", "out", "--use_cpu", "True", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1"),
    *("--save_total_limit", "2", "--learning_rate", "1e-3", "--per_device_train_batch_size", "2", "--lora_r", "4"),
    *("--lora_alpha", "8", "--lora_dropout", "0.1", "--logging_steps", "1"),
]
_EVALUATED = ("--eval_split", "0.25", "--eval_strategy", "steps", "--eval_steps", "2", "--dataloader_num_workers", "1")
_GOES_ON: dict = {
    "output": "out",
    "appears_whole": False,
    "again": ("--resume_from_checkpoint", "auto"),
    "leave_out": ("checkpoint-", *_OF_THE_MOMENT, "runs/"),
}
_MANY = [word.replace("data.json", "many.json") for word in _TRAIN]
OPERATIONS = [
    Operation("train", [*_TRAIN, *_EVALUATED], **_GOES_ON),
    Operation("saving a checkpoint", _TRAIN, begins="out/checkpoint-*", lasts=0.1, **_GOES_ON),
    Operation("the first read", _MANY, lasts=0.7, **_GOES_ON),
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
    rows = json.loads((folder / "data.json").read_text())
    (folder / "many.json").write_text(json.dumps(rows * 100))
    run([*_TRAIN[:-2], "--max_steps", "1", "--save_strategy", "no"], folder)
    (folder / "out").rename(folder / "adapter")
    folder.with_suffix(".log").unlink()
    return folder


def outcome_of(
    operation: Operation,
    start: Path,
    expected: dict[str, str],
    folder: Path,
    moment: float,
    number: int,
    to_all: bool = False,
) -> str:
    """
    Sends the signal `number` to `operation` after `moment` seconds, or to all processes of its own as schedulers do,
    runs it again and compares.

    Args:
        start (`Path`): what `prepared` made; it is copied to `folder`.
        expected (`dict`): files of the unbroken run, all of its folder.

    Returns:
        `str`: "stopped, then the same", or "ended before".

    Raises:
        AssertionError: if something was lost, half-written or left.
    """
    shutil.copytree(start, folder)
    command = Command(operation.words, folder)
    if operation.begins is not None:
        command.until(lambda: any(folder.glob(str(operation.begins))))
    command.ends_within(moment)
    code = command.kill(number, to_all)
    was_stopped = code != 0
    # Before it is a command of ours, a signal ends the process itself; a shell counts that as the same code.
    allowed = {0, -number} if number == signal.SIGKILL else {0, -number, 128 + number}
    assert code in allowed, f"exit code {code}: {command.printed()[-1500:]}"
    assert not (alive := command.left_alive()), f"processes live on: {alive}"
    assert "Traceback" not in command.printed(), command.printed()[-1500:]
    output = folder / operation.output
    if number != signal.SIGKILL:
        left = [name for name in digests(folder) if ".partial-" in name or name.endswith((".lock", ".lock.json"))]
        assert not left, f"left: {left}"
    if was_stopped and operation.appears_whole and output.exists():
        found = digests(folder, leave_out=operation.leave_out)
        whole = {name: digest for name, digest in expected.items() if name.startswith(operation.output)}
        assert {name: found.get(name) for name in whole} == whole, "the output is there and is not whole"
    if was_stopped or not operation.appears_whole:
        if operation.appears_whole and output.exists():
            shutil.rmtree(output) if output.is_dir() else output.unlink()
        again = Command([*operation.words, *operation.again], folder)
        assert again.wait() == 0, again.printed()[-1500:]
    found = digests(folder, leave_out=operation.leave_out)
    assert found == expected, f"other files: {sorted(set(found.items()) ^ set(expected.items()))[:6]}"
    return "stopped, then the same" if was_stopped else "ended before"


def signal_often(
    root: Path,
    checkpoint: Path,
    count: int,
    seed: int,
    only: str | None = None,
    numbers: tuple[int, ...] = (signal.SIGKILL,),
    tell: Callable[[str], None] = print,
) -> dict[str, Counter]:
    """Sends the signals to the operations in turn, `count` times in all; what came out, by row of the table."""
    start = prepared(root / "start", checkpoint)
    chosen = [operation for operation in OPERATIONS if only in (None, operation.name)]
    rng = random.Random(seed)
    unbroken: dict[str, tuple[dict[str, str], float]] = {}
    outcomes: dict[str, Counter] = {}
    for turn in range(count):
        operation = chosen[turn % len(chosen)]
        number = numbers[turn // len(chosen) % len(numbers)]
        if operation.name not in unbroken:
            unbroken[operation.name] = _unbroken(operation, start, root / f"unbroken-{operation.name}")
        expected, seconds = unbroken[operation.name]
        moment, to_all = rng.uniform(0, seconds * operation.lasts), number != signal.SIGKILL and rng.random() < 0.5
        folder = root / f"{operation.name}-{turn}"
        try:
            outcome = outcome_of(operation, start, expected, folder, moment, number, to_all)
        except AssertionError as error:
            outcome = "failed"
            tell(f"{operation.name}, signal {number}, turn {turn} of seed {seed}, after {moment:.3f} s: {error}")
        name = f"{signal.Signals(number).name} to {operation.name}"
        outcomes.setdefault(name, Counter())[outcome] += 1
        shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def _unbroken(operation: Operation, start: Path, folder: Path) -> tuple[dict[str, str], float]:
    """The files of a run that nobody stopped, and its seconds."""
    shutil.copytree(start, folder)
    began = time.monotonic()
    run(operation.words, folder)
    return digests(folder, leave_out=operation.leave_out), time.monotonic() - began
