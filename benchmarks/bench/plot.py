"""Draws the results of the benchmark: how often as long as ours each side takes, by kind of run.

python -m benchmarks.bench.plot benchmarks/results/full.json benchmarks/results/lora.json --output bench.png
"""

import argparse
import json
from pathlib import Path

NAMES = {
    "ours": "hf_llava_ft",
    "plain": "plain Trainer",
    "plain grouped": "plain Trainer, grouped",
    "trl": "TRL",
    "trl grouped": "TRL, grouped,\nno checkpointing",
    "345f9fe": "hf_llava_ft before",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    reports = [json.loads(path.read_text()) for path in args.results]
    figure, row = plt.subplots(1, len(reports), figsize=(4.2 * len(reports), 2.9), layout="constrained", squeeze=False)
    for axes, report in zip(row[0], reports, strict=True):
        sides = list(report["summary"])
        found = [report["summary"][side]["times_as_long"] for side in sides]
        medians = [each["median"] for each in found]
        errors = [[each["median"] - each["min"] for each in found], [each["max"] - each["median"] for each in found]]
        colours = ["#2563eb" if side == "ours" else "#9ca3af" for side in sides]
        bars = axes.barh([NAMES[side] for side in sides], medians, xerr=errors, color=colours, ecolor="#374151")
        axes.bar_label(bars, [f"{each:.2f}" for each in medians], padding=10, fontsize=9)
        settings = report["settings"]
        kind = "LoRA" if settings["lora"] else "full"
        axes.set_title(f"{kind}, batches of {settings['batch_size']} rows", fontsize=10)
        axes.set_xlabel("CPU seconds of an epoch, over ours", fontsize=9)
        axes.set_xlim(0, 1.25 * max(each["max"] for each in found))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.output, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
