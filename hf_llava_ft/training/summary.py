"""`train_summary.json`: what a run was told, what it ran on, what it trained, and how it went."""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterable
from enum import Enum
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerState, TrainingArguments

from hf_llava_ft.checkpoints.run_files import SUMMARY_FILE
from hf_llava_ft.data.formats import Source
from hf_llava_ft.settings.resolved import SECRET, default_of
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.throughput import Counts
from hf_llava_ft.training.tuning import TrainedPart, learning_rate_of
from hf_llava_ft.whole_files import write_atomically

_PACKAGES = (
    *("hf-llava-ft", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("pillow", "deepspeed", "bitsandbytes", "flash-attn"),
)
# Of transformers' settings, those that say how it was trained even where nothing was said.
_ALWAYS_SHOWN = frozenset(
    ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate")
    + ("lr_scheduler_type", "warmup_steps", "optim", "seed")
)
# A set with its pictures inside may have a terabyte: of a file past this size only its ends are read.
_MAX_BYTES_READ = 2**30
_BYTES_OF_AN_END = 16 * 2**20


def settings_of(*arguments: Any) -> dict[str, Any]:
    """
    The settings of a run by name: all of ours, and those of transformers that are not at their default or say
    how it was trained.

    Secrets are hidden and the home folder is `~`.

    Args:
        arguments: objects of the four classes of arguments, as they were parsed.
    """
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    found = {}
    for part in arguments:
        is_training = isinstance(part, LlavaTrainingArguments)
        for field in dataclasses.fields(part):
            value, default = getattr(part, field.name), default_of(field)
            is_theirs = is_training and field.name in theirs and field.name not in _ALWAYS_SHOWN
            if not field.init or (is_theirs and _is_default(value, default)):
                continue
            found[field.name] = "(hidden)" if SECRET.search(field.name) and value is not None else plain(value)
    return found


def _is_default(value: Any, default: Any) -> bool:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # made of a default that is none
        return default is None and value == type(value)()
    return value == default or (not default and (not value or value == "none"))


def plain(value: Any) -> Any:
    """A setting as JSON has it; secrets are hidden, and the home folder is `~`."""
    if isinstance(value, Enum):
        return plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        shown = {str(key): "(hidden)" if SECRET.search(str(key)) else plain(entry) for key, entry in value.items()}
        return shown
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return without_home(str(value))


def without_home(text: str) -> str:
    """`text` with the user's home folder as `~`, wherever it stands in it."""
    home = os.path.expanduser("~").rstrip(os.sep)
    return text.replace(f"{home}{os.sep}", f"~{os.sep}") if home else text


def data_facts(sources: Iterable[Source], trained_on: Dataset | None = None) -> dict[str, Any]:
    """
    What a run was trained on.

    Args:
        sources (`Iterable[Source]`): where the rows come from.
        trained_on (`datasets.Dataset`, *optional*): the rows; without it, as where they are streamed, none is counted.

    Returns:
        `rows`, `rows_with_images` and `images`, or None; `sources`, of which each has `where`, `name` (the same
        without the folders it lies in), `format`, `weight`, `bytes`, `fingerprint`, and of a table `columns`; and
        `fingerprint` of all. It is the BLAKE2b of the data files, in order, without their names; of a file past 1 GiB
        that of its size and its first and last 16 MiB. Images that lie beside a file are not in it.
    """
    facts = []
    for source in sources:
        files = [Path(file) for file in source.container.files if os.path.isfile(file)]
        digest = blake2b(digest_size=16)
        for file in files:
            _add_file(digest, file)
        facts.append(
            {
                "where": without_home(str(source.where)),
                "name": _name_of(str(source.where)),
                "format": source.format,
                "weight": source.weight,
                "bytes": sum(file.stat().st_size for file in files),
                "fingerprint": digest.hexdigest(),
                **({} if source.dialect.columns is None else {"columns": source.dialect.columns.reading}),
            }
        )
    together = json.dumps([[each["fingerprint"], each["weight"]] for each in facts]).encode()
    counts: dict[str, Any] = dict.fromkeys(("rows", "rows_with_images", "images"))
    if trained_on is not None:
        counts = row_counts(trained_on)
    return {**counts, "fingerprint": blake2b(together, digest_size=16).hexdigest(), "sources": facts}


def row_counts(dataset: Dataset) -> dict[str, Any]:
    """`rows`, `rows_with_images` and `images`."""
    images = dataset.select_columns(["num_images"]).with_format("numpy")[:]["num_images"]
    return {"rows": len(images), "rows_with_images": int((images > 0).sum()), "images": int(images.sum())}


def _name_of(where: str) -> str:
    """A Hub id is its own name; of a file or folder it is the last part."""
    return Path(where).name if os.path.isabs(where) or os.path.exists(where) else where


def _add_file(digest: Any, file: Path) -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with file.open("rb") as opened:
        if size <= _MAX_BYTES_READ:
            while block := opened.read(2**20):
                digest.update(block)
            return
        digest.update(opened.read(_BYTES_OF_AN_END))
        opened.seek(-_BYTES_OF_AN_END, os.SEEK_END)
        digest.update(opened.read(_BYTES_OF_AN_END))


def versions() -> dict[str, str]:
    """Of Python and the installed packages that a run depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory(device: torch.device) -> dict[str, Any]:
    """`bytes` and `of`: of a GPU, what PyTorch had allocated on it; else what the process had in memory."""
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "GPU memory of the first process"}
    try:
        import resource
    except ImportError:  # Windows
        return {"bytes": None, "of": "not known on this system"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"bytes": peak * (1 if sys.platform == "darwin" else 1024), "of": "main memory of the first process"}


def train_summary(
    *,
    settings: dict[str, Any],
    base: list[dict[str, str]],
    data: dict[str, Any],
    trained: list[TrainedPart],
    state: TrainerState,
    counts: Counts,
    seconds: float,
    seconds_training: float,
    args: LlavaTrainingArguments,
) -> dict[str, Any]:
    """
    The content of `train_summary.json`.

    Args:
        settings: of [`settings_of`].
        base: of `training_facts.base_facts`.
        data: of [`data_facts`].
        trained (`list[TrainedPart]`): what trained.
        state (`TrainerState`): at the end of training.
        counts (`Counts`): of all processes, of this run, without what a run before it did when it was resumed.
        seconds (`float`): of the training loop.
        seconds_training (`float`): without the time in evaluation; speeds are of these.
        args (`LlavaTrainingArguments`): for seed, batch, learning rates, device and number of processes.
    """
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    evaluated = [{"step": e["step"], "loss": e["eval_loss"]} for e in state.log_history if "eval_loss" in e]
    best = min(evaluated, key=lambda each: each["loss"], default=None)
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    per_second = {
        f"{name}_per_second": round(count / seconds_training, 3) if seconds_training > 0 else None
        for name, count in dataclasses.asdict(counts).items()
    }
    return {
        "steps": state.global_step,
        "epochs": state.epoch,
        "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "eval_loss": {"first": evaluated[0], "last": evaluated[-1], "best": best} if evaluated else None,
        "seconds": round(seconds, 3),
        "seconds_without_evaluation": round(seconds_training, 3),
        **dataclasses.asdict(counts),
        "supervised_share": round(counts.supervised_tokens / counts.tokens, 4) if counts.tokens else None,
        **per_second,
        # Of packs, each step has another number.
        "rows_per_step": None
        if args.packing
        else args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "seed": args.seed,
        "peak_memory": peak_memory(args.device),
        "device": device,
        "num_processes": args.world_size,
        "base": base,
        "trained": described(trained, args),
        "data": data,
        "settings": settings,
        "versions": versions(),
    }


def described(trained: list[TrainedPart], args: LlavaTrainingArguments) -> list[dict[str, Any]]:
    """The parts as plain data, each with its peak learning rate as text."""
    return [{**dataclasses.asdict(part), "learning_rate": learning_rate_of(part, args)} for part in trained]


def write_summary(summary: dict[str, Any], output_dir: str | Path) -> None:
    """Puts `train_summary.json` into the folder, whole."""
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    write_atomically(
        Path(output_dir, SUMMARY_FILE),
        lambda temporary: temporary.write_bytes(text.encode("utf-8", errors="replace")),
    )
