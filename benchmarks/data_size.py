"""What a dataset costs before the first step, from 1,000 rows to the 665,298 of mix665k, beside the original's way.

    python benchmarks/data_size.py --output_dir /tmp/size [--rows 1000 10000 100000 665298 --token_rows 100000]

For each size it writes a set (`synthetic_665k.py`, once), and then in fresh processes: opens it for the first time and
again, computes the sampler's lengths and both kinds of order, reads rows at random, and counts tokens for the first
time and again (up to `--token_rows` rows); and, as the original does, loads the whole JSON as a list and computes the
lengths from that. Writes data_size.json and data_size.png beside this file (or to --results_dir) and prints a table.
Linux only. Files are in the page cache, as they are after a download.

Memory is the process's own over what it had after its imports: `RssAnon`, which the system cannot take back, at its
peak. Pages of mapped files are told apart (`RssFile`): they are shared by all processes of a machine, and the system
drops them when memory is wanted elsewhere. CPU seconds include those of worker processes, whose own memory is not
counted: they are gone before training begins.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from transformers import CLIPVisionConfig

import hf_llava_ft
from hf_llava_ft.data.builder import load_llava_json, modality_lengths
from hf_llava_ft.data.lengths import token_lengths
from hf_llava_ft.data.sampler import ModalityLengthSampler, OriginalOrderSampler
from hf_llava_ft.data.schema import count_words
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
_BATCH_SIZE, _WORLD_SIZE = 16, 8  # of LLaVA-1.5's tuning
_ROWS_READ = 5_000


class Meter:
    """Seconds, CPU seconds and peak memory of what this process does, over what it had before."""

    def __init__(self):
        self.figures: dict[str, float] = {}
        self._baseline = resident_bytes()
        self.peak = self._baseline
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def timed(self, name: str, call: Callable):
        start, cpu = time.perf_counter(), cpu_seconds()
        result = call()
        self.figures[f"{name}_seconds"] = time.perf_counter() - start
        self.figures[f"{name}_cpu_seconds"] = cpu_seconds() - cpu
        return result

    def finish(self) -> dict[str, float]:
        self._done.set()
        self._watcher.join()
        anonymous, mapped = resident_bytes()
        self.figures["peak_mb"] = (self.peak[0] - self._baseline[0]) / 1e6
        self.figures["memory_mb"] = (anonymous - self._baseline[0]) / 1e6
        self.figures["mapped_mb"] = (mapped - self._baseline[1]) / 1e6
        return self.figures

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = tuple(map(max, self.peak, resident_bytes()))


def resident_bytes() -> tuple[int, int]:
    """(anonymous, of files) memory of this process."""
    status = Path("/proc/self/status").read_text()
    anonymous, mapped = (int(status.split(f"{name}:")[1].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return anonymous, mapped


def cpu_seconds() -> float:
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_ours(folder: Path, moment: str) -> dict[str, float]:
    meter = Meter()
    data = meter.timed(moment, lambda: open_set(folder))
    if moment == "again":
        lengths = meter.timed("modality_lengths", lambda: modality_lengths(data))
        ours = ModalityLengthSampler(lengths, _BATCH_SIZE, _WORLD_SIZE, pool_steps=50)
        meter.timed("order", lambda: list(ours))
        original = OriginalOrderSampler(
            len(data), 0, lengths=lengths, batch_size=_BATCH_SIZE, num_processes=_WORLD_SIZE
        )
        meter.timed("original_order", lambda: list(original))
        chosen = np.random.default_rng(0).integers(0, len(data), _ROWS_READ).tolist()
        meter.timed("read", lambda: [data[index]["messages"] for index in chosen])
    return meter.finish()


def measure_tokens(folder: Path) -> dict[str, float]:
    data = open_set(folder)
    processor = hf_llava_ft.LlavaProcessor.build(
        load_tokenizer(GOLDEN / "tokenizer_llama"),
        CLIPVisionConfig.from_pretrained(GOLDEN / "tiny-clip"),
        version="v1",
    )
    meter = Meter()
    meter.timed("tokens_first", lambda: token_lengths(data, processor))
    meter.timed("tokens_again", lambda: token_lengths(data, processor))
    return meter.finish()


def measure_original(folder: Path) -> dict[str, float]:
    """The whole list in memory, as in the original's LazySupervisedDataset, and its two measures of length."""
    meter = Meter()
    with open(folder / "data.json") as file:
        rows = meter.timed("first", lambda: json.load(file))
    meter.timed("modality_lengths", lambda: [count_words(row) * (1 if "image" in row else -1) for row in rows])
    return meter.finish()


def open_set(folder: Path) -> datasets.Dataset:
    return load_llava_json(folder / "data.json", folder / "images", folder / "cache")


def in_fresh_process(*args: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *args], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, num_rows: int, count_tokens: bool) -> dict:
    if not (folder / "data.json").exists():
        writer = Path(__file__).with_name("synthetic_665k.py")
        subprocess.run([sys.executable, writer, "--output_dir", folder, "--rows", str(num_rows)], check=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    load_before = os.getloadavg()[0]
    result = {
        "rows": num_rows,
        "json_mb": (folder / "data.json").stat().st_size / 1e6,
        "original": in_fresh_process("--measure", "original", "--folder", str(folder)),
        "first": in_fresh_process("--measure", "first", "--folder", str(folder)),
        "again": in_fresh_process("--measure", "again", "--folder", str(folder)),
    }
    if count_tokens:
        result["tokens"] = in_fresh_process("--measure", "tokens", "--folder", str(folder))
    result["load_average"] = [load_before, os.getloadavg()[0]]
    return result


def print_table(results: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Seconds (CPU seconds); MB over the process after its imports")
    table.add_column("")
    for result in results:
        table.add_column(f"{result['rows']:,} rows", justify="right")
    lines = [
        ("load, first time", "first", "first"),
        ("load, again", "again", "again"),
        ("modality lengths", "again", "modality_lengths"),
        ("order, ours", "again", "order"),
        ("order, the original's", "again", "original_order"),
        (f"read {_ROWS_READ:,} rows at random", "again", "read"),
        ("token lengths, first time", "tokens", "tokens_first"),
        ("token lengths, again", "tokens", "tokens_again"),
        ("original: json.load", "original", "first"),
        ("original: modality lengths", "original", "modality_lengths"),
    ]
    for title, part, name in lines:
        cells = [result.get(part, {}) for result in results]
        table.add_row(
            title,
            *(f"{cell[f'{name}_seconds']:.2f} ({cell[f'{name}_cpu_seconds']:.2f})" if cell else "-" for cell in cells),
        )
    for title, part, name in [
        ("memory, loading first: peak", "first", "peak_mb"),
        ("memory, loaded and read: peak", "again", "peak_mb"),
        ("  and pages of memory-mapped files", "again", "mapped_mb"),
        ("memory, the original's list: peak", "original", "peak_mb"),
    ]:
        table.add_row(title, *(f"{result[part][name]:.0f} MB" for result in results))
    table.add_row("load average", *("{:.1f} to {:.1f}".format(*result["load_average"]) for result in results))
    Console(width=120).print(table)


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(11, 5.2))
    for title, part, name, style in [
        ("token lengths, first time", "tokens", "tokens_first", "o-C4"),
        ("load, first time", "first", "first", "o-C0"),
        ("original: json.load and lengths", "original", None, "s--C3"),
        ("load, again", "again", "again", "o-C2"),
        ("modality lengths", "again", "modality_lengths", "o-C1"),
        ("order", "again", "order", "o-C5"),
    ]:
        measured = [result for result in results if part in result]
        names = [name] if name else ["first", "modality_lengths"]
        costs = [
            sum(result[part][f"{each}_cpu_seconds"] for each in names) / result["rows"] * 1e6 for result in measured
        ]
        time_axes.plot([result["rows"] for result in measured], costs, style, label=title)
    time_axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="CPU microseconds per row", title="Cost per row")
    rows = [result["rows"] for result in results]
    for title, part, style in [
        ("original: the list", "original", "s--C3"),
        ("ours, loading first", "first", "o-C0"),
        ("ours, loaded and read", "again", "o-C2"),
    ]:
        memory_axes.plot(rows, [result[part]["peak_mb"] for result in results], style, label=title)
    memory_axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="MB at the peak", title="Memory of the process")
    for axes in (time_axes, memory_axes):
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/data_size"))
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 665_298])
    parser.add_argument("--token_rows", type=int, default=100_000)
    parser.add_argument("--measure", choices=["first", "again", "tokens", "original"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    if args.measure == "tokens":
        print(json.dumps(measure_tokens(args.folder)))
    elif args.measure == "original":
        print(json.dumps(measure_original(args.folder)))
    elif args.measure:
        print(json.dumps(measure_ours(args.folder, args.measure)))
    else:
        results = [measure(args.output_dir / str(rows), rows, rows <= args.token_rows) for rows in args.rows]
        machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
        figures = {"machine": machine, "sizes": results}
        args.results_dir.mkdir(parents=True, exist_ok=True)
        (args.results_dir / "data_size.json").write_text(json.dumps(figures, indent=2) + "\n")
        plot(results, args.results_dir / "data_size.png")
        print_table(results)


if __name__ == "__main__":
    main()
