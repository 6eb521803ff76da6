"""How fast, and in how much memory, a sharded original checkpoint opens, beside the same weights in native form.

    python benchmarks/loading.py --output_dir runs/loading [--hidden_size 4096 --num_layers 32 --repeats 3]

Writes a LLaVA of random bfloat16 weights once in each dialect (at the default sizes LLaVA-1.5-7B, 27 GB on disk), then
opens them in turn, A B A B, each in a fresh process, which reports its seconds and its largest resident memory. Prints
one JSON object. Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from llava_sizes import llava_1_5
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

import hf_llava_ft

SHARD_SIZE = "2GB"


def write(folder: Path, hidden_size: int, num_layers: int) -> None:
    config = llava_1_5(hidden_size, num_layers, vocab_size=32000, vision_tower_name=str(folder / "tower"))
    with torch.device("meta"):
        model = hf_llava_ft.LlavaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    CLIPVisionModel(config.vision_config).save_pretrained(folder / "tower")
    model.save_pretrained(folder / "llava", checkpoint_format="llava", max_shard_size=SHARD_SIZE)
    model.save_pretrained(folder / "llava-hf", checkpoint_format="llava-hf", max_shard_size=SHARD_SIZE)


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes; getrusage would begin at its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def open_once(kind: str, folder: Path) -> None:
    """In a process of its own: opens the checkpoint, touches every weight, prints seconds and peak memory."""
    baseline = peak_memory()
    start = time.perf_counter()
    loader = hf_llava_ft.LlavaForCausalLM if kind == "llava" else LlavaForConditionalGeneration
    model = loader.from_pretrained(folder / kind, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.flatten()[:: 2048 // parameter.element_size()].sum()  # a read in every page of memory
    seconds = time.perf_counter() - start
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    peak = peak_memory() - baseline
    print(json.dumps({"seconds": seconds, "peak_over_size": peak / size, "size_gb": size / 1e9}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/loading"))
    parser.add_argument("--hidden_size", type=int, default=4096)
    parser.add_argument("--num_layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--open", choices=["llava", "llava-hf"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        open_once(args.open, args.output_dir)
        return
    if not (args.output_dir / "llava-hf" / "config.json").is_file():
        write(args.output_dir, args.hidden_size, args.num_layers)
    runs: dict[str, list[dict]] = {"llava": [], "llava-hf": []}
    for _ in range(args.repeats):
        for kind, found in runs.items():
            command = [sys.executable, __file__, "--output_dir", str(args.output_dir), "--open", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    ratios = [
        ours["seconds"] / theirs["seconds"] for ours, theirs in zip(runs["llava"], runs["llava-hf"], strict=True)
    ]
    print(
        json.dumps(
            {
                "size_gb": runs["llava"][0]["size_gb"],
                "seconds_ratio_original_to_native": {
                    "median": statistics.median(ratios),
                    "min": min(ratios),
                    "max": max(ratios),
                },
                "peak_memory_over_size": {
                    kind: max(run["peak_over_size"] for run in found) for kind, found in runs.items()
                },
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
