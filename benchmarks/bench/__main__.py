"""Training the same rows with this package and with others, in turn, compared by process CPU time.

    python -m benchmarks.bench [--rows 64 --rounds 8 --batch_size 4] [--sides ours plain ...] [--lora] [--tiny]

Each side is a process of its own with one thread. First all say what they train on, and it has to be the same: ids and
labels bit by bit, pixels to 1e-5. Then every round lets each side train one epoch, in one order and back in the next.
Printed are medians with least and greatest of the rounds, and of the ratios within the rounds; they are written to
`--output`, with versions and processor. See docs/performance.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.bench.environments import CHECKOUT, environment_of
from benchmarks.bench.process import Process

SIDES = ("ours", "plain grouped", "plain", "trl grouped", "trl", "345f9fe")
MOST_BYTES = 4 << 30  # of a side
LARGEST_DIFFERENCE = 1e-5  # of pixels


def started(side: str, args: argparse.Namespace) -> Process:
    python, code = environment_of(side, args.folder)
    command = [str(python), str(Path(__file__).with_name("side.py")), "--side", side]
    command += ["--folder", str(args.folder.resolve()), "--batch_size", str(args.batch_size)]
    return Process(side, [*command, *(["--lora"] if args.lora else [])], code, args.folder)


def check_equal(digests: dict[str, dict[str, Any]]) -> float:
    """The largest difference between pixels; SystemExit at a row of other ids or labels, or of other pixels."""
    (first, expected), *others = digests.items()
    largest = 0.0
    for side, found in others:
        for number, (text, pixels) in expected.items():
            if found[number][0] != text:
                raise SystemExit(f"Row {number} has other ids or labels under {side} than under {first}.")
            if len(found[number][1]) != len(pixels):
                raise SystemExit(f"Row {number} has a picture under {side} or {first} alone.")
            apart = [abs(mine - theirs) for mine, theirs in zip(pixels, found[number][1], strict=True)]
            largest = max([largest, *apart])
            if largest > LARGEST_DIFFERENCE:
                raise SystemExit(f"Row {number} has other pixels under {side} than under {first}: by {largest:g}.")
    return largest


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary_of(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By side: seconds, how often as long as the first one's, memory, padding, and tokens a second."""
    first, found = next(iter(rounds[0])), {}
    for side in rounds[0]:
        epochs = [each[side] for each in rounds]
        above = [epoch["above_model"] for epoch in epochs]
        found[side] = {
            "cpu_seconds": spread([epoch["seconds"] for epoch in epochs]),
            "times_as_long": spread([each[side]["seconds"] / each[first]["seconds"] for each in rounds]),
            "tokens_per_cpu_second": spread([epoch["tokens"] / epoch["seconds"] for epoch in epochs]),
            "bytes_above_model": None if None in above else max(above),
            "padding": statistics.mean(epoch["padding"] for epoch in epochs),
            "last_loss": epochs[-1]["loss"],
        }
    return found


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table_of(summary: dict[str, dict[str, Any]]) -> str:
    lines = ["| side | CPU s an epoch | times as long | tokens/CPU s | GB above the model | padding |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for side, found in summary.items():
        seconds, ratio = (
            "{median:.2f} ({min:.2f} to {max:.2f})".format(**found[name]) for name in ("cpu_seconds", "times_as_long")
        )
        above = found["bytes_above_model"]
        memory = "-" if above is None else f"{above / 1e9:.2f}"
        tokens = found["tokens_per_cpu_second"]["median"]
        lines.append(f"| {side} | {seconds} | {ratio} | {tokens:.0f} | {memory} | {100 * found['padding']:.1f} % |")
    return "\n".join(lines)


def write_report(
    output: Path, args: argparse.Namespace, processes: list[Process], apart: float, rounds: list[dict[str, Any]]
) -> None:
    """After every round: a run that is ended keeps what it has measured."""
    settings = ("sides", "lora", "rows", "batch_size", "tiny")
    report = {
        "settings": {name: getattr(args, name) for name in settings},
        "machine": {"processor": processor_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
        "versions": {each.side: each.versions for each in processes},
        "largest_difference_of_pixels": apart,
        "summary": summary_of(rounds),
        "rounds": rounds,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--lora", action="store_true", help="instead of all of the language model")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="a model that shows that it runs, and measures nothing")
    parser.add_argument("--folder", type=Path, default=CHECKOUT / "build" / "bench", help="for what is made")
    parser.add_argument("--output", type=Path, help="JSON; default: results/ beside this folder")
    args = parser.parse_args()
    name = "tiny" if args.tiny else "lora" if args.lora else "full"
    output = args.output or CHECKOUT / "benchmarks" / "results" / f"{name}.json"
    args.folder.mkdir(parents=True, exist_ok=True)
    for made in ("model", "images"):
        subprocess.run(["rm", "-rf", str(args.folder / made)], check=True)
    from benchmarks.bench.workload import write_workload

    write_workload(args.folder, args.rows, args.tiny)
    processes: list[Process] = []
    try:
        for side in args.sides:
            processes.append(started(side, args))
        digests = {each.side: each.ask("digest") for each in processes}
        apart = check_equal(digests)
        print(f"{args.rows} rows: equal ids and labels on all sides, pixels to {apart:g}.", flush=True)
        rounds = []
        for number in range(args.rounds):
            found = {each.side: each.ask("train") for each in processes[:: -1 if number % 2 else 1]}
            rounds.append({side: found[side] for side in args.sides})
            told = ", ".join(f"{side} {epoch['seconds']:.1f}" for side, epoch in rounds[-1].items())
            print(f"round {number + 1}: {told}", flush=True)
            write_report(output, args, processes, apart, rounds)
            for side, epoch in found.items():
                if epoch["peak"] is not None and epoch["peak"] > MOST_BYTES:
                    raise SystemExit(f"{side} took {epoch['peak'] / 1e9:.1f} GB: more than a side may take.")
    finally:
        for each in processes:
            each.end()
    print(table_of(summary_of(rounds)))


if __name__ == "__main__":
    main()
