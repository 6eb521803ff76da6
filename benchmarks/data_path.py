"""Rows of a LLaVA JSON before the first step, beside an earlier build: opened, counted in tokens, checked.

    python benchmarks/data_path.py --earlier FOLDER --output_dir /tmp/rows [--rows 10000 100000 --rounds 3 --no_check]

FOLDER holds the files of commit 345f9fe (`git worktree add FOLDER 345f9fe`), which run in the same environment. For
each size a set is written (`synthetic_665k.py`, once). Then, each in a fresh process and the sides in turn, the set is
opened for the first time, opened again, and its tokens are counted; after the rounds this build checks it twice, with
a kept result as `llava-ft check` does. Prints a table, and writes results/data_path.json after each size, where other
sizes stay as they were. Linux only.

CPU seconds are those of all processes together; imports are left out, and told apart. Memory is a run of its own:
`Pss_Anon` of the process and its workers at its peak, over that of the process after its imports. Pages of files are
not in it, which the system drops when memory is wanted elsewhere.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "tests" / "golden"
SIDES = ("ours", "345f9fe")
LIBRARIES = ("datasets", "pyarrow", "tokenizers", "transformers", "numpy", "pillow")


def cpu_seconds() -> float:
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# In the process that is measured


def measure(what: str, folder: Path) -> dict[str, float]:
    """Does one thing; returns its CPU seconds, and those of the imports before it."""
    import datasets

    from hf_llava_ft.data.builder import load_llava_json

    datasets.disable_progress_bars()
    files = folder / "data.json", folder / "images", folder / "cache"
    call: Callable[[], object] = lambda: load_llava_json(*files)  # noqa: E731
    if what == "tokens":
        from hf_llava_ft.data.lengths import token_lengths

        rows, processor = load_llava_json(*files), build_processor()
        call = lambda: token_lengths(rows, processor)  # noqa: E731
    elif what in ("check", "check_again"):
        call = checking(*files)
    before, started = cpu_seconds(), time.perf_counter()
    call()
    took = {"cpu": cpu_seconds() - before, "seconds": time.perf_counter() - started, "cpu_before": before}
    return took


def measure_memory(folder: Path) -> dict[str, float]:
    import datasets

    from hf_llava_ft.data.builder import load_llava_json

    datasets.disable_progress_bars()
    baseline = sum(anonymous_bytes())
    peak, done = [baseline], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak.append(max(peak.pop(), sum(anonymous_bytes())))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    load_llava_json(folder / "data.json", folder / "images", folder / "cache")
    done.set()
    watcher.join()
    return {"peak_mb": (peak[0] - baseline) / 1e6}


def anonymous_bytes() -> Iterator[int]:
    """Of this process and its children, what is shared between them divided among them."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for process in ("self", *children):
        try:
            memory = Path(f"/proc/{process}/smaps_rollup").read_text()
            yield int(memory.split("Pss_Anon:")[1].split()[0]) * 1024
        except (OSError, IndexError):  # it has just ended
            pass


def build_processor():
    from transformers import CLIPVisionConfig

    import hf_llava_ft
    from hf_llava_ft.processing.tokenizer_llava import load_tokenizer

    tower = CLIPVisionConfig.from_pretrained(GOLDEN / "tiny-clip")
    return hf_llava_ft.LlavaProcessor.build(load_tokenizer(GOLDEN / "tokenizer_llama"), tower, version="v1")


def checking(data: Path, images: Path, cache: Path) -> Callable[[], object]:
    """As `llava-ft check --model` does it."""
    from hf_llava_ft.checking.check import check_data
    from hf_llava_ft.checking.kept_checks import KeptCheck
    from hf_llava_ft.data.formats import open_source

    processor = build_processor()

    def check() -> object:
        sources = open_source(data, images)
        kept = KeptCheck(cache, sources, processor, longest=4096, batch_size=16)
        return kept.load() or check_data(sources, processor, longest=4096, batch_size=16, kept=kept)

    return check


# In the process that starts them


def in_fresh_process(what: str, folder: Path, code: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", what, "--output_dir", str(folder)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(code)}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def folder_of(side: str, set_folder: Path) -> Path:
    """The set again, with a cache of its own."""
    folder = set_folder / side
    folder.mkdir(exist_ok=True)
    for name in ("data.json", "images"):
        if not (folder / name).exists():
            (folder / name).symlink_to(set_folder / name)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return folder


def measure_size(set_folder: Path, num_rows: int, earlier: Path, rounds: int, with_check: bool) -> dict:
    set_folder = set_folder.resolve()
    if not (set_folder / "data.json").exists():
        writer = [sys.executable, HERE / "synthetic_665k.py", "--output_dir", set_folder, "--rows", str(num_rows)]
        subprocess.run(writer, check=True)
    code = dict(zip(SIDES, (HERE.parent, earlier.resolve()), strict=True))
    result: dict = {"rows": num_rows, "json_mb": (set_folder / "data.json").stat().st_size / 1e6, "rounds": []}
    result["load_average"] = [os.getloadavg()[0]]
    for number in range(rounds):
        one: dict = {}
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            folder = folder_of(side, set_folder)
            one[side] = {what: in_fresh_process(what, folder, code[side]) for what in ("first", "again", "tokens")}
            print(num_rows, side, {what: round(took["cpu"], 2) for what, took in one[side].items()}, file=sys.stderr)
        result["rounds"].append(one)
    folder = folder_of(SIDES[0], set_folder)
    if with_check:
        result["check"] = in_fresh_process("check", folder, code[SIDES[0]])
        result["check_again"] = in_fresh_process("check_again", folder, code[SIDES[0]])
    result["memory"] = in_fresh_process("memory", folder_of(SIDES[0], set_folder), code[SIDES[0]])
    result["load_average"].append(os.getloadavg()[0])
    shutil.rmtree(folder / "cache")
    return result


def ratio(result: dict, what: str) -> float:
    """Of CPU seconds: of ours over the earlier build's in the same round, the median of the rounds; or of checks."""
    if what == "check_again":
        return result["check_again"]["cpu"] / result["check"]["cpu"]
    ours, theirs = SIDES
    return statistics.median(one[ours][what]["cpu"] / one[theirs][what]["cpu"] for one in result["rounds"])


def print_table(results: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="CPU seconds, this build / 345f9fe: the median of the rounds, and the ratio")
    table.add_column("")
    for result in results:
        table.add_column(f"{result['rows']:,} rows", justify="right")

    def seconds(result: dict, side: str, what: str) -> float:
        return statistics.median(one[side][what]["cpu"] for one in result["rounds"])

    for title, what in (("first opening", "first"), ("opened again", "again"), ("token lengths", "tokens")):
        cells = []
        for result in results:
            ours, theirs = (seconds(result, side, what) for side in SIDES)
            cells.append(f"{ours:.2f} / {theirs:.2f} = {ratio(result, what):.3f}")
        table.add_row(title, *cells)
        costs = [f"{seconds(result, SIDES[0], what) / result['rows'] * 1e6:.1f} us" for result in results]
        table.add_row("  a row, this build", *costs)
    checks = [
        (f"{result['check']['cpu']:.2f}", f"{result['check_again']['cpu']:.2f} = {ratio(result, 'check_again'):.3f}")
        if "check" in result
        else ("-", "-")
        for result in results
    ]
    table.add_row("check", *(first for first, _ in checks))
    table.add_row("check again, of the first", *(again for _, again in checks))
    table.add_row("memory of the first opening", *(f"{result['memory']['peak_mb']:.0f} MB" for result in results))
    table.add_row("load average", *("{:.1f} to {:.1f}".format(*result["load_average"]) for result in results))
    Console(width=140).print(table)


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/data_path"))
    parser.add_argument("--earlier", type=Path, help="files of commit 345f9fe")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "data_path.json")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no_check", action="store_true", help="leave out the two checks")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        found = measure_memory(args.output_dir) if args.measure == "memory" else measure(args.measure, args.output_dir)
        print(json.dumps(found))
        return
    if args.earlier is None:
        parser.error("--earlier is the folder of the build to compare with")
    known = json.loads(args.results.read_text())["sizes"] if args.results.exists() else []
    results = {result["rows"]: result for result in known}
    for num_rows in args.rows:
        folder = args.output_dir / str(num_rows)
        results[num_rows] = measure_size(folder, num_rows, args.earlier, args.rounds, not args.no_check)
        results[num_rows]["machine"] = machine()
        args.results.parent.mkdir(parents=True, exist_ok=True)
        sizes = [results[rows] for rows in sorted(results)]
        args.results.write_text(json.dumps({"sizes": sizes}, indent=2) + "\n")
    print_table(sizes)


if __name__ == "__main__":
    main()
