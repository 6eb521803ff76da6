"""Training with a frozen tower that sees a picture as often as it is asked about, once in a batch, and never again.

    OMP_NUM_THREADS=1 python -m benchmarks.vision_cache [--pairs 8 --rows 64 --pictures 32 --batch_size 8]

The language model is small, 4 layers of width 256 behind a tower of 8 layers of width 384, since before a large one a
tower costs next to nothing; `--sizes` are others.

Each side takes an epoch of the same rows through a `LlavaTrainer` with LoRA, JPEGs read and optimiser steps included,
imports and loading left out. `kept` reads what an epoch before has kept. The sides come in turn, one thread each, and
what is compared is processor time. Printed are the pictures that the tower saw, median, least and greatest of the
ratios of the pairs, and the losses, which have to be equal.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from benchmarks.bench import workload
from hf_llava_ft import LlavaTrainer, LlavaTrainingArguments, load_llava_json, with_tuning
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.settings.arguments import TuningArguments

SIDES = ("each place", "once a batch", "first epoch kept", "kept")


class Clock(TrainerCallback):
    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = time.process_time()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.process_time() - self.begin


def write_workload(folder: Path, num_rows: int, num_pictures: int, sizes: list[int]) -> None:
    """Rows that all have a picture, `num_pictures` different ones."""
    rows = workload.write_rows(folder, 5 * num_rows, random.Random(0), longest=80)
    rows = [row for row in rows if "image" in row][:num_rows]
    for number, row in enumerate(rows):
        row["image"] = rows[number % num_pictures]["image"]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    workload.SIZES[False] = tuple(sizes)
    texts = [turn["value"] for row in rows for turn in row["conversations"]]
    workload.write_model(folder / "model", texts, tiny=False, seed=0)


def epoch(folder: Path, side: str, batch_size: int, seed: int) -> tuple[float, float, int]:
    """Seconds, loss, and how many pictures the tower saw."""
    set_seed(seed)
    processor = load_processor(str(folder / "model"))
    model = with_tuning(
        load_model(str(folder / "model"), processor), TuningArguments(lora_r=64), str(folder / "model")
    )
    cache = folder / "cache" if side == "kept" else folder / f"cache-{seed}" if side == "first epoch kept" else None
    args = LlavaTrainingArguments(
        output_dir=str(folder / "run"),
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=1,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=seed,
        cache_vision_features=cache and str(cache),
    )
    rows = load_llava_json(folder / "rows.json", folder / "images")
    trainer = LlavaTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)
    if side == "each place":
        trainer.data_collator = LlavaCollator(processor, uint8_pixels=True)
    clock, seen = Clock(), 0

    def count(module: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
        nonlocal seen
        seen += len(given[0])

    trainer.add_callback(clock)
    trainer._unwrapped_model.model.vision_tower.register_forward_pre_hook(count)
    loss = trainer.train().training_loss
    return clock.seconds, loss, seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs=4,
        default=[256, 4, 384, 8],
        help="width and layers of the language model, then of the tower",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ratios: dict[str, list[float]] = {side: [] for side in SIDES[1:]}
    seen: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_workload(folder, options.rows, options.pictures, options.sizes)
        epoch(folder, "kept", options.batch_size, 0)
        for pair in range(options.pairs):
            found = {}
            for side in SIDES if pair % 2 else reversed(SIDES):
                found[side] = epoch(folder, side, options.batch_size, pair)
                seen[side] = found[side][2]
            for side in SIDES[1:]:
                ratios[side].append(found["each place"][0] / found[side][0])
                if abs(found[side][1] - found["each place"][1]) > 1e-4:
                    raise SystemExit(f"{side}: loss {found[side][1]} instead of {found['each place'][1]}")
            print(", ".join(f"{side} {found[side][0]:.1f} s, loss {found[side][1]:.5f}" for side in SIDES), flush=True)
    for side in SIDES:
        line = f"{side}: the tower saw {seen[side]} pictures"
        if side in ratios:
            each = ratios[side]
            line += f", {statistics.median(each):.2f} times as fast ({min(each):.2f} to {max(each):.2f})"
        print(line)


if __name__ == "__main__":
    main()
