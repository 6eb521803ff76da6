"""Where the time of our steps goes, in the workload of the benchmark: self CPU time of PyTorch's operations, by kind.

    OMP_NUM_THREADS=1 python -m benchmarks.bench.profile_step [--lora] [--batch_size 4] [--picture step.png]

Two steps warm up and six are profiled. `--picture` draws what is printed, and what was drawn there before of the other
kind of run stays beside it (`step.json`).
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from benchmarks.bench.environments import CHECKOUT
from benchmarks.bench.workload import SIZES, VOCABULARY, write_workload

WARM_UP, STEPS = 2, 6
RANK = 64
KINDS = {
    "linear layers of the language model": "#2563eb",
    "LoRA": "#60a5fa",
    "head and loss": "#d97706",
    "attention": "#059669",
    "optimiser and clipping": "#7c3aed",
    "vision tower": "#db2777",
    "reading rows": "#ca8a04",
    "dropout": "#0891b2",
    "everything else": "#9ca3af",
}


class Profiled(TrainerCallback):
    """Profiles the steps behind the warm-up, and ends the run."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self.profile.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP + STEPS:
            self.profile.__exit__(None, None, None)
            control.should_training_stop = True


def kind_of(name: str, shapes: Iterable[Any]) -> str:
    """Of an operation, by its name and the shapes of what it is given."""
    widths = {size for shape in shapes if isinstance(shape, list) for size in shape if isinstance(size, int)}
    tower_width = SIZES[False][2]
    if "DataLoader" in name:
        return "reading rows"
    if "Optimizer" in name or "adamw" in name or name in ("aten::linalg_vector_norm", "aten::_foreach_norm"):
        return "optimiser and clipping"
    if widths & {VOCABULARY, VOCABULARY + 1} or "softmax" in name:
        return "head and loss"
    if "bernoulli" in name or "drop" in name.lower():
        return "dropout"
    if widths & {tower_width, 4 * tower_width} or "conv" in name:
        return "vision tower"
    if "scaled_dot_product" in name:
        return "attention"
    if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
        return "LoRA" if RANK in widths else "linear layers of the language model"
    return "everything else"


def shares_of(found: Any) -> dict[str, float]:
    """Of the kinds, in parts of 1."""
    spent = dict.fromkeys(KINDS, 0.0)
    for event in found.key_averages(group_by_input_shape=True):
        spent[kind_of(event.key, event.input_shapes)] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: spent[kind] / total for kind in KINDS}


def draw(shares: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.75 * len(shares)), layout="constrained")
    for kind, colour in KINDS.items():
        before = [sum(list(each.values())[: list(KINDS).index(kind)]) for each in shares.values()]
        parts = [each[kind] for each in shares.values()]
        bars = axes.barh(list(shares), parts, left=before, color=colour, label=kind, height=0.6)
        labels = [f"{part:.0%}" if part >= 0.035 else "" for part in parts]
        axes.bar_label(bars, labels, label_type="center", color="white", fontsize=8)
    axes.set_xlim(0, 1)
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False)
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=CHECKOUT / "build" / "bench_profile")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    write_workload(args.folder, 64, tiny=False)
    sys.path.insert(0, str(Path(__file__).parent))  # as `side.py` finds its neighbour when it is run
    import side

    torch.set_num_threads(1)
    trainer = side.Ours(
        argparse.Namespace(side="ours", folder=args.folder, batch_size=args.batch_size, lora=args.lora, seed=0)
    ).trainer()
    profiled = Profiled()
    trainer.add_callback(profiled)
    trainer.train()
    name = "LoRA" if args.lora else "full"
    shares = shares_of(profiled.profile)
    for kind, share in shares.items():
        print(f"{kind:38}{share:6.1%}")
    if args.picture is not None:
        kept = args.picture.with_suffix(".json")
        drawn = json.loads(kept.read_text()) if kept.is_file() else {}
        drawn[name] = {kind: round(share, 4) for kind, share in shares.items()}
        kept.write_text(json.dumps(drawn, indent=2) + "\n", encoding="utf-8")
        draw(drawn, args.picture)


if __name__ == "__main__":
    main()
