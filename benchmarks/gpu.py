"""Everything about speed and memory that needs a GPU, in one run of some minutes.

    python benchmarks/gpu.py --output gpu.json [--sections memory attention ...] [--tiny]

Models have the sizes of LLaVA-1.5-7B and random weights, made on the device; nothing is downloaded. What is measured:

* `ceilings`: a large product of matrices and a large copy, as bounds;
* `memory`: for LoRA, projector and full training, with and without gradient checkpointing: bytes against what
  `llava-ft estimate` says, seconds of a step, tokens/s, and the share of the peak that is reached (MFU, which counts
  no operation twice; HFU, which counts what is computed again too);
* `implementations`: a step under each attention implementation, and under a mask for padding;
* `attention`: the kernels by themselves, for documents of different lengths (`attention.py`);
* `compile`: a step with each decoder layer compiled, against the same step without;
* `four_bits`: a QLoRA step, where bitsandbytes is installed;
* `uint8`: pictures as uint8 and normalised on the device, against the floats of a CPU: bits and seconds.

A section that fails is told with its error, the others still run, and the exit code is 1. `--tiny` runs all of it on
small models, also on a CPU: that shows that it works and measures nothing worth telling; memory is counted on CUDA
only. Needs torch, transformers, PEFT and accelerate; datasets and bitsandbytes may be missing.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import json
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention
import peft
import torch
import transformers
from llava_sizes import llava_1_5, tiny
from repeats import finished, seconds_in_turn
from training_step import Case, TrainingStep, states_of
from transformers import CLIPVisionConfig

from hf_llava_ft.estimate.trace import Batch
from hf_llava_ft.processing.image_processing_llava import build_image_processor
from hf_llava_ft.processing.uint8_pixels_llava import normalize_pixels
from hf_llava_ft.settings.arguments import TuningArguments

# What trains, rows of a batch, gradient checkpointing: what an H200 should hold.
CASES = [
    ("lora", 8, False),
    ("lora", 16, True),
    ("projector", 8, False),
    ("projector", 16, True),
    ("freeze_vision", 4, False),
    ("full", 8, True),
]


class Bench:
    """What the sections share: device, sizes, and how often things are repeated."""

    def __init__(self, args: argparse.Namespace):
        self.device = torch.device(args.device)
        self.tiny, self.tflops = args.tiny, args.tflops
        self.steps, self.warm_up = (2, 1) if args.tiny else (args.steps, args.warm_up)
        self.config = tiny() if args.tiny else llava_1_5(num_layers=args.num_layers)

    def case(self, train_type: str, rows: int, checkpointing: bool, **tuning) -> Case:
        # By default LoRA's rank would be twice the width of the tiny model.
        tuning |= {"lora_r": 4, "lora_alpha": 8} if self.tiny else {}
        text = 24 if self.tiny else 200
        batch = Batch(2 if self.tiny else rows, 1, text, text)
        return Case(self.config, TuningArguments(train_type=train_type, **tuning), batch, checkpointing, self.device)

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def ceilings(bench: Bench) -> dict[str, Any]:
    edge = 256 if bench.tiny else 8192
    left, right = torch.randn(2, edge, edge, device=bench.device, dtype=torch.bfloat16)
    copied = torch.empty((1 << 18) if bench.tiny else (1 << 30), device=bench.device)
    ways = {"matmul": lambda: left @ right, "copy": copied.clone}
    seconds = seconds_in_turn(ways, bench.device, 20, warm_up=3)
    return {
        "bf16_matmul_tflops": 2 * edge**3 / seconds["matmul"]["median"] / 1e12,
        "copy_tb_per_second": 2 * copied.nbytes / seconds["copy"]["median"] / 1e12,  # read and written
    }


def measured_step(bench: Bench, case: Case) -> dict[str, Any]:
    """Memory and speed of a step, beside the estimate."""
    estimate = case.estimate()
    once = case.estimate(gradient_checkpointing=False) if case.gradient_checkpointing else estimate
    step = TrainingStep(case)
    seconds, losses = step.seconds(bench.steps, bench.warm_up)
    tokens = step.inputs["input_ids"].numel()
    estimated = {"weights": estimate.states.weights, "states": states_of(estimate.states), "peak": estimate.total}
    median = seconds["median"]
    return {
        "train_type": case.tuning.train_type,
        "gradient_checkpointing": case.gradient_checkpointing,
        "batch": dataclasses.asdict(case.batch),
        "attention": case.attention,
        "estimated_bytes": estimated,
        "measured_bytes": step.measured if bench.device.type == "cuda" else None,
        "estimated_over_measured": {name: estimated[name] / step.measured[name] for name in estimated}
        if bench.device.type == "cuda"
        else None,
        "seconds": seconds,
        "rows_per_second": case.batch.size / median,
        "tokens_per_second": tokens / median,
        "mfu": once.micro_batch.operations / median / (bench.tflops * 1e12),
        "hfu": estimate.micro_batch.operations / median / (bench.tflops * 1e12),
        "losses": losses,
    }


def memory(bench: Bench) -> list[dict[str, Any]]:
    found = []
    for train_type, rows, checkpointing in CASES:
        bench.free()
        try:
            found.append(measured_step(bench, bench.case(train_type, rows, checkpointing)))
        except torch.OutOfMemoryError as error:  # that too is a finding, and the next one may fit
            case = {"train_type": train_type, "rows": rows, "gradient_checkpointing": checkpointing}
            found.append(case | {"out_of_memory": str(error).splitlines()[0]})
    return found


def implementations(bench: Bench) -> dict[str, Any]:
    step = TrainingStep(bench.case("lora", 8, False, lora_dropout=0.0))
    whole = dict(step.inputs)
    length = torch.ones_like(whole["input_ids"])
    length[0, -1] = 0  # one position of padding is enough for a mask
    variants = {
        "sdpa": ("sdpa", whole),
        "sdpa_with_a_mask": ("sdpa", whole | {"attention_mask": length}),
        "eager": ("eager", whole),
        "flash_attention_2": ("flash_attention_2", whole),
        "flex_attention": ("flex_attention", whole),
    }
    found: dict[str, Any] = {}
    runs: dict[str, Callable[[], float]] = {}
    for name, (implementation, inputs) in variants.items():

        def run(implementation=implementation, inputs=inputs) -> float:
            step.model.set_attn_implementation({"text_config": implementation})
            step.inputs = inputs
            return step()

        try:
            found[name] = {"loss": run()}
            runs[name] = run
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            found[name] = {"missing": str(error).splitlines()[0]}
            step.optimizer.zero_grad()
    for name, seconds in seconds_in_turn(runs, bench.device, bench.steps, warm_up=bench.warm_up).items():
        found[name]["seconds"] = seconds
    return found


def kernels(bench: Bench) -> dict[str, Any]:
    lengths = [24, 40, 9] if bench.tiny else [776, 640, 1203, 655, 831, 2048, 702, 1337]
    heads, width = (2, 16) if bench.tiny else (32, 128)
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    return attention.compare(lengths, heads, width, bench.device, dtype, bench.steps)


def compiled(bench: Bench) -> dict[str, Any]:
    step = TrainingStep(bench.case("lora", 8, False, lora_dropout=0.0))
    layers = step.model.get_base_model().model.language_model.layers
    with torch.no_grad():
        plain_loss = step.loss().item()
    backend = "eager" if bench.tiny else "inductor"
    for layer in layers:
        layer.compile(backend=backend)
    calls = [layer._compiled_call_impl for layer in layers]
    with torch.no_grad():
        compiled_loss = step.loss().item()
    start = finished(bench.device)
    step()
    first = finished(bench.device) - start

    def run(compiled: bool) -> None:
        for layer, call in zip(layers, calls, strict=True):
            layer._compiled_call_impl = call if compiled else None
        step()

    ways = {"plain": lambda: run(False), "compiled": lambda: run(True)}
    seconds = seconds_in_turn(ways, bench.device, bench.steps, warm_up=bench.warm_up)
    return {
        "backend": backend,
        "losses": {"plain": plain_loss, "compiled": compiled_loss},
        "first_step_seconds": first,
        "seconds": seconds,
        "times_as_fast": seconds["plain"]["median"] / seconds["compiled"]["median"],
    }


def four_bits(bench: Bench) -> dict[str, Any] | list[dict[str, Any]]:
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"missing": "bitsandbytes is not installed"}
    found = []
    for rows in (1, 8):
        bench.free()
        found.append(measured_step(bench, bench.case("qlora", rows, True, bits=4)))
    return found


def uint8(bench: Bench) -> dict[str, Any]:
    vision = CLIPVisionConfig(image_size=56 if bench.tiny else 336, patch_size=14)
    processor = build_image_processor(vision, "pad")
    generator = torch.Generator().manual_seed(0)
    shape = (4 if bench.tiny else 64, 3, vision.image_size, vision.image_size)
    levels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    floats = normalize_pixels(processor, levels)
    if bench.device.type == "cuda":
        levels, floats = levels.pin_memory(), floats.pin_memory()
    there = normalize_pixels(processor, levels.to(bench.device))
    ways = {
        "floats_sent": lambda: floats.to(bench.device, non_blocking=True),
        "uint8_sent_and_normalised": lambda: normalize_pixels(processor, levels.to(bench.device, non_blocking=True)),
    }
    return {
        "pictures": len(levels),
        "equal_bits": torch.equal(there.cpu(), floats),
        "seconds": seconds_in_turn(ways, bench.device, bench.steps, warm_up=bench.warm_up),
    }


SECTIONS: dict[str, Callable[[Bench], Any]] = {
    "ceilings": ceilings,
    "memory": memory,
    "implementations": implementations,
    "attention": kernels,
    "compile": compiled,
    "four_bits": four_bits,
    "uint8": uint8,
}


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        found |= {"name": properties.name, "memory": total, "free_before": free, "cuda": torch.version.cuda}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file, written again after each section")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small models; also on a CPU")
    parser.add_argument("--num_layers", type=int, default=32, help="of the language model")
    parser.add_argument("--steps", type=int, default=10, help="measured ones")
    parser.add_argument("--warm_up", type=int, default=3, help="steps before them")
    parser.add_argument("--tflops", type=float, default=989.0, help="peak of the device; default: H100, H200")
    args = parser.parse_args()
    if args.device == "cpu" and not args.tiny:
        parser.error("no CUDA device is there; --tiny runs on a CPU")
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if args.tiny:
        torch.set_num_threads(1)  # more have nothing to do on products this small, and wait for each other
    bench = Bench(args)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report: dict[str, Any] = {"settings": settings, "machine": machine(bench.device), "sections": {}}
    failed = False
    for name in args.sections:
        bench.free()
        start = time.perf_counter()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                report["sections"][name] = SECTIONS[name](bench)
        except Exception as error:  # the time on a GPU is short: the other sections still count
            traceback.print_exc()
            report["sections"][name], failed = {"error": f"{type(error).__name__}: {error}"}, True
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
