"""What settings require of the machine."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import is_torch_xla_available
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_torch_bf16_gpu_available,
    is_torch_tf32_available,
)

from hf_llava_ft.errors import UserError

_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml"}


def workers_by_cores() -> int:
    """Processes that open pictures while the GPU of this process computes: half of its share of the cores, 8 at most;
    none where that is not one, or the Trainer and they would take turns."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // 2)


def machine_problems(settings: dict[str, Any]) -> list[str]:
    """
    What this machine lacks for `settings`, by name, one sentence each; an empty list if nothing.

    A launcher's processes all see the same, so that all of them stop.
    """
    problems = []
    on_gpu = not settings["use_cpu"]
    if settings["bf16"] and on_gpu and not is_torch_bf16_gpu_available() and not is_torch_xla_available():
        problems.append(
            "--bf16 True needs a GPU that computes in bfloat16 (NVIDIA: Ampere or newer) and there is none here: use "
            "--fp16 True on an older one, or --use_cpu True."
        )
    if settings["fp16"] and not (on_gpu and torch.accelerator.is_available()):
        problems.append(
            "--fp16 True needs a GPU, and the Trainer would compute in float32 without one: use --bf16 True, which a "
            "CPU has too, with --use_cpu True."
        )
    deepspeed = settings["deepspeed"]
    if isinstance(deepspeed, str) and deepspeed and not deepspeed.startswith("{"):
        if not Path(deepspeed).is_file():
            problems.append(f"--deepspeed {deepspeed}: there is no such file; ready ones are in examples/deepspeed.")
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        problems.append("--deepspeed needs the package: pip install 'hf-llava-ft[deepspeed]'.")
    if settings["bits"] < 16 and importlib.util.find_spec("bitsandbytes") is None:
        problems.append(f"--bits {settings['bits']} needs bitsandbytes: pip install 'hf-llava-ft[qlora]'.")
    try:
        check_attention(settings["attn_implementation"])
    except UserError as error:
        problems.append(error.sentence)
    return problems + _missing_reporters(settings["report_to"])


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, or in main memory for a CPU; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found) * 1024


def check_attention(attn_implementation: str) -> None:
    """
    Raises:
        UserError: if FlashAttention is asked for and not there, naming what to install.
    """
    available = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if attn_implementation in available and not available[attn_implementation]():
        raise UserError(
            f"--attn_implementation {attn_implementation} needs the flash-attn package and an NVIDIA GPU: "
            f"pip install 'hf-llava-ft[flash-attn]' --no-build-isolation, or use --attn_implementation sdpa."
        )


def _missing_reporters(report_to: str | list[str] | None) -> list[str]:
    names = [report_to] if isinstance(report_to, str) else report_to or []
    available = get_available_reporting_integrations()
    problems = []
    for name in names:
        if name in ("all", "none") or name in available:
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            problems.append(f"--report_to {name} is unknown; known: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}.")
        else:
            package = _PACKAGES.get(name, name)
            problems.append(f"--report_to {name}: it is not installed: pip install {package}, or --report_to none.")
    return problems


def without_missing_tf32(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` without `tf32` where the device has none: float32 products are computed exactly there."""
    return {**settings, "tf32": None} if settings["tf32"] and not is_torch_tf32_available() else settings


def has_bf16_gpu() -> bool:
    """Whether there is a GPU that computes in bfloat16."""
    return torch.cuda.is_available() and is_torch_bf16_gpu_available()


def settles_precision(use_cpu: bool, deepspeed: Any) -> bool:
    """Whether the machine, the launcher or DeepSpeed's settings leave nothing to choose of what is computed in."""
    if use_cpu or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":  # accelerate launch --mixed_precision
        return True
    return deepspeed is not None and not follows_bf16(deepspeed)


def follows_bf16(deepspeed: Any) -> bool:
    """Whether DeepSpeed's settings, a file, JSON or a dictionary, leave it to --bf16 in what is computed."""
    try:
        if isinstance(deepspeed, str):
            text = deepspeed if deepspeed.startswith("{") else Path(deepspeed).read_text(encoding="utf-8")
            deepspeed = json.loads(text)
        return deepspeed["bf16"]["enabled"] == "auto"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def is_first_process() -> bool:
    """Whether this is the process that speaks, by the variables that every launcher sets."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) <= 0
