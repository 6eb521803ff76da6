"""How soon a small LLaVA sees: answers that are right over CPU seconds of training, here and with other trainers.

    OMP_NUM_THREADS=1 python -m benchmarks.learning [--pictures 12000 --every 100] [--sides ours plain trl]

The set and the model are those of `llava-ft shapes --learn`; all sides begin with the same random weights, and train
the same rows with the same settings, ours with its own defaults else. Each is a process of its own with one thread,
and they take turns, `--every` steps each. At each stop questions about held-out pictures are answered, which is not
counted. A side is done when `--enough` of the answers are right. Written are `results/learning.json` and a picture.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.bench.__main__ import check_equal, processor_name
from benchmarks.bench.environments import CHECKOUT, environment_of
from benchmarks.bench.process import Process

SIDES = ("ours", "plain", "trl")
NAMES = {"ours": "hf_llava_ft", "plain": "plain Trainer", "trl": "TRL SFTTrainer"}


def started(side: str, args: argparse.Namespace) -> Process:
    python, code = environment_of(side, CHECKOUT / "build" / "bench")
    command = [str(python), str(Path(__file__).with_name("side.py")), "--side", side]
    command += ["--folder", str(args.folder.resolve()), "--every", str(args.every)]
    return Process(side, command, code, args.folder)


def write_start(folder: Path, pictures: int) -> None:
    """The set, and `captions` and `questions`: the model of random weights with the template of each stage."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    from hf_llava_ft.checkpoints.compose import compose_from_parts, save_composed
    from hf_llava_ft.quickstart.learning import write_parts
    from hf_llava_ft.quickstart.shapes import write_shapes
    from hf_llava_ft.settings.composition import Composition

    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    write_shapes(folder / "shapes", pictures, 300, 42)
    tower, language = write_parts(folder, folder / "shapes", 42)
    for stage, version in (("captions", "plain"), ("questions", "chatml")):
        parts = (AutoModel.from_pretrained(tower), AutoModelForCausalLM.from_pretrained(language))
        how = Composition(version=version, vision_feature_layer=-1, image_aspect_ratio="square", seed=42)
        composed = compose_from_parts(*parts, AutoTokenizer.from_pretrained(language), how)
        save_composed(*composed, folder / stage)


def share_right(model_dir: str, processor_dir: Path, data_dir: Path, questions: int) -> float:
    """Of questions about held-out pictures, by the model in `model_dir`."""
    import torch

    from hf_llava_ft.answering.batches import Question, answer_all
    from hf_llava_ft.checkpoints.opening import load_model, load_processor

    processor = load_processor(str(processor_dir))
    model = load_model(model_dir, processor).eval()
    rows = json.loads((data_dir / "heldout_pictures.json").read_text())[:questions]
    asked, expected = [], []
    for row in rows:
        text = row["conversations"][0]["value"].replace("<image>\n", "")
        content = [{"type": "image"}, {"type": "text", "text": text}]
        asked.append(
            Question([{"role": "user", "content": content}], [{"path": str(data_dir / "images" / row["image"])}])
        )
        expected.append(row["conversations"][1]["value"])
    with torch.inference_mode():
        said = dict(answer_all(model, processor, asked, batch_size=64, max_new_tokens=8))
    return sum(said[place].text == wanted for place, wanted in enumerate(expected)) / len(expected)


def seconds_to(points: list[tuple[float, float]], share: float) -> float | None:
    """CPU seconds at which the curve of (seconds, share) first reaches `share`, between two stops on the line."""
    before = (0.0, 0.0)
    for point in points:
        if point[1] >= share:
            rise = point[1] - before[1]
            part = (share - before[1]) / rise if rise else 1.0
            return before[0] + part * (point[0] - before[0])
        before = point
    return None


def draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for side, colour in zip(report["curves"], ("#2563eb", "#d97706", "#6b7280"), strict=False):
        points = report["curves"][side]
        axes.plot(*zip(*points, strict=True), label=NAMES[side], color=colour, marker="o", markersize=3)
    axes.axhline(report["settings"]["enough"], color="#9ca3af", linewidth=0.8, linestyle=":")
    axes.set_xlabel("CPU seconds of training, both stages")
    axes.set_ylabel("answers about held-out pictures\nthat are right")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--pictures", type=int, default=12000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--enough", type=float, default=0.9)
    parser.add_argument("--folder", type=Path, default=CHECKOUT / "build" / "learning")
    parser.add_argument("--output", type=Path, default=CHECKOUT / "benchmarks" / "results" / "learning.json")
    parser.add_argument("--picture", type=Path, default=CHECKOUT / "docs" / "images" / "learning_curve.png")
    args = parser.parse_args()
    write_start(args.folder, args.pictures)
    waiting = {side: started(side, args) for side in args.sides}
    report: dict[str, Any] = {
        "settings": {name: getattr(args, name) for name in ("pictures", "every", "questions", "enough")},
        "machine": {"processor": processor_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
        "versions": {side: each.versions for side, each in waiting.items()},
        "curves": {side: [] for side in waiting},
    }
    try:
        digests = {}
        for side, each in waiting.items():
            digests[side] = {key: (text, [pixels]) for key, (text, pixels) in each.ask("digest").items()}
        check_equal(digests)
        print("Equal ids, labels and pixels on all sides.", flush=True)
        while waiting:
            for side, each in list(waiting.items()):
                stop = each.ask("go")
                if stop.get("done"):
                    each.end()
                    del waiting[side]
                    continue
                if stop["stage"] == "captions":  # it cannot be asked yet
                    print(f"{side}: {stop['seconds']:.0f} s, captions", flush=True)
                    report["captions_seconds"] = report.get("captions_seconds", {}) | {side: stop["seconds"]}
                    continue
                folder = args.folder
                right = share_right(stop["model"], folder / "questions", folder / "shapes", args.questions)
                curve = report["curves"][side]
                if not curve:
                    curve.append((report["captions_seconds"][side], 0.0))
                curve.append((stop["seconds"], right))
                print(f"{side}: {stop['seconds']:.0f} s, {right:.1%} right", flush=True)
                if right >= args.enough:
                    each.end()
                    del waiting[side]
                report["seconds_to_enough"] = {
                    name: seconds_to(points, args.enough) for name, points in report["curves"].items()
                }
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    finally:
        for each in waiting.values():
            each.end()
    draw(report, args.picture)
    found = report["seconds_to_enough"]
    for side, seconds in found.items():
        if seconds is None:
            print(f"{NAMES[side]}: did not come to {args.enough:.0%}")
        else:
            ratio = "" if found[args.sides[0]] is None else f", {seconds / found[args.sides[0]]:.2f} times as long"
            print(f"{NAMES[side]}: {args.enough:.0%} right after {seconds:.0f} CPU seconds{ratio}")


if __name__ == "__main__":
    sys.exit(main())
